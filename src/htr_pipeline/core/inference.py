"""The trained network applied: line images to log-probabilities, log-probabilities to text."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from htr_pipeline.core.batching import Line, collate
from htr_pipeline.core.ctc.decoding import Hypothesis, beam_search, greedy_search, line_confidence, warm_up
from htr_pipeline.core.ctc.language_model import CharacterNGram
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.core.text import Charset


@dataclass(frozen=True)
class Reading:
    """What a decoder read on a line.

    Attributes:
        text: the hypothesis.
        confidence: 0 to 1, of the whole line.
        characters: (character, first frame, frame after the last, confidence) of each character.
    """

    text: str
    confidence: float
    characters: list[tuple[str, int, int, float]]


class Network:
    """A trained network together with its charset, ready to read line images.

    Args:
        model: as core.model.build_model builds it.
        charset: its classes but the blank.
        batch_size: lines computed at a time.
    """

    def __init__(self, model: keras.Model, charset: Charset, batch_size: int = 16) -> None:
        self._charset = charset
        self._batch_size = batch_size
        height = model.inputs[0].shape[-1]

        @tf.function(input_signature=[tf.TensorSpec((None, None, height), tf.uint8), tf.TensorSpec((None,), tf.int32)])
        def compute(pixels: tf.Tensor, width_pixels: tf.Tensor) -> tf.Tensor:
            logits = model({"pixels": pixels, "width_pixels": width_pixels}, training=False)["logits"]
            return tf.nn.log_softmax(tf.cast(logits, tf.float32))

        self._compute = compute
        threading.Thread(target=warm_up, daemon=True).start()  # while the network reads the first lines

    def log_probs(self, lines: Sequence[Line]) -> list[np.ndarray]:
        """(T, K) float32 natural log-probabilities of each line, T its own number of frames."""
        results: list[Any] = [None] * len(lines)
        by_width = sorted(range(len(lines)), key=lambda index: lines[index].pixels.shape[0])
        for start in range(0, len(lines), self._batch_size):
            members = by_width[start : start + self._batch_size]
            batch = collate([lines[index]._replace(text="") for index in members], self._charset, len(members))
            computed = self._compute(batch.pixels, batch.width_pixels).numpy()
            for row, index in enumerate(members):
                results[index] = computed[row, : num_frames(lines[index].pixels.shape[0])]
        return results

    def decode(
        self, log_probs: Sequence[np.ndarray], decoding: DecodingConfig, language_model: CharacterNGram | None = None
    ) -> list[Reading]:
        """The best reading of each line.

        Args:
            log_probs: as returned by the method of that name.
            decoding: which decoder; with beam_lm alpha and beta are set.
            language_model: for beam_lm.
        """
        if not log_probs:
            return []
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
                characters=self._charset.characters,
                language_model=language_model,
                alpha=decoding.alpha,
                beta=decoding.beta,
            )
        return [self._reading(hypotheses[0]) for hypotheses in found]

    def _reading(self, hypothesis: Hypothesis) -> Reading:
        text = self._charset.decode(hypothesis.labels)
        characters = [
            (character, int(start), int(end), float(confidence))
            for character, (start, end), confidence in zip(
                text, hypothesis.frame_spans, hypothesis.confidences, strict=True
            )
        ]
        return Reading(text, line_confidence(hypothesis), characters)
