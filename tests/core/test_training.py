import dataclasses
import json
import math

import cv2
import numpy as np
import pytest

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.batching import Line
from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import ModelConfig, TrainingConfig, learning_rate
from htr_pipeline.core.text import Charset

CONFIG = TrainingConfig(epochs=3, batch_size=8, checkpoint_seconds=0.0, seed=4)


def drawn(index):
    """A line of digits in a plain vector font."""
    text = "".join(np.random.default_rng(index).choice(list("0123456789"), 4))
    image = np.zeros((32, 90), np.uint8)
    cv2.putText(image, text, (4, 25), cv2.FONT_HERSHEY_SIMPLEX, 0.9, 255, 2)
    return Line(f"line-{index}", np.ascontiguousarray(image.T), text)


class MemoryCheckpoints:
    """Keeps what was saved, through the same forms as on disk; stops the process at a given save."""

    def __init__(self, stop_at=None):
        self.saved, self.count, self.stop_at = None, 0, stop_at

    def save(self, arrays, state):
        self.saved = {name: array.copy() for name, array in arrays.items()}, json.dumps(state)
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt

    def load(self):
        return self.saved and (self.saved[0], json.loads(self.saved[1]))


class Silent:
    """Keeps what it is told; asks to stop at a given step."""

    def __init__(self, stop_at=None):
        self.rows, self.warnings, self.steps, self.stop_at = [], [], 0, stop_at

    def step(self, done, figures):
        assert 0.0 < done <= 1.0
        self.steps += 1

    def epoch(self, row, samples):
        self.rows.append(row)
        assert samples

    def notice(self, sentence, warning):
        self.warnings += [sentence] if warning else []

    def stop_asked(self):
        return self.steps == self.stop_at


def run(checkpoints=None, config=CONFIG, lines=30, progress=None, model=None, training=None, augmentation=None):
    from htr_pipeline.core.model import build_model
    from htr_pipeline.core.training import train_network

    training = training or [drawn(index) for index in range(lines)]
    return train_network(
        model or build_model(ModelConfig(size="XS"), 11, 32, config.seed),
        lambda rng: (training[index] for index in rng.permutation(len(training))),
        len(training),
        [drawn(index) for index in range(1000, 1005)],
        Charset("0123456789"),
        augmentation=augmentation or AugmentationConfig(),
        config=config,
        checkpoints=checkpoints or MemoryCheckpoints(),
        progress=progress or Silent(),
    )


def poisoned(**dropout):
    """The frames of lines whose brightest pixel is 77 become NaN."""
    import keras

    from htr_pipeline.core.model import build_model

    class NotANumber(keras.layers.Layer):
        def call(self, logits, pixels):
            ill = keras.ops.equal(keras.ops.max(pixels, axis=(1, 2)), 77)
            return keras.ops.where(ill[:, None, None], float("nan"), logits)

    model = build_model(ModelConfig(size="XS", **dropout), 11, 32, CONFIG.seed)
    pixels = model.input["pixels"]
    return keras.Model(model.input, {name: NotANumber()(x, pixels) for name, x in model.output.items()})


def linear():
    """No non-linearity, and each frame sees its own four columns only."""
    import keras

    pixels, width = keras.Input((None, 32), dtype="uint8", name="pixels"), keras.Input((), name="width_pixels")
    frames = keras.layers.AveragePooling1D(4)(keras.layers.Rescaling(1 / 255)(pixels))
    heads = {name: keras.layers.Dense(11, name=name)(frames) for name in ("logits", "shortcut_logits")}
    return keras.Model({"pixels": pixels, "width_pixels": width}, heads)


def softmaxed():
    import keras

    from htr_pipeline.core.model import build_model

    model = build_model(ModelConfig(size="XS"), 11, 32, CONFIG.seed)
    return keras.Model(model.input, {name: keras.layers.Softmax()(x) for name, x in model.output.items()})


def weights_equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left.get_weights(), right.get_weights(), strict=True))


