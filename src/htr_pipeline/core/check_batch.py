"""Learns one batch by heart: if that fails, data, charset, lengths and loss do not fit together."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import keras

from htr_pipeline.core.batching import Line, collate
from htr_pipeline.core.collapse import ADVICE, CollapseMonitor, StepFigures, Verdict
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.model import FusedBatchNorm
from htr_pipeline.core.recipe import TrainingConfig, unusual_rate
from htr_pipeline.core.text import Charset
from htr_pipeline.core.training import Trainer

# By heart: nearly every character, in the mode of training and in that of reading.
_LEARNT_CER = 0.05
_WARMUP_STEPS = 20
# The batch is all there is, so its moments need no long mean: reading follows training at once.
_MOMENTUM = 0.5
# A batch is learnt in 70 to 300 steps: a loss that stands still for this long will not fall.
_PLATEAU_STEPS = 400
_FEWEST_STEPS = 50
_LINES_NAMED = 3


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
    characters = sum(len(line.text) for line in lines)
    if not characters:
        return BatchCheck(False, f"None of the {len(lines)} lines has a text: there is nothing to learn.")
    config = replace(config, label_smoothing=0.0)  # as dropout, it is against learning by heart
    for layer in model.layers:
        if isinstance(layer, FusedBatchNorm):
            layer.momentum = _MOMENTUM
    trainer = Trainer(model, charset, config)
    batch = collate(lines, charset, len(lines))
    monitor = CollapseMonitor(_PLATEAU_STEPS)
    failed = f"{len(lines)} lines were not learnt by heart"
    figures: StepFigures | None = None
    started, steps, cer, read_cer, verdict = time.monotonic(), 0, 1.0, 1.0, None
    while (seconds := time.monotonic() - started) < max_seconds:
        step = trainer.step(lines, batch, config.learning_rate * min((steps + 1) / _WARMUP_STEPS, 1.0))
        steps += 1
        if step.figures:
            figures = step.figures
            if figures.unfit:
                return BatchCheck(
                    False,
                    f"{failed}: {len(figures.unfit)} of them have a longer text than their frames can hold: "
                    f"{', '.join(map(repr, figures.unfit))}. {ADVICE['labels_do_not_fit']}",
                )
            cer = figures.edits / characters
            on_step(steps, cer)
        verdict = monitor.observe(step.figures) or verdict
        if verdict and verdict.failed:
            return BatchCheck(False, f"{failed}: {verdict.seen} {_advice(verdict, lines, figures, config)}")
        if cer <= _LEARNT_CER and (read_cer := trainer.validate(lines)[1].cer) <= _LEARNT_CER:
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
    if cer <= _LEARNT_CER:
        return BatchCheck(
            False,
            f"{failed} in {steps} steps ({seconds:.0f} seconds): as training sees them they are read (CER {cer:.0%}), "
            f"and as reading does not (CER {read_cer:.0%}). The network does something else there, as normalisation "
            "with moving statistics or dropout does.",
        )
    state = f" {verdict.seen}" if verdict else ""
    return BatchCheck(
        False,
        f"{failed} in {steps} steps ({seconds:.0f} seconds); the CER is still {cer:.0%}. Allow more time if it fell to "
        f"the end.{state} {_advice(verdict, lines, figures, config)}",
    )


def _advice(verdict: Verdict | None, lines: list[Line], figures: StepFigures | None, config: TrainingConfig) -> str:
    """What to do, other than the training's advice, which begins with this check; and the lines that are read worst."""
    if verdict and verdict.failed and not verdict.rate_may_help:
        return ADVICE[verdict.kind]
    if verdict and verdict.kind == "exploded":
        return ADVICE[verdict.kind] + unusual_rate(config)
    if figures is None:
        return unusual_rate(config).strip()
    edits = score_lines(figures.references, figures.hypotheses).characters.edits
    worst = [index for index in sorted(range(len(lines)), key=lambda index: -edits[index]) if edits[index]]
    named = ", ".join(
        f"{lines[i].line_id!r} ({figures.references[i]!r} is read as {figures.hypotheses[i]!r})"
        for i in worst[:_LINES_NAMED]
    )
    return (
        "Look whether their images show their texts, and whether two have one image"
        + (f"; read worst: {named}." if named else ".")
        + unusual_rate(config)
    )
