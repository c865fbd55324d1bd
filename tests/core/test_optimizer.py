"""The optimizer on kernels of every form."""

import keras
import numpy as np
import pytest

from htr_pipeline.core.optimizer import Muon


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((40, 24), "kernel"),
        ((24, 40), "kernel"),
        ((3, 3, 8, 24), "kernel"),
        ((40, 4 * 24), "recurrent_kernel"),
        ((24, 4 * 40), "recurrent_kernel"),
        ((384, 4 * 192), "recurrent_kernel"),
    ],
)
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_the_update_of_a_matrix_has_all_singular_values_alike(shape, name, products):
    rng = np.random.default_rng(0)
    variable = keras.Variable(np.zeros(shape, np.float32), name=name)
    optimizer = Muon(0.01, weight_decay=0.0, clip_norm=0.0, products=products)
    optimizer.build([variable])
    # One direction, or one gate, a hundred times as steep as the rest: plain gradient descent would follow it alone.
    gradient = rng.standard_normal(shape).astype(np.float32)
    gradient[..., : shape[-1] // 4 if name == "recurrent_kernel" else 1] *= 100
    optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    matrix = np.asarray(variable).reshape(-1, shape[-1])
    for gate in np.split(matrix, 4 if name == "recurrent_kernel" else 1, axis=1):
        values = np.linalg.svd(gate, compute_uv=False)
        assert values.min() > 0.4 * values.max()
        root_mean_square = np.sqrt(np.mean(gate**2))
        assert 0.1 * 0.01 < root_mean_square < 0.4 * 0.01  # as large as an update of AdamW


def test_offsets_and_the_first_convolution_are_left_to_adamw():
    first = keras.Variable(np.zeros((3, 3, 1, 8), np.float32))
    bias = keras.Variable(np.zeros(8, np.float32), name="bias")
    optimizer = Muon(0.01, weight_decay=0.0, clip_norm=0.0)
    optimizer.build([first, bias])
    gradients = [np.full(v.shape, 5.0, np.float32) for v in (first, bias)]
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], [first, bias])
    for variable in (first, bias):  # the first step of Adam is the learning rate in every entry
        np.testing.assert_allclose(np.asarray(variable), -0.01, rtol=1e-3)
