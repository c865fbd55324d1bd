"""The CTC loss of one line after the other, compiled by Numba: the recursions of Graves 2006, section 4.1.

A path probability is a float64 mantissa and a power of two, itself a float64: it neither underflows as a probability
does nor costs an exp and a log in every cell as a logarithm does. Blanks and labels of the label with blanks (l' of
the paper) are kept apart: blank j stands before label j, blank N behind the last. Into a blank lead two states, into a
label three.
"""

import functools
import math
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from htr_pipeline.core.ctc.compilation import compiled
from htr_pipeline.core.ctc.problems import (
    BLANK_IN_LABEL,
    BLANK_INDEX,
    CLASS_OUT_OF_RANGE,
    FINE,
    INFEASIBLE,
    LABEL_LENGTH,
    LOGIT_LENGTH,
)
from htr_pipeline.core.threads import num_cores, thread_pool

NEVER = -1e250  # the power of two of an impossible path
FORBIDDEN_BELOW = -1e150  # a class that far below the best of its frame has probability 0
_RENORMALISED_EVERY = 32  # frames in which a mantissa grows or shrinks by less than 2**100
BIAS, FRACTION_BITS = 1023, 52
LOG2_E = 1 / math.log(2)
# ln 2 in two parts, the first with so few bits that its product with a power of two is exact (Cody and Waite, 1980).
LN_2_HIGH, LN_2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = (1 / math.factorial(n) for n in range(2, 14))

_compiled = compiled(error_model="numpy")
_vector_sum = compiled(fastmath={"reassoc", "nsz"})
_vector_max = compiled(fastmath={"reassoc", "nsz", "nnan"})


def _reinterpreted(source: Any, target: Any) -> Any:
    """A compiled function that reads the 64 bits of a number of type source as one of type target."""

    @intrinsic
    def reinterpret(_context: Any, _number: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return reinterpret


_as_integer = _reinterpreted(types.float64, types.int64)
_as_float = _reinterpreted(types.int64, types.float64)


@_compiled
def _power_of_two(power):
    """2**power for a whole number of at most 1023; 0 where a float64 underflows."""
    # Added to 2**52, a whole number stands in the lowest bits.
    return _as_float(_as_integer(max(power, -1023.0) + (BIAS + 2.0**FRACTION_BITS)) << FRACTION_BITS)


@_vector_max
def _largest(logits, row):
    """The largest logit of a frame; any of them where one is NaN."""
    largest = logits[row, 0]
    for k in range(logits.shape[1]):
        largest = max(largest, logits[row, k])
    return largest


@_compiled
def _exponentials(logits, row, largest, mantissa, power, exponential):
    """exp(logits - largest) of a frame, both as mantissa and power of two and as one number."""
    for k in range(logits.shape[1]):
        difference = np.float64(logits[row, k]) - largest
        whole = np.floor(difference * LOG2_E + 0.5)
        x = (difference - whole * LN_2_HIGH) - whole * LN_2_LOW  # -0.35 to 0.35
        # The series of exp, to the last bit. Its nested form is what the compiler turns into vector instructions.
        y = 1.0 + x * (1.0 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * (_C6 + x * (_C7 + x * (
            _C8 + x * (_C9 + x * (_C10 + x * (_C11 + x * (_C12 + x * _C13))))))))))))  # fmt: skip
        y = 1.0 if abs(x) > 0.5 else y  # a difference so large that it has no digits behind the point
        y = 0.0 if difference < FORBIDDEN_BELOW else y
        whole = NEVER if difference < FORBIDDEN_BELOW else whole
        mantissa[k], power[k] = y, whole
        exponential[k] = y * _power_of_two(whole)


@_vector_sum
def _sum(values, length):
    total = 0.0
    for i in range(length):
        total += values[i]
    return total


@_compiled
def _write_scaled(target, row, values, factor):
    for k in range(len(values)):
        target[row, k] = values[k] * factor


@_compiled
def _pick(mantissa, power, labels, y, y_power, t):
    for n in range(len(labels)):
        y[t, n] = mantissa[labels[n]]
        y_power[t, n] = power[labels[n]]


