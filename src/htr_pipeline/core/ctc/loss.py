"""The batched CTC loss and its gradient, exact from an empty label to a label that no alignment fits.

The recursions of Graves 2006, section 4.1, over all lines of a batch at once, compiled by XLA. A path probability is
neither a float nor a logarithm but a number with a very long exponent: it does not underflow like the one and costs no
exp and log in every cell like the other. docs/ctc.md explains the algorithm and gives figures.
"""

import functools
import math
from typing import Any

import numpy as np
import tensorflow as tf

# What a row was found to be; the compiled part finds it, the caller raises it.
_FINE, _INFEASIBLE, _BLANK_IN_LABEL, _CLASS_OUT_OF_RANGE, _LABEL_LENGTH, _LOGIT_LENGTH = range(6)
_PROBLEMS = (
    "",
    "Too few frames for the label, or a class that it needs has logit -inf: no alignment fits. "
    "Reject such lines beforehand, or pass infeasible='inf' or 'zero'.",
    "The blank occurs inside a label: labels hold only other classes. Check blank_index.",
    "A label is not a class of the logits: expected 0 <= label < number of classes.",
    "label_length is negative or exceeds the width of labels.",
    "logit_length is negative or exceeds the number of frames. "
    "Where time is the first axis of the logits, pass logits_time_major=True.",
)

# A path probability is one int64, read as a binary floating-point number: the upper bits are the exponent of two, the
# lower _fraction_bits(dtype) bits the fraction behind the leading 1. Greater numbers are greater integers, so maximum
# works on them; a power of two has no fraction, so multiplying by it is adding. Zero is an exponent no line reaches.
_ZERO, _ONE = -(1 << 62), 0
_INFEASIBLE_BELOW = _ZERO // 4 * 3  # zero grows a little when three of it are added in every frame
_DOUBLE_FRACTION_BITS, _DOUBLE_BIAS = 52, 1023


