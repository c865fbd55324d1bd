"""The CTC loss of a whole batch, compiled by XLA: for GPUs, for callers with jit_compile=True, for second derivatives.

The recursions of Graves 2006, section 4.1, over all lines at once. As in kernel_cpu.py, a path probability is a float64
mantissa and a power of two, itself a float64.
"""

import functools
import math
from typing import NamedTuple

import tensorflow as tf

from htr_pipeline.core.ctc.inputs import Lines, Rows, checked_rows
from htr_pipeline.core.ctc.kernel_cpu import BIAS, FORBIDDEN_BELOW, FRACTION_BITS, LN_2_HIGH, LN_2_LOW, LOG2_E, NEVER
from htr_pipeline.core.ctc.problems import FINE, INFEASIBLE


class _Mass(NamedTuple):
    """Probabilities: mantissa times two to the power, two float64 tensors of one shape; a mantissa is 1 to 2."""

    mantissa: tf.Tensor
    power: tf.Tensor


class Trellis(NamedTuple):
    """A batch made ready for the recursions.

    Attributes:
        logits: (B, T, K) float32 or float64, with at least one frame; 0 behind the end of a line.
        largest: (B, T, 1) largest logit of each frame, to which probabilities are relative.
        softmax: (B, T, K).
        log_sums: (B, T) float64. Log of what the softmax divided by; 0 behind the end of a line.
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
    lines: Lines, blank_index: int, time_major: bool, collapse: bool, merge: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Loss of each line and its gradient.

    Args:
        lines: the batch, logits of any floating-point type.
        blank_index: class of the blank; negative values count from the last class.
        time_major: whether the logits are (T, B, K).
        collapse: preprocess_collapse_repeated.
        merge: ctc_merge_repeated.

    Returns:
        (B,) losses, inf where no alignment fits, NaN where a frame holds NaN or the row is wrong; their gradient in the
        shape of logits, 0 for infeasible and wrong rows; both float64 for float64 logits, else float32. (B,) int32
        status of each row.
    """
    logits = lines.logits
    rows = checked_rows(lines, blank_index, time_major, collapse)
    frames_given = tf.shape(logits)[0 if time_major else 1]
    trellis = make_trellis(rows, logits, blank_index, time_major, merge)
    real = trellis.logits.dtype
    log_likelihood, feasible, (posterior,) = _forward_backward(trellis)
    loss = tf.cast(tf.maximum(tf.reduce_sum(trellis.log_sums, axis=1) - log_likelihood, 0.0), real)
    feasible &= loss < math.inf  # which float32 cannot hold
    feasible |= tf.math.is_nan(loss)  # NaN logits stay visible
    loss = tf.where(feasible, loss, tf.constant(math.inf, real))
    is_fine = tf.equal(rows.status, FINE)
    loss = tf.where(is_fine, loss, tf.constant(math.nan, real))
    status = tf.where(is_fine & ~feasible, INFEASIBLE, rows.status)

    # Dividing by the sum keeps rounding from growing with T.
    posterior = _per_class(posterior, trellis)
    gradient = trellis.softmax - posterior / tf.reduce_sum(posterior, axis=2, keepdims=True)
    gradient = tf.where(tf.math.is_nan(loss)[:, tf.newaxis, tf.newaxis], tf.constant(math.nan, real), gradient)
    gradient = _in_layout(gradient, trellis.in_line & feasible[:, tf.newaxis], frames_given, time_major)
    return loss, gradient, status


