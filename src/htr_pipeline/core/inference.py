"""The trained network applied: line images to log-probabilities, log-probabilities to text."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from htr_pipeline.core.batching import Line, collate
from htr_pipeline.core.calibration import Calibration
from htr_pipeline.core.ctc.decoding import Hypothesis, beam_search, greedy_search, line_confidence, warm_up
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram
from htr_pipeline.core.ctc.lexicon import Lexicon
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.core.text import Charset, visual_order

# Of these best readings of a line, the share of the first tells how clearly a language model decided for it.
_READINGS_COMPARED = 10
# That are decoded together, in float32 and float64: with thousands of characters, some hundred lines fill the memory.
_MOST_NUMBERS = 1 << 25


@dataclass(frozen=True)
class Reading:
    """What a decoder read on a line.

    Attributes:
        text: the hypothesis.
        confidence: 0 to 1, of the whole line; calibrated, the probability that it is read without an error.
        characters: (character, first frame, frame after the last, confidence) of each character of the text, in its
            order, so that frames fall where text runs from right to left; calibrated, the confidence is the
            probability that the character is right.
    """

    text: str
    confidence: float
    characters: list[tuple[str, int, int, float]]


class Network:
    """A trained network together with its charset, ready to read line images.

    Args:
        model: as core.model.build_model builds it.
        charset: its classes but the blank.
        calibrations: by decoder, for "lines" and "characters"; decoders that are missing give raw confidences.
        batch_size: lines computed at a time.
    """

    def __init__(
        self,
        model: keras.Model,
        charset: Charset,
        calibrations: Mapping[str, Mapping[str, Calibration]] = MappingProxyType({}),
        batch_size: int = 16,
    ) -> None:
        self._charset = charset
        self._calibrations = calibrations
        self._batch_size = batch_size
        height = model.inputs[0].shape[-1]

        @tf.function(input_signature=[tf.TensorSpec((None, None, height), tf.uint8), tf.TensorSpec((None,), tf.int32)])
        def compute(pixels: tf.Tensor, width_pixels: tf.Tensor) -> tf.Tensor:
            logits = model({"pixels": pixels, "width_pixels": width_pixels}, training=False)["logits"]
            return tf.nn.log_softmax(tf.cast(logits, tf.float32))

        self._compute = compute
        threading.Thread(target=warm_up, daemon=True).start()  # while the network reads the first lines

    def log_probs(self, lines: Sequence[Line], looks: int = 1) -> list[np.ndarray]:
        """(T, K) float32 natural log-probabilities of each line, T its own number of frames.

        Args:
            lines: normalised.
            looks: 1, or 3: the mean over the line as it is, a little higher and a little lower, made to sum to one.
        """
        results: list[Any] = [None] * len(lines)
        by_width = sorted(range(len(lines)), key=lambda index: lines[index].pixels.shape[0])
        for start in range(0, len(lines), self._batch_size):
            members = by_width[start : start + self._batch_size]
            batch = collate([lines[index]._replace(text="") for index in members], self._charset, len(members))
            computed = [self._compute(pixels, batch.width_pixels) for pixels in _looks(batch.pixels, looks)]
            mean = (computed[0] if looks == 1 else tf.nn.log_softmax(tf.reduce_mean(computed, axis=0))).numpy()
            for row, index in enumerate(members):
                results[index] = mean[row, : num_frames(lines[index].pixels.shape[0])]
        return results

    def decode(
        self,
        log_probs: Sequence[np.ndarray],
        decoding: DecodingConfig,
        language_model: CharacterNGram | WordNGram | None = None,
        lexicon: Lexicon | None = None,
    ) -> list[Reading]:
        """The best reading of each line.

        Args:
            log_probs: as returned by the method of that name.
            decoding: which decoder; with beam_lm alpha and beta are set.
            language_model: for beam_lm; knows texts in visual order.
            lexicon: for beam_lm, as decoding.build_lexicon makes it.
        """
        return [
            reading
            for group in _groups(log_probs, _MOST_NUMBERS)
            for reading in self._decode(group, decoding, language_model, lexicon)
        ]

    def _decode(
        self,
        log_probs: Sequence[np.ndarray],
        decoding: DecodingConfig,
        language_model: CharacterNGram | WordNGram | None,
        lexicon: Lexicon | None,
    ) -> list[Reading]:
        length = np.array([len(frames) for frames in log_probs], np.int32)
        padded = np.zeros((len(log_probs), length.max(), self._charset.num_classes), np.float32)
        for row, frames in enumerate(log_probs):
            padded[row, : len(frames)] = frames
        if decoding.decoder == "greedy":
            found = greedy_search(padded, length, blank_index=-1)
        elif decoding.decoder == "beam":
            found = beam_search(padded, length, blank_index=-1, beam_width=decoding.beam_width)
        elif language_model is None or decoding.alpha is None or decoding.beta is None:
            raise ValueError(f"{decoding}: beam_lm needs a language model, alpha and beta.")
        else:
            found = beam_search(
                padded,
                length,
                blank_index=-1,
                beam_width=decoding.beam_width,
                top_paths=_READINGS_COMPARED,
                characters=self._charset.characters,
                language_model=language_model,
                alpha=decoding.alpha,
                beta=decoding.beta,
                lexicon=lexicon,
            )
        calibration = self._calibrations.get(decoding.decoder, {})
        identity = Calibration()
        return [
            self._reading(hypotheses, calibration.get("lines", identity), calibration.get("characters", identity))
            for hypotheses in found
        ]

    def _reading(self, hypotheses: list[Hypothesis], of_line: Calibration, of_characters: Calibration) -> Reading:
        best = hypotheses[0]
        written = "".join(self._charset.characters[label] for label in best.labels)
        confidences = of_characters(best.confidences).tolist()
        characters = list(zip(written, *best.frame_spans.T.tolist(), confidences, strict=True))
        characters = _single_blanks([characters[place] for place in visual_order(written)])
        text = "".join(character for character, *_ in characters)
        return Reading(text, float(of_line(line_confidence(best) * _share_of_first(hypotheses))), characters)


def _single_blanks(characters: list[tuple[str, int, int, float]]) -> list[tuple[str, int, int, float]]:
    """Without blanks at the ends and beside others, as texts are that networks learn from and are measured on."""
    before = [" ", *(character for character, *_ in characters)]
    kept = [found for found, last in zip(characters, before, strict=False) if not found[0] == last == " "]
    return kept[:-1] if kept and kept[-1][0] == " " else kept


def _looks(pixels: np.ndarray, looks: int) -> list[np.ndarray]:
    """(B, W, H) line images as they are, and of three looks also a sixteenth of their height higher, and lower."""
    if looks == 1:
        return [pixels]
    height = pixels.shape[2]
    rows = round(height / 16)
    on_paper = np.pad(pixels, ((0, 0), (0, 0), (rows, rows)))
    return [pixels, on_paper[..., 2 * rows :], on_paper[..., :height]]


def _groups(log_probs: Sequence[np.ndarray], most: int) -> Iterator[Sequence[np.ndarray]]:
    """Neighbouring lines that come to at most so many numbers together once they are padded, but always one."""
    start, longest = 0, 0
    for end, frames in enumerate(log_probs):
        longest = max(longest, frames.size)
        if end > start and (end + 1 - start) * longest > most:
            yield log_probs[start:end]
            start, longest = end, frames.size
    if start < len(log_probs):
        yield log_probs[start:]


def _share_of_first(hypotheses: list[Hypothesis]) -> float:
    """How much of the probability of these readings is that of the first, 0..1; 1 for a single one."""
    scores = np.array([hypothesis.score for hypothesis in hypotheses])
    return 1.0 if len(scores) == 1 else float(1.0 / np.exp(scores - scores[0]).sum())
