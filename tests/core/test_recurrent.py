"""The LSTM loop beside Keras' LSTM, and its written gradient beside TensorFlow's."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from htr_pipeline.core.recurrent import lstm

UNITS = 5


@pytest.fixture
def tensors():
    random = np.random.default_rng(3)
    projected = random.normal(size=(37, 3, 4 * UNITS)).astype(np.float32)
    recurrent_kernel = random.normal(size=(UNITS, 4 * UNITS)).astype(np.float32)
    return tf.constant(projected), tf.constant(recurrent_kernel)


def test_hidden_states_are_those_of_keras(tensors):
    projected, recurrent_kernel = tensors
    hidden = lstm(projected, recurrent_kernel, training=False)
    cell = keras.layers.LSTM(UNITS, return_sequences=True, use_bias=False)
    cell.build((3, 37, 4 * UNITS))
    # Keras' order is input, forget, candidate, output; ours has the candidate last.
    i, f, o, c = np.split(np.arange(4 * UNITS), 4)
    cell.set_weights([np.eye(4 * UNITS), recurrent_kernel.numpy()[:, np.concatenate([i, f, c, o])]])
    frames = projected.numpy()[..., np.concatenate([i, f, c, o])].transpose(1, 0, 2)
    np.testing.assert_allclose(hidden, np.asarray(cell(frames)).transpose(1, 0, 2), atol=1e-6)


@pytest.mark.parametrize("frames", [1, 16, 37])
def test_the_written_gradient_is_the_gradient(tensors, frames):
    projected, recurrent_kernel = tensors[0][:frames], tensors[1]
    weights = tf.random.stateless_normal((frames, 3, UNITS), seed=[1, 2])

    @tf.function
    def hidden_and_gradients(training):
        with tf.GradientTape() as tape:
            tape.watch([projected, recurrent_kernel])
            hidden = lstm(projected, recurrent_kernel, training)
            total = tf.reduce_sum(hidden * weights)
        return [hidden, *tape.gradient(total, [projected, recurrent_kernel])]

    for plain, trained in zip(hidden_and_gradients(False), hidden_and_gradients(True), strict=True):
        np.testing.assert_allclose(trained, plain, atol=2e-5)
