"""The network: a CRNN with column max-pooling and a CTC shortcut head.

Source: Retsinas et al., Best practices for a handwritten text recognition system (DAS 2022, arXiv 2404.11339): aspect
kept, maximum over the rows instead of concatenating them, an auxiliary CTC head straight on the convolutions.
"""

import hashlib
import os
from itertools import zip_longest
from typing import Any

import keras
import llvmlite.binding
import tensorflow as tf

from htr_pipeline.core import cudnn
from htr_pipeline.core.config import UserError
from htr_pipeline.core.distribution import summed
from htr_pipeline.core.image import DOWNSAMPLING
from htr_pipeline.core.recipe import DEFAULT_SIZE, ModelConfig
from htr_pipeline.core.recurrent import lstm
from htr_pipeline.core.text import Charset

_PACKAGE = "htr_pipeline"
# Filters of the convolutions, layers and units of the recurrent part. L: the parameters of Retsinas et al. in 3 x 3
# convolutions without detours around them.
_SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "XS": ((12, 24, 32, 48, 64), 1, 96),
    "S": ((16, 32, 48, 64, 96), 2, 128),
    "SM": ((16, 32, 64, 96, 128), 2, 192),
    "M": ((32, 64, 96, 128, 192), 2, 256),
    "L": ((32, 64, 128, 128, 192, 192, 256, 256, 256), 3, 256),
}
# (width, height) pooling after the first convolutions; the widths multiply to DOWNSAMPLING.
_POOLS = ((2, 2), (2, 2), (1, 2))