@_compiled
def _renormalise(mantissa, power, length):
    """Mantissas back to 1..2; zeros stay."""
    for i in range(length):
        if mantissa[i] > 0.0:
            bits = _as_integer(mantissa[i])
            power[i] += np.float64((bits >> FRACTION_BITS) - BIAS)
            mantissa[i] = _as_float((bits & ((1 << FRACTION_BITS) - 1)) | (BIAS << FRACTION_BITS))


# In all steps: a (alpha) is the mass that arrived, b (beta) the mass still to come; *_power their powers of two;
# stay and skip are 0 where a label may stay for another frame, or follow its predecessor without a blank, else NEVER.


@_compiled
def _alpha_labels(a, a_power, t, blank, blank_power, y, y_power, stay, skip, num_labels):
    """Equation 6 for labels: from frame t - 1, kept at [t], to frame t, kept at [t + 1]; label n is at column n + 1."""
    for n in range(num_labels):
        same = a_power[t, n + 1] + stay
        from_blank = blank_power[n]
        from_label = a_power[t, n] + skip[n]
        power = max(max(same, from_blank), from_label)
        mass = (
            a[t, n + 1] * _power_of_two(same - power)
            + blank[n] * _power_of_two(from_blank - power)
            + a[t, n] * _power_of_two(from_label - power)
        )
        a[t + 1, n + 1] = mass * y[t, n]
        a_power[t + 1, n + 1] = power + y_power[t, n]


@_compiled
def _beta_labels(b, b_power, blank, blank_power, stay, skip, before, before_power, num_labels):
    """Equation 10 for labels: the mass to come behind frame t, without that frame's own emission."""
    for n in range(num_labels):
        same = b_power[n] + stay
        to_blank = blank_power[n + 1]
        to_label = b_power[n + 1] + skip[n + 1]
        power = max(max(same, to_blank), to_label)
        before[n] = (
            b[n] * _power_of_two(same - power)
            + blank[n + 1] * _power_of_two(to_blank - power)
            + b[n + 1] * _power_of_two(to_label - power)
        )
        before_power[n] = power


@_compiled
def _blanks(blank, blank_power, label, label_power, y, y_power):
    """Equations 6 and 10 for blanks, in place: each takes over the mass of one neighbouring label."""
    for n in range(len(blank)):
        power = max(blank_power[n], label_power[n])
        mass = blank[n] * _power_of_two(blank_power[n] - power) + label[n] * _power_of_two(label_power[n] - power)
        blank[n] = mass * y
        blank_power[n] = power + y_power


@_compiled
def _emit(before, before_power, y, y_power, t, b, b_power, num_labels):
    for n in range(num_labels):
        b[n] = before[n] * y[t, n]
        b_power[n] = before_power[n] + y_power[t, n]


@_compiled
def _posteriors(a, a_power, t, before, before_power, scale, scale_power, posterior, num_labels):
    """Equation 14: alpha times beta over the probability of the label, for each label in frame t."""
    for n in range(num_labels):
        power = a_power[t + 1, n + 1] + before_power[n] - scale_power
        posterior[n] = a[t + 1, n + 1] * before[n] * scale * _power_of_two(power)


@_compiled
def _subtract(gradient, row, labels, posterior):
    for n in range(len(labels)):
        gradient[row, labels[n]] -= posterior[n]


