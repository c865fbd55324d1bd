"""The LSTM of a GPU: one kernel for all frames."""

import tensorflow as tf


def is_available() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.list_logical_devices("GPU"))


def lstm(
    frames: tf.Tensor, length: tf.Tensor, kernel: tf.Tensor, recurrent_kernel: tf.Tensor, bias: tf.Tensor
) -> tf.Tensor:
    """Hidden states of one LSTM; zero past each length.

    Args:
        frames: (T, B, features) float32.
        length: (B,) int32 valid frames; 0 is taken for 1, since cuDNN accepts no empty rows.
        kernel: (features, 4 * units) float32, gates in the order of core.recurrent.
        recurrent_kernel: (units, 4 * units) float32.
        bias: (4 * units,) float32.

    Returns:
        (T, B, units) float32.
    """
    zeros = tf.zeros([1, tf.shape(frames)[1], recurrent_kernel.shape[0]], frames.dtype)
    return tf.raw_ops.CudnnRNNV3(
        input=frames,
        input_h=zeros,
        input_c=zeros,
        params=packed_weights(kernel, recurrent_kernel, bias),
        sequence_lengths=tf.maximum(length, 1),
        rnn_mode="lstm",
        is_training=True,  # keeps what the gradient needs
        time_major=True,
    ).output


def packed_weights(kernel: tf.Tensor, recurrent_kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """All weights in the one vector that cuDNN takes.

    First each gate's kernel, then each gate's recurrent kernel, transposed; then the biases of both, of which we have
    one: the other is zero. Source: _standardize_cudnn_weights in keras/src/backend/tensorflow/rnn.py.
    """
    kernel, recurrent_kernel, bias = (in_order_of_cudnn(weights) for weights in (kernel, recurrent_kernel, bias))
    gates = tf.split(kernel, 4, axis=1) + tf.split(recurrent_kernel, 4, axis=1)
    matrices = [tf.reshape(tf.transpose(gate), [-1]) for gate in gates]
    return tf.concat([*matrices, tf.zeros_like(bias), bias], axis=0)


def in_order_of_cudnn(weights: tf.Tensor) -> tf.Tensor:
    """Gates along the last axis from ours (input, forget, output, candidate) to input, forget, candidate, output."""
    i, f, o, candidate = tf.split(weights, 4, axis=-1)
    return tf.concat([i, f, candidate, o], axis=-1)
