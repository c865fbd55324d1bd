"""An LSTM as a loop over the frames with its gradient written out.

What Keras' LSTM does in every step (input projection, and in the gradient the outer products of both kernels) is done
here once for all frames as large matrix products; the loop keeps what truly depends on the frame before.
"""

import tensorflow as tf

# Training compiles the loop over so many frames, and calls it until a line is through: compiled once, not for each
# width. Batches are padded to a multiple of it (batching.WIDTH_MULTIPLE_PIXELS).
_CHUNK_FRAMES = 16


def lstm(projected: tf.Tensor, recurrent_kernel: tf.Tensor, training: bool) -> tf.Tensor:
    """Hidden states of all frames, from the first to the last.

    Args:
        projected: (T, B, 4 * units) float32. Input times kernel plus bias; input, forget and output gate, then
            candidate.
        recurrent_kernel: (units, 4 * units) float32.
        training: compiles the loop with XLA, once for each B, and writes the gradient out. Otherwise nothing is
            compiled: a server meets too many shapes once each.

    Returns:
        (T, B, units) float32.

    Source: Hochreiter and Schmidhuber, Neural Computation 9 (1997), with the forget gate of Gers et al. (2000).
    """
    if training:
        return _trained(projected, recurrent_kernel)
    zeros = tf.zeros_like(projected[0, :, : recurrent_kernel.shape[0]])
    return _run(projected, recurrent_kernel, zeros, zeros)[0]


@tf.custom_gradient
def _trained(projected: tf.Tensor, recurrent_kernel: tf.Tensor) -> tuple[tf.Tensor, object]:
    units = recurrent_kernel.shape[0]
    frames = tf.shape(projected)[0]
    num_chunks = -(-frames // _CHUNK_FRAMES)
    zeros = tf.zeros_like(projected[0, :, :units])

    def to_chunks(x: tf.Tensor) -> tf.Tensor:
        x = tf.pad(x, [[0, -frames % _CHUNK_FRAMES], [0, 0], [0, 0]])
        return tf.reshape(x, [num_chunks, _CHUNK_FRAMES, -1, x.shape[-1]])

    def to_frames(x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, [num_chunks * _CHUNK_FRAMES, -1, x.shape[-1]])

    def chunks_of(size: int) -> tf.TensorArray:
        return tf.TensorArray(tf.float32, num_chunks, element_shape=[_CHUNK_FRAMES, None, size])

    inputs = to_chunks(projected)

    def forward(c, hidden, cell, all_hidden, all_cells, all_gates):
        hiddens, cells, gates = _compiled_run(inputs[c], recurrent_kernel, hidden, cell)
        written = all_hidden.write(c, hiddens), all_cells.write(c, cells), all_gates.write(c, gates)
        return c + 1, tf.ensure_shape(hiddens[-1], zeros.shape), tf.ensure_shape(cells[-1], zeros.shape), *written

    state = (0, zeros, zeros, chunks_of(units), chunks_of(units), chunks_of(4 * units))
    done = tf.while_loop(lambda c, *_: c < num_chunks, forward, state, maximum_iterations=num_chunks)
    hidden, cells, gates = (chunks.stack() for chunks in done[3:])

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        upstream = to_chunks(upstream)
        transposed_kernel = tf.transpose(recurrent_kernel)  # once, not in every step
        cells_before = tf.concat([zeros[tf.newaxis], cells[:-1, -1]], axis=0)

        def backward(c, from_next, cell_gradient, all_gates):
            by_gate, from_next, cell_gradient = _compiled_gradient(
                upstream[c], cells_before[c], cells[c], gates[c], transposed_kernel, from_next, cell_gradient
            )
            carried = tf.ensure_shape(from_next, zeros.shape), tf.ensure_shape(cell_gradient, zeros.shape)
            return c - 1, *carried, all_gates.write(c, by_gate)

        state = (num_chunks - 1, zeros, zeros, chunks_of(4 * units))
        done = tf.while_loop(lambda c, *_: c >= 0, backward, state, maximum_iterations=num_chunks)
        by_gate = to_frames(done[3].stack())
        hidden_before = tf.concat([zeros[tf.newaxis], to_frames(hidden)[:-1]], axis=0)

        def as_matrix(x: tf.Tensor) -> tf.Tensor:
            return tf.reshape(x, [-1, x.shape[-1]])

        return by_gate[:frames], tf.matmul(as_matrix(hidden_before), as_matrix(by_gate), transpose_a=True)

    return to_frames(hidden)[:frames], gradient


def _run(
    projected: tf.Tensor, recurrent_kernel: tf.Tensor, hidden: tf.Tensor, cell: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Hidden states, cells and opened gates of all frames from the hidden state and the cell before the first."""
    units = recurrent_kernel.shape[0]
    frames = tf.shape(projected)[0]

    def step(t, hidden, cell, all_hidden, all_cells, all_gates):
        gates = projected[t] + tf.matmul(hidden, recurrent_kernel)  # (B, 4 * units)
        opened = tf.sigmoid(gates[..., : 3 * units])
        candidate = tf.tanh(gates[..., 3 * units :])
        i, f, o = opened[..., :units], opened[..., units : 2 * units], opened[..., 2 * units :]
        cell = f * cell + i * candidate
        hidden = o * tf.tanh(cell)
        gates = tf.concat([opened, candidate], axis=-1)
        return (t + 1, hidden, cell, all_hidden.write(t, hidden), all_cells.write(t, cell), all_gates.write(t, gates))

    arrays = [tf.TensorArray(tf.float32, frames, element_shape=x.shape) for x in (hidden, cell, projected[0])]
    state = (0, hidden, cell, *arrays)
    done = tf.while_loop(lambda t, *_: t < frames, step, state, maximum_iterations=frames)
    return done[3].stack(), done[4].stack(), done[5].stack()


def _gradient(
    upstream: tf.Tensor,
    cell_before: tf.Tensor,
    cells: tf.Tensor,
    gates: tf.Tensor,
    transposed_kernel: tf.Tensor,
    from_next: tf.Tensor,
    cell_gradient: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Gradient by the gates of all frames, and by the hidden state and the cell before the first."""
    units = transposed_kernel.shape[1]
    frames = tf.shape(upstream)[0]
    earlier_cells = tf.concat([cell_before[tf.newaxis], cells[:-1]], axis=0)

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
        from_next = tf.matmul(by_gate, transposed_kernel)
        return t - 1, from_next, cell_gradient * f, all_gates.write(t, by_gate)

    all_gates = tf.TensorArray(tf.float32, frames, element_shape=gates.shape[1:])
    state = (frames - 1, from_next, cell_gradient, all_gates)
    done = tf.while_loop(lambda t, *_: t >= 0, step, state, maximum_iterations=frames)
    return done[3].stack(), done[1], done[2]


_compiled_run = tf.function(_run, jit_compile=True, autograph=False)
_compiled_gradient = tf.function(_gradient, jit_compile=True, autograph=False)
