"""What of the GPU's LSTM can be checked without one: the order of the gates, and how weights are packed."""

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow.rnn import _standardize_cudnn_weights

from htr_pipeline.core.cudnn import in_order_of_cudnn, packed_weights
from htr_pipeline.core.model import BidirectionalLSTM

FEATURES, UNITS = 5, 7


def layer_with_weights():
    layer = BidirectionalLSTM(UNITS)
    layer.build([(None, None, FEATURES), (None,)])
    rng = np.random.default_rng(2)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    return layer


def test_with_reordered_gates_keras_lstm_computes_what_ours_does():
    # Keras hands its weights to cuDNN in the order in which it has them.
    layer = layer_with_weights()
    frames = np.random.default_rng(3).normal(size=(3, 9, FEATURES)).astype(np.float32)
    ours = np.asarray(layer((frames, np.full(3, 9, np.int32))))
    for direction, (kernel, recurrent_kernel, bias) in enumerate(
        zip(layer.kernels, layer.recurrent_kernels, layer.biases, strict=True)
    ):
        keras_lstm = keras.layers.LSTM(UNITS, return_sequences=True, go_backwards=bool(direction))
        keras_lstm.build((None, None, FEATURES))
        keras_lstm.set_weights([np.asarray(in_order_of_cudnn(w.value)) for w in (kernel, recurrent_kernel, bias)])
        theirs = np.asarray(keras_lstm(frames))[:, :: -1 if direction else 1]
        np.testing.assert_allclose(ours[..., direction * UNITS : (direction + 1) * UNITS], theirs, atol=1e-5)


def test_weights_are_packed_as_keras_packs_them():
    layer = layer_with_weights()
    weights = [w.value for w in (layer.kernels[0], layer.recurrent_kernels[0], layer.biases[0])]
    kernel, recurrent_kernel, bias = map(in_order_of_cudnn, weights)
    gates = tf.split(kernel, 4, axis=1) + tf.split(recurrent_kernel, 4, axis=1)
    biases = tf.split(tf.concat([tf.zeros_like(bias), bias], axis=0), 8)
    expected = _standardize_cudnn_weights(gates, biases, tf.constant([-1]), transpose_weights=True)
    np.testing.assert_array_equal(packed_weights(*weights), expected)
