import numpy as np
import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.recipe import ModelConfig
from htr_pipeline.core.text import Charset

keras = pytest.importorskip("keras")

from htr_pipeline.core.model import (  # noqa: E402  after TensorFlow is known to be there
    FusedBatchNorm,
    build_model,
    chosen_precision,
    copy_weights,
    multiplications,
    set_precision,
)

NUM_CLASSES = 11


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig(size="XS"), NUM_CLASSES, 32, seed=3)


def random_lines(widths, padded_width):
    pixels = np.zeros((len(widths), padded_width, 32), np.uint8)
    rng = np.random.default_rng(1)
    for row, width in enumerate(widths):
        pixels[row, :width] = rng.integers(0, 256, (width, 32))
    return {"pixels": pixels, "width_pixels": np.array(widths, np.int32)}


def test_one_frame_of_logits_for_four_pixels_of_width(model):
    logits = model(random_lines([100, 128], 128))["logits"]
    assert logits.shape == (2, 32, NUM_CLASSES)
    assert logits.dtype == "float32"


@pytest.mark.parametrize("width", [1, 37, 100, 125])
def test_padding_and_neighbours_change_nothing(model, width):
    together = random_lines([width, 190], 256)
    alone = {"pixels": together["pixels"][:1, : num_frames(width) * 4], "width_pixels": together["width_pixels"][:1]}
    frames = num_frames(width)
    for head in ("logits", "shortcut_logits"):
        left, right = np.asarray(model(together)[head])[0, :frames], np.asarray(model(alone)[head])[0, :frames]
        # Rounding differs with the shape of the batch; true differences would be near 1.
        np.testing.assert_allclose(left, right, atol=2e-5)


def test_a_filler_row_is_harmless(model):
    assert np.isfinite(np.asarray(model(random_lines([0, 64], 64))["logits"])).all()


def test_a_saved_model_gives_the_same_logits(model, tmp_path):
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    lines = random_lines([100, 128], 128)
    np.testing.assert_array_equal(np.asarray(model(lines)["logits"]), np.asarray(again(lines)["logits"]))


def test_the_seed_fixes_the_initial_weights():
    def weights(seed):
        return build_model(ModelConfig(size="XS"), NUM_CLASSES, 32, seed=seed).get_weights()

    assert all(np.array_equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights(3), weights(4), strict=True))


def test_forget_gates_are_open_at_the_beginning(model):
    units = model.get_layer("recurrent_1").units
    for bias in model.get_layer("recurrent_1").biases:
        opened = np.flatnonzero(bias)
        assert (opened == np.arange(units, 2 * units)).all()


def test_sizes_are_as_documented():
    parameters = {
        size: build_model(ModelConfig(size=size), 101, 48, seed=0).count_params()
        for size in ("XS", "S", "SM", "M", "L")
    }
    assert 0.1e6 < parameters["XS"] < 0.3e6
    assert 0.7e6 < parameters["S"] < 0.9e6
    assert 1.6e6 < parameters["SM"] < 1.7e6
    assert 3e6 < parameters["M"] < 4e6
    assert 6.5e6 < parameters["L"] < 7.5e6


def test_multiplications_of_a_line_are_those_of_its_layers():
    # Columns x rows x kernel of each convolution, then frames x (both kernels of both directions, logits).
    convolutions = 400 * 32 * 9 * 12 + 200 * 16 * 9 * 12 * 24 + 100 * 8 * 9 * 24 * 32
    convolutions += 100 * 4 * 9 * (32 * 48 + 48 * 64)
    recurrent = 100 * 2 * 4 * 96 * (64 + 96)
    expected = convolutions + recurrent + 100 * 2 * 96 * NUM_CLASSES
    assert multiplications(build_model(ModelConfig(size="XS"), NUM_CLASSES, 32, seed=0), 400) == expected


def fine_tuned(trained, old, new, height=32):
    model = build_model(ModelConfig(size="XS"), Charset(new).num_classes, height, seed=9)
    copy_weights(trained, Charset(old), model, Charset(new))
    return model


def test_kept_characters_and_the_blank_have_the_logits_that_they_had(model):
    lines = random_lines([100, 128], 128)
    old, new = "0123456789", "9876543210abc"
    tuned = fine_tuned(model, old, new)
    kept = [new.index(character) for character in old] + [len(new)]
    for head in ("logits", "shortcut_logits"):
        before, after = np.asarray(model(lines)[head]), np.asarray(tuned(lines)[head])
        np.testing.assert_allclose(after[..., kept], before, atol=1e-5)


def test_characters_may_go(model):
    tuned = fine_tuned(model, "0123456789", "02")
    assert tuned(random_lines([100], 128))["logits"].shape[-1] == 3


def test_another_height_is_no_hindrance_and_another_size_is_named(model):
    fine_tuned(model, "0123456789", "0123456789", height=48)
    other = build_model(ModelConfig(size="S"), NUM_CLASSES, 32, seed=1)
    with pytest.raises(UserError, match=r"in its layer 'conv_1'.*Start from a network that this version of"):
        copy_weights(model, Charset("0123456789"), other, Charset("0123456789"))


def test_in_mixed_precision_what_follows_the_recurrent_layers_is_float32():
    model = build_model(ModelConfig(size="XS"), NUM_CLASSES, 32, seed=3)
    lines = random_lines([100, 128], 128)
    exact = {name: np.asarray(x) for name, x in model(lines).items()}
    set_precision(model, "mixed_bfloat16")
    types = {layer.name: layer.compute_dtype for layer in model.layers}
    assert types["conv_2"] == types["norm_2"] == types["recurrent_1"] == "bfloat16"
    assert types["recurrent_dropout_1"] == types["logits"] == types["shortcut_logits"] == "float32"
    hidden = model.get_layer("recurrent_1")((keras.ops.zeros((2, 16, 64), "bfloat16"), np.array([16, 9])))
    assert hidden.dtype == "float32"
    mixed = {name: np.asarray(x) for name, x in model(lines).items()}
    for name, logits in exact.items():
        assert mixed[name].dtype == np.float32
        assert 0 < np.abs(mixed[name] - logits).max() < 0.03 * np.abs(logits).max()
    assert all(x.dtype == "float32" for x in model(lines, training=True).values())
    assert {weight.dtype for weight in model.trainable_variables} == {"float32"}


@pytest.mark.parametrize(("features", "expected"), [({"avx512bf16": True}, "mixed_bfloat16"), ({}, "float32")])
def test_bfloat16_is_chosen_where_the_processor_has_it(monkeypatch, features, expected):
    import llvmlite.binding

    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert chosen_precision("auto") == expected
    assert chosen_precision("float32") == "float32"
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert chosen_precision("auto") == "float32", "TensorFlow's own kernels have no such instructions"


def test_the_normalisation_of_several_replicas_is_the_fused_one():
    import tensorflow as tf

    layer = FusedBatchNorm()
    rng = np.random.default_rng(4)
    inputs = tf.constant(rng.normal(0.5, 2.0, (4, 16, 8, 6)), tf.float32)
    upstream = tf.constant(rng.normal(size=inputs.shape), tf.float32)
    variables = [tf.constant(rng.uniform(0.5, 1.5, 6), tf.float32) for _ in range(2)]
    found = []
    for normalise in (layer._fused, layer._over_replicas):
        with tf.GradientTape() as tape:
            tape.watch([inputs, *variables])
            outputs, mean, variance = normalise(inputs, *variables)
        found.append([outputs, mean, variance, *tape.gradient(outputs, [inputs, *variables], upstream)])
    for fused, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours, fused, rtol=1e-5, atol=1e-5)