@keras.saving.register_keras_serializable(_PACKAGE)
class FrameLength(keras.layers.Layer):
    """(B,) int32 widths in pixels to (B,) int32 valid frames: image.num_frames for tensors."""

    def call(self, width_pixels: tf.Tensor) -> tf.Tensor:
        """Rounded up."""
        return (width_pixels + (DOWNSAMPLING - 1)) // DOWNSAMPLING

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Unchanged."""
        return input_shape


@keras.saving.register_keras_serializable(_PACKAGE)
class MaskPadding(keras.layers.Layer):
    """Sets everything to the right of a line's last frame to zero, so that padding cannot change its result.

    Args:
        columns_per_frame: columns of the features that make one frame at the network's end.
    """

    def __init__(self, columns_per_frame: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns_per_frame = columns_per_frame

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """(B, columns, rows, channels) features and (B,) int32 frame lengths to features of the same shape."""
        features, length = inputs
        mask = tf.sequence_mask(length * self.columns_per_frame, tf.shape(features)[1], dtype=features.dtype)
        return features * mask[:, :, tf.newaxis, tf.newaxis]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the features."""
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, for saving."""
        return {**super().get_config(), "columns_per_frame": self.columns_per_frame}


@keras.saving.register_keras_serializable(_PACKAGE)
class FusedBatchNorm(keras.layers.Layer):
    """Batch normalisation over the last axis in TensorFlow's fused kernel; Keras' own takes several passes on a CPU.

    Args:
        momentum: of the moving statistics. Few steps are taken on little data: 0.99 would lag behind.
        epsilon: added to the variance.
    """

    def __init__(self, momentum: float = 0.95, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        """Makes scale, offset and the moving statistics, (channels,) float32 each."""

        def weights(name: str, initializer: str, trainable: bool) -> Any:
            # Never cast, also where the features are bfloat16.
            return self.add_weight(
                name=name,
                shape=(input_shape[-1],),
                initializer=initializer,
                trainable=trainable,
                dtype="float32",
                autocast=False,
            )

        self.gamma = weights("gamma", "ones", trainable=True)
        self.beta = weights("beta", "zeros", trainable=True)
        self.mean = weights("mean", "zeros", trainable=False)
        self.variance = weights("variance", "ones", trainable=False)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """(B, W, H, channels) to the same shape."""
        scale, offset = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        if not training:
            return tf.compat.v1.nn.fused_batch_norm(
                inputs,
                scale,
                offset,
                tf.convert_to_tensor(self.mean),
                tf.convert_to_tensor(self.variance),
                epsilon=self.epsilon,
                is_training=False,
            )[0]
        is_alone = tf.distribute.get_strategy().num_replicas_in_sync == 1
        outputs, mean, variance = (self._fused if is_alone else self._over_replicas)(inputs, scale, offset)
        for moving, batch in ((self.mean, mean), (self.variance, variance)):
            moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        return outputs

    def _fused(self, inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tf.compat.v1.nn.fused_batch_norm(inputs, scale, offset, epsilon=self.epsilon)

    def _over_replicas(self, inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """What the fused kernel would return for the rows of all replicas, of which each has equally many."""
        features = tf.cast(inputs, tf.float32)
        moments = tf.stack([tf.reduce_mean(features, [0, 1, 2]), tf.reduce_mean(features * features, [0, 1, 2])])
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        mean, mean_of_squares = tf.unstack(summed(moments) / num_replicas)
        variance = tf.maximum(mean_of_squares - mean * mean, 0.0)
        outputs = tf.nn.batch_normalization(features, mean, variance, offset, scale, self.epsilon)
        count = num_replicas * tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)
        return tf.cast(outputs, inputs.dtype), mean, variance * count / (count - 1.0)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Unchanged."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, for saving."""
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@keras.saving.register_keras_serializable(_PACKAGE)
class BidirectionalLSTM(keras.layers.Layer):
    """An LSTM over the frames and one over the reversed valid frames, outputs concatenated.

    Unlike in keras.layers.Bidirectional, the backward LSTM starts at the line's own last frame and not in the padding.

    Args:
        units: size of each direction.
    """

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # call knows which products bear it
        self.units = units

    def build(self, input_shape: Any) -> None:
        """Makes kernel, recurrent kernel and bias of each direction for (B, T, features)."""
        features, gates = input_shape[0][-1], 4 * self.units

        def weights(name: str, shape: tuple[int, ...], initializer: Any) -> list[Any]:
            return [
                self.add_weight(
                    name=f"{direction}_{name}", shape=shape, initializer=initializer, dtype="float32", autocast=False
                )
                for direction in ("forward", "backward")
            ]

        self.kernels = weights("kernel", (features, gates), "glorot_uniform")
        self.recurrent_kernels = weights("recurrent_kernel", (self.units, gates), "orthogonal")
        self.biases = weights("bias", (gates,), self._open_forget_gates)

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tf.Tensor:
        """(B, T, features) and (B,) int32 lengths to (B, T, 2 * units)."""
        features, length = inputs
        features = tf.cast(features, tf.float32 if cudnn.is_available() else self.compute_dtype)
        forward = tf.transpose(features, [1, 0, 2])
        directions = (forward, self._reversed(forward, length))
        # No direction waits for the other: TensorFlow runs the two loops on two cores.
        hidden = [
            self._run(x, length, training, *map(tf.convert_to_tensor, weights))
            for x, *weights in zip(directions, self.kernels, self.recurrent_kernels, self.biases, strict=True)
        ]
        return self._joined(hidden[0], hidden[1], length)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """(B, T, 2 * units)."""
        return (*input_shape[0][:2], 2 * self.units)

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments, for saving."""
        return {**super().get_config(), "units": self.units}

    def _open_forget_gates(self, shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
        # 1 for the second of the four gates (Jozefowicz et al., 2015): what was seen is kept until training says else.
        return tf.repeat(tf.constant([0, 1, 0, 0], dtype), self.units)

    def _joined(self, forward: tf.Tensor, backward: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
        return tf.transpose(tf.concat([forward, self._reversed(backward, length)], axis=-1), [1, 0, 2])

    def _run(
        self,
        frames: tf.Tensor,
        length: tf.Tensor,
        training: bool,
        kernel: tf.Tensor,
        recurrent_kernel: tf.Tensor,
        bias: tf.Tensor,
    ) -> tf.Tensor:
        if cudnn.is_available():
            return cudnn.lstm(frames, length, kernel, recurrent_kernel, bias)
        # As one matrix: the gradient of a product of three by two dimensions takes three times as long.
        as_matrix = tf.reshape(frames, [-1, frames.shape[-1]])
        projected = tf.cast(tf.matmul(as_matrix, tf.cast(kernel, self.compute_dtype)), tf.float32) + bias
        projected = tf.reshape(projected, tf.concat([tf.shape(frames)[:-1], [projected.shape[-1]]], axis=0))
        return lstm(projected, recurrent_kernel, training)

    @staticmethod
    def _reversed(frames: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
        return tf.reverse_sequence(frames, length, seq_axis=0, batch_axis=1)


def build_model(config: ModelConfig, num_classes: int, height_pixels: int, seed: int) -> keras.Model:
    """A network from line images to logits.

    Args:
        config: size and dropout; without a size it is DEFAULT_SIZE.
        num_classes: characters plus the blank, which is the last class.
        height_pixels: height of the line images.
        seed: of the initial weights and of dropout.

    Returns:
        A model of {"pixels": (B, W, height_pixels) uint8, "width_pixels": (B,) int32}, W a multiple of DOWNSAMPLING,
        that returns {"logits": (B, W / 4, num_classes) float32, "shortcut_logits": the same shape, for training only}.
        Frames past num_frames(width_pixels) are padding and influence no valid frame.
    """
    filters, recurrent_layers, units = _SIZES[config.size or DEFAULT_SIZE]
    keras.utils.set_random_seed(seed)
    pixels = keras.Input((None, height_pixels), dtype="uint8", name="pixels")
    width = keras.Input((), dtype="int32", name="width_pixels")
    length = FrameLength(name="frame_length")(width)
    x = keras.layers.Rescaling(1.0 / 255.0, name="rescale")(pixels)
    x = keras.layers.Reshape((-1, height_pixels, 1), name="channel")(x)
    columns_per_frame = DOWNSAMPLING
    for index, (channels, pool) in enumerate(zip_longest(filters, _POOLS, fillvalue=(1, 1)), start=1):
        x = keras.layers.Conv2D(channels, 3, padding="same", use_bias=False, name=f"conv_{index}")(x)
        if pool != (1, 1):
            # Before the normalisation, which then has a quarter of the work and nearly the same result.
            x = keras.layers.MaxPooling2D(pool, padding="same", name=f"pool_{index}")(x)
            columns_per_frame //= pool[0]
        x = FusedBatchNorm(name=f"norm_{index}")(x)
        x = keras.layers.ReLU(name=f"relu_{index}")(x)
        x = MaskPadding(columns_per_frame, name=f"mask_{index}")([x, length])
    columns = keras.layers.Reshape((-1, channels), name="columns")(
        keras.layers.MaxPooling2D((1, x.shape[2]), name="column_max")(x)
    )
    columns = keras.layers.Dropout(config.column_dropout, seed=seed + 1, name="column_dropout")(columns)
    x = columns
    for index in range(1, recurrent_layers + 1):
        x = BidirectionalLSTM(units, name=f"recurrent_{index}")([x, length])
        x = keras.layers.Dropout(config.recurrent_dropout, seed=seed + 1 + index, name=f"recurrent_dropout_{index}")(x)
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    shortcut = keras.layers.Conv1D(num_classes, 3, padding="same", dtype="float32", name="shortcut_logits")(columns)
    return keras.Model(
        {"pixels": pixels, "width_pixels": width}, {"logits": logits, "shortcut_logits": shortcut}, name="htr"
    )


def size_of(model: keras.Model) -> str | None:
    """The size of a network of build_model; None where it has none of today's."""
    filters = tuple(layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    units = [layer.units for layer in model.layers if isinstance(layer, BidirectionalLSTM)]
    return next((size for size, (f, n, u) in _SIZES.items() if (f, [u] * n) == (filters, units)), None)


def chosen_precision(precision: str) -> str:
    """What the convolutional part trains in on this machine.

    Args:
        precision: float32, mixed_bfloat16, or auto: the latter where all GPUs, or without one the processor, compute
            in bfloat16 by instructions of their own; elsewhere it would take many times as long.
    """
    if precision != "auto":
        return precision
    if gpus := tf.config.list_physical_devices("GPU"):
        capabilities = [tf.config.experimental.get_device_details(gpu).get("compute_capability") for gpu in gpus]
        is_fast = all(capability and capability >= (8, 0) for capability in capabilities)
    else:
        uses_onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
        is_fast = uses_onednn and llvmlite.binding.get_host_cpu_features().get("avx512bf16", False)
    return "mixed_bfloat16" if is_fast else "float32"


def set_precision(model: keras.Model, precision: str) -> None:
    """Sets the type that the convolutions and the products of their columns with the recurrent kernels compute in.

    The recurrence itself, logits and the statistics of the normalisations are always float32, and so are the weights.

    Args:
        model: of build_model.
        precision: float32 or mixed_bfloat16.
    """
    for layer in model.layers:
        if not layer.name.startswith(("recurrent_dropout", "logits", "shortcut_logits")):
            layer.dtype_policy = keras.DTypePolicy(precision)


def copy_weights(trained: keras.Model, trained_charset: Charset, model: keras.Model, charset: Charset) -> None:
    """Gives a new network the weights of a trained one; classes are carried over by their character.

    Characters that are new keep the initial weights of the new network.

    Args:
        trained: of build_model, of the same size, with the classes of its charset; any height of lines.
        trained_charset: its characters.
        model: the new network; its weights are changed.
        charset: its characters.

    Raises:
        UserError: the two differ in more than their classes.
    """
    kept = [c for c in charset.characters if c in trained_charset]
    old = [trained_charset.characters.index(c) for c in kept] + [trained_charset.blank_index]
    new = [charset.characters.index(c) for c in kept] + [charset.blank_index]
    sources = {layer.name: layer.get_weights() for layer in trained.layers}
    for layer in model.layers:
        ours, theirs = layer.get_weights(), sources.get(layer.name, [])
        is_head = layer.name in ("logits", "shortcut_logits")
        shapes, expected = ([a.shape[: -1 if is_head else None] for a in arrays] for arrays in (theirs, ours))
        if shapes != expected:
            raise UserError(
                f"The network to start from has other weights in its layer {layer.name!r}: shapes {shapes}, expected "
                f"{expected}. Start from a network that this version of htr_pipeline has trained."
            )
        if is_head:
            for array, source in zip(ours, theirs, strict=True):
                array[..., new] = source[..., old]
        layer.set_weights(ours if is_head else theirs)


def weights_hash(model: keras.Model) -> str:
    """SHA-256 of all weights: tells whether figures were measured with this very network."""
    return hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()


def multiplications(model: keras.Model, width_pixels: int) -> int:
    """Multiplications of one line of that width through a network of build_model, as it reads.

    The shortcut head, which only training has, is not counted.
    """
    total, columns = 0, width_pixels
    for layer in model.layers:
        if isinstance(layer, keras.layers.MaxPooling2D) and layer.name.startswith("pool_"):
            columns //= layer.pool_size[0]
        elif isinstance(layer, keras.layers.Conv2D):
            total += columns * layer.output.shape[2] * layer.kernel.shape.num_elements()
        elif isinstance(layer, keras.layers.Dense):
            total += columns * layer.kernel.shape.num_elements()
        elif isinstance(layer, BidirectionalLSTM):
            total += columns * sum(k.shape.num_elements() for k in (*layer.kernels, *layer.recurrent_kernels))
    return total