def without_clock(history):
    timed = ("lines_per_second", "data_wait_seconds", "elapsed_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in history]


@pytest.fixture(scope="module")
def whole():
    return run()


def test_two_runs_are_equal_bit_for_bit(whole):
    again = run()
    assert weights_equal(whole.model, again.model)
    assert without_clock(whole.history) == without_clock(again.history)


@pytest.mark.parametrize("stop_at", [1, 4, 7, 13, 14])
def test_an_interrupted_run_ends_with_the_same_weights(whole, stop_at):
    checkpoints = MemoryCheckpoints(stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints)
    resumed = run(checkpoints)
    assert weights_equal(whole.model, resumed.model)
    assert without_clock(whole.history) == without_clock(resumed.history)


def test_history_has_a_row_an_epoch_with_all_figures(whole):
    from htr_pipeline.io.manifest import HISTORY, to_table

    table = to_table(whole.history, HISTORY)
    assert table["epoch"].to_pylist() == [1, 2, 3]
    assert table["step"].to_pylist() == [4, 8, 12]
    assert whole.best_cer == min(table["validation_cer"].to_pylist())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_objective_is_the_ctc_loss_of_both_heads_smoothed(smoothing):
    import tensorflow as tf

    from htr_pipeline.core.batching import collate
    from htr_pipeline.core.model import build_model
    from htr_pipeline.core.training import Trainer

    charset = Charset("0123456789")
    narrow = Line("narrow", np.ascontiguousarray(drawn(3).pixels[:40]), "11")  # beside wider lines
    unfit = Line("unfit", np.ascontiguousarray(drawn(4).pixels[:12]), "1234")  # three frames: not learnt from
    lines = [drawn(1), narrow, drawn(2), unfit]
    batch = collate(lines, charset, len(lines))
    model = build_model(ModelConfig(size="XS", column_dropout=0.0, recurrent_dropout=0.0), 11, 32, 4)

    @tf.function
    def expected():
        losses, objective = [], 0.0
        outputs = model({"pixels": batch.pixels, "width_pixels": batch.width_pixels}, training=True)
        for row, line in enumerate(lines[:3]):
            frames = -(-line.pixels.shape[0] // 4)
            for head, weight in (("logits", 1.0), ("shortcut_logits", 0.1)):
                logits = outputs[head][row : row + 1, :frames]
                labels = charset.encode(line.text)[None]
                loss = tf.nn.ctc_loss(labels, logits, [labels.size], [frames], logits_time_major=False, blank_index=10)
                by_class = tf.nn.log_softmax(logits[0]) / 11
                objective += weight * ((1 - smoothing) * loss[0] - smoothing * tf.reduce_sum(by_class)) / len(lines)
                losses += [loss[0]] if head == "logits" else []
        gradients = tf.gradients(objective, [variable.value for variable in model.trainable_variables])
        return losses, tf.linalg.global_norm(gradients)

    losses, norm = expected()
    config = dataclasses.replace(CONFIG, label_smoothing=smoothing, precision="float32")
    step = Trainer(model, charset, config).step(lines, batch, 0.0)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert step.losses == pytest.approx([*map(float, losses), 0.0], rel=1e-4)  # what is shown is the loss alone
    assert step.figures.unfit == ["unfit"]


@pytest.fixture(scope="module")
def learnt():
    return run(config=dataclasses.replace(CONFIG, epochs=25, learning_rate=5e-3, checkpoint_seconds=60.0), lines=160)


def test_digits_are_learnt(learnt):
    assert learnt.best_cer < 0.5
    assert learnt.history[-1]["train_loss"] < 0.5 * learnt.history[0]["train_loss"]


def test_distortions_are_weaker_in_the_last_fifth():
    def losses(final_strength):
        config = dataclasses.replace(CONFIG, epochs=5)
        trained = run(lines=8, config=config, augmentation=AugmentationConfig(final_strength=final_strength))
        return [row["train_loss"] for row in trained.history]

    strong, weak = losses(1.0), losses(0.0)
    assert strong[:4] == weak[:4]
    assert strong[4] != weak[4]


def test_the_clock_can_end_training():
    ended = run(config=dataclasses.replace(CONFIG, epochs=10_000, max_minutes=0.05))
    assert 1 <= len(ended.history) < 10_000
    assert ended.ended_by == "clock"


def test_a_clock_takes_the_place_of_epochs():
    from htr_pipeline.core.training import TrainingState, _done, _end

    state = TrainingState(epoch=5, step=100, elapsed_seconds=15.0)
    by_clock, by_epochs = (dataclasses.replace(CONFIG, epochs=1, max_minutes=minutes) for minutes in (1.0, None))
    assert (_done(state, 20, by_clock), _done(state, 20, by_epochs)) == (0.25, 1.0)
    assert [_end(state, _done(state, 20, config), config) for config in (by_clock, by_epochs)] == ["", "epochs"]
    state.elapsed_seconds = 61.0
    assert _end(state, _done(state, 20, by_clock), by_clock) == "clock"


@pytest.mark.parametrize(
    ("num_lines", "batch_size", "num_replicas", "expected"),
    [(17, 16, 1, 10), (40, 16, 1, 14), (16, 16, 1, 16), (3, 16, 1, 4), (1, 1, 1, 1), (257, 16, 1, 16), (17, 16, 4, 12)],
)
def test_batches_of_a_small_set_are_filled_evenly(num_lines, batch_size, num_replicas, expected):
    from htr_pipeline.core.training import _even_batch_size

    assert _even_batch_size(num_lines, batch_size, num_replicas) == expected


def test_a_size_of_batches_never_changes_their_number():
    from htr_pipeline.core.training import _even_batch_size

    for batch_size in (1, 2, 5, 8, 16):
        for num_lines in range(1, 300):
            size = _even_batch_size(num_lines, batch_size, 1)
            assert 1 <= size <= batch_size
            assert math.ceil(num_lines / size) == math.ceil(num_lines / batch_size)


def test_the_network_to_start_from_is_kept_where_no_epoch_is_better(learnt):
    weights, progress = learnt.model.get_weights(), Silent()
    spoilt = dataclasses.replace(CONFIG, epochs=1, learning_rate=0.5, start_from="learnt")
    kept = run(model=learnt.model, config=spoilt, progress=progress)
    assert kept.best_cer == pytest.approx(learnt.best_cer)
    assert len(kept.history) == 1
    assert all(map(np.array_equal, kept.model.get_weights(), weights))
    assert "No epoch was better than the network that training started from" in progress.warnings[-1]


def test_no_lines_are_an_error():
    with pytest.raises(UserError, match="got 0 training and 5 validation lines"):
        run(lines=0)


def test_the_rate_warms_up_and_falls_in_a_straight_line():
    config = TrainingConfig(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(done, config) for done in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.01], abs=1e-6)


# --- failures on purpose ---------------------------------------------------------------------------------------------

STOP = dataclasses.replace(CONFIG, epochs=200, on_collapse="stop", plateau_steps=100, checkpoint_seconds=60.0)


def test_a_network_without_non_linearity_is_named_a_collapse():
    with pytest.raises(UserError, match=r"The network writes (hardly anything but|one character and then) blanks"):
        run(config=dataclasses.replace(STOP, learning_rate=0.03, plateau_steps=60), model=linear())


def test_labels_that_count_padding_are_named_with_their_lines():
    lines = [drawn(index)._replace(text=drawn(index).text.ljust(32, "0")) for index in range(16)]
    with pytest.raises(UserError, match=r"longer text than their frames can hold: 'line-0'.*label lengths that count"):
        run(config=STOP, training=lines)


def test_labels_that_do_not_fit_are_the_verdict_also_before_the_first_window():
    lines = [drawn(index)._replace(text=drawn(index).text.ljust(32, "0")) for index in range(16)]
    history = run(config=dataclasses.replace(CONFIG, epochs=1, plateau_steps=1000), training=lines).history
    assert [row["verdict"] for row in history] == ["labels_do_not_fit"]


def test_label_lengths_that_count_padding_are_seen_where_the_loss_gets_them():
    from htr_pipeline.core.batching import collate
    from htr_pipeline.core.model import build_model
    from htr_pipeline.core.training import Trainer

    charset, lines = Charset("0123456789"), [drawn(index) for index in range(8)]
    batch = collate(lines, charset, 8)
    trainer = Trainer(build_model(ModelConfig(size="XS"), 11, 32, CONFIG.seed), charset, CONFIG)
    assert trainer.step(lines, batch, 1e-3).figures.unfit == []
    padded = batch._replace(label_length=np.full_like(batch.label_length, batch.labels.shape[1]))
    assert trainer.step(lines, padded, 1e-3).figures.unfit == [line.line_id for line in lines]


def test_widths_that_count_padding_are_named():
    lines = [drawn(index) for index in range(16)]
    lines = [line._replace(pixels=np.pad(line.pixels, [(0, 1000), (0, 0)])) for line in lines]
    with pytest.raises(UserError, match=r"frames for each character instead of 3 to 10.*Widths that count padding"):
        run(config=dataclasses.replace(STOP, learning_rate=0.0), training=lines)


def test_a_network_whose_blank_is_a_character_is_named_before_the_first_step():
    from htr_pipeline.core.model import build_model

    with pytest.raises(UserError, match="has 10 classes; the charset of 10 characters and the blank make 11"):
        run(model=build_model(ModelConfig(size="XS"), 10, 32, 1))


def wrong_texts(num):
    lines = [drawn(index) for index in range(num)]
    return [line._replace(text=other.text) for line, other in zip(lines, lines[1:] + lines[:1], strict=True)]


def test_texts_of_other_lines_are_named_where_they_are_learnt_by_heart():
    plain = AugmentationConfig(enabled=False)
    config = dataclasses.replace(STOP, epochs=150, max_validation_lines=5)
    with pytest.raises(UserError, match=r"learnt by heart .* others are not read .*whether each text belongs to its"):
        run(config=config, training=wrong_texts(16), augmentation=plain)


def test_a_softmax_too_many_is_named():
    with pytest.raises(
        UserError, match=r"The outputs of the network are probabilities, not logits.*take the activation"
    ):
        run(config=STOP, model=softmaxed())


FAST = dataclasses.replace(STOP, learning_rate=100 * CONFIG.learning_rate)


@pytest.mark.parametrize(
    ("smoothing", "collapse"),
    [(0.0, "(explode|not what stands in the lines|and then blanks)"), (0.01, "hardly anything but blanks")],
)
def test_a_rate_times_100_is_named(smoothing, collapse):
    with pytest.raises(UserError, match=collapse + r".*training\.learning_rate is 0\.\d+; the default is 0\.006"):
        run(config=dataclasses.replace(FAST, label_smoothing=smoothing))


def test_a_rate_that_makes_loss_or_gradient_explode_is_named():
    with pytest.raises(UserError, match=r"(exploded|explodes).*Lower training\.learning_rate to a tenth"):
        run(config=dataclasses.replace(STOP, learning_rate=1.0, weight_decay=0.0))  # which would hold weights down


def test_a_collapsed_network_goes_back_at_a_lower_rate_interrupted_or_not():
    config = dataclasses.replace(STOP, epochs=10, learning_rate=1.0, on_collapse="back", checkpoint_seconds=0.0)
    progress, checkpoints = Silent(), MemoryCheckpoints(stop_at=25)
    recovered = run(config=config, progress=progress)
    returns = [sentence for sentence in progress.warnings if "back to the last good network" in sentence]
    assert "the one at the beginning, at 0.3 of the learning rate" in returns[0]
    assert recovered.history[-1]["train_loss"] < recovered.history[0]["train_loss"]
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints, config)
    resumed = run(checkpoints, config)
    assert weights_equal(recovered.model, resumed.model)
    assert without_clock(recovered.history) == without_clock(resumed.history)


