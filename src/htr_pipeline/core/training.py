"""The training loop: our CTC loss on the network, with exact resumption from a checkpoint."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np
import tensorflow as tf

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.batching import Batch, Line, ordered_batches, training_batches
from htr_pipeline.core.collapse import READING_CER, UNFIT_SHARE, CollapseMonitor, StepFigures, Verdict, judge_epoch
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.loss import ctc_loss
from htr_pipeline.core.ctc.loss import required_frames as required_frames_of_labels
from htr_pipeline.core.distribution import Distribution, change_copies, gathered, summed
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.metrics import LineScores, score_lines
from htr_pipeline.core.model import FrameLength, chosen_precision, set_precision
from htr_pipeline.core.optimizer import Muon
from htr_pipeline.core.recipe import TrainingConfig, learning_rate, unusual_rate
from htr_pipeline.core.text import Charset, required_frames

# The loss is compiled once for each shape: frames are padded to a multiple of this for it.
_LOSS_FRAME_MULTIPLE = 64
_BATCHES_AHEAD = 8
# What training.on_collapse: back does, and how often before it gives up.
_RATE_FACTOR = 0.3
_MOST_RETURNS = 3
_LINES_NAMED = 20
_UNFIT_LINES_NAMED = 50  # in all notices together


@dataclass
class TrainingState:
    """Where training stands, apart from the arrays: what a checkpoint needs to go on exactly."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch already trained on
    step: int = 0
    epoch_began_at: float = 0.0  # share of the whole training
    elapsed_seconds: float = 0.0
    best_cer: float = math.inf
    best_epoch: int = 0  # epochs done when it was found
    rate_factor: float = 1.0  # below 1 after a collapse
    returns: int = 0  # to the last good network
    bad_batches: int = 0
    unfit_lines: list[str] = field(default_factory=list)
    monitor: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)


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

    def epoch(self, row: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """After an epoch: its row of history and a few (reference, hypothesis) pairs."""

    def notice(self, sentence: str, warning: bool) -> None:
        """What the user should know."""

    def stop_asked(self) -> bool:
        """Whether training shall end after the batch under way."""


@dataclass(frozen=True)
class TrainedNetwork:
    """The best network by validation CER, and the history of training it.

    Attributes:
        model: the network.
        history: a row of io.manifest.HISTORY for each epoch.
        best_cer: its validation CER, greedy.
        best_epoch: the one whose network is kept, from 1; 0 where that is the one that training started from.
        ended_by: epochs, clock, patience or interrupt; after the last, training may go on from the checkpoint.
    """

    model: keras.Model
    history: list[dict[str, Any]]
    best_cer: float
    best_epoch: int
    ended_by: str


def train_network(
    model: keras.Model,
    read_training_lines: Callable[[np.random.Generator], Iterable[Line]],
    num_training_lines: int,
    validation_lines: list[Line],
    charset: Charset,
    *,
    augmentation: AugmentationConfig,
    config: TrainingConfig,
    checkpoints: Checkpoints,
    progress: Progress,
    distribution: Distribution | None = None,
) -> TrainedNetwork:
    """Trains a network, or goes on from the checkpoint, and returns it as it was after its best epoch.

    The same arguments give the same weights, bit for bit on CPU, interrupted or not, unless max_minutes is set.

    Args:
        model: of core.model.build_model, new or trained before; its weights are changed.
        read_training_lines: yields all training lines in an order drawn from the generator that it is given.
        num_training_lines: how many it yields.
        validation_lines: scored greedily after every epoch.
        charset: characters of the training texts: the classes of the network.
        augmentation: distortions of the training lines.
        config: the rest.
        checkpoints: where the state is kept.
        progress: is told, and may ask to stop.
        distribution: the devices that share each batch, in whose scope the model was made; None: one device. All
            processes need the same arguments and the same checkpoint; only the chief writes.

    Raises:
        UserError: no lines, a batch size that the devices cannot share, workers with other checkpoints, a network of
            other classes, too many batches without a finite gradient, or a collapse that config.on_collapse does not
            let pass.
    """
    if not num_training_lines or not validation_lines:
        raise UserError(
            f"Training needs lines in both splits, got {num_training_lines} training and "
            f"{len(validation_lines)} validation lines. Look into the manifest's column 'split'."
        )
    tf.config.experimental.enable_op_determinism()
    distribution = distribution or Distribution()
    distribution.rows(config.batch_size)  # whether the devices can share it
    batch_size = _even_batch_size(num_training_lines, config.batch_size, distribution.num_replicas)
    rows = distribution.rows(batch_size)
    trainer = Trainer(model, charset, config, distribution)
    initial = best = model.get_weights()
    state = TrainingState()
    if saved := checkpoints.load():
        arrays, fields = saved
        state = TrainingState(**fields)
        trainer.set_arrays(arrays)
        best = [arrays[f"best/{index}"] for index in range(len(best))]
    distribution.require_equal(
        str(state.step),
        f"The workers of this training found different checkpoints; that of this one is of step {state.step} (0: there "
        "is none). Give checkpoint.path a folder that all of them share.",
    )
    monitor = CollapseMonitor(**{"plateau_steps": config.plateau_steps, **state.monitor})
    if config.start_from and not saved:
        state.best_cer = trainer.validate(validation_lines)[1].cer
        progress.notice(
            f"The network that training starts from has a CER of {state.best_cer:.2%} on the validation lines.",
            warning=False,
        )

    def save_checkpoint() -> None:
        if not distribution.is_chief:
            return
        state.monitor = dataclasses.asdict(monitor)
        arrays = trainer.get_arrays() | {f"best/{index}": array for index, array in enumerate(best)}
        checkpoints.save(arrays, dataclasses.asdict(state))

    total_steps = config.epochs * math.ceil(num_training_lines / config.batch_size)

    def synchronise() -> bool:
        """Sets all workers to the clock that is ahead; returns whether any of them was asked to stop."""
        state.elapsed_seconds, stop = distribution.largest(state.elapsed_seconds, progress.stop_asked())
        return bool(stop)

    saved_at = time.monotonic()
    stop_asked = synchronise()
    done = _done(state, total_steps, config)
    # An epoch under way is validated even if its last batch was the last of all.
    ended_by = "" if state.batch else _end(state, done, config)
    while not ended_by:
        if not state.batch:
            state.epoch_began_at = done
        batches = training_batches(
            read_training_lines,
            charset,
            augmentation.at(state.epoch_began_at),
            batch_size=batch_size,
            buffer_lines=config.buffer_lines,
            seed=config.seed,
            epoch=state.epoch,
            skip_batches=state.batch,
            rows=rows,
        )
        ready = clock = time.monotonic()
        for lines, batch in _prefetched(batches):
            waited = time.monotonic() - ready
            rate = learning_rate(done, config) * state.rate_factor
            step = trainer.step(lines, batch, rate)
            now = time.monotonic()
            seconds, clock = now - clock, now
            state.step += 1
            state.batch += 1
            state.elapsed_seconds += seconds
            _add(state.sums, {**_sums(step), "data_wait_seconds": waited, "seconds": seconds})
            state.sums["learning_rate"] = rate
            if step.figures is None:
                _skip_bad_batch(state, step, lines, rate, config, progress)
            else:
                _name_unfit_lines(state, step.figures.unfit, progress)
            told, verdict = monitor.kind or "learning", monitor.observe(step.figures)
            if verdict and verdict.kind != told:
                progress.notice(f"Step {state.step}: {_in_words(verdict, config)}", warning=verdict.failed)
            if verdict and verdict.failed and config.on_collapse != "warn":
                _go_back(state, verdict, config, progress)
                trainer.restart(best if state.best_cer < READING_CER else initial)
                monitor = CollapseMonitor(config.plateau_steps)
            progress.step(_done(state, total_steps, config), _running_figures(state.sums))
            stop_asked = synchronise()
            done = _done(state, total_steps, config)
            if now - saved_at >= config.checkpoint_seconds:
                save_checkpoint()
                saved_at = clock = time.monotonic()
                state.elapsed_seconds += saved_at - now
            if done >= 1.0 or stop_asked:
                break
            ready = time.monotonic()
        interrupted = done < 1.0 and stop_asked
        if interrupted:
            # Within the epoch: a run that goes on from here ends as one that was never stopped.
            save_checkpoint()
        clock = time.monotonic()
        validation_loss, score, samples = trainer.validate(validation_lines)
        state.elapsed_seconds += time.monotonic() - clock
        row = _history_row(state, monitor.kind, validation_loss, score.cer)
        losses = [earlier["validation_loss"] for earlier in state.history] + [validation_loss]
        by_heart = judge_epoch(row["train_cer"], score.cer, losses)
        if by_heart:
            row["verdict"] = by_heart.kind
            if by_heart.kind not in {earlier["verdict"] for earlier in state.history}:
                progress.notice(f"Epoch {row['epoch']}: {by_heart.sentence}", warning=True)
        state.history.append(row)
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, {}
        if score.cer < state.best_cer and not math.isnan(validation_loss):
            state.best_cer, state.best_epoch = score.cer, state.epoch
            best = model.get_weights()
        progress.epoch(state.history[-1], samples)
        synchronise()
        done = _done(state, total_steps, config)
        if by_heart and config.on_collapse != "warn":  # against which no rate helps
            raise _collapse_error(state, by_heart, config)
        if interrupted:
            ended_by = "interrupt"
        else:
            save_checkpoint()
            saved_at = time.monotonic()
            ended_by = _end(state, done, config)
    if config.start_from and not state.best_epoch:
        progress.notice(
            "No epoch was better than the network that training started from, which is kept. Lower "
            "training.learning_rate, or give it more lines.",
            warning=True,
        )
    model.set_weights(best)
    set_precision(model, "float32")
    return TrainedNetwork(model, state.history, state.best_cer, state.best_epoch, ended_by)


class StepResult(NamedTuple):
    """What Trainer.step found.

    Attributes:
        figures: of the batch; None where it was skipped, since its gradient is not finite.
        gradient_norm: before clipping.
        losses: (B,) float32 nats.
    """

    figures: StepFigures | None
    gradient_norm: float
    losses: np.ndarray


class Trainer:
    """The network, its optimizer and the compiled steps.

    Args:
        model: its weights are changed, and it computes in config.precision from now on.
        charset: its classes.
        config: batch size, optimizer, precision, label smoothing and weight of the shortcut.
        distribution: the devices that share each batch; None: one device.

    Raises:
        UserError: network and charset do not have the same classes.
    """

    def __init__(
        self, model: keras.Model, charset: Charset, config: TrainingConfig, distribution: Distribution | None = None
    ) -> None:
        num_classes = model.outputs[0].shape[-1]
        if num_classes != charset.num_classes:
            raise UserError(
                f"The network has {num_classes} classes; the charset of {len(charset)} characters and the blank make "
                f"{charset.num_classes}: the blank (the last class) would stand for a character within the texts. "
                "Build the network for this charset, or start from it with training.start_from."
            )
        precision = chosen_precision(config.precision)
        set_precision(model, precision)
        self.model = model
        self.charset = charset
        self.config = config
        self.distribution = distribution or Distribution()
        with self.distribution.scope():
            self.optimizer = Muon(
                config.learning_rate,
                config.weight_decay,
                config.gradient_clip_norm,
                products=precision.removeprefix("mixed_"),
            )
            self.optimizer.build(model.trainable_variables)
        signature = [
            tf.TensorSpec((None, None, model.inputs[0].shape[-1]), tf.uint8),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None,), tf.int32),
        ]
        self._train = self.distribution.compiled(self._train_step, signature)
        self._evaluate = self.distribution.compiled(self._evaluation_step, signature)

    def step(self, lines: list[Line], batch: Batch, rate: float) -> StepResult:
        """One optimizer step; where the gradient is not finite, nothing is changed.

        Args:
            lines: all of the global batch.
            batch: the rows of this process.
            rate: learning rate.
        """
        self.optimizer.learning_rate.assign(rate)
        batch = self.distribution.as_wide_as_others(batch)
        losses, best_classes, widths, label_length, norm, finite, probabilities = self._train(*batch)
        losses = np.asarray(losses)[: len(lines)]
        if not finite:
            return StepResult(None, float(norm), losses)
        best = np.asarray(best_classes)
        length = num_frames(np.asarray(widths))
        references = [self.charset.known(line.text) for line in lines]
        hypotheses = self._texts(best, length)[: len(lines)]
        valid = np.arange(best.shape[1]) < length[:, None]
        figures = StepFigures(
            lines=len(lines),
            loss=float(losses.sum()),
            gradient_norm=float(norm),
            edits=int(score_lines(references, hypotheses).characters.edits.sum()),
            frames=int(valid.sum()),
            blanks=int(np.count_nonzero((best == self.charset.blank_index) & valid)),
            num_classes=self.charset.num_classes,
            references=references,
            hypotheses=hypotheses,
            unfit=[
                line.line_id
                for line, text, count, frames in zip(lines, references, label_length, length, strict=False)
                if max(required_frames(text), count) > frames
            ],
            probabilities=bool(probabilities),
        )
        return StepResult(figures, float(norm), losses)

    def restart(self, weights: list[np.ndarray]) -> None:
        """Takes these weights and forgets what the optimizer knows."""
        self.model.set_weights(weights)
        for variable in self.optimizer.variables:
            variable.assign(tf.zeros_like(variable))

    def validate(self, lines: list[Line]) -> tuple[float, LineScores, list[tuple[str, str]]]:
        """Mean loss of a line, scores, and five (reference, hypothesis) pairs."""
        total, references, hypotheses = 0.0, [], []
        batch_size = _even_batch_size(len(lines), self.config.batch_size, self.distribution.num_replicas)
        rows = self.distribution.rows(batch_size)
        for members, batch in ordered_batches(lines, self.charset, batch_size):
            losses, best_classes = self._evaluate(*(array[rows] for array in batch))
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
    ) -> tuple[tf.Tensor, ...]:
        num_lines = summed(tf.reduce_sum(tf.cast(width_pixels > 0, tf.float32)))
        # The forward pass writes them: the moving statistics of the normalisations.
        statistics = [v for v in self.model.non_trainable_variables if v.dtype == "float32"]
        before = [tf.identity(variable) for variable in statistics]
        with tf.GradientTape() as tape:
            outputs = self.model({"pixels": pixels, "width_pixels": width_pixels}, training=True)
            # Both heads in one call: the recursion's steps are paid once.
            stacked = tf.concat([outputs["logits"], outputs["shortcut_logits"]], axis=0)
            both = tf.tile(width_pixels, [2]), tf.tile(labels, [2, 1]), tf.tile(label_length, [2])
            losses = self._losses(stacked, *both)
            objectives = losses
            if smoothing := self.config.label_smoothing:
                objectives = (1.0 - smoothing) * losses + smoothing * _distance_from_uniform(stacked, *both)
            main, shortcut = tf.split(objectives, 2)
            objective = tf.reduce_sum(main + self.config.shortcut_weight * shortcut) / num_lines
        gradients, objective = summed((tape.gradient(objective, self.model.trainable_variables), objective))
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(objective)

        def change(finite: tf.Tensor, gradients: list[tf.Tensor], before: list[tf.Tensor]) -> None:
            def apply() -> tf.Tensor:
                self.optimizer.apply(gradients, self.model.trainable_variables)
                return finite

            def skip() -> tf.Tensor:
                for variable, value in zip(statistics, before, strict=True):
                    variable.assign(value)
                return finite

            tf.cond(finite, apply, skip)

        change_copies(change, (finite, gradients, before), self.optimizer.iterations.value)
        best_classes = tf.argmax(outputs["logits"], axis=-1, output_type=tf.int32)
        width_pixels, first_frames = gathered(width_pixels), gathered(outputs["logits"][:, 0])
        probabilities = _are_probabilities(first_frames, width_pixels)
        losses = losses[: tf.shape(pixels)[0]]
        return (
            gathered(losses),
            gathered(best_classes),
            width_pixels,
            gathered(label_length),
            norm,
            finite,
            probabilities,
        )

    def _evaluation_step(
        self, pixels: tf.Tensor, width_pixels: tf.Tensor, labels: tf.Tensor, label_length: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.model({"pixels": pixels, "width_pixels": width_pixels}, training=False)["logits"]
        losses = self._losses(logits, width_pixels, labels, label_length)
        return gathered(losses), gathered(tf.argmax(logits, axis=-1, output_type=tf.int32))

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


def _distance_from_uniform(
    logits: tf.Tensor, width_pixels: tf.Tensor, labels: tf.Tensor, label_length: tf.Tensor
) -> tf.Tensor:
    """(B,) cross-entropy of all classes alike and the network's, summed over the frames; 0 if a text does not fit.

    Source: the label smoothing of Kim et al. (Interspeech 2018, arXiv 1711.02212), but for a constant.
    """
    logit_length = FrameLength()(width_pixels)
    mean_log_probs = tf.reduce_mean(tf.nn.log_softmax(tf.cast(logits, tf.float32)), axis=-1)
    counted = tf.where(required_frames_of_labels(labels, label_length) <= logit_length, logit_length, 0)
    return -tf.reduce_sum(mean_log_probs * tf.sequence_mask(counted, tf.shape(logits)[1], tf.float32), axis=-1)


def _are_probabilities(first_frames: tf.Tensor, width_pixels: tf.Tensor) -> tf.Tensor:
    """Whether the (B, K) outputs of the first frames of all lines are not negative and sum to 1."""
    frames = tf.boolean_mask(first_frames, width_pixels > 0)
    sums_to_one = tf.reduce_all(tf.abs(tf.reduce_sum(frames, axis=-1) - 1.0) < 1e-3)
    return sums_to_one & tf.reduce_all(frames >= 0.0)


def _prefetched(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, made in a thread while the network computes."""
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, batches, None) for _ in range(_BATCHES_AHEAD))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, batches, None))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def _even_batch_size(num_lines: int, batch_size: int, num_replicas: int) -> int:
    """The size at which as many batches are filled best: the empty rows of a last one would count in its moments.

    With batch_size times batch_size lines or more it is always batch_size.
    """
    evenly = math.ceil(num_lines / math.ceil(num_lines / batch_size))
    multiple = math.lcm(2, num_replicas)  # of two devices as of one
    return min(math.ceil(evenly / multiple) * multiple, batch_size)


def _end(state: TrainingState, done: float, config: TrainingConfig) -> str:
    """Why training is over, or an empty string."""
    if done >= 1.0:
        return "clock" if config.max_minutes else "epochs"
    # Before it reads, a network is no better for many epochs, however healthy.
    if config.patience and state.best_cer < READING_CER and state.epoch - state.best_epoch >= config.patience:
        return "patience"
    return ""


def _skip_bad_batch(
    state: TrainingState,
    step: StepResult,
    lines: list[Line],
    rate: float,
    config: TrainingConfig,
    progress: Progress,
) -> None:
    state.bad_batches += 1
    # Where the losses themselves are not finite, only the lines that have such a one are suspects.
    suspects = [line for line, loss in zip(lines, step.losses, strict=True) if not math.isfinite(loss)] or lines
    what = (
        f"Step {state.step}: loss or gradient are not finite (norm {step.gradient_norm:.3g}, learning rate "
        f"{rate:.2g}); the batch is skipped. Its {'lines' if suspects is lines else 'lines without a finite loss'}: "
        f"{_named([line.line_id for line in suspects])}."
    )
    if state.bad_batches > config.max_bad_batches:
        raise UserError(
            f"{what} This is number {state.bad_batches}, and training.max_bad_batches is {config.max_bad_batches}. "
            "If it is always the same lines, look at their images and texts; otherwise lower training.learning_rate."
        )
    progress.notice(what, warning=True)


def _name_unfit_lines(state: TrainingState, unfit: list[str], progress: Progress) -> None:
    if not unfit:
        return
    named = set(state.unfit_lines)
    new = [line_id for line_id in unfit if line_id not in named]
    state.unfit_lines += new
    if new and len(named) < _UNFIT_LINES_NAMED:
        last = " More of them are not named." if len(state.unfit_lines) >= _UNFIT_LINES_NAMED else ""
        progress.notice(
            f"Nothing is learnt from {_named(new)}: the text needs more frames than the line has. "
            f"Reject such lines, or raise features.height_pixels, which makes them wider.{last}",
            warning=True,
        )


def _in_words(verdict: Verdict, config: TrainingConfig) -> str:
    """What the verdict says, and whether the learning rate may be why."""
    return verdict.sentence + (unusual_rate(config) if verdict.rate_may_help else "")


def _collapse_error(state: TrainingState, verdict: Verdict, config: TrainingConfig) -> UserError:
    """Why training does not go on."""
    if config.on_collapse == "stop":
        return UserError(f"Step {state.step}: {_in_words(verdict, config)} (training.on_collapse is stop.)")
    tried = f" The rate was lowered {state.returns} times." if state.returns else ""
    return UserError(f"Step {state.step}: {verdict.sentence} A lower learning rate does not help here.{tried}")


def _go_back(state: TrainingState, verdict: Verdict, config: TrainingConfig, progress: Progress) -> None:
    """Lowers the rate, or raises where that is not wanted or does not help."""
    if config.on_collapse == "stop" or not verdict.rate_may_help or state.returns >= _MOST_RETURNS:
        raise _collapse_error(state, verdict, config)
    state.returns += 1
    state.bad_batches = 0
    state.rate_factor *= _RATE_FACTOR
    is_epoch = state.best_epoch and state.best_cer < READING_CER
    target = f"that of epoch {state.best_epoch}" if is_epoch else "the one at the beginning"
    progress.notice(
        f"Step {state.step}: back to the last good network, {target}, at {state.rate_factor:.2g} of the learning rate.",
        warning=True,
    )


def _named(line_ids: list[str]) -> str:
    more = f" and {len(line_ids) - _LINES_NAMED} more" if len(line_ids) > _LINES_NAMED else ""
    return ", ".join(map(repr, line_ids[:_LINES_NAMED])) + more


def _sums(step: StepResult) -> dict[str, float]:
    figures = step.figures
    if figures is None:
        return {"skipped_batches": 1.0}
    return {
        "steps": 1.0,
        "lines": float(figures.lines),
        "loss": figures.loss,
        "edits": float(figures.edits),
        "characters": float(sum(map(len, figures.references))),
        "output_characters": float(sum(map(len, figures.hypotheses))),
        "frames": float(figures.frames),
        "blanks": float(figures.blanks),
        "unfit": float(len(figures.unfit)),
        "gradient_norm": step.gradient_norm,
    }


def _done(state: TrainingState, total_steps: int, config: TrainingConfig) -> float:
    share = state.elapsed_seconds / (60.0 * config.max_minutes) if config.max_minutes else state.step / total_steps
    return min(share, 1.0)


def _add(sums: dict[str, float], figures: dict[str, float]) -> None:
    for key, value in figures.items():
        sums[key] = sums.get(key, 0.0) + value


def _running_figures(sums: dict[str, float]) -> dict[str, float]:
    """NaN where all batches were skipped."""
    lines = sums.get("lines", 0.0)
    return {
        "loss": sums["loss"] / lines if lines else math.nan,
        "cer": sums["edits"] / max(sums["characters"], 1.0) if lines else math.nan,
        "lines_per_second": lines / sums["seconds"],
    }


def _history_row(state: TrainingState, verdict: str, validation_loss: float, validation_cer: float) -> dict[str, Any]:
    sums = state.sums
    running = _running_figures(sums)
    early = "learning" if running["cer"] < READING_CER else "plateau" if sums.get("lines") else "exploded"
    if sums.get("unfit", 0.0) > UNFIT_SHARE * sums.get("lines", 0.0):
        early = "labels_do_not_fit"
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "train_loss": running["loss"],
        "train_cer": running["cer"],
        "validation_loss": validation_loss,
        "validation_cer": validation_cer,
        "learning_rate": sums["learning_rate"],
        "blank_share": sums.get("blanks", 0.0) / max(sums.get("frames", 0.0), 1.0),
        "output_length_ratio": sums.get("output_characters", 0.0) / max(sums.get("characters", 0.0), 1.0),
        "gradient_norm": sums.get("gradient_norm", 0.0) / max(sums.get("steps", 0.0), 1.0),
        "lines_per_second": running["lines_per_second"],
        "data_wait_seconds": sums["data_wait_seconds"],
        "elapsed_seconds": state.elapsed_seconds,
        "skipped_batches": int(sums.get("skipped_batches", 0.0)),
        "verdict": verdict or early,
    }