@functools.partial(tf.function, jit_compile=True, autograph=False, reduce_retracing=True)
def hessian_vector_product(
    lines: Lines, direction: tf.Tensor, blank_index: int, time_major: bool, collapse: bool, merge: bool
) -> tf.Tensor:
    """The derivative of each line's gradient along a direction; 0 where no alignment fits.

    The Hessian is the covariance of the classes of the frames when frames are independent (softmax), minus their
    covariance over the alignments of the label. For the latter the recursions carry, beside the mass of all paths that
    lead into a state, their mean sum of the direction: an expectation semiring (Li and Eisner, EMNLP 2009).

    Args:
        lines: as for loss_and_gradient.
        direction: in the shape of the logits.
        blank_index: as for loss_and_gradient.
        time_major: as for loss_and_gradient.
        collapse: as for loss_and_gradient.
        merge: as for loss_and_gradient.

    Returns:
        In the shape of logits; float64 for float64 logits, else float32.
    """
    frames_given = tf.shape(lines.logits)[0 if time_major else 1]
    real = tf.float64 if lines.logits.dtype == tf.float64 else tf.float32
    rows = checked_rows(lines, blank_index, time_major, collapse)
    trellis = make_trellis(rows, tf.cast(lines.logits, tf.float64), blank_index, time_major, merge)
    direction = _batch_major(tf.cast(direction, tf.float64), time_major, trellis.in_line)
    # What all classes of a frame have in common changes nothing: taken off, the sums along the paths stay small.
    direction -= tf.reduce_sum(trellis.softmax * direction, axis=2, keepdims=True)
    _, feasible, (posterior, moment) = _forward_backward(trellis, direction)
    posterior, moment = _per_class(posterior, trellis), _per_class(moment, trellis)
    total = tf.reduce_sum(posterior, axis=2, keepdims=True)
    mean = tf.reduce_sum(moment, axis=2, keepdims=True) / total  # of the sums of all paths, the same in every frame
    product = trellis.softmax * direction - (moment - posterior * mean) / total
    return tf.cast(_in_layout(product, trellis.in_line & feasible[:, tf.newaxis], frames_given, time_major), real)


def make_trellis(rows: Rows, logits: tf.Tensor, blank_index: int, time_major: bool, merge: bool) -> Trellis:
    """The batch made ready; the arguments are those of loss_and_gradient, rows checked."""
    real = tf.float64 if logits.dtype == tf.float64 else tf.float32
    num_frames = tf.shape(logits)[0 if time_major else 1]
    blank = blank_index if blank_index >= 0 else tf.shape(logits)[2] + blank_index
    in_line = tf.sequence_mask(rows.logit_length, tf.maximum(num_frames, 1))  # XLA compiles no loop over nothing
    logits = _batch_major(tf.cast(logits, real), time_major, in_line)
    largest = tf.reduce_max(logits, axis=2, keepdims=True)
    largest = tf.where(tf.equal(largest, -math.inf), tf.zeros([], real), largest)  # a frame that forbids every class
    exponentials = tf.exp(logits - largest)
    # In float64, so that small losses keep their relative precision: the largest exponential is 1.
    log_sums = tf.math.log(tf.reduce_sum(tf.cast(exponentials, tf.float64), axis=2))

    states = _label_with_blanks(rows.labels, blank)
    position = tf.range(tf.shape(states)[1])
    is_label = tf.equal(position % 2, 1)
    return Trellis(
        logits=logits,
        largest=largest,
        softmax=exponentials / tf.reduce_sum(exponentials, axis=2, keepdims=True),
        log_sums=tf.where(in_line, log_sums, 0.0),
        in_line=in_line,
        states=states,
        last_blank=tf.equal(position, 2 * rows.label_length[:, tf.newaxis]),
        stays=tf.ones_like(is_label) if merge else ~is_label,
        skipped_into=is_label & (position > 1) & (tf.not_equal(states, tf.roll(states, 2, axis=1)) | (not merge)),
    )


def _label_with_blanks(labels: tf.Tensor, blank: int | tf.Tensor) -> tf.Tensor:
    """The label l' of Graves 2006, (B, 2 N + 1): a blank before, between and behind the labels."""
    batch, width = tf.shape(labels)[0], tf.shape(labels)[1]
    pairs = tf.stack([tf.fill([batch, width], blank), labels], axis=2)
    return tf.pad(tf.reshape(pairs, [batch, 2 * width]), [[0, 0], [0, 1]], constant_values=blank)


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


def _per_class(values: tf.Tensor, trellis: Trellis) -> tf.Tensor:
    """(T, B, S) values of the states summed up for each class, (B, T, K)."""
    batch, num_frames, num_classes = tf.unstack(tf.shape(trellis.logits))
    classes = trellis.states + num_classes * tf.range(batch)[:, tf.newaxis]
    values = tf.reshape(tf.transpose(values, [1, 2, 0]), [-1, num_frames])
    values = tf.math.unsorted_segment_sum(values, tf.reshape(classes, [-1]), batch * num_classes)
    return tf.transpose(tf.reshape(values, [batch, num_classes, num_frames]), [0, 2, 1])


