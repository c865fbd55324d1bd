"""Both directions of an LSTM in one loop over the frames, with its gradient written out.

What Keras' LSTM does in every step (input projection, and in the gradient the outer products of both kernels) is done
here once for all frames as large matrix products; the loop keeps what truly depends on the frame before.
"""

import tensorflow as tf


def lstm(projected: tf.Tensor, recurrent_kernel: tf.Tensor, training: bool) -> tf.Tensor:
    """Hidden states of D independent LSTMs run side by side.

    Args:
        projected: (T, D, B, 4 * units) float32. Input times kernel plus bias; input, forget and output gate, then
            candidate.
        recurrent_kernel: (D, units, 4 * units) float32.
        training: compiles the loop with XLA, once for each shape, and writes the gradient out. Otherwise nothing is
            compiled: a server meets too many shapes once each.

    Returns:
        (T, D, B, units) float32.

    Source: Hochreiter and Schmidhuber, Neural Computation 9 (1997), with the forget gate of Gers et al. (2000).
    """
    return _trained(projected, recurrent_kernel) if training else _run(projected, recurrent_kernel)[0]


@tf.custom_gradient
def _trained(projected: tf.Tensor, recurrent_kernel: tf.Tensor) -> tuple[tf.Tensor, object]:
    hidden, cells, gates = _compiled_run(projected, recurrent_kernel)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _compiled_gradient(upstream, hidden, cells, gates, recurrent_kernel)

    return hidden, gradient


def _run(projected: tf.Tensor, recurrent_kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    units = recurrent_kernel.shape[1]
    frames = tf.shape(projected)[0]
    zeros = tf.zeros_like(projected[0, ..., :units])

    def arrays() -> tf.TensorArray:
        return tf.TensorArray(tf.float32, frames, element_shape=zeros.shape)

    def step(t, hidden, cell, all_hidden, all_cells, all_gates):
        gates = projected[t] + tf.matmul(hidden, recurrent_kernel)  # (D, B, 4 * units)
        opened = tf.sigmoid(gates[..., : 3 * units])
        candidate = tf.tanh(gates[..., 3 * units :])
        i, f, o = opened[..., :units], opened[..., units : 2 * units], opened[..., 2 * units :]
        cell = f * cell + i * candidate
        hidden = o * tf.tanh(cell)
        gates = tf.concat([opened, candidate], axis=-1)
        return (t + 1, hidden, cell, all_hidden.write(t, hidden), all_cells.write(t, cell), all_gates.write(t, gates))

    state = (0, zeros, zeros, arrays(), arrays(), tf.TensorArray(tf.float32, frames, element_shape=projected.shape[1:]))
    done = tf.while_loop(lambda t, *_: t < frames, step, state, maximum_iterations=frames)
    return done[3].stack(), done[4].stack(), done[5].stack()


def _gradient(
    upstream: tf.Tensor, hidden: tf.Tensor, cells: tf.Tensor, gates: tf.Tensor, recurrent_kernel: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    units = recurrent_kernel.shape[1]
    frames = tf.shape(upstream)[0]
    zeros = tf.zeros_like(upstream[0])
    earlier_cells = tf.concat([zeros[tf.newaxis], cells[:-1]], axis=0)

    def step(t, from_next, cell_gradient, all_gates):
        # Index first, cut then: where one slice mixes a running index and bounds, XLA (TensorFlow 2.21) reads
        # wrong values.
        gate = gates[t]
        opened, candidate = gate[..., : 3 * units], gate[..., 3 * units :]
        i, f, o = opened[..., :units], opened[..., units : 2 * units], opened[..., 2 * units :]
        hidden_gradient = upstream[t] + from_next
        squashed = tf.tanh(cells[t])
        cell_gradient = cell_gradient + hidden_gradient * o * (1.0 - squashed * squashed)
        by_gate = tf.concat(
            [
                cell_gradient * candidate * i * (1.0 - i),
                cell_gradient * earlier_cells[t] * f * (1.0 - f),
                hidden_gradient * squashed * o * (1.0 - o),
                cell_gradient * i * (1.0 - candidate * candidate),
            ],
            axis=-1,
        )
        from_next = tf.matmul(by_gate, recurrent_kernel, transpose_b=True)
        return t - 1, from_next, cell_gradient * f, all_gates.write(t, by_gate)

    state = (frames - 1, zeros, zeros, tf.TensorArray(tf.float32, frames, element_shape=gates.shape[1:]))
    by_gate = tf.while_loop(lambda t, *_: t >= 0, step, state, maximum_iterations=frames)[3].stack()
    earlier_hidden = tf.concat([zeros[tf.newaxis], hidden[:-1]], axis=0)
    return by_gate, tf.einsum("tdbu,tdbg->dug", earlier_hidden, by_gate)


_compiled_run = tf.function(_run, jit_compile=True, autograph=False, reduce_retracing=True)
_compiled_gradient = tf.function(_gradient, jit_compile=True, autograph=False, reduce_retracing=True)
