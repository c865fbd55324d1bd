"""Labels, logits and lengths as callers give them, brought to one form and checked row by row."""

from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext  # no public function tells it

from htr_pipeline.core.ctc.problems import (
    BLANK_IN_LABEL,
    BLANK_INDEX,
    CLASS_OUT_OF_RANGE,
    FINE,
    LABEL_LENGTH,
    LOGIT_LENGTH,
    raise_problems,
    warn_if_softmaxed,
)


def is_compiled_by_xla() -> bool:
    """Whether this is called while tracing a tf.function with jit_compile=True."""
    return GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


class Lines(NamedTuple):
    """A batch of lines in one form.

    Attributes:
        labels: (B, N) int32; anything behind label_length.
        logits: (B, T, K), or (T, B, K) where time is the first axis.
        label_length: (B,) int32.
        logit_length: (B,) int32.
    """

    labels: tf.Tensor
    logits: tf.Tensor
    label_length: tf.Tensor
    logit_length: tf.Tensor


def checked_lines(
    labels: Any, logits: Any, label_length: Any, logit_length: Any, blank_index: int, logits_time_major: bool
) -> Lines:
    """Checks types, ranks and batch sizes, as far as they are known, and fills in what was left out.

    Raises:
        ValueError: they do not fit; the message says what was received and what was expected.
    """
    logits = tf.convert_to_tensor(logits)
    if logits.dtype not in (tf.float64, tf.float32, tf.float16, tf.bfloat16):
        raise ValueError(f"logits are {logits.dtype.name}: expected float64, float32, float16 or bfloat16.")
    if logits.shape.rank not in (3, None):
        raise ValueError(f"logits have shape {logits.shape}: expected 3 axes (batch, frames, classes).")
    logits = tf.ensure_shape(logits, [None, None, None])
    num_classes = logits.shape[2]
    if num_classes == 0:
        raise ValueError(f"logits have shape {logits.shape}: expected at least one class, the blank.")
    if num_classes is not None and not -num_classes <= blank_index < num_classes:
        raise ValueError(
            f"blank_index={blank_index}: the logits have {num_classes} classes, "
            f"expected {-num_classes} to {num_classes - 1}."
        )
    time_axis = 0 if logits_time_major else 1
    labels, label_length = dense_labels(labels, label_length)
    if logit_length is None:
        logit_length = tf.fill([tf.shape(logits)[1 - time_axis]], tf.shape(logits)[time_axis])
    lines = Lines(labels, logits, label_length, checked_lengths(logit_length, "logit_length"))
    return _with_one_batch_size(lines, time_axis)


