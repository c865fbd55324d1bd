"""Learns one batch by heart: if that fails, data, charset, lengths and loss do not fit together."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import keras

from htr_pipeline.core.batching import Line, collate
from htr_pipeline.core.collapse import CollapseMonitor
from htr_pipeline.core.model import FusedBatchNorm
from htr_pipeline.core.recipe import TrainingConfig
from htr_pipeline.core.text import Charset
from htr_pipeline.core.training import Trainer, in_words

# By heart: nearly every character, in the mode of training and in that of reading.
_LEARNT_CER = 0.05
_WARMUP_STEPS = 20
# The batch is all there is, so its moments need no long mean: reading follows training at once.
_MOMENTUM = 0.5
# A batch is learnt in 70 to 300 steps: a loss that stands still for this long will not fall.
_PLATEAU_STEPS = 400
_FEWEST_STEPS = 50


class BatchCheck(NamedTuple):
    """Whether the batch was learnt, and a sentence that says so or why not."""

    passed: bool
    sentence: str


def check_batch(
    model: keras.Model,
    lines: list[Line],
    charset: Charset,
    config: TrainingConfig,
    *,
    max_seconds: float,
    on_step: Callable[[int, float], None] = lambda steps, cer: None,
) -> BatchCheck:
    """Trains on the same lines, without distortions, until the network reads them.

    Args:
        model: a network without dropout; its weights are changed.
        lines: one batch.
        charset: the classes of the network.
        config: learning rate and optimizer.
        max_seconds: when to give up.
        on_step: is told the number of steps and the CER of each.

    Raises:
        UserError: network and charset do not have the same classes.
    """
    if unknown := {line.line_id: charset.unknown(line.text) for line in lines if charset.unknown(line.text)}:
        return BatchCheck(False, f"The charset lacks characters of the texts: {unknown}.")
    for layer in model.layers:
        if isinstance(layer, FusedBatchNorm):
            layer.momentum = _MOMENTUM
    trainer = Trainer(model, charset, config)
    batch = collate(lines, charset, len(lines))
    characters = sum(len(line.text) for line in lines)
    monitor = CollapseMonitor(_PLATEAU_STEPS)
    started, steps, cer, verdict = time.monotonic(), 0, 1.0, None
    while (seconds := time.monotonic() - started) < max_seconds:
        step = trainer.step(lines, batch, config.learning_rate * min((steps + 1) / _WARMUP_STEPS, 1.0))
        steps += 1
        if step.figures:
            cer = step.figures.edits / max(characters, 1)
            on_step(steps, cer)
        verdict = monitor.observe(step.figures) or verdict
        if verdict and verdict.failed:
            return BatchCheck(False, f"{len(lines)} lines were not learnt by heart: {in_words(verdict, config)}")
        if cer <= _LEARNT_CER and trainer.validate(lines)[1].cer <= _LEARNT_CER:
            seconds = time.monotonic() - started
            return BatchCheck(
                True,
                f"Data, charset, lengths and loss fit together: {len(lines)} lines with {characters} characters were "
                f"learnt by heart in {steps} steps ({seconds:.0f} seconds). (Whether each text belongs to its image "
                "cannot be told from this: wrong texts are learnt by heart too.)",
            )
    if steps < _FEWEST_STEPS:
        enough = math.ceil(300 * seconds / max(steps, 1))
        return BatchCheck(
            False,
            f"There was time for {steps} steps only ({seconds:.0f} seconds), which says nothing yet: to learn "
            f"{len(lines)} lines by heart takes 70 to 300. Allow --seconds {enough}.",
        )
    state = verdict.sentence if verdict else "there was no time to tell why."
    return BatchCheck(
        False,
        f"{len(lines)} lines were not learnt by heart in {steps} steps ({seconds:.0f} seconds); the CER is still "
        f"{cer:.0%}. Allow more time if it fell to the end; the last verdict: {state}",
    )
