"""What can be wrong with a row of a batch, and how it is said."""

import warnings

import numpy as np

# Of several problems of a row the greatest counts.
FINE, INFEASIBLE, BLANK_IN_LABEL, CLASS_OUT_OF_RANGE, LABEL_LENGTH, LOGIT_LENGTH = range(6)
_MESSAGES = (
    "",
    "Too few frames for the label, or a class that it needs has logit -inf: no alignment fits. "
    "Reject such lines beforehand, or pass infeasible='inf'.",
    "The blank occurs inside a label: labels hold only other classes. Check blank_index, and that label_length does "
    "not count padding.",
    "A label is not a class of the logits: expected 0 <= label < number of classes. Check that label_length does not "
    "count padding.",
    "label_length is negative or exceeds the width of labels.",
    "logit_length is negative or exceeds the number of frames. "
    "Where time is the first axis of the logits, pass logits_time_major=True.",
)
_ROWS_NAMED = 10
_SUM_TOLERANCE = 1e-2  # of a softmax in half precision


def raise_problems(
    status: np.ndarray, worst_allowed: int, labels: np.ndarray, label_length: np.ndarray, logit_length: np.ndarray
) -> None:
    """Raises ValueError, naming rows, if one is worse than allowed.

    Args:
        status: (B,) int32, FINE or one of the problems above.
        worst_allowed: FINE or INFEASIBLE.
        labels: (B, N) as the caller gave them.
        label_length: (B,) as the caller gave them.
        logit_length: (B,) as the caller gave them.
    """
    worst = status.max(initial=FINE)
    if worst <= worst_allowed:
        return
    rows = np.flatnonzero(status == worst)
    named = "; ".join(
        f"row {row} has {_in_words(worst, labels[row], label_length[row], logit_length[row])}"
        for row in rows[:_ROWS_NAMED]
    )
    more = ", ..." if len(rows) > _ROWS_NAMED else ""
    raise ValueError(f"{_MESSAGES[worst]} {len(rows)} of {len(status)} rows: {named}{more}.")


def _in_words(problem: int, labels: np.ndarray, label_length: int, logit_length: int) -> str:
    if problem == LABEL_LENGTH:
        return f"label_length {label_length}, and labels are {len(labels)} wide"
    if problem == LOGIT_LENGTH:
        return f"logit_length {logit_length}"
    label = labels[:label_length]
    if problem == INFEASIBLE:
        needed = len(label) + int((label[1:] == label[:-1]).sum())
        return f"{len(label)} labels that need {needed} frames, and {logit_length} frames"
    return f"the label {label.tolist()}"


def warn_if_softmaxed(first_frames: np.ndarray, logit_length: np.ndarray) -> None:
    """Warns where the first frames of all lines, (B, K), are probabilities rather than logits."""
    frames = first_frames[logit_length > 0].astype(np.float32)
    if frames.size and frames.shape[1] > 1 and (frames >= 0).all():
        if (abs(frames.sum(axis=1) - 1) < _SUM_TOLERANCE).all():
            warnings.warn(
                "The logits look like probabilities: they are not negative and sum to 1. The CTC loss applies the "
                "softmax itself; pass what comes before the softmax.",
                stacklevel=2,
            )
