"""The CTC loss of a whole batch, compiled by XLA: for GPUs, for callers with jit_compile=True, for second derivatives.

The recursions of Graves 2006, section 4.1, over all lines at once. A path probability is neither a float nor a
logarithm but a number with a very long exponent: it does not underflow like the one and costs no exp and log in every
cell like the other. docs/ctc.md explains it.
"""

import functools
import math
from typing import Any, NamedTuple

import tensorflow as tf

from htr_pipeline.core.ctc.inputs import Rows, label_with_blanks

# A path probability is one int64, read as a binary floating-point number: the upper bits are the exponent of two, the
# lower _fraction_bits(dtype) bits the fraction behind the leading 1. Greater numbers are greater integers, so maximum
# works on them; a power of two has no fraction, so multiplying by it is adding. Zero is an exponent no line reaches.
_ZERO, _ONE = -(1 << 62), 0
_INFEASIBLE_BELOW = _ZERO // 4 * 3  # zero grows a little when three of it are added in every frame
_DOUBLE_FRACTION_BITS, _DOUBLE_BIAS = 52, 1023


class _Trellis(NamedTuple):
    """A batch made ready for the recursions.

    Attributes:
        logits: (B, T, K) float32 or float64, with at least one frame; 0 behind the end of a line.
        largest: (B, T, 1) largest logit of each frame, to which probabilities are relative.
        softmax: (B, T, K).
        log_sums: (B,) float64. Sum over the frames of the log of what the softmax divided by.
        in_line: (B, T) False behind the end of a line.
        states: (B, S) classes of the label l' of the paper: a blank before, between and behind the labels.
        last_blank: (B, S) True where that is the blank behind the label.
        stays: (S,) whether a path may stay in a state for another frame.
        skipped_into: (B, S) whether a label may follow its predecessor without a blank.
    """

    logits: tf.Tensor
    largest: tf.Tensor
    softmax: tf.Tensor
    log_sums: tf.Tensor
    in_line: tf.Tensor
    states: tf.Tensor
    last_blank: tf.Tensor
    stays: tf.Tensor
    skipped_into: tf.Tensor


