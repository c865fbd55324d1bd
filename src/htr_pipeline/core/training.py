"""The training loop: our CTC loss on the network, with exact resumption from a checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.batching import Batch, Line, ordered_batches, training_batches
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.loss import ctc_loss
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.model import FrameLength, build_model
from htr_pipeline.core.optimizer import Muon
from htr_pipeline.core.recipe import ModelConfig, TrainingConfig, learning_rate
from htr_pipeline.core.text import Charset

# The loss is compiled once for each shape: frames are padded to a multiple of this for it.
_LOSS_FRAME_MULTIPLE = 64


@dataclass
class TrainingState:
    """Where training stands, apart from the arrays: what a checkpoint needs to go on exactly."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already trained on
    step: int = 0
    elapsed_seconds: float = 0.0
    best_cer: float = math.inf
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way
    history: list[dict[str, float]] = field(default_factory=list)


class Checkpoints(Protocol):
    """Keeps the newest checkpoint; both methods are atomic."""

    def save(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Replaces the checkpoint."""

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The checkpoint, or None where there is none for this training."""


class Progress(Protocol):
    """Is told how training goes."""

    def step(self, done: float, figures: dict[str, float]) -> None:
        """After a batch: done is the share of the whole training, 0 to 1."""

    def epoch(self, row: dict[str, float], samples: list[tuple[str, str]]) -> None:
        """After an epoch: its row of history and a few (reference, hypothesis) pairs."""


@dataclass(frozen=True)
class TrainedNetwork:
    """The best network by validation CER, and the history of training it."""

    model: keras.Model
    history: list[dict[str, float]]
    best_cer: float


def train_network(
    read_training_lines: Callable[[np.random.Generator], Iterable[Line]],
    num_training_lines: int,
    validation_lines: list[Line],
    charset: Charset,
    *,
    height_pixels: int,
    model_config: ModelConfig,
    augmentation: AugmentationConfig,
    config: TrainingConfig,
    checkpoints: Checkpoints,
    progress: Progress,
) -> TrainedNetwork:
    """Trains a network from scratch, or goes on from the checkpoint, and returns the one of the best epoch.

    The same arguments give the same weights, bit for bit on CPU, interrupted or not, unless max_minutes is set.

    Args:
        read_training_lines: yields all training lines in an order drawn from the generator that it is given.
        num_training_lines: how many it yields.
        validation_lines: scored greedily after every epoch.
        charset: characters of the training texts.
        height_pixels: height of the line images.
        model_config: the network.
        augmentation: distortions of the training lines.
        config: the rest.
        checkpoints: where the state is kept.
        progress: is told.

    Raises:
        UserError: no lines, or the loss is not finite.
    """
    if not num_training_lines or not validation_lines:
        raise UserError(
            f"Training needs lines in both splits, got {num_training_lines} training and "
            f"{len(validation_lines)} validation lines. Look into the manifest's column 'split'."
        )
    tf.config.experimental.enable_op_determinism()
    model = build_model(model_config, charset.num_classes, height_pixels, config.seed)
    trainer = _Trainer(model, charset, config)
    best = model.get_weights()
    state = TrainingState()
    if saved := checkpoints.load():
        arrays, fields = saved
        state = TrainingState(**fields)
        trainer.set_arrays(arrays)
        best = [arrays[f"best/{index}"] for index in range(len(best))]

    def save_checkpoint() -> None:
        arrays = trainer.get_arrays() | {f"best/{index}": array for index, array in enumerate(best)}
        checkpoints.save(arrays, dataclasses.asdict(state))

    total_steps = config.epochs * math.ceil(num_training_lines / config.batch_size)
    saved_at = time.monotonic()
    done = _done(state, total_steps, config)
    while done < 1.0:
        batches = training_batches(
            read_training_lines,
            charset,
            augmentation,
            batch_size=config.batch_size,
            buffer_lines=config.buffer_lines,
            seed=config.seed,
            epoch=state.epoch,
            skip_batches=state.batch,
        )
        clock = time.monotonic()
        for batch in _prefetched(batches, height_pixels):
            waited = time.monotonic() - clock
            figures = trainer.step(batch, learning_rate(done, config))
            now = time.monotonic()
            seconds, clock = now - clock, now
            state.step += 1
            state.batch += 1
            state.elapsed_seconds += seconds
            _add(state.sums, {**figures, "steps": 1.0, "data_wait_seconds": waited, "seconds": seconds})
            state.sums["learning_rate"] = learning_rate(done, config)
            done = _done(state, total_steps, config)
            progress.step(done, _running_figures(state.sums))
            if now - saved_at >= config.checkpoint_seconds:
                save_checkpoint()
                saved_at = clock = time.monotonic()
                state.elapsed_seconds += saved_at - now
            if done >= 1.0:
                break
        clock = time.monotonic()
        validation_loss, score, samples = trainer.validate(validation_lines)
        state.elapsed_seconds += time.monotonic() - clock
        state.history.append(_history_row(state, validation_loss, score.cer))
        if score.cer < state.best_cer:
            state.best_cer = score.cer
            best = model.get_weights()
        progress.epoch(state.history[-1], samples)
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, {}
        done = _done(state, total_steps, config)
        save_checkpoint()
        saved_at = time.monotonic()
    model.set_weights(best)
    return TrainedNetwork(model, state.history, state.best_cer)


class _Trainer:
    """The network, its optimizer and the compiled steps."""

    def __init__(self, model: keras.Model, charset: Charset, config: TrainingConfig) -> None:
        self.model = model
        self.charset = charset
        self.config = config
        self.optimizer = Muon(config.learning_rate, config.weight_decay, config.gradient_clip_norm)
        self.optimizer.build(model.trainable_variables)
        signature = [
            tf.TensorSpec((None, None, model.inputs[0].shape[-1]), tf.uint8),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None,), tf.int32),
        ]
        self._train = tf.function(self._train_step, input_signature=signature)
        self._evaluate = tf.function(self._evaluation_step, input_signature=signature)

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """One optimizer step; sums over the batch's lines."""
        self.optimizer.learning_rate.assign(rate)
        losses, best_classes, norm = self._train(*batch)
        total = float(tf.reduce_sum(losses))
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            raise UserError(
                f"The loss became {total} (gradient norm {float(norm)}) at learning rate {rate:.2g}. "
                "Lower training.learning_rate or training.gradient_clip_norm."
            )
        references = [
            self.charset.decode(labels[:length])
            for labels, length in zip(batch.labels, batch.label_length, strict=True)
        ]
        best = np.asarray(best_classes)
        lengths = num_frames(batch.width_pixels)
        hypotheses = self._texts(best, lengths)
        score = score_lines(references, hypotheses)
        valid = np.arange(best.shape[1]) < lengths[:, None]
        return {
            "lines": float(np.count_nonzero(batch.width_pixels)),
            "loss": total,
            "edits": float(score.characters.edits.sum()),
            "characters": float(sum(map(len, references))),
            "output_characters": float(sum(map(len, hypotheses))),
            "frames": float(valid.sum()),
            "blanks": float(np.count_nonzero((best == self.charset.blank_index) & valid)),
            "gradient_norm": float(norm),
        }

    def validate(self, lines: list[Line]) -> tuple[float, Any, list[tuple[str, str]]]:
        """Mean loss of a line, score, and five (reference, hypothesis) pairs."""
        total, references, hypotheses = 0.0, [], []
        for members, batch in ordered_batches(lines, self.charset, self.config.batch_size):
            losses, best_classes = self._evaluate(*batch)
            total += float(tf.reduce_sum(losses))
            lengths = num_frames(batch.width_pixels)
            references += [line.text for line in members]
            hypotheses += self._texts(np.asarray(best_classes), lengths)[: len(members)]
        pairs = list(zip(references, hypotheses, strict=True))
        return total / len(lines), score_lines(references, hypotheses), pairs[:: max(len(pairs) // 5, 1)][:5]

    def get_arrays(self) -> dict[str, np.ndarray]:
        """Everything that changes in training."""
        return {key: variable.numpy() for key, variable in self._variables().items()}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Restores what get_arrays gave."""
        for key, variable in self._variables().items():
            variable.assign(arrays[key])

    def _variables(self) -> dict[str, Any]:
        # By position, since the seeds of dropout have names that depend on what was built before in the process.
        groups = {"model": self.model.variables, "optimizer": self.optimizer.variables}
        return {f"{name}/{index}": v for name, group in groups.items() for index, v in enumerate(group)}

    def _train_step(
        self, pixels: tf.Tensor, width_pixels: tf.Tensor, labels: tf.Tensor, label_length: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        num_lines = tf.reduce_sum(tf.cast(width_pixels > 0, tf.float32))
        with tf.GradientTape() as tape:
            outputs = self.model({"pixels": pixels, "width_pixels": width_pixels}, training=True)
            # Both heads in one call: the recursion's steps are paid once.
            stacked = tf.concat([outputs["logits"], outputs["shortcut_logits"]], axis=0)
            losses = self._losses(
                stacked, tf.tile(width_pixels, [2]), tf.tile(labels, [2, 1]), tf.tile(label_length, [2])
            )
            main, shortcut = tf.split(losses, 2)
            objective = tf.reduce_sum(main + self.config.shortcut_weight * shortcut) / num_lines
        gradients = tape.gradient(objective, self.model.trainable_variables)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        return main, tf.argmax(outputs["logits"], axis=-1, output_type=tf.int32), tf.linalg.global_norm(gradients)

    def _evaluation_step(
        self, pixels: tf.Tensor, width_pixels: tf.Tensor, labels: tf.Tensor, label_length: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.model({"pixels": pixels, "width_pixels": width_pixels}, training=False)["logits"]
        losses = self._losses(logits, width_pixels, labels, label_length)
        return losses, tf.argmax(logits, axis=-1, output_type=tf.int32)

    def _losses(
        self, logits: tf.Tensor, width_pixels: tf.Tensor, labels: tf.Tensor, label_length: tf.Tensor
    ) -> tf.Tensor:
        frames = tf.shape(logits)[1]
        logits = tf.pad(logits, [[0, 0], [0, -frames % _LOSS_FRAME_MULTIPLE], [0, 0]])
        return ctc_loss(labels, logits, label_length, FrameLength()(width_pixels), blank_index=-1, infeasible="zero")

    def _texts(self, best_classes: np.ndarray, lengths: np.ndarray) -> list[str]:
        """Best-path texts of (B, T) classes."""
        previous = np.pad(best_classes, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
        kept = (best_classes != previous) & (best_classes != self.charset.blank_index)
        kept &= np.arange(best_classes.shape[1]) < lengths[:, None]
        return [self.charset.decode(row[mask]) for row, mask in zip(best_classes, kept, strict=True)]


def _prefetched(batches: Iterable[Batch], height_pixels: int) -> Iterator[Batch]:
    """The batches, made in a thread of tf.data while the network computes."""
    signature = Batch(
        tf.TensorSpec((None, None, height_pixels), tf.uint8),
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None, None), tf.int32),
        tf.TensorSpec((None,), tf.int32),
    )
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=tuple(signature))
    return (Batch(*arrays) for arrays in dataset.prefetch(8).as_numpy_iterator())


def _done(state: TrainingState, total_steps: int, config: TrainingConfig) -> float:
    by_clock = state.elapsed_seconds / (60.0 * config.max_minutes) if config.max_minutes else 0.0
    return min(max(state.step / total_steps, by_clock), 1.0)


def _add(sums: dict[str, float], figures: dict[str, float]) -> None:
    for key, value in figures.items():
        sums[key] = sums.get(key, 0.0) + value


def _running_figures(sums: dict[str, float]) -> dict[str, float]:
    return {
        "loss": sums["loss"] / sums["lines"],
        "cer": sums["edits"] / max(sums["characters"], 1.0),
        "lines_per_second": sums["lines"] / sums["seconds"],
    }


def _history_row(state: TrainingState, validation_loss: float, validation_cer: float) -> dict[str, float]:
    sums = state.sums
    running = _running_figures(sums)
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "train_loss": running["loss"],
        "train_cer": running["cer"],
        "validation_loss": validation_loss,
        "validation_cer": validation_cer,
        "learning_rate": sums["learning_rate"],
        "blank_share": sums["blanks"] / max(sums["frames"], 1.0),
        "output_length_ratio": sums["output_characters"] / max(sums["characters"], 1.0),
        "gradient_norm": sums["gradient_norm"] / sums["steps"],
        "lines_per_second": running["lines_per_second"],
        "data_wait_seconds": sums["data_wait_seconds"],
        "elapsed_seconds": state.elapsed_seconds,
    }