def dense_labels(labels: Any, label_length: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Every form of labels as (B, N) int32 and label_length (B,) int32."""
    if isinstance(labels, tf.SparseTensor):
        if labels.shape.rank not in (2, None):
            raise ValueError(f"labels have shape {labels.shape}: expected (batch, labels).")
        labels = tf.sparse.reorder(labels)
        # Rows are packed: a gap between two entries of a row is not a label.
        labels = tf.RaggedTensor.from_value_rowids(labels.values, labels.indices[:, 0], nrows=labels.dense_shape[0])
    if isinstance(labels, tf.RaggedTensor):
        if label_length is not None:
            raise ValueError(
                "label_length goes with dense or concatenated labels; ragged and sparse ones carry their own."
            )
        if labels.shape.rank != 2:
            raise ValueError(f"labels have shape {labels.shape}: expected (batch, labels).")
        return _whole_numbers(labels.to_tensor(), "labels"), tf.cast(labels.row_lengths(), tf.int32)
    if label_length is None:
        raise ValueError("label_length is missing: dense and concatenated labels need it, padding is never guessed.")
    labels, label_length = _whole_numbers(labels, "labels"), checked_lengths(label_length, "label_length")
    if labels.shape.rank not in (1, 2):
        raise ValueError(
            f"labels have shape {labels.shape}: expected (batch, labels) or (sum of label_length,). "
            "Where a tf.function does not know it, tf.ensure_shape tells."
        )
    if labels.shape.rank == 1:
        lengths = tf.cast(label_length, tf.int64)  # whose sum no two lengths can carry over the edge
        if tf.executing_eagerly() and (tf.reduce_any(lengths < 0) or tf.reduce_sum(lengths) != len(labels)):
            raise ValueError(
                f"Concatenated labels are {len(labels)}, label_length adds up to {tf.reduce_sum(lengths)}: "
                "expected lengths of at least 0 that add up to the number of labels."
            )
        labels = tf.RaggedTensor.from_row_lengths(labels, lengths).to_tensor()
    return labels, label_length


def checked_lengths(values: Any, name: str) -> tf.Tensor:
    """(B,) int32; what does not fit into int32 becomes something that is out of range as well.

    Raises:
        ValueError: values are no whole numbers or have another rank.
    """
    lengths = _whole_numbers(values, name)
    if lengths.shape.rank not in (1, None):
        raise ValueError(f"{name} has shape {lengths.shape}: expected one length for each row.")
    return tf.ensure_shape(lengths, [None])


def _whole_numbers(values: Any, name: str) -> tf.Tensor:
    values = tf.convert_to_tensor(values)
    if not values.dtype.is_integer and values.shape.num_elements() != 0:  # an empty Python list becomes float32
        raise ValueError(f"{name} are {values.dtype.name}: expected int32 or int64.")
    if values.dtype == tf.uint64:
        values = tf.cast(tf.minimum(values, tf.constant(tf.int32.max, tf.uint64)), tf.int32)
    # Cut to int32, 2**32 would become class 0: out of range must stay out of range.
    if values.dtype.size > tf.int32.size:
        values = tf.clip_by_value(values, tf.cast(tf.int32.min, values.dtype), tf.cast(tf.int32.max, values.dtype))
    return tf.cast(values, tf.int32)


def _with_one_batch_size(lines: Lines, time_axis: int) -> Lines:
    """The lines, each tensor with the batch size that any of them is known to have."""
    batch_axis = Lines(labels=0, logits=1 - time_axis, label_length=0, logit_length=0)
    sizes = Lines(*(values.shape[axis] for values, axis in zip(lines, batch_axis, strict=True)))
    known = set(sizes) - {None}
    if len(known) > 1:
        received = ", ".join(f"{name} {size}" for name, size in sizes._asdict().items())
        raise ValueError(f"Batch sizes differ: {received}. Is logits_time_major={time_axis == 0} right?")
    if not known:
        return lines
    shapes = [values.shape.as_list() for values in lines]
    for shape, axis in zip(shapes, batch_axis, strict=True):
        shape[axis] = min(known)
    return Lines(*(tf.ensure_shape(values, shape) for values, shape in zip(lines, shapes, strict=True)))


class Rows(NamedTuple):
    """Labels and lengths that can be computed with: a wrong row has become an empty one.

    Attributes:
        labels: (B, N) int32, 0 behind label_length.
        label_length: (B,) int32.
        logit_length: (B,) int32.
        status: (B,) int32, FINE or what is wrong with the row.
    """

    labels: tf.Tensor
    label_length: tf.Tensor
    logit_length: tf.Tensor
    status: tf.Tensor


def checked_rows(lines: Lines, blank_index: int, time_major: bool, collapse: bool) -> Rows:
    """What can be told of the rows without looking at the logits; inside XLA.

    Args:
        lines: the batch.
        blank_index: class of the blank; negative values count from the last class.
        time_major: whether the logits are (T, B, K).
        collapse: make one label of equal neighbours.
    """
    shape = tf.shape(lines.logits)
    num_frames, num_classes = shape[0 if time_major else 1], shape[2]
    num_rows = shape[1 if time_major else 0]
    labels = of_as_many_rows(lines.labels, num_rows)
    label_length = of_as_many_rows(lines.label_length[:, tf.newaxis], num_rows)[:, 0]
    logit_length = of_as_many_rows(lines.logit_length[:, tf.newaxis], num_rows)[:, 0]
    blank = blank_index if blank_index >= 0 else num_classes + blank_index
    in_label = tf.sequence_mask(label_length, tf.shape(labels)[1])
    is_blank = tf.reduce_any(tf.equal(labels, blank) & in_label, axis=1)
    is_outside = tf.reduce_any(((labels < 0) | (labels >= num_classes)) & in_label, axis=1)
    status = tf.where(is_blank, BLANK_IN_LABEL, FINE)
    status = tf.where(is_outside, CLASS_OUT_OF_RANGE, status)
    status = tf.where((label_length < 0) | (label_length > tf.shape(labels)[1]), LABEL_LENGTH, status)
    status = tf.where((logit_length < 0) | (logit_length > num_frames), LOGIT_LENGTH, status)
    status = tf.where((blank < 0) | (blank >= num_classes), BLANK_INDEX, status)
    is_fine = tf.equal(status, FINE)
    label_length = tf.where(is_fine, label_length, 0)
    logit_length = tf.where(is_fine, logit_length, 0)
    labels = tf.where(in_label & is_fine[:, tf.newaxis], labels, 0)
    if collapse:
        labels, label_length = _collapse_repeated(labels, label_length)
    return Rows(labels, label_length, logit_length, status)


def of_as_many_rows(values: tf.Tensor, num_rows: tf.Tensor) -> tf.Tensor:
    """The values (B, N) int32, B being num_rows: a single row would be broadcast, but cannot be joined to several."""
    return tf.concat([tf.zeros([num_rows, 0], tf.int32), values], axis=1)


def _collapse_repeated(labels: tf.Tensor, label_length: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels (B, N) with one label for equal neighbours, and their lengths: those kept move to the front in order."""
    positions = tf.range(tf.shape(labels)[1])
    kept = (tf.not_equal(labels, tf.roll(labels, 1, axis=1)) | tf.equal(positions, 0)) & (
        positions < label_length[:, tf.newaxis]
    )
    order = tf.argsort(tf.cast(~kept, tf.int32), axis=1, stable=True)
    return tf.gather(labels, order, batch_dims=1), tf.reduce_sum(tf.cast(kept, tf.int32), axis=1)


def report(
    status: tf.Tensor, worst_allowed: int, lines: Lines, time_major: bool, collapse: bool, merge: bool
) -> list[tf.Operation]:
    """Raises and warns as problems.py does, in a graph when it runs; not inside XLA, which cannot call back.

    Returns:
        What must run before a result is used.
    """
    if is_compiled_by_xla():
        return []
    first_frames = lines.logits[:1] if time_major else tf.transpose(lines.logits[:, :1], [1, 0, 2])

    def look(status: Any, first_frames: Any, labels: Any, label_length: Any, logit_length: Any, shape: Any) -> None:
        num_frames, num_classes = shape[0 if time_major else 1], shape[2]
        raise_problems(
            status, worst_allowed, labels, label_length, logit_length, num_frames, num_classes, collapse, merge
        )
        if len(first_frames):
            warn_if_softmaxed(first_frames[0], logit_length)

    arguments = [status, tf.cast(first_frames, tf.float32), lines.labels, lines.label_length, lines.logit_length]
    arguments.append(tf.shape(lines.logits))
    if tf.executing_eagerly():
        look(*(tensor.numpy() for tensor in arguments))
        return []
    return [tf.numpy_function(look, arguments, [])]