def test_what_a_lower_rate_cannot_cure_stops_the_run():
    with pytest.raises(UserError, match=r"longer text than .* A lower learning rate does not help here"):
        run(
            config=dataclasses.replace(STOP, on_collapse="back"),
            training=[drawn(index)._replace(text="0" * 32) for index in range(8)],
        )


def test_warnings_alone_change_nothing(whole):
    watched = run(config=dataclasses.replace(CONFIG, plateau_steps=20))
    assert weights_equal(whole.model, watched.model)


# --- bad lines and batches -------------------------------------------------------------------------------------------


def with_poison():
    lines = [drawn(index) for index in range(30)]
    lines[7] = Line("poison", np.full_like(lines[7].pixels, 77), lines[7].text)
    return lines


OFF = AugmentationConfig(enabled=False)


def test_a_batch_without_a_finite_gradient_is_skipped_and_its_line_named():
    progress = Silent()
    trained = run(model=poisoned(), training=with_poison(), progress=progress, augmentation=OFF)
    named = [sentence for sentence in progress.warnings if "loss or gradient are not finite" in sentence]
    assert len(named) == CONFIG.epochs
    assert all("Its lines without a finite loss: 'poison'." in sentence for sentence in named)
    assert [row["skipped_batches"] for row in trained.history] == [1, 1, 1]
    assert all(np.isfinite(array).all() for array in trained.model.get_weights())