def _forward_backward(
    trellis: Trellis, direction: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor, tuple[tf.Tensor, ...]]:
    """The recursions of Graves 2006, equations 6 to 11, and the posteriors of equation 14.

    Behind the end of a line, blanks have probability 1 and labels 0: states wait there in the blank behind their
    label, so that rows of all lengths go through the same T steps.

    Args:
        trellis: the batch.
        direction: (B, T, K) or None.

    Returns:
        (B,) float64 ln P(label); (B,) whether any alignment fits; the posteriors of the states (T, B, S) and, given a
        direction, beside them the same times the mean sum of the direction along all paths through the state.
    """
    num_frames, num_states = tf.shape(trellis.logits)[1], tf.shape(trellis.states)[1]
    position = tf.range(num_states)
    is_label = tf.equal(position % 2, 1)
    # What a step costs, as a power of two: nothing or everything.
    free, forbidden = tf.constant(0.0, tf.float64), tf.constant(NEVER, tf.float64)
    stay = tf.where(trellis.stays, free, forbidden)
    skip_into = tf.where(trellis.skipped_into, free, forbidden)
    skip_from = tf.roll(skip_into, -2, axis=1)

    # y of the paper, first for one blank and the labels only: that spares half of the exponentials.
    distinct = tf.concat([trellis.states[:, :1], trellis.states[:, 1::2]], axis=1)  # (B, N + 1)

    def of_states(values: tf.Tensor, behind: tf.Tensor) -> tf.Tensor:
        """(B, T, N + 1) to (T, B, S), with other values behind the end of a line."""
        values = tf.where(trellis.in_line[:, :, tf.newaxis], values, behind)
        return tf.transpose(tf.gather(values, tf.where(is_label, (position + 1) // 2, 0), axis=2), [1, 0, 2])

    y = _exp(tf.gather(trellis.logits, distinct, axis=2, batch_dims=1), trellis.largest)
    behind = tf.where(tf.range(tf.shape(distinct)[1]) > 0, forbidden, free)
    y = _Mass(of_states(y.mantissa, tf.ones_like(behind)), of_states(y.power, behind))
    if direction is not None:
        steps = of_states(tf.gather(direction, distinct, axis=2, batch_dims=1), tf.zeros_like(behind))

    def forwards(t: tf.Tensor, alpha: _Mass, mean: tf.Tensor, alphas: _Mass, means: tf.TensorArray) -> tuple:
        # The state before frame t is written, not that after it: XLA would compute it twice, once for the array.
        alphas = _Mass(*(array.write(t, values) for array, values in zip(alphas, alpha, strict=True)))
        terms, power = _aligned(alpha, [(0, stay), (1, free), (2, skip_into)])
        if direction is not None:
            mean = _weighted_mean(terms, [_shifted(mean, by, 0.0) for by in (0, 1, 2)]) + steps[t]
            means = means.write(t, mean)
        return t + 1, _normalised(tf.add_n(terms) * y.mantissa[t], power + y.power[t]), mean, alphas, means

    ones = tf.ones_like(trellis.states, tf.float64)
    alpha = _Mass(ones, tf.where(tf.equal(position, 0), free, forbidden) * ones)
    alphas = _Mass(*(tf.TensorArray(tf.float64, size=num_frames + 1) for _ in alpha))
    mean = tf.zeros_like(ones) if direction is not None else free  # loops carry no None
    means = tf.TensorArray(tf.float64, size=num_frames if direction is not None else 0)
    _, alpha, _, alphas, means = tf.while_loop(lambda t, *_: t < num_frames, forwards, (0, alpha, mean, alphas, means))
    alphas = _Mass(*(array.write(num_frames, values).stack() for array, values in zip(alphas, alpha, strict=True)))
    alphas = _Mass(*(tf.reshape(values, [num_frames + 1, -1, num_states]) for values in alphas))
    if direction is not None:
        means = tf.reshape(means.stack(), tf.shape(y.power))

    # Equation 8: the label ends in its last class or in the blank behind it.
    is_end = trellis.last_blank | (tf.roll(trellis.last_blank, -1, axis=1) & is_label)
    p_power = tf.reduce_max(tf.where(is_end, alpha.power, forbidden), axis=1, keepdims=True)
    feasible = p_power > NEVER / 2
    p_power = tf.where(feasible, p_power, free)
    p = tf.reduce_sum(tf.where(is_end, alpha.mantissa * _power_of_two(alpha.power - p_power), free), axis=1)
    log_likelihood = tf.where(feasible[:, 0], tf.math.log(p) + math.log(2) * p_power[:, 0], free)

    def backwards(t: tf.Tensor, beta_y: _Mass, mean: tf.Tensor, posteriors: tf.TensorArray, moments: tf.TensorArray):
        terms, power = _aligned(beta_y, [(0, stay), (-1, free), (-2, skip_from)])
        beta = tf.add_n(terms)  # without the emission of frame t, which alpha holds
        posterior = alphas.mantissa[t + 1] * beta * _power_of_two(alphas.power[t + 1] + power - p_power)
        posteriors = posteriors.write(t, tf.cast(posterior, trellis.logits.dtype))
        if direction is not None:
            mean = _weighted_mean(terms, [_shifted(mean, by, 0.0) for by in (0, -1, -2)])
            moments = moments.write(t, posterior * (means[t] + mean))
            mean += steps[t]
        return t - 1, _normalised(beta * y.mantissa[t], power + y.power[t]), mean, posteriors, moments

    posteriors = tf.TensorArray(trellis.logits.dtype, size=num_frames)
    moments = tf.TensorArray(tf.float64, size=num_frames if direction is not None else 0)
    beta_y = _Mass(ones, tf.where(trellis.last_blank, free, forbidden))
    *_, posteriors, moments = tf.while_loop(
        lambda t, *_: t >= 0, backwards, (num_frames - 1, beta_y, mean, posteriors, moments)
    )
    found = (posteriors,) if direction is None else (posteriors, moments)
    shape = tf.shape(y.power)
    return log_likelihood, feasible[:, 0], tuple(tf.reshape(array.stack(), shape) for array in found)


def _exp(logits: tf.Tensor, largest: tf.Tensor) -> _Mass:
    """exp(logits - largest), exact to rounding however small; the mantissa is 0.7 to 1.5."""
    difference = tf.cast(logits, tf.float64) - tf.cast(largest, tf.float64)
    power = tf.floor(difference * LOG2_E + 0.5)
    rest = (difference - power * LN_2_HIGH) - power * LN_2_LOW
    mantissa = tf.where(abs(rest) <= 0.5, tf.exp(rest), tf.ones([], tf.float64))  # a difference without such digits
    return _Mass(mantissa, tf.where(difference < FORBIDDEN_BELOW, tf.constant(NEVER, tf.float64), power))


def _power_of_two(power: tf.Tensor) -> tf.Tensor:
    """2**power for a whole number of at most 1023; 0 where a float64 underflows."""
    # Added to 2**52, a whole number stands in the lowest bits.
    bits = tf.bitcast(tf.maximum(power, -float(BIAS)) + (BIAS + 2.0**FRACTION_BITS), tf.int64)
    return tf.bitcast(tf.bitwise.left_shift(bits, tf.constant(FRACTION_BITS, tf.int64)), tf.float64)


def _normalised(mantissa: tf.Tensor, power: tf.Tensor) -> _Mass:
    """The same with a mantissa from 1 to 2."""
    bits = tf.bitcast(mantissa, tf.int64)
    exponent = tf.bitwise.right_shift(bits, tf.constant(FRACTION_BITS, tf.int64)) - BIAS
    fraction = tf.bitwise.bitwise_and(bits, tf.constant((1 << FRACTION_BITS) - 1, tf.int64))
    return _Mass(tf.bitcast(fraction + (BIAS << FRACTION_BITS), tf.float64), power + tf.cast(exponent, tf.float64))


def _shifted(values: tf.Tensor, by: int, filling: float) -> tf.Tensor:
    """(B, S): each state gets what the state that many places before it has."""
    front, back = max(by, 0), max(-by, 0)
    padded = tf.pad(values, [[0, 0], [front, back]], constant_values=filling)
    return padded[:, back : back + tf.shape(values)[1]]


def _aligned(mass: _Mass, steps: list[tuple[int, tf.Tensor]]) -> tuple[list[tf.Tensor], tf.Tensor]:
    """The masses that arrive by steps of so many places at such a cost, all relative to the power returned beside."""
    arriving = [_shifted(mass.power, by, NEVER) + cost for by, cost in steps]
    power = functools.reduce(tf.maximum, arriving)
    mantissas = [_shifted(mass.mantissa, by, 1.0) for by, _ in steps]
    return [mantissa * _power_of_two(p - power) for mantissa, p in zip(mantissas, arriving, strict=True)], power


def _weighted_mean(weights: list[tf.Tensor], values: list[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([weight * value for weight, value in zip(weights, values, strict=True)]) / tf.add_n(weights)
