"""What can be wrong with a row of a batch, and how it is said."""

import warnings

import numpy as np

# Of several problems of a row the greatest counts.
FINE, INFEASIBLE, BLANK_IN_LABEL, CLASS_OUT_OF_RANGE, LABEL_LENGTH, LOGIT_LENGTH, BLANK_INDEX = range(7)
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
    "blank_index is not a class of the logits.",
)
_ROWS_NAMED = 10
_SUM_TOLERANCE = 1e-2  # of a softmax in half precision


def raise_problems(
    status: np.ndarray,
    worst_allowed: int,
    labels: np.ndarray,
    label_length: np.ndarray,
    logit_length: np.ndarray,
    num_frames: int,
    num_classes: int,
    collapse: bool,
    merge: bool,
) -> None:
    """Raises ValueError, naming rows, if one is worse than allowed.

    Args:
        status: (B,) int32, FINE or one of the problems above.
        worst_allowed: FINE or INFEASIBLE.
        labels: (B, N) as the caller gave them.
        label_length: (B,) as the caller gave them.
        logit_length: (B,) as the caller gave them.
        num_frames: T of the logits.
        num_classes: K of the logits.
        collapse: preprocess_collapse_repeated.
        merge: ctc_merge_repeated.
    """
    worst = status.max(initial=FINE)
    if worst <= worst_allowed:
        return

    def in_words(row: int) -> str:
        if worst == LABEL_LENGTH:
            return f"label_length {label_length[row]}, and labels are {labels.shape[1]} wide"
        if worst == LOGIT_LENGTH:
            return f"logit_length {logit_length[row]}, and there are {num_frames} frames"
        label = labels[row, : label_length[row]]
        if worst == CLASS_OUT_OF_RANGE:
            wrong = label[(label < 0) | (label >= num_classes)]
            return f"the class {wrong[0]}, and there are {num_classes}"
        if worst != INFEASIBLE:
            return f"the label {label.tolist()}"
        repeats = int((label[1:] == label[:-1]).sum())
        needed = len(label) - repeats if collapse else len(label) + repeats * merge
        return f"{len(label)} labels that need {needed} frames, and {logit_length[row]} frames"

    if worst == BLANK_INDEX:
        raise ValueError(f"{_MESSAGES[worst]} These have {num_classes} classes.")
    rows = np.flatnonzero(status == worst)
    named = "; ".join(f"row {row} has {in_words(row)}" for row in rows[:_ROWS_NAMED])
    more = ", ..." if len(rows) > _ROWS_NAMED else ""
    raise ValueError(f"{_MESSAGES[worst]} {len(rows)} of {len(status)} rows: {named}{more}.")


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
