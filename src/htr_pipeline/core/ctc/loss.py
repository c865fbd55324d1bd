"""The batched CTC loss and its derivatives, exact from an empty label to a label that no alignment fits.

This module is the face of it: forms of labels, options, errors, derivatives. The recursions of Graves 2006 are in
kernel_cpu.py, which is the faster by far but a call back into Python, and in kernel_xla.py, for GPUs and for callers
that XLA compiles. docs/ctc.md explains the algorithm and gives figures.
"""

import operator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from htr_pipeline.core.ctc import kernel_cpu, kernel_xla
from htr_pipeline.core.ctc.inputs import (
    Lines,
    checked_lines,
    dense_labels,
    is_compiled_by_xla,
    of_as_many_rows,
    report,
)
from htr_pipeline.core.ctc.problems import FINE, INFEASIBLE, raise_problems, warn_if_softmaxed


@tf.autograph.experimental.do_not_convert
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

    The softmax is inside. The derivative with respect to the logits is softmax minus posterior; that derivative has one
    too, for Hessian-vector products.

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
            jit_compile=True, which has no assertions, the row has loss NaN and gradient 0, and "raise" is as "inf".

    Note:
        On a GPU and in callers with jit_compile=True, XLA compiles once for every combination of B, T and N: bring
        batches to a few sizes there.

    Source: Graves et al., ICML 2006, section 4.1; the options are those of tf.compat.v1.nn.ctc_loss.
    """
    blank_index = operator.index(blank_index)
    if infeasible not in ("inf", "zero", "raise"):
        raise ValueError(f"infeasible={infeasible!r}: expected 'inf', 'zero' or 'raise'.")
    lines = checked_lines(labels, logits, label_length, logit_length, blank_index, logits_time_major)
    options = _Options(blank_index, logits_time_major, preprocess_collapse_repeated, ctc_merge_repeated)
    time_axis = 0 if logits_time_major else 1

    @tf.custom_gradient
    def loss_of(logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
        loss, gradient, status = _loss_and_gradient(lines, options, FINE if infeasible == "raise" else INFEASIBLE)
        if infeasible == "zero":
            loss = tf.where(tf.equal(status, INFEASIBLE), tf.zeros_like(loss), loss)

        @tf.custom_gradient
        def weighted_gradient(upstream: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, Any]:
            # Whatever the caller made of an infinite loss, its row has gradient 0; and so has a row of weight 0.
            weight = tf.where(tf.equal(status, FINE), upstream, tf.zeros_like(upstream))
            weight = tf.expand_dims(weight[:, tf.newaxis], axis=time_axis)

            def second_derivative(direction: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                product = _hessian_vector_product(lines._replace(logits=logits), direction, options)
                along = tf.reduce_sum(gradient * tf.cast(direction, gradient.dtype), axis=[time_axis, 2])
                return along, tf.cast(tf.math.multiply_no_nan(product, weight), logits.dtype)

            return tf.cast(tf.math.multiply_no_nan(gradient, weight), logits.dtype), second_derivative

        return loss, lambda upstream: weighted_gradient(upstream, logits)

    return loss_of(lines.logits)


def required_frames(labels: Any, label_length: Any = None) -> tf.Tensor:
    """(B,) int32 fewest frames that can hold each label: its length plus one blank between equal neighbours.

    Args:
        labels: as for ctc_loss.
        label_length: as for ctc_loss.

    Raises:
        ValueError: lengths do not fit the labels; in a graph only where their number does not.
    """
    labels, label_length = dense_labels(labels, label_length)
    if not labels.shape[:1].is_compatible_with(label_length.shape):
        raise ValueError(f"labels have {labels.shape[0]} rows, label_length has {label_length.shape[0]}.")
    if tf.executing_eagerly():
        wrong = tf.where((label_length < 0) | (label_length > labels.shape[1]))[:, 0].numpy().tolist()
        if wrong:
            found = label_length[wrong[0]]
            raise ValueError(
                f"{len(wrong)} of {len(label_length)} rows: row {wrong[0]} has label_length {found}, and labels are "
                f"{labels.shape[1]} wide."
            )
    label_length = of_as_many_rows(label_length[:, tf.newaxis], tf.shape(labels)[0])[:, 0]
    pairs = tf.sequence_mask(label_length - 1, tf.maximum(tf.shape(labels)[1] - 1, 0))
    equal = (labels[:, 1:] == labels[:, :-1]) & pairs
    return label_length + tf.reduce_sum(tf.cast(equal, tf.int32), axis=1)


class _Options(NamedTuple):
    blank_index: int
    time_major: bool
    collapse: bool
    merge: bool


def _loss_and_gradient(lines: Lines, options: _Options, worst_allowed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Loss, gradient and status of each row from the kernel that is the faster one here, after raising problems."""
    if _needs_xla():
        lines = lines._replace(logits=tf.stop_gradient(lines.logits))
        loss, gradient, status = kernel_xla.loss_and_gradient(lines, *options)
        with tf.control_dependencies(report(status, worst_allowed, lines, *options[1:])):
            return tf.identity(loss), gradient, status

    def compute(labels: Any, logits: Any, label_length: Any, logit_length: Any) -> tuple[np.ndarray, ...]:
        found = kernel_cpu.loss_and_gradient(labels, logits, label_length, logit_length, **options._asdict())
        num_frames, num_classes = logits.shape[0 if options.time_major else 1], logits.shape[2]
        raise_problems(
            found[2], worst_allowed, labels, label_length, logit_length, num_frames, num_classes, *options[2:]
        )
        if logits.size:
            warn_if_softmaxed(logits[0] if options.time_major else logits[:, 0], logit_length)
        return found

    real = tf.float64 if lines.logits.dtype == tf.float64 else tf.float32
    arguments = lines._replace(logits=tf.cast(lines.logits, real))
    if tf.executing_eagerly():
        loss, gradient, status = map(tf.convert_to_tensor, compute(*(tensor.numpy() for tensor in arguments)))
    else:
        loss, gradient, status = tf.numpy_function(compute, arguments, [real, real, tf.int32], stateful=False)
        for found, like in ((loss, lines.label_length), (gradient, lines.logits), (status, lines.label_length)):
            found.set_shape(like.shape)
    return loss, gradient, status


def _needs_xla() -> bool:
    """In a caller that XLA compiles nothing can call back to the CPU, and with a GPU nothing should."""
    return is_compiled_by_xla() or any(device.device_type != "CPU" for device in tf.config.list_logical_devices())


def _hessian_vector_product(lines: Lines, direction: tf.Tensor, options: _Options) -> tf.Tensor:
    @tf.custom_gradient
    def product_of(logits: tf.Tensor, direction: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def third_derivative(*_: tf.Tensor) -> None:
            raise LookupError("ctc_loss has no third derivative: it can be differentiated twice, in reverse mode.")

        stopped = lines._replace(logits=tf.stop_gradient(logits))
        return kernel_xla.hessian_vector_product(stopped, tf.stop_gradient(direction), *options), third_derivative

    return product_of(lines.logits, direction)