@functools.partial(tf.function, jit_compile=True, autograph=False, reduce_retracing=True)
def loss_and_gradient(
    rows: Rows, logits: tf.Tensor, blank_index: int, time_major: bool, merge: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Loss of each line and its gradient.

    Args:
        rows: labels and lengths.
        logits: (B, T, K), or (T, B, K) if time_major, of any floating-point type.
        blank_index: class of the blank; negative values count from the last class.
        time_major: see logits.
        merge: ctc_merge_repeated.

    Returns:
        (B,) losses, inf where no alignment fits, NaN where a frame holds NaN; their gradient in the shape of logits.
        Both float64 for float64 logits, else float32.
    """
    frames_given = tf.shape(logits)[0 if time_major else 1]
    trellis = _trellis(rows, logits, blank_index, time_major, merge)
    real = trellis.logits.dtype
    log_likelihood, feasible, (posterior,) = _forward_backward(trellis)
    loss = tf.cast(tf.maximum(trellis.log_sums - log_likelihood, 0.0), real)
    feasible |= tf.math.is_nan(loss)  # NaN logits stay visible
    loss = tf.where(feasible, loss, tf.constant(math.inf, real))

    # Dividing by the sum keeps rounding from growing with T.
    posterior = _per_class(posterior, trellis)
    gradient = trellis.softmax - posterior / tf.reduce_sum(posterior, axis=2, keepdims=True)
    return loss, _in_layout(gradient, trellis.in_line & feasible[:, tf.newaxis], frames_given, time_major)


@functools.partial(tf.function, jit_compile=True, autograph=False, reduce_retracing=True)
def hessian_vector_product(
    rows: Rows, logits: tf.Tensor, direction: tf.Tensor, blank_index: int, time_major: bool, merge: bool
) -> tf.Tensor:
    """The derivative of each line's gradient along a direction; 0 where no alignment fits.

    The Hessian is the covariance of the classes of the frames when frames are independent (softmax), minus their
    covariance over the alignments of the label. For the latter the recursions carry, beside the mass of all paths that
    lead into a state, their mean sum of the direction: an expectation semiring (Li and Eisner, EMNLP 2009).

    Args:
        rows: labels and lengths.
        logits: (B, T, K), or (T, B, K) if time_major, of any floating-point type.
        direction: in the shape of logits.
        blank_index: as for loss_and_gradient.
        time_major: as for loss_and_gradient.
        merge: as for loss_and_gradient.

    Returns:
        In the shape of logits; float64 for float64 logits, else float32.
    """
    frames_given = tf.shape(logits)[0 if time_major else 1]
    real = tf.float64 if logits.dtype == tf.float64 else tf.float32
    trellis = _trellis(rows, tf.cast(logits, tf.float64), blank_index, time_major, merge)
    direction = _batch_major(tf.cast(direction, tf.float64), time_major, trellis.in_line)
    # What all classes of a frame have in common changes nothing: taken off, the sums along the paths stay small.
    direction -= tf.reduce_sum(trellis.softmax * direction, axis=2, keepdims=True)
    _, feasible, (posterior, moment) = _forward_backward(trellis, direction)
    posterior, moment = _per_class(posterior, trellis), _per_class(moment, trellis)
    total = tf.reduce_sum(posterior, axis=2, keepdims=True)
    mean = tf.reduce_sum(moment, axis=2, keepdims=True) / total  # of the sums of all paths, the same in every frame
    product = trellis.softmax * direction - (moment - posterior * mean) / total
    return tf.cast(_in_layout(product, trellis.in_line & feasible[:, tf.newaxis], frames_given, time_major), real)


def _trellis(rows: Rows, logits: tf.Tensor, blank_index: int, time_major: bool, merge: bool) -> _Trellis:
    real = tf.float64 if logits.dtype == tf.float64 else tf.float32
    num_frames = tf.shape(logits)[0 if time_major else 1]
    blank = blank_index if blank_index >= 0 else tf.shape(logits)[2] + blank_index
    in_line = tf.sequence_mask(rows.logit_length, tf.maximum(num_frames, 1))  # XLA compiles no loop over nothing
    logits = _batch_major(tf.cast(logits, real), time_major, in_line)
    largest = tf.reduce_max(logits, axis=2, keepdims=True)
    largest = tf.where(largest == -math.inf, tf.zeros([], real), largest)  # a frame that forbids every class
    exponentials = tf.exp(logits - largest)
    # In float64, so that small losses keep their relative precision: the largest exponential is 1.
    log_sums = tf.math.log(tf.reduce_sum(tf.cast(exponentials, tf.float64), axis=2))

    states = label_with_blanks(rows.labels, blank)
    position = tf.range(tf.shape(states)[1])
    is_label = position % 2 == 1
    return _Trellis(
        logits=logits,
        largest=largest,
        softmax=exponentials / tf.reduce_sum(exponentials, axis=2, keepdims=True),
        log_sums=tf.reduce_sum(tf.where(in_line, log_sums, 0.0), axis=1),
        in_line=in_line,
        states=states,
        last_blank=position == 2 * rows.label_length[:, tf.newaxis],
        stays=tf.ones_like(is_label) if merge else ~is_label,
        skipped_into=is_label & (position > 1) & ((states != tf.roll(states, 2, axis=1)) | (not merge)),
    )


def _batch_major(values: tf.Tensor, time_major: bool, in_line: tf.Tensor) -> tf.Tensor:
    """As (B, T, K), with at least one frame, zeros behind the end of a line: what stands there may be NaN."""
    if time_major:
        values = tf.transpose(values, [1, 0, 2])
    values = tf.pad(values, [[0, 0], [0, tf.shape(in_line)[1] - tf.shape(values)[1]], [0, 0]])
    return tf.where(in_line[:, :, tf.newaxis], values, tf.zeros([], values.dtype))


def _in_layout(values: tf.Tensor, kept: tf.Tensor, num_frames: tf.Tensor, time_major: bool) -> tf.Tensor:
    """(B, T, K) in the layout of the logits, 0 in the frames that are not kept."""
    values = tf.where(kept[:, :, tf.newaxis], values, tf.zeros([], values.dtype))[:, :num_frames]
    return tf.transpose(values, [1, 0, 2]) if time_major else values


def _per_class(values: tf.Tensor, trellis: _Trellis) -> tf.Tensor:
    """(T, B, S) values of the states summed up for each class, (B, T, K)."""
    batch, num_frames, num_classes = tf.unstack(tf.shape(trellis.logits))
    classes = trellis.states + num_classes * tf.range(batch)[:, tf.newaxis]
    values = tf.reshape(tf.transpose(values, [1, 2, 0]), [-1, num_frames])
    values = tf.math.unsorted_segment_sum(values, tf.reshape(classes, [-1]), batch * num_classes)
    return tf.transpose(tf.reshape(values, [batch, num_classes, num_frames]), [0, 2, 1])


def _forward_backward(
    trellis: _Trellis, direction: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...]]:
    """The recursions of Graves 2006, equations 6 to 11, and the posteriors of equation 14.

    Behind the end of a line, blanks have probability 1 and labels 0: states wait there in the blank behind their
    label, so that rows of all lengths go through the same T steps.

    Args:
        trellis: the batch.
        direction: (B, T, K) or None.

    Returns:
        (B,) float64 ln P(label); (B,) whether any alignment fits; the posteriors of the states (T, B, S), up to a
        factor for each row and frame, and, given a direction, beside them the same times the mean sum of the direction
        along all paths through the state.
    """
    real = trellis.logits.dtype
    bits = _fraction_bits(real)
    zero, one = tf.constant(_ZERO, tf.int64), tf.constant(_ONE, tf.int64)
    num_frames, num_states = tf.shape(trellis.logits)[1], tf.shape(trellis.states)[1]
    position = tf.range(num_states)
    is_label = position % 2 == 1

    # y of the paper, first for one blank and the labels only: that spares half of the exponentials.
    distinct = tf.concat([trellis.states[:, :1], trellis.states[:, 1::2]], axis=1)  # (B, N + 1)

    def of_states(values: tf.Tensor) -> tf.Tensor:
        """(B, T, N + 1) to (T, B, S)."""
        return tf.transpose(tf.gather(values, tf.where(is_label, (position + 1) // 2, 0), axis=2), [1, 0, 2])

    y = _packed_exp(tf.gather(trellis.logits, distinct, axis=2, batch_dims=1), trellis.largest, bits)
    behind = tf.where(tf.range(tf.shape(distinct)[1]) > 0, zero, one)
    y = of_states(tf.where(trellis.in_line[:, :, tf.newaxis], y, behind))
    steps = None if direction is None else of_states(tf.gather(direction, distinct, axis=2, batch_dims=1))

    def forwards(t: tf.Tensor, alpha: tf.Tensor, mean: Any, alphas: tf.TensorArray, means: Any) -> tuple:
        # The state before frame t is written, not that after it: XLA would compute it twice, once for the array.
        alphas = alphas.write(t, alpha)
        before = tf.pad(alpha, [[0, 0], [2, 0]], constant_values=_ZERO)
        terms = [
            tf.where(trellis.stays, alpha, zero),
            before[:, 1:-1],
            tf.where(trellis.skipped_into, before[:, :-2], zero),
        ]
        numbers, whole = _aligned(terms, bits)
        if steps is not None:
            mean = tf.pad(mean, [[0, 0], [2, 0]])
            mean = _weighted_mean(numbers, [mean[:, 2:], mean[:, 1:-1], mean[:, :-2]]) + steps[t]
            means = means.write(t, mean)
        return t + 1, _packed_product(tf.add_n(numbers), whole, y[t], bits), mean, alphas, means

    alpha = tf.broadcast_to(tf.where(position == 0, one, zero), tf.shape(trellis.states))
    alphas = tf.TensorArray(tf.int64, size=num_frames + 1)
    # Loops carry no None.
    mean = tf.zeros_like(alpha, tf.float64) if steps is not None else tf.zeros([], tf.float64)
    means = tf.TensorArray(tf.float64, size=num_frames if steps is not None else 0)
    _, alpha, _, alphas, means = tf.while_loop(lambda t, *_: t < num_frames, forwards, (0, alpha, mean, alphas, means))
    alphas = tf.reshape(alphas.write(num_frames, alpha).stack(), [num_frames + 1, -1, num_states])
    if steps is not None:
        means = tf.reshape(means.stack(), tf.shape(y))

    last_label = tf.roll(trellis.last_blank, -1, axis=1) & is_label
    ends = [tf.reduce_max(tf.where(last, alpha, zero), axis=1) for last in (trellis.last_blank, last_label)]
    numbers, whole = _aligned(ends, bits)
    likelihood = _packed_product(tf.add_n(numbers), whole, one, bits)
    feasible = likelihood > _INFEASIBLE_BELOW
    likelihood = tf.where(feasible, likelihood, one)
    whole = _whole(likelihood, bits)
    log_likelihood = tf.math.log(_as_double(likelihood, whole, bits)) + math.log(2) * tf.cast(
        tf.bitwise.right_shift(whole, tf.constant(bits, tf.int64)), tf.float64
    )
    skipped_from = tf.roll(trellis.skipped_into, -2, axis=1)

    def backwards(t: tf.Tensor, beta_y: tf.Tensor, mean: Any, posteriors: tf.TensorArray, moments: Any) -> tuple:
        after = tf.pad(beta_y, [[0, 0], [0, 2]], constant_values=_ZERO)
        terms = [
            tf.where(trellis.stays, beta_y, zero),
            after[:, 1:-1],
            tf.where(skipped_from, after[:, 2:], zero),
        ]
        numbers, beta_whole = _aligned(terms, bits)
        beta = tf.add_n(numbers)  # without the emission of frame t, which alpha holds
        scale = tf.maximum(beta_whole, _ZERO // 8 * 7) - whole[:, tf.newaxis]  # so that the next sum fits an int64
        posterior = beta * _as_double(alphas[t + 1] + scale, one, bits)
        posteriors = posteriors.write(t, tf.cast(posterior, real))
        if steps is not None:
            mean = tf.pad(mean, [[0, 0], [0, 2]])
            mean = _weighted_mean(numbers, [mean[:, :-2], mean[:, 1:-1], mean[:, 2:]])
            moments = moments.write(t, posterior * (means[t] + mean))
            mean += steps[t]
        return t - 1, _packed_product(beta, beta_whole, y[t], bits), mean, posteriors, moments

    posteriors = tf.TensorArray(real, size=num_frames)
    moments = tf.TensorArray(tf.float64, size=num_frames if steps is not None else 0)
    beta_y = tf.where(trellis.last_blank, one, zero)
    *_, posteriors, moments = tf.while_loop(
        lambda t, *_: t >= 0, backwards, (num_frames - 1, beta_y, mean, posteriors, moments)
    )
    found = (posteriors,) if steps is None else (posteriors, moments)
    return log_likelihood, feasible, tuple(tf.reshape(array.stack(), tf.shape(y)) for array in found)


def _weighted_mean(weights: list[tf.Tensor], values: list[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([weight * value for weight, value in zip(weights, values, strict=True)]) / tf.add_n(weights)


def _fraction_bits(real: tf.DType) -> int:
    """Leaves losses of up to 5e8 nats a line for float32, and of 7e7 with one more digit for float64."""
    return 35 if real == tf.float64 else 32


def _packed_exp(logits: tf.Tensor, largest: tf.Tensor, bits: int) -> tf.Tensor:
    """exp(logits - largest), exact to rounding however small: the difference is taken and split in float64."""
    power = (tf.cast(logits, tf.float64) - tf.cast(largest, tf.float64)) * math.log2(math.e)
    power = tf.maximum(power, _ZERO / (1 << bits))
    whole = tf.round(power)
    mantissa = tf.exp(tf.cast((power - whole) * math.log(2), logits.dtype))  # 0.7 to 1.4
    # Adding this number leaves an integer in the lowest bits: many times faster than XLA's conversion, which saturates.
    shifter = 1.5 * 2.0**_DOUBLE_FRACTION_BITS
    whole = tf.bitcast(whole + shifter, tf.int64) - tf.bitcast(tf.constant(shifter, tf.float64), tf.int64)
    return tf.bitwise.left_shift(whole, tf.constant(bits, tf.int64)) + _packed(tf.cast(mantissa, tf.float64), bits)


def _whole(number: tf.Tensor, bits: int) -> tf.Tensor:
    """The power of two at or below the number."""
    return tf.bitwise.bitwise_and(number, tf.constant(-(1 << bits), tf.int64))


def _as_double(number: tf.Tensor, whole: tf.Tensor, bits: int) -> tf.Tensor:
    """The float64 number / whole, at least 2**-1022, whole being a power of two."""
    ratio = tf.maximum(number - whole, -((_DOUBLE_BIAS - 1) << bits))
    shift = _DOUBLE_FRACTION_BITS - bits
    one = _DOUBLE_BIAS << _DOUBLE_FRACTION_BITS
    return tf.bitcast(tf.bitwise.left_shift(ratio, tf.constant(shift, tf.int64)) + one, tf.float64)


def _aligned(terms: list[tf.Tensor], bits: int) -> tuple[list[tf.Tensor], tf.Tensor]:
    """The terms as float64 of at most 2 and the power of two that all are to be multiplied by; their sum is 1 to 6."""
    whole = _whole(functools.reduce(tf.maximum, terms), bits)
    return [_as_double(term, whole, bits) for term in terms], whole


def _packed_product(number: tf.Tensor, whole: tf.Tensor, factor: tf.Tensor, bits: int) -> tf.Tensor:
    """The product of all three, rounded; not below zero."""
    factor_whole = _whole(factor, bits)
    packed = _packed(number * _as_double(factor, factor_whole, bits), bits)
    return tf.maximum(packed + (whole + factor_whole), _ZERO)


def _packed(number: tf.Tensor, bits: int) -> tf.Tensor:
    """A float64 that is a normal number, rounded."""
    shift = _DOUBLE_FRACTION_BITS - bits
    one_less_rounding = (_DOUBLE_BIAS << _DOUBLE_FRACTION_BITS) - (1 << (shift - 1))
    return tf.bitwise.right_shift(tf.bitcast(number, tf.int64) - one_less_rounding, tf.constant(shift, tf.int64))