def test_skipped_batches_do_not_disturb_going_on_from_a_checkpoint():
    def once(checkpoints=None):
        return run(checkpoints, model=poisoned(), training=with_poison(), augmentation=OFF)

    checkpoints = MemoryCheckpoints(stop_at=7)
    with pytest.raises(KeyboardInterrupt):
        once(checkpoints)
    whole, resumed = once(), once(checkpoints)
    assert weights_equal(whole.model, resumed.model)
    assert without_clock(whole.history) == without_clock(resumed.history)


def test_an_epoch_of_skipped_batches_has_no_error_rate():
    lines = [Line(f"poison{index}", np.full_like(drawn(index).pixels, 77), "1") for index in range(16)]
    trained = run(model=poisoned(), training=lines, augmentation=OFF, config=dataclasses.replace(CONFIG, epochs=1))
    row = trained.history[0]
    assert math.isnan(row["train_cer"])
    assert math.isnan(row["train_loss"])
    assert (row["skipped_batches"], row["verdict"]) == (2, "exploded")


def test_too_many_bad_batches_stop_the_run():
    with pytest.raises(UserError, match=r"'poison'\. This is number 2, and training\.max_bad_batches is 1"):
        run(
            model=poisoned(),
            training=with_poison(),
            augmentation=OFF,
            config=dataclasses.replace(CONFIG, max_bad_batches=1),
        )