@_compiled
def _line(logits, first_row, row_step, num_frames, labels, blank_index, merge, gradient, a, a_power, y, y_power):
    """Loss of one line, whose frames are the rows first_row, first_row + row_step, ...; fills its gradient."""
    num_labels = len(labels)
    # Arrays of their own: rows of one array would have strides that the compiler cannot know.
    num_classes = logits.shape[1]
    mantissa, power, exponential = np.empty(num_classes), np.empty(num_classes), np.empty(num_classes)
    y_blank, y_blank_power = np.empty(num_frames), np.empty(num_frames)
    log_normaliser = 0.0
    for t in range(num_frames):
        row = first_row + t * row_step
        largest = max(np.float64(_largest(logits, row)), -1e300)  # finite in a frame that forbids every class
        _exponentials(logits, row, largest, mantissa, power, exponential)
        normaliser = _sum(exponential, len(exponential))
        log_normaliser += math.log(normaliser)
        _write_scaled(gradient, row, exponential, 1.0 / normaliser)
        _pick(mantissa, power, labels, y, y_power, t)
        y_blank[t], y_blank_power[t] = mantissa[blank_index], power[blank_index]

    stay = 0.0 if merge else NEVER
    skip = np.full(num_labels + 1, NEVER)
    for n in range(1, num_labels):
        if not merge or labels[n] != labels[n - 1]:
            skip[n] = 0.0

    # Before the first frame: as if a blank had been there.
    blank, blank_power = np.zeros(num_labels + 1), np.full(num_labels + 1, NEVER)
    blank[0], blank_power[0] = 1.0, 0.0
    a[0, :], a_power[0, :] = 0.0, NEVER
    a[:, 0], a_power[:, 0] = 0.0, NEVER  # no label before the first
    for t in range(num_frames):
        _alpha_labels(a, a_power, t, blank, blank_power, y, y_power, stay, skip, num_labels)
        _blanks(blank, blank_power, a[t], a_power[t], y_blank[t], y_blank_power[t])
        if t % _RENORMALISED_EVERY == 0:
            _renormalise(a[t + 1], a_power[t + 1], num_labels + 1)
            _renormalise(blank, blank_power, num_labels + 1)

    # Equation 8: the label ends in its last class or in the blank behind it.
    p_power = max(blank_power[num_labels], a_power[num_frames, num_labels])
    p = blank[num_labels] * _power_of_two(blank_power[num_labels] - p_power)
    p += a[num_frames, num_labels] * _power_of_two(a_power[num_frames, num_labels] - p_power)
    loss = log_normaliser - math.log(p) - p_power * math.log(2.0) if p > 0.0 and p_power > NEVER / 2 else np.inf
    loss = np.nan if math.isnan(log_normaliser) else loss
    if not math.isfinite(loss):
        for t in range(num_frames):
            gradient[first_row + t * row_step, :] = 0.0 if loss == np.inf else np.nan
        return loss

    # Behind the last frame: as if a blank followed.
    blank[:], blank_power[:] = 0.0, NEVER
    blank[num_labels], blank_power[num_labels] = 1.0, 0.0
    b, b_power = np.zeros(num_labels + 1), np.full(num_labels + 1, NEVER)  # no label behind the last
    before, before_power, posterior = np.empty(num_labels), np.empty(num_labels), np.empty(num_labels)
    for t in range(num_frames - 1, -1, -1):
        row = first_row + t * row_step
        _beta_labels(b, b_power, blank, blank_power, stay, skip, before, before_power, num_labels)
        _blanks(blank, blank_power, b, b_power, y_blank[t], y_blank_power[t])
        _emit(before, before_power, y, y_power, t, b, b_power, num_labels)
        _posteriors(a, a_power, t, before, before_power, 1.0 / p, p_power, posterior, num_labels)
        _subtract(gradient, row, labels, posterior)
        gradient[row, blank_index] -= 1.0 - _sum(posterior, num_labels)  # so that each row sums to 0
        if t % _RENORMALISED_EVERY == 0:
            _renormalise(b, b_power, num_labels + 1)
            _renormalise(blank, blank_power, num_labels + 1)
    return max(loss, 0.0)


@_compiled
def _status(labels, label_length, logit_length, num_frames, num_classes, blank_index):
    """What is wrong with a row, as far as it can be told without its logits."""
    if not -num_classes <= blank_index < num_classes:
        return BLANK_INDEX
    if not 0 <= logit_length <= num_frames:
        return LOGIT_LENGTH
    if not 0 <= label_length <= len(labels):
        return LABEL_LENGTH
    status = FINE
    for n in range(label_length):
        if not 0 <= labels[n] < num_classes:
            return CLASS_OUT_OF_RANGE
        if labels[n] == blank_index % num_classes:
            status = BLANK_IN_LABEL
    return status


