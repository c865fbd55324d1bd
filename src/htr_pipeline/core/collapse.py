"""Tells from a training's figures whether it learns, waits on the plateau or has collapsed, and says what to try.

A CTC network first learns to write blanks, since these are most frames of every line; the characters come when the loss
begins to fall again. The pictures of that plateau and of a collapse are the same; what differs is that on a plateau the
loss moves and that it ends.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# Windows in the number of steps that a plateau may last: enough to see a trend above the differences between batches.
_WINDOWS = 20
# A loss that falls by less from one half of these windows to the other does not move: batches differ by about 1 %.
_LEAST_FALL = 0.03
# Blanks and the commonest one or two characters give a CER of 1 to 0.8; healthy runs are at 0.6 after two epochs of 200
# steps, and then at 0.3.
READING_CER = 0.7
# Healthy runs reach 0.8 to 1.
_EMPTY_RATIO = 0.1
# One such step is an accident of a batch.
_BAD_STEPS = 3  # less the good ones since
# After the lowest loss a healthy run stays within a few per cent of it.
_LOSS_RISE = 3.0
_LOW_LOSS = 0.5  # nats a character; below it, as with a few lines known by heart, a loss may rise many times
# So many windows without reading, at so many times the lowest loss: a network that has just begun to read wavers, but
# its loss does not rise.
_UNREAD_WINDOWS = 3
_UNREAD_RISE = 1.5
# Before clipping. Healthy runs have 10 to 200 and, with a batch of odd lines, some 1,000.
_STEEP_GRADIENT = 3000.0
_STEEP_SHARE = 0.1
# Lines of hands and fonts have 3 to 10 frames of 4 pixels for each character.
_MOST_FRAMES_PER_CHARACTER = 40.0
# A healthy network reads lines that nobody distorts, those of validation, no worse than training lines.
_BY_HEART_CER = 0.35
_BY_HEART_RISE = 1.2
# Who knows the labels that the loss gets reads them: at 0.2 nats a character a CER of some 5 %.
_KNOWN_LOSS = 0.2
_OTHER_CER = 0.25
# Of the lines of a window. Fewer are named one by one and do no harm.
UNFIT_SHARE = 0.2

ADVICE = {
    "learning": "",
    "plateau": "This is normal at the beginning: wait.",
    "blank": "Run `kedro check-batch`: if it fails, look at the images and texts of the lines that it names; "
    "if it passes, lower training.learning_rate to a third or lengthen training.warmup_share.",
    "few_characters": "It knows how frequent characters are and makes no use of the images: look whether each text "
    "belongs to its image. If it does and `kedro check-batch` passes, lower training.learning_rate to a third, or take "
    "a larger model.size (from scratch).",
    "not_learning": "Look whether each text belongs to its image. If it does, training.learning_rate is too high (the "
    "loss jumps) or too low (it creeps).",
    "exploded": "Lower training.learning_rate to a tenth, or training.gradient_clip_norm.",
    "labels_do_not_fit": "Look at these lines: label lengths that count padding, several lines of text for one image, "
    "or images that are too narrow. Reject them, or raise features.height_pixels.",
    "padded_widths": "Widths that count padding, or wide margins: give each line its own width, and crop the images.",
    "by_heart": "Look whether each text belongs to its image. If it does, these are too few lines: add more, or begin "
    "with a network that reads, by --env finetune.",
    "other_labels": "Look at what is between the texts and the loss: another charset, other lengths (a label_length "
    "that cuts the text, widths of other lines), another order of the labels.",
    "softmax_twice": "The loss applies the softmax itself: take the activation off the last layer.",
}
# What another learning rate cannot change.
_OF_THE_DATA = ("labels_do_not_fit", "padded_widths", "other_labels", "softmax_twice", "by_heart")
HEALTHY = ("learning", "plateau")


class StepFigures(NamedTuple):
    """What one training step showed, summed over the lines of its batch.

    Attributes:
        lines: how many.
        loss: nats.
        gradient_norm: before clipping.
        edits: between references and greedy hypotheses.
        frames: valid ones.
        blanks: of these, where the blank is the best class.
        num_classes: characters plus the blank.
        references: their texts.
        hypotheses: greedy readings.
        unfit: line_ids whose label has no room in the frames.
        probabilities: whether the logits are probabilities already.
    """

    lines: int
    loss: float
    gradient_norm: float
    edits: int
    frames: int
    blanks: int
    num_classes: int
    references: list[str]
    hypotheses: list[str]
    unfit: list[str]
    probabilities: bool


@dataclass(frozen=True)
class Verdict:
    """How training goes.

    Attributes:
        kind: a key of ADVICE.
        seen: what was seen, with figures.
    """

    kind: str
    seen: str

    @property
    def sentence(self) -> str:
        """What was seen, and what to try."""
        return f"{self.seen} {ADVICE[self.kind]}".strip()

    @property
    def failed(self) -> bool:
        """Whether something has to change."""
        return self.kind not in HEALTHY

    @property
    def rate_may_help(self) -> bool:
        """Whether going back with a lower learning rate can help."""
        return self.failed and self.kind not in _OF_THE_DATA


@dataclass
class CollapseMonitor:
    """Watches a training window by window; all fields are plain, so that a checkpoint can hold them.

    Args:
        plateau_steps: steps that the loss may stand still while the network does not read.
    """

    plateau_steps: int
    sums: dict[str, float] = field(default_factory=dict)  # of the window under way
    written: dict[str, int] = field(default_factory=dict)  # characters of its hypotheses
    expected: dict[str, int] = field(default_factory=dict)  # and of its references
    unfit: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # nats a character, of the last windows
    lowest_loss: float = math.inf
    had_read: bool = False
    empty_windows: int = 0  # one after the other
    unread_windows: int = 0  # one after the other, since it had read
    bad_steps: int = 0  # less the good ones since
    kind: str = ""  # the last verdict

    def observe(self, step: StepFigures | None) -> Verdict | None:
        """Takes a step in; at the end of a window returns the verdict on it.

        Args:
            step: None where its gradient was not finite; several of these soon after each other are a verdict at once.
        """
        self.bad_steps = self.bad_steps + 1 if step is None else max(self.bad_steps - 1, 0)
        if step is None:
            if self.bad_steps < _BAD_STEPS:
                return None
            self.kind = "exploded"
            return Verdict("exploded", "Loss or gradient are not finite in most of the last steps.")
        totals = {
            "steps": 1.0,
            "lines": step.lines,
            "loss": step.loss,
            "edits": step.edits,
            "frames": step.frames,
            "blanks": step.blanks,
            "guessing": step.frames * math.log(step.num_classes),
            "probabilities": float(step.probabilities),
            "unfit": len(step.unfit),
            "steep": float(step.gradient_norm > _STEEP_GRADIENT),
        }
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in totals.items()}
        self.written = dict(Counter(self.written) + Counter("".join(step.hypotheses)))
        self.expected = dict(Counter(self.expected) + Counter("".join(step.references)))
        self.unfit = sorted({*self.unfit, *step.unfit})[:10]
        if self.sums["steps"] < max(self.plateau_steps // _WINDOWS, 1):
            return None
        verdict = self._judge()
        self.sums, self.written, self.expected, self.unfit, self.kind = {}, {}, {}, [], verdict.kind
        return verdict

    def _judge(self) -> Verdict:
        sums = self.sums
        characters = max(sum(self.expected.values()), 1)
        loss = sums["loss"] / characters
        cer = sums["edits"] / characters
        ratio = sum(self.written.values()) / characters
        blank_share = sums["blanks"] / max(sums["frames"], 1.0)
        written, expected = _frequent(self.written), _frequent(self.expected)
        frames = sums["frames"] / characters
        lowest = self.lowest_loss
        self.losses = [*self.losses, loss][-_WINDOWS:]
        self.had_read = self.had_read or cer < READING_CER
        self.lowest_loss = min(loss, self.lowest_loss)
        self.empty_windows = self.empty_windows + 1 if ratio < _EMPTY_RATIO else 0
        self.unread_windows = self.unread_windows + 1 if self.had_read and cer >= READING_CER else 0

        seen = (
            f"CER {cer:.0%}, {blank_share:.0%} of the frames blank, output {ratio:.0%} as long as the texts, "
            f"{written} different characters where the texts have {expected}, loss {loss:.2f} a character"
        )

        def verdict(kind: str, what: str) -> Verdict:
            return Verdict(kind, f"{what} ({seen}).")

        if sums["probabilities"] == sums["steps"]:
            return verdict("softmax_twice", "The outputs of the network are probabilities, not logits")
        if sums["unfit"] > UNFIT_SHARE * sums["lines"]:
            named = ", ".join(map(repr, self.unfit))
            share = sums["unfit"] / sums["lines"]
            return verdict(
                "labels_do_not_fit", f"{share:.0%} of the lines have a longer text than their frames can hold: {named}"
            )
        if sums["loss"] > sums["guessing"]:
            return verdict("exploded", "The loss exploded: it is higher than by guessing every frame")
        if loss > _LOSS_RISE * max(lowest, _LOW_LOSS):
            return verdict("exploded", f"The loss exploded: it was {lowest:.2f} a character")
        if sums["steep"] > _STEEP_SHARE * sums["steps"]:
            return verdict("exploded", f"The gradient explodes: norms above {_STEEP_GRADIENT:,.0f}, where 200 is much")
        if loss < _KNOWN_LOSS and cer > _OTHER_CER and not sums["unfit"]:
            return verdict("other_labels", "The loss is nearly nil and the readings are wrong: it gets other labels")
        if cer < READING_CER:
            return verdict("learning", "The network learns")
        too_wide = f"The lines have {frames:.0f} frames for each character instead of 3 to 10"
        is_too_wide = frames > _MOST_FRAMES_PER_CHARACTER
        fell_silent = self.had_read and self.empty_windows >= 2
        forgot = self.unread_windows >= _UNREAD_WINDOWS and loss > _UNREAD_RISE * lowest
        if not (fell_silent or forgot or self._stands_still()):
            hint = f". {too_wide}, which may be why" if is_too_wide else ""
            reads = "hardly reads" if self.had_read else "does not read yet"
            return verdict("plateau", f"The network {reads}, and the loss moves{hint}")
        since = " after it had read" if fell_silent or forgot else ""
        if is_too_wide:
            return verdict("padded_widths", too_wide)
        if ratio < _EMPTY_RATIO:
            what = "writes hardly anything but blanks" if not written else "writes a character or so and then blanks"
            return verdict("blank", f"The network {what}{since}")
        if written <= max(expected // 5, 2):
            return verdict("few_characters", f"The network writes the same few characters for every line{since}")
        how = since or ", and the loss stands still"
        return verdict("not_learning", f"The network writes, but not what stands in the lines{how}")

    def _stands_still(self) -> bool:
        if len(self.losses) < _WINDOWS:
            return False
        half = _WINDOWS // 2
        return sum(self.losses[half:]) > (1.0 - _LEAST_FALL) * sum(self.losses[:half])


def judge_epoch(train_cer: float, validation_cer: float, validation_losses: list[float]) -> Verdict | None:
    """Names a network that learns the training lines by heart and cannot read others.

    Args:
        train_cer: of the epoch.
        validation_cer: after it.
        validation_losses: nats a line after each epoch so far.
    """
    if not math.isfinite(train_cer) or not math.isfinite(validation_losses[-1]):  # another verdict's matter
        return None
    lowest = min(filter(math.isfinite, validation_losses))
    if train_cer > _BY_HEART_CER or validation_cer < READING_CER or validation_losses[-1] < _BY_HEART_RISE * lowest:
        return None
    return Verdict(
        "by_heart",
        f"The training lines are learnt by heart (CER {train_cer:.0%}), others are not read (validation CER "
        f"{validation_cer:.0%}, and the loss has risen from {lowest:.0f} to {validation_losses[-1]:.0f}).",
    )


def _frequent(counts: dict[str, int]) -> int:
    """How many characters make 95 % of a text: a stray one does not count."""
    left, number = 0.95 * sum(counts.values()), 0
    for count in sorted(counts.values(), reverse=True):
        if left <= 0:
            break
        left, number = left - count, number + 1
    return number