def test_a_line_that_does_not_fit_is_named_once():
    lines = [drawn(index) for index in range(30)]
    lines[3] = lines[3]._replace(line_id="too-narrow", pixels=np.ascontiguousarray(lines[3].pixels[:12]))
    progress = Silent()
    run(training=lines, progress=progress)
    assert sum("Nothing is learnt from 'too-narrow'" in sentence for sentence in progress.warnings) == 1


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [6, 8])
def test_asked_to_stop_training_ends_after_the_batch_and_goes_on_from_there(whole, stop_at):
    checkpoints = MemoryCheckpoints()
    stopped = run(checkpoints, progress=Silent(stop_at))
    assert stopped.ended_by == "interrupt"
    assert stopped.history[-1]["step"] == stop_at
    assert stopped.best_cer == min(row["validation_cer"] for row in stopped.history)
    resumed = run(checkpoints)
    assert resumed.ended_by == "epochs"
    assert weights_equal(whole.model, resumed.model)
    assert without_clock(whole.history) == without_clock(resumed.history)


def test_training_ends_after_epochs_without_a_better_error_rate(learnt):
    config = dataclasses.replace(CONFIG, epochs=50, learning_rate=0.0, patience=3, start_from="learnt")
    ended = run(config=config, model=learnt.model)
    assert ended.ended_by == "patience"
    assert len(ended.history) == ended.best_epoch + 3


def test_a_network_that_does_not_read_yet_has_all_the_patience():
    ended = run(config=dataclasses.replace(CONFIG, epochs=6, learning_rate=0.0, patience=3))
    assert (ended.ended_by, len(ended.history)) == ("epochs", 6)