@_compiled
def _without_repeats(labels, collapsed):
    """Writes one label for each run of equal ones; returns how many there are."""
    length = 0
    for n in range(len(labels)):
        if n == 0 or labels[n] != labels[n - 1]:
            collapsed[length] = labels[n]
            length += 1
    return length


@_compiled
def _lines(
    logits, time_major, labels, label_length, logit_length, blank_index, collapse, merge,
    loss, gradient, status, first, step,
):  # fmt: skip
    """The lines first, first + step, ... of a batch; logits and gradient are (B T, K), or (T B, K) if time_major."""
    batch, width = labels.shape
    num_frames = len(logits) // batch
    a, a_power = np.empty((num_frames + 1, width + 1)), np.empty((num_frames + 1, width + 1))
    y, y_power = np.empty((num_frames, width)), np.empty((num_frames, width))
    collapsed = np.empty(width, labels.dtype)
    for i in range(first, batch, step):
        row, row_step = (i, batch) if time_major else (i * num_frames, 1)
        length = 0
        status[i] = _status(labels[i], label_length[i], logit_length[i], num_frames, logits.shape[1], blank_index)
        if status[i] == FINE:
            length, label = logit_length[i], labels[i, : label_length[i]]
            if collapse:
                label = collapsed[: _without_repeats(label, collapsed)]
            loss[i] = _line(
                logits, row, row_step, length, label, blank_index % logits.shape[1], merge,
                gradient, a, a_power, y, y_power,
            )  # fmt: skip
            if loss[i] == np.inf:
                status[i] = INFEASIBLE
        else:
            loss[i] = np.nan
        for t in range(length, num_frames):
            gradient[row + t * row_step, :] = 0.0


def _aligned(like: np.ndarray) -> np.ndarray:
    """An array like this one, whose memory TensorFlow takes over instead of copying it, for it begins at 64 bytes."""
    memory = np.empty(like.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


def loss_and_gradient(
    labels: np.ndarray,
    logits: np.ndarray,
    label_length: np.ndarray,
    logit_length: np.ndarray,
    *,
    blank_index: int,
    time_major: bool,
    collapse: bool,
    merge: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss of each line and its gradient, the lines spread over the cores; the result does not depend on their number.

    Args:
        labels: (B, N) int32.
        logits: (B, T, K) float32 or float64, or (T, B, K) if time_major.
        label_length: (B,) int32.
        logit_length: (B,) int32.
        blank_index: class of the blank; negative values count from the last class.
        time_major: see logits.
        collapse: preprocess_collapse_repeated.
        merge: ctc_merge_repeated.

    Raises:
        ValueError: batch sizes differ.

    Returns:
        (B,) losses, inf where no alignment fits, NaN where a frame holds NaN or the row is wrong; their gradient in the
        shape of logits, 0 for infeasible and wrong rows; both in the dtype of logits. (B,) int32 status of each row.
    """
    batch = logits.shape[1 if time_major else 0]
    if not batch == len(labels) == len(label_length) == len(logit_length):
        raise ValueError(
            f"Batch sizes differ: labels {len(labels)}, label_length {len(label_length)}, logits {batch}, "
            f"logit_length {len(logit_length)}. Is logits_time_major={time_major} right?"
        )
    loss, gradient, status = np.empty(batch, logits.dtype), _aligned(logits), np.empty(batch, np.int32)
    if not batch:
        return loss, gradient, status
    flat = (-1, logits.shape[2])
    compute = functools.partial(
        _lines, logits.reshape(flat), time_major, labels, label_length, logit_length,
        blank_index, collapse, merge, loss, gradient.reshape(flat), status,
    )  # fmt: skip
    num_threads = min(batch, num_cores())
    others = [thread_pool().submit(compute, first, num_threads) for first in range(1, num_threads)]
    compute(0, num_threads)
    for other in others:
        other.result()
    return loss, gradient, status
