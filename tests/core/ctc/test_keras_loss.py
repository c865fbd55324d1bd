"""CTCLoss in model.fit, on lines drawn with numpy, against ctc_loss itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from htr_pipeline.core.ctc.keras_loss import CTCLoss, pack_targets
from htr_pipeline.core.ctc.loss import ctc_loss

NUM_CLASSES = 4  # three letters and the blank


def draw_lines(num_lines=48, width=30, height=6):
    """Images (B, width, height) of one to four letters four columns wide, padded; one column is one frame."""
    rng = np.random.default_rng(0)
    letters = np.array([np.eye(4, height), np.ones((4, height)), np.tile([0, 1], (4, height // 2))])
    images, labels = rng.normal(0, 0.1, (num_lines, width, height)), np.zeros((num_lines, 4), np.int32)
    label_length = rng.integers(1, 5, num_lines)
    for image, label, length in zip(images, labels, label_length, strict=True):
        label[:length] = rng.integers(0, 3, length)
        for place in range(length):
            image[7 * place + 1 : 7 * place + 5] += letters[label[place]]
    return images.astype("float32"), labels, label_length, 7 * label_length


def build_model(dtype=None):
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((None, 6)),
            keras.layers.Conv1D(16, 5, padding="same", activation="relu", dtype=dtype),
            keras.layers.Dense(NUM_CLASSES, dtype=dtype),
        ]
    )


def random_batch(batch=5):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(batch, 9, NUM_CLASSES)).astype("float32")
    return rng.integers(0, 3, (batch, 3)), logits, rng.integers(0, 4, batch), rng.integers(6, 10, batch)


@pytest.mark.parametrize("how", [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_ten_epochs_of_fit_lower_the_loss(how, dtype):
    images, labels, label_length, logit_length = draw_lines()
    model = build_model(dtype)
    model.compile(keras.optimizers.Adam(0.01), CTCLoss(), **how)
    targets = pack_targets(labels, label_length, logit_length).numpy()
    history = model.fit(images, targets, batch_size=16, epochs=10, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    assert model.evaluate(images, targets, verbose=0) == pytest.approx(
        np.mean(ctc_loss(labels, model(images), label_length, logit_length)), rel=1e-2 if dtype != "float32" else 1e-5
    )


def test_loss_and_gradient_are_those_of_ctc_loss():
    labels, logits, label_length, logit_length = random_batch()
    weight = np.array([1.0, 0.5, 0.0, 2.0, 3.0], "float32")
    logits = tf.constant(logits)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        found = CTCLoss()(pack_targets(labels, label_length, logit_length), logits, weight)
        expected = tf.reduce_sum(weight * ctc_loss(labels, logits, label_length, logit_length)) / 5
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-6)
    np.testing.assert_allclose(tape.gradient(found, logits), tape.gradient(expected, logits), atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", "none", None])
def test_reductions_are_those_of_keras(reduction):
    labels, logits, label_length, logit_length = random_batch()
    rows = ctc_loss(labels, logits, label_length, logit_length).numpy()
    weight = np.array([1.0, 0.0, 2.0, 1.0, 0.5], "float32")
    expected = {"sum": (rows * weight).sum(), "mean_with_sample_weight": np.average(rows, weights=weight)}
    expected |= {name: (rows * weight).mean() for name in ("sum_over_batch_size", "mean")}
    expected |= {name: rows * weight for name in ("none", None)}
    loss = CTCLoss(reduction=reduction)
    targets = pack_targets(labels, label_length, logit_length)
    np.testing.assert_allclose(loss(targets, logits, weight), expected[reduction], rtol=1e-6)
    column = loss(targets, logits, weight[:, np.newaxis]).numpy()  # not reduced, Keras leaves it a column
    np.testing.assert_allclose(column.squeeze(), expected[reduction], rtol=1e-6)


@pytest.mark.parametrize("infeasible", ["inf", "zero", "raise"])
def test_a_row_of_weight_zero_is_not_looked_at(infeasible):
    logits = np.zeros((3, 4, NUM_CLASSES), "float32")
    logits[1] = np.nan
    # the first has too few frames, the second NaN
    targets = pack_targets([[0, 0], [0, 1], [0, 1]], [2, 2, 2], [2, 4, 4])
    loss, logits = CTCLoss(infeasible=infeasible, reduction="sum"), tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = loss(targets, logits, [0.0, 0.0, 1.0])
    assert found.numpy() == pytest.approx(ctc_loss([[0, 1]], logits[2:], [2])[0].numpy(), rel=1e-6)
    gradient = tape.gradient(found, logits).numpy()
    assert not gradient[:2].any()
    assert gradient[2].any()
    if infeasible == "raise":
        with pytest.raises(ValueError, match="row 0 has 2 labels that need 3 frames"):
            loss(targets[:1], logits[:1])
    else:
        assert loss(targets[:1], logits[:1]).numpy() == (0 if infeasible == "zero" else np.inf)


def test_fit_passes_sample_weights():
    images, labels, label_length, logit_length = draw_lines(num_lines=16)
    logit_length[0] = 0  # fits nothing
    model = build_model()
    model.compile(loss=CTCLoss(infeasible="inf"))
    weight = (np.arange(16) > 0).astype("float32")
    targets = pack_targets(labels, label_length, logit_length).numpy()
    before = model(images)
    (found,) = model.fit(images, targets, sample_weight=weight, batch_size=16, verbose=0).history["loss"]
    expected = np.sum(ctc_loss(labels, before, label_length, logit_length)[1:]) / 16
    assert found == pytest.approx(expected, rel=1e-5)


def test_high_classes_survive_mixed_precision():
    logits = np.zeros((1, 3, 5000), "float16")
    logits[0, :, 4097] = 20
    loss = CTCLoss()
    assert loss(pack_targets([[4097]], [1], [3]), logits).numpy() < 0.01
    assert loss(pack_targets([[4096]], [1], [3]), logits).numpy() > 10


@pytest.mark.parametrize("floatx", ["float16", "float64"])
def test_keras_float_type(floatx):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        assert CTCLoss().dtype == ("float64" if floatx == "float64" else "float32")
    finally:
        keras.config.set_floatx(before)


def test_mask_of_the_logits_is_ignored():
    labels, logits, label_length, logit_length = random_batch()
    targets = pack_targets(labels, label_length, logit_length)
    masked = keras.layers.Masking()(tf.constant(logits))
    assert masked._keras_mask is not None
    assert CTCLoss()(targets, masked).numpy() == CTCLoss()(targets, logits).numpy()


def test_packed_forms_of_labels_agree():
    expected = pack_targets([[1, 2], [0, 0]], [2, 1], [5, 4])
    np.testing.assert_array_equal(expected, [[2, 5, 1, 2], [1, 4, 0, 0]])
    assert expected.dtype == tf.int32
    ragged = tf.ragged.constant([[1, 2], [0]], dtype=tf.int64)
    for labels in (ragged, ragged.to_sparse()):
        np.testing.assert_array_equal(pack_targets(labels, None, [5, 4]), expected)
    np.testing.assert_array_equal(pack_targets([1, 2, 0], [2, 1], [5, 4]), expected)


def test_packs_inside_a_dataset():
    images, *targets = draw_lines(num_lines=16)
    targets = tuple(targets)
    lines = tf.data.Dataset.from_tensor_slices((images, targets)).batch(8)
    model = build_model()
    model.compile(loss=CTCLoss())
    from_dataset = model.evaluate(lines.map(lambda image, target: (image, pack_targets(*target))), verbose=0)
    assert from_dataset == pytest.approx(model.evaluate(images, pack_targets(*targets), batch_size=8, verbose=0))


def test_options_reach_the_loss():
    labels, logits = [[1, 1, 2]], random_batch(1)[1]
    options = {"blank_index": 0, "preprocess_collapse_repeated": True, "ctc_merge_repeated": False}
    found = CTCLoss(**options)(pack_targets(labels, [3], [9]), logits)
    assert found.numpy() == pytest.approx(ctc_loss(labels, logits, [3], [9], **options)[0].numpy(), rel=1e-6)


def test_saved_and_loaded_with_its_model(tmp_path):
    images, *lines = draw_lines(num_lines=8)
    targets = pack_targets(*lines).numpy()
    model = build_model()
    model.compile(loss=CTCLoss(infeasible="inf", reduction="sum", name="of_lines"))
    model.fit(images, targets, verbose=0)
    before = model.evaluate(images, targets, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.evaluate(images, targets, verbose=0) == pytest.approx(before, rel=1e-6)
    revived = keras.losses.deserialize(keras.losses.serialize(CTCLoss(blank_index=2)))
    assert revived.get_config() == CTCLoss(blank_index=2).get_config()


def test_unpacked_targets_are_an_error():
    logits = np.zeros((2, 4, NUM_CLASSES), "float32")
    with pytest.raises(ValueError, match=r"y_true has shape \(2, 1\): expected \(batch, 2 \+ labels\)"):
        CTCLoss()(np.ones((2, 1), int), logits)
    with pytest.raises(ValueError, match="label_length is missing"):
        pack_targets([[0, 1]], None, [3])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([5.9, 5.2], "logit_length are float32: expected int32 or int64"),
        ([6], "logit_length has 1 lengths for 2 rows of labels"),
        (6, r"logit_length has shape \(\): expected one length for each row"),
        ([[6], [5]], r"logit_length has shape \(2, 1\)"),
    ],
)
def test_lengths_that_do_not_fit_are_named_when_packed(lengths, message):
    with pytest.raises(ValueError, match=message):
        pack_targets([[1, 2], [1, 0]], [2, 1], lengths)


def test_lengths_beyond_32_bits_are_not_taken_for_others():
    targets = pack_targets([[1, 2], [1, 0]], [2, 1], np.array([2**32 + 6, 6]))
    with pytest.raises(ValueError, match="logit_length"):
        CTCLoss()(targets, np.zeros((2, 6, 4), np.float32))