def test_network_that_is_no_number_is_not_the_best():
    from htr_pipeline.core.model import build_model

    model = build_model(ModelConfig(size="XS"), 11, 32, CONFIG.seed)
    model.set_weights([np.full_like(weights, np.nan) for weights in model.get_weights()])
    ended = run(config=dataclasses.replace(CONFIG, epochs=1, max_bad_batches=100), model=model)
    assert math.isnan(ended.history[0]["validation_loss"])
    assert ended.best_epoch == 0


def test_batches_far_larger_than_the_set_cost_no_more():
    from htr_pipeline.core.model import build_model
    from htr_pipeline.core.training import Trainer

    config = dataclasses.replace(CONFIG, batch_size=65_536)  # whose images alone would take 200 megabytes
    trainer = Trainer(build_model(ModelConfig(size="XS"), 11, 32, CONFIG.seed), Charset("0123456789"), config)
    lines = [drawn(index) for index in range(5)]
    small = Trainer(trainer.model, trainer.charset, dataclasses.replace(config, batch_size=6))
    assert trainer.validate(lines)[0] == small.validate(lines)[0]


# --- one batch -------------------------------------------------------------------------------------------------------


def check(lines, max_seconds=60.0, charset="0123456789"):
    from htr_pipeline.core.check_batch import check_batch
    from htr_pipeline.core.model import build_model

    model = build_model(ModelConfig(size="XS", column_dropout=0.0, recurrent_dropout=0.0), 11, 32, 1)
    config = dataclasses.replace(CONFIG, learning_rate=5e-3)
    return check_batch(model, lines, Charset(charset), config, max_seconds=max_seconds)


def test_a_batch_that_fits_is_learnt_by_heart():
    passed, sentence = check([drawn(index) for index in range(6)])
    assert passed
    assert "Data, charset, lengths and loss fit together: 6 lines with 24 characters were learnt by heart" in sentence


def test_a_batch_that_does_not_fit_is_not():
    passed, sentence = check([drawn(index)._replace(text="0" * 32) for index in range(6)])
    assert not passed
    assert (
        "6 lines were not learnt by heart: 6 of them have a longer text than their frames can hold: 'line-0'"
        in sentence
    )


def test_a_batch_in_which_a_single_line_does_not_fit_names_it():
    lines = [drawn(index) for index in range(8)]
    lines[5] = lines[5]._replace(text="0" * 32)
    passed, sentence = check(lines)
    assert not passed
    assert "1 of them have a longer text than their frames can hold: 'line-5'. Look at these lines" in sentence


def test_a_batch_with_one_image_of_two_texts_names_both():
    lines = [drawn(index) for index in range(4)]
    passed, sentence = check([*lines, lines[0]._replace(line_id="twin", text="9999")], max_seconds=15.0)
    assert not passed
    assert "Look whether their images show their texts, and whether two have one image; read worst: '" in sentence
    assert "'line-0'" in sentence or "'twin'" in sentence


@pytest.mark.parametrize("change", [lambda labels: (labels + 1) % 10, lambda labels: labels[:1]])
def test_a_batch_whose_loss_gets_other_labels_is_named(monkeypatch, change):
    encode = Charset.encode
    monkeypatch.setattr(Charset, "encode", lambda charset, text: change(encode(charset, text)))
    passed, sentence = check([drawn(index) for index in range(6)])
    assert not passed
    assert "The loss is nearly nil and the readings are wrong: it gets other labels" in sentence
    assert "Look at what is between the texts and the loss: another charset, other lengths" in sentence


def test_a_batch_without_texts_is_named():
    assert check([drawn(0)._replace(text="")]).sentence == "None of the 1 lines has a text: there is nothing to learn."


def test_a_batch_of_other_characters_is_named():
    assert check([drawn(0)], charset="abcdefghij").sentence.startswith(
        "The charset lacks characters of the texts: {'line-0'"
    )


def test_a_batch_that_gets_no_time_says_so():
    passed, sentence = check([drawn(index) for index in range(6)], max_seconds=0.0)
    assert not passed
    assert "There was time for 0 steps only" in sentence