def ctc_loss(
    labels: Any,
    logits: Any,
    label_length: Any = None,
    logit_length: Any = None,
    *,
    blank_index: int = -1,
    logits_time_major: bool = False,
    preprocess_collapse_repeated: bool = False,
    ctc_merge_repeated: bool = True,
    infeasible: str = "inf",
) -> tf.Tensor:
    """Negative log-likelihood of each line's label, summed over all its alignments.

    The softmax is inside. Its derivative with respect to the logits is softmax minus posterior; the derivative of that
    is not implemented and raises NotImplementedError.

    Args:
        labels: (B, N) int32 or int64 classes, right-padded, with label_length; or a tf.SparseTensor or tf.RaggedTensor
            of B rows without it; or all labels one after the other, (sum of label_length,), with it. N may be 0.
            What stands behind label_length is ignored.
        logits: (B, T, K) float64, float32, float16 or bfloat16, unnormalised. Frames past logit_length are ignored and
            may hold NaN. -inf forbids a class.
        label_length: (B,) number of labels in each row, 0..N.
        logit_length: (B,) number of frames of each row, 0..T; all T where None.
        blank_index: class of the blank; negative values count from the last class.
        logits_time_major: True where the logits are (T, B, K).
        preprocess_collapse_repeated: first make one label of equal neighbours.
        ctc_merge_repeated: False: each label fills exactly one frame and equal neighbours need no blank between them.
        infeasible: what a row gives that no alignment fits: "inf": loss inf, gradient 0; "zero": both 0; "raise": an
            error that names the rows.

    Returns:
        (B,) losses in nats, >= 0; float64 for float64 logits, else float32. An empty label gives -sum ln p(blank), 0
        without frames. NaN where a frame of the line holds NaN. On a CPU every result is bit-for-bit reproducible.

    Raises:
        ValueError: a rank, type or option does not fit, a label holds the blank or a class out of range, a length is
            negative or too large. In a graph wrong values give InvalidArgumentError. In a caller compiled with
            jit_compile=True, which has no assertions, the row has loss NaN and gradient 0.

    Note:
        XLA compiles once for every combination of B, T and N; bring batches to a few sizes when training.

    Source: Graves et al., ICML 2006, section 4.1; the options are those of tf.compat.v1.nn.ctc_loss.
    """
    if infeasible not in ("inf", "zero", "raise"):
        raise ValueError(f"infeasible={infeasible!r}: expected 'inf', 'zero' or 'raise'.")
    logits = tf.convert_to_tensor(logits)
    if logits.dtype not in (tf.float64, tf.float32, tf.float16, tf.bfloat16):
        raise ValueError(f"logits are {logits.dtype.name}: expected float64, float32, float16 or bfloat16.")
    if logits.shape.rank not in (3, None):
        raise ValueError(f"logits have shape {logits.shape}: expected 3 axes (batch, frames, classes).")
    num_classes = logits.shape[-1]
    if num_classes is not None and not -num_classes <= blank_index < num_classes:
        raise ValueError(f"blank_index={blank_index}: the logits have {num_classes} classes.")
    time_axis = 0 if logits_time_major else 1
    labels, label_length = _dense_labels(labels, label_length)
    if logit_length is None:
        logit_length = tf.fill([tf.shape(logits)[1 - time_axis]], tf.shape(logits)[time_axis])
    logit_length = tf.cast(logit_length, tf.int32)
    _check_batch_sizes(labels, label_length, logits, logit_length, time_axis)

    @tf.custom_gradient
    def loss_of(logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
        loss, gradient, status, needed = _loss_and_gradient(
            labels, tf.stop_gradient(logits), label_length, logit_length,
            blank_index, logits_time_major, preprocess_collapse_repeated, ctc_merge_repeated, infeasible == "zero",
        )  # fmt: skip
        worst_allowed = _FINE if infeasible == "raise" else _INFEASIBLE
        with tf.control_dependencies(_raise_problems(status, worst_allowed, needed, label_length, logit_length)):
            loss = tf.identity(loss)

        @tf.custom_gradient
        def weighted_gradient(upstream: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
            def second_derivative(*_: tf.Tensor) -> None:
                raise NotImplementedError("ctc_loss has no second derivative.")

            weight = tf.expand_dims(upstream[:, tf.newaxis], axis=time_axis)
            return tf.cast(weight * gradient, logits.dtype), second_derivative

        return loss, lambda upstream: weighted_gradient(upstream, logits)

    return loss_of(logits)


def required_frames(labels: Any, label_length: Any = None) -> tf.Tensor:
    """(B,) int32 fewest frames that can hold each label: its length plus one blank between equal neighbours.

    Args:
        labels: as for ctc_loss.
        label_length: as for ctc_loss.
    """
    labels, label_length = _dense_labels(labels, label_length)
    pairs = tf.sequence_mask(label_length - 1, tf.maximum(tf.shape(labels)[1] - 1, 0))
    equal = (labels[:, 1:] == labels[:, :-1]) & pairs
    return label_length + tf.reduce_sum(tf.cast(equal, tf.int32), axis=1)


def _dense_labels(labels: Any, label_length: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Every form of labels as (B, N) int32 and label_length (B,) int32."""
    if isinstance(labels, tf.SparseTensor):
        # Rows are packed: a gap between two entries of a row is not a label.
        labels = tf.RaggedTensor.from_value_rowids(labels.values, labels.indices[:, 0], nrows=labels.dense_shape[0])
    if isinstance(labels, tf.RaggedTensor):
        if label_length is not None:
            raise ValueError(
                "label_length goes with dense or concatenated labels; ragged and sparse ones carry their own."
            )
        return tf.cast(labels.to_tensor(), tf.int32), tf.cast(labels.row_lengths(), tf.int32)
    labels = tf.convert_to_tensor(labels)
    if not labels.dtype.is_integer and labels.shape.num_elements() != 0:  # an empty Python list becomes float32
        raise ValueError(f"labels are {labels.dtype.name}: expected int32 or int64.")
    if label_length is None:
        raise ValueError("label_length is missing: dense and concatenated labels need it, padding is never guessed.")
    label_length = tf.cast(label_length, tf.int32)
    labels = tf.cast(labels, tf.int32)
    if labels.shape.rank == 1:
        total = tf.reduce_sum(label_length)
        tf.debugging.assert_equal(total, tf.size(labels), "Concatenated labels must number sum(label_length).")
        labels = tf.RaggedTensor.from_row_lengths(labels, label_length).to_tensor()
    if labels.shape.rank not in (2, None):
        raise ValueError(f"labels have shape {labels.shape}: expected (batch, labels) or (sum of label_length,).")
    return labels, label_length


def _check_batch_sizes(
    labels: tf.Tensor, label_length: tf.Tensor, logits: tf.Tensor, logit_length: tf.Tensor, time_axis: int
) -> None:
    """Raises where the batch sizes known so far disagree."""
    sizes = {
        "labels": labels.shape[:1],
        "label_length": label_length.shape,
        "logits": logits.shape[1 - time_axis : 2 - time_axis],
        "logit_length": logit_length.shape,
    }
    for name, shape in sizes.items():
        if shape.rank not in (1, None):
            raise ValueError(f"{name} has shape {shape}: expected one length for each row.")
        if not shape.is_compatible_with(sizes["labels"]):
            received = ", ".join(f"{name} {shape[0]}" for name, shape in sizes.items() if shape.rank)
            raise ValueError(f"Batch sizes differ: {received}. Is logits_time_major={time_axis == 0} right?")


def _raise_problems(
    status: tf.Tensor, worst_allowed: int, needed: tf.Tensor, label_length: tf.Tensor, logit_length: tf.Tensor
) -> list[tf.Operation]:
    """Raises ValueError eagerly; in a graph, returns the assertion that will raise InvalidArgumentError."""
    if not tf.executing_eagerly():
        lengths = ["label_length:", label_length, "required frames:", needed, "logit_length:", logit_length]
        return [
            tf.debugging.Assert(tf.reduce_all(status != problem), [message, *lengths], summarize=20)
            for problem, message in enumerate(_PROBLEMS)
            if problem > worst_allowed
        ]
    worst = status.numpy().max(initial=_FINE)
    if worst > worst_allowed:
        rows = np.flatnonzero(status.numpy() == worst)
        rows_in_words = "; ".join(
            f"row {row} has {label_length[row]} labels that need {needed[row]} frames, and {logit_length[row]} frames"
            for row in rows[:10]
        )
        raise ValueError(f"{_PROBLEMS[worst]} {len(rows)} of {len(status)} rows: {rows_in_words}.")
    return []


@functools.partial(tf.function, jit_compile=True, autograph=False, reduce_retracing=True)
def _loss_and_gradient(
    labels: tf.Tensor,
    logits: tf.Tensor,
    label_length: tf.Tensor,
    logit_length: tf.Tensor,
    blank_index: int,
    time_major: bool,
    collapse: bool,
    merge: bool,
    infeasible_is_zero: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """What ctc_loss returns and raises.

    Returns:
        (B,) losses; gradient in the layout of the logits; (B,) int32 status, one of the constants above; (B,) int32
        frames that the label needs.
    """
    real = tf.float64 if logits.dtype == tf.float64 else tf.float32
    logits = tf.cast(logits, real)
    if time_major:
        logits = tf.transpose(logits, [1, 0, 2])  # (B, T, K)
    frames_given, num_classes = tf.shape(logits)[1], tf.shape(logits)[2]
    blank = blank_index if blank_index >= 0 else num_classes + blank_index

    in_label = tf.sequence_mask(label_length, tf.shape(labels)[1])  # (B, N)
    status = _check_rows(labels, label_length, logit_length, in_label, frames_given, num_classes, blank)
    # A wrong row is computed as an empty one, so that nothing is read out of bounds.
    label_length = tf.where(status == _FINE, label_length, 0)
    logit_length = tf.where(status == _FINE, logit_length, 0)
    labels = tf.where(in_label & (status == _FINE)[:, tf.newaxis], labels, 0)
    if collapse:
        labels, label_length = _collapse_repeated(labels, label_length)
    needed = required_frames(labels, label_length) if merge else label_length

    # Softmax relative to each frame's largest logit. Padded frames become zeros first: they may hold NaN.
    num_frames = tf.maximum(frames_given, 1)  # XLA compiles no loop over nothing
    logits = tf.pad(logits, [[0, 0], [0, num_frames - frames_given], [0, 0]])
    in_line = tf.sequence_mask(logit_length, num_frames)  # (B, T)
    logits = tf.where(in_line[:, :, tf.newaxis], logits, tf.zeros([], real))
    largest = tf.reduce_max(logits, axis=2, keepdims=True)
    largest = tf.where(largest == -math.inf, tf.zeros([], real), largest)  # a frame that forbids every class
    exponentials = tf.exp(logits - largest)
    sums = tf.reduce_sum(exponentials, axis=2, keepdims=True)  # (B, T, 1)
    # In float64, so that small losses keep their relative precision: the largest exponential is 1.
    log_sums = tf.math.log(tf.reduce_sum(tf.cast(exponentials, tf.float64), axis=2))
    log_sums = tf.where(in_line, log_sums, 0.0)

    states = _blanks_between(labels, blank)  # (B, S)
    log_likelihood, posterior, feasible = _forward_backward(states, label_length, logits, largest, in_line, merge)
    loss = tf.cast(tf.maximum(tf.reduce_sum(log_sums, axis=1) - log_likelihood, 0.0), real)
    feasible |= tf.math.is_nan(loss)  # NaN logits stay visible
    loss = tf.where(feasible, loss, tf.cast(0.0 if infeasible_is_zero else math.inf, real))
    loss = tf.where(status == _FINE, loss, tf.cast(math.nan, real))

    # Posteriors of states become posteriors of classes; dividing by their sum keeps rounding from growing with T.
    batch = tf.shape(labels)[0]
    rows = states + num_classes * tf.range(batch)[:, tf.newaxis]
    posterior = tf.math.unsorted_segment_sum(
        tf.reshape(tf.transpose(posterior, [1, 2, 0]), [-1, num_frames]), tf.reshape(rows, [-1]), batch * num_classes
    )
    posterior = tf.reshape(posterior, [batch, num_classes, num_frames])
    posterior /= tf.reduce_sum(posterior, axis=1, keepdims=True)
    gradient = exponentials / sums - tf.transpose(posterior, [0, 2, 1])
    kept = in_line & (feasible & (status == _FINE))[:, tf.newaxis]
    gradient = tf.where(kept[:, :, tf.newaxis], gradient, tf.zeros([], real))[:, :frames_given]
    status = tf.where((status == _FINE) & ~feasible, _INFEASIBLE, status)
    if time_major:
        gradient = tf.transpose(gradient, [1, 0, 2])
    return loss, gradient, status, needed


def _check_rows(
    labels: tf.Tensor,
    label_length: tf.Tensor,
    logit_length: tf.Tensor,
    in_label: tf.Tensor,
    num_frames: tf.Tensor,
    num_classes: tf.Tensor,
    blank: int | tf.Tensor,
) -> tf.Tensor:
    """Status of each row, (B,), as far as it can be known before the recursion."""
    is_blank = tf.reduce_any((labels == blank) & in_label, axis=1)
    is_outside = tf.reduce_any(((labels < 0) | (labels >= num_classes)) & in_label, axis=1)
    status = tf.where(is_blank, _BLANK_IN_LABEL, _FINE)
    status = tf.where(is_outside, _CLASS_OUT_OF_RANGE, status)
    status = tf.where((label_length < 0) | (label_length > tf.shape(labels)[1]), _LABEL_LENGTH, status)
    return tf.where((logit_length < 0) | (logit_length > num_frames), _LOGIT_LENGTH, status)


def _collapse_repeated(labels: tf.Tensor, label_length: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels (B, N) with one label for equal neighbours, and their lengths: those kept move to the front in order."""
    positions = tf.range(tf.shape(labels)[1])
    kept = ((labels != tf.roll(labels, 1, axis=1)) | (positions == 0)) & (positions < label_length[:, tf.newaxis])
    order = tf.argsort(tf.cast(~kept, tf.int32), axis=1, stable=True)
    return tf.gather(labels, order, batch_dims=1), tf.reduce_sum(tf.cast(kept, tf.int32), axis=1)


def _blanks_between(labels: tf.Tensor, blank: int | tf.Tensor) -> tf.Tensor:
    """The label l' of the paper, (B, 2 N + 1): a blank before, between and behind the labels."""
    shape = tf.shape(labels)
    pairs = tf.stack([tf.fill(shape, blank), labels], axis=2)
    return tf.pad(tf.reshape(pairs, [shape[0], 2 * shape[1]]), [[0, 0], [0, 1]], constant_values=blank)


def _forward_backward(
    states: tf.Tensor, label_length: tf.Tensor, logits: tf.Tensor, largest: tf.Tensor, in_line: tf.Tensor, merge: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The recursions of Graves 2006, equations 6 to 11, and the posteriors of equation 14.

    Behind the end of a line, blanks have probability 1 and labels 0: states wait there in the blank behind their
    label, so that rows of all lengths go through the same T steps.

    Args:
        states: (B, S) classes of the label with blanks between.
        label_length: (B,).
        logits: (B, T, K).
        largest: (B, T, 1) largest logit of each frame, to which probabilities are relative.
        in_line: (B, T) False behind the end of a line.
        merge: ctc_merge_repeated.

    Returns:
        (B,) float64 ln P(label); posteriors of the states (T, B, S), up to a factor; (B,) whether any alignment fits.
    """
    real = logits.dtype
    bits = _fraction_bits(real)
    zero, one = tf.constant(_ZERO, tf.int64), tf.constant(_ONE, tf.int64)
    num_frames, num_states = tf.shape(logits)[1], tf.shape(states)[1]
    position = tf.range(num_states)
    is_label = position % 2 == 1

    # y of the paper, first for one blank and the labels only: that spares half of the exponentials.
    distinct = tf.concat([states[:, :1], states[:, 1::2]], axis=1)  # (B, N + 1)
    y = _packed_exp(tf.gather(logits, distinct, axis=2, batch_dims=1), largest, bits)
    y = tf.where(in_line[:, :, tf.newaxis], y, tf.where(tf.range(tf.shape(distinct)[1]) > 0, zero, one))
    y = tf.transpose(tf.gather(y, tf.where(is_label, (position + 1) // 2, 0), axis=2), [1, 0, 2])  # (T, B, S)

    # Into state s lead s itself, s - 1, and s - 2 if the blank between two labels may be skipped.
    stays = tf.ones_like(is_label) if merge else ~is_label
    skipped_into = is_label & (position > 1) & ((states != tf.roll(states, 2, axis=1)) | (not merge))
    skipped_from = tf.roll(skipped_into, -2, axis=1)

    def forwards(t, alpha, alphas):
        # The state before frame t is written, not that after it: XLA would compute it twice, once for the array.
        alphas = alphas.write(t, alpha)
        before = tf.pad(alpha, [[0, 0], [2, 0]], constant_values=_ZERO)
        terms = [
            alpha if merge else tf.where(stays, alpha, zero),
            before[:, 1:-1],
            tf.where(skipped_into, before[:, :-2], zero),
        ]
        return t + 1, _packed_product(*_sum(terms, bits), y[t], bits), alphas

    alpha = tf.broadcast_to(tf.where(position == 0, one, zero), tf.shape(states))
    alphas = tf.TensorArray(tf.int64, size=num_frames + 1)
    _, alpha, alphas = tf.while_loop(
        lambda t, *_: t < num_frames, forwards, (0, alpha, alphas), maximum_iterations=num_frames
    )
    alphas = tf.reshape(alphas.write(num_frames, alpha).stack(), [num_frames + 1, -1, num_states])

    last_blank = position == 2 * label_length[:, tf.newaxis]
    last_label = position == 2 * label_length[:, tf.newaxis] - 1
    ends = [tf.reduce_max(tf.where(last, alpha, zero), axis=1) for last in (last_blank, last_label)]
    likelihood = _packed_product(*_sum(ends, bits), one, bits)
    feasible = likelihood > _INFEASIBLE_BELOW
    likelihood = tf.where(feasible, likelihood, one)
    whole = _whole(likelihood, bits)
    log_likelihood = tf.math.log(_as_double(likelihood, whole, bits)) + math.log(2) * tf.cast(
        tf.bitwise.right_shift(whole, tf.constant(bits, tf.int64)), tf.float64
    )

    def backwards(t, beta_y, posteriors):
        after = tf.pad(beta_y, [[0, 0], [0, 2]], constant_values=_ZERO)
        terms = [
            beta_y if merge else tf.where(stays, beta_y, zero),
            after[:, 1:-1],
            tf.where(skipped_from, after[:, 2:], zero),
        ]
        beta, beta_whole = _sum(terms, bits)  # without the emission of frame t, which alpha holds
        scale = tf.maximum(beta_whole, _ZERO // 8 * 7) - whole[:, tf.newaxis]  # so that the next sum fits an int64
        posterior = beta * _as_double(alphas[t + 1] + scale, one, bits)
        posteriors = posteriors.write(t, tf.cast(posterior, real))
        return t - 1, _packed_product(beta, beta_whole, y[t], bits), posteriors

    posteriors = tf.TensorArray(real, size=num_frames)
    beta_y = tf.where(last_blank, one, zero)
    _, _, posteriors = tf.while_loop(
        lambda t, *_: t >= 0, backwards, (num_frames - 1, beta_y, posteriors), maximum_iterations=num_frames
    )
    posteriors = tf.reshape(posteriors.stack(), tf.shape(y))
    return log_likelihood, posteriors, feasible


def _fraction_bits(real: tf.DType) -> int:
    """Leaves losses of up to 5e8 nats a line for float32, and of 3e7 with one more digit for float64."""
    return 36 if real == tf.float64 else 32


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


def _sum(terms: list[tf.Tensor], bits: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The sum as a float64 from 1 to 6 and the power of two it is to be multiplied by."""
    whole = _whole(functools.reduce(tf.maximum, terms), bits)
    return tf.add_n([_as_double(term, whole, bits) for term in terms]), whole


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
