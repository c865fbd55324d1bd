"""ctc_loss for model.fit.

Keras hands a loss one tensor of targets for one output, so the lengths travel in front of the labels.
"""

from typing import Any

import keras
import tensorflow as tf

from htr_pipeline.core.ctc.inputs import checked_lengths, dense_labels
from htr_pipeline.core.ctc.loss import ctc_loss


def pack_targets(labels: Any, label_length: Any, logit_length: Any) -> tf.Tensor:
    """The y_true of CTCLoss, (B, 2 + N) int32: label_length, logit_length and the labels of each row.

    Args:
        labels: as for ctc_loss, in any of its forms.
        label_length: (B,) as for ctc_loss; None with ragged or sparse labels.
        logit_length: (B,) number of frames that the model gives for each line.
    """
    labels, label_length = dense_labels(labels, label_length)
    logit_length = checked_lengths(logit_length, "logit_length")
    num_rows, num_lengths = label_length.shape[0], logit_length.shape[0]
    if None not in (num_rows, num_lengths) and num_rows != num_lengths:
        raise ValueError(
            f"logit_length has {num_lengths} lengths for {num_rows} rows of labels: expected one for each."
        )
    lengths = tf.stack([label_length, logit_length], axis=1)
    return tf.concat([lengths, labels], axis=1)


@keras.saving.register_keras_serializable(package="htr_pipeline")
class CTCLoss(keras.losses.Loss):
    """ctc_loss of y_true = pack_targets(...) and y_pred = logits (B, T, K).

    keras.losses.CTC takes every frame for one of the line and every label but 0 for one of the text; here the lengths
    say so. A Keras mask of the logits is ignored for the same reason. A row of sample_weight 0 is not looked at: it
    gives 0 and raises nothing, whatever it holds.

    Args:
        blank_index: as for ctc_loss.
        preprocess_collapse_repeated: as for ctc_loss.
        ctc_merge_repeated: as for ctc_loss.
        infeasible: as for ctc_loss; with "zero" one line that does not fit does not ruin the mean.
        reduction: as for every Keras loss; None gives (B,) losses.
        name: as for every Keras loss.
    """

    def __init__(
        self,
        *,
        blank_index: int = -1,
        preprocess_collapse_repeated: bool = False,
        ctc_merge_repeated: bool = True,
        infeasible: str = "zero",
        reduction: str | None = "sum_over_batch_size",
        name: str = "ctc_loss",
    ) -> None:
        # Keras casts y_true to this type: classes would not survive half precision.
        super().__init__(name, reduction, "float64" if keras.config.floatx() == "float64" else "float32")
        self.options: dict[str, Any] = {
            "blank_index": blank_index,
            "preprocess_collapse_repeated": preprocess_collapse_repeated,
            "ctc_merge_repeated": ctc_merge_repeated,
            "infeasible": infeasible,
        }

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        """Loss of the batch, reduced."""
        if sample_weight is not None:
            counts = tf.not_equal(tf.cast(tf.reshape(sample_weight, [-1, 1]), tf.float32), 0)
            y_true = tf.where(counts, y_true, 0)  # 0: an empty label in no frames
        return super().__call__(y_true, tf.identity(y_pred), sample_weight)  # tf.identity: without the mask

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """(B,) losses."""
        y_true = tf.convert_to_tensor(y_true)
        if y_true.shape.rank not in (2, None) or y_true.shape[1] in (0, 1):
            raise ValueError(f"y_true has shape {y_true.shape}: expected (batch, 2 + labels), made by pack_targets.")
        y_true = tf.cast(y_true, tf.int32)
        return ctc_loss(y_true[:, 2:], y_pred, y_true[:, 0], y_true[:, 1], **self.options)

    def get_config(self) -> dict[str, Any]:
        """What from_config needs."""
        return {**super().get_config(), **self.options}
