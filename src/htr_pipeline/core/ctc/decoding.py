"""Best path and prefix beam search over CTC outputs, one line of text a thread.

The search keeps every prefix once, as a node of a trie in flat arrays, and works in log space with float64 throughout:
there is nothing to underflow, so an unpruned search is exact. What language model and lexicon say of a prefix is a
function of its labels alone, so it is stored with the prefix and asked once, when the prefix grows.
"""

import dataclasses
import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from htr_pipeline.core.ctc.kernel_search import (
    LETTER,
    OTHER,
    ROUNDING,
    SPACE,
    Characters,
    Entries,
    Weights,
    Words,
    search,
)
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram
from htr_pipeline.core.ctc.lexicon import Lexicon, is_letter
from htr_pipeline.core.threads import num_cores, thread_pool

# A log-softmax in half precision may end up this much above zero by rounding; logits and probabilities lie far above.
_LOG_PROB_TOLERANCE = 1e-2
_WIDEST_BEAM = 1_000_000  # prefixes, of some kilobytes each


@dataclasses.dataclass(frozen=True, eq=False)
class Hypothesis:
    """One reading of a line.

    Attributes:
        labels: (N,) int32. Classes, without blanks.
        score: what hypotheses are ranked by, natural log:
            ctc_score + alpha * lm_score + beta * number of labels + lexicon_score.
        ctc_score: natural log of the probability of all alignments that the search followed to these labels; of the one
            best path for greedy_search.
        lm_score: natural log of the language model's probability; 0 without one.
        frame_spans: (N, 2) int32. First frame of each label and the frame after its last, on the best alignment of
            these labels; frames between two spans are blank.
        confidences: (N,) float64, 0..1. The highest probability of each label in a frame of its span.
        lexicon_score: natural log, what the words of the line gain or lose by a lexicon; 0 without one.
        word_spans: (W, 2) int32. Place in labels of the first character of each word and of the blank or end after its
            last, a word being what stands between white space; so it also cuts frame_spans and confidences into
            words. None if the search was not told the characters.
    """

    labels: np.ndarray
    score: float
    ctc_score: float
    lm_score: float
    frame_spans: np.ndarray
    confidences: np.ndarray
    lexicon_score: float = 0.0
    word_spans: np.ndarray | None = None


def line_confidence(hypothesis: Hypothesis) -> float:
    """How sure the network is of a whole line, 0..1: the geometric mean of the confidences of its characters.

    Unlike the probability of the line it does not shrink with the line's length, so lines can be compared. A line read
    as empty has no characters; its confidence is the probability of the empty reading, exp(ctc_score).
    """
    if not len(hypothesis.labels):
        return min(1.0, math.exp(hypothesis.ctc_score))
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(hypothesis.confidences).mean()))


def greedy_search(
    log_probs: npt.ArrayLike,
    logit_length: npt.ArrayLike | None = None,
    *,
    blank_index: int = -1,
    characters: Sequence[str] | None = None,
) -> list[list[Hypothesis]]:
    """The best path of each line: the likeliest class of every frame, repeats merged, blanks removed.

    Args:
        log_probs: (B, T, K) floating point. Log-softmax of the logits; frames past logit_length are ignored.
        logit_length: (B,) integer, 0..T; None: T for every line.
        blank_index: class of the blank; negative counts from the end.
        characters: as for beam_search.

    Returns:
        For each line a list of one Hypothesis, as beam_search returns with top_paths=1. Its score is that of the path,
        not of all alignments of the labels. Of equally likely classes in a frame the lowest is taken. A frame in which
        nothing is possible is read as a blank, and the score is -inf.

    Raises:
        ValueError: shapes, lengths, blank_index or characters do not fit, or log_probs cannot be log-probabilities.
    """
    lines, blank, num_classes = _checked_lines(log_probs, logit_length, blank_index)
    is_space = _is_space(_checked_classes(characters, num_classes, blank))
    return [[_best_path(frames, blank, is_space)] for frames in lines]


def beam_search(
    log_probs: npt.ArrayLike,
    logit_length: npt.ArrayLike | None = None,
    *,
    blank_index: int = -1,
    beam_width: int = 100,
    top_paths: int = 1,
    characters: Sequence[str] | None = None,
    language_model: CharacterNGram | WordNGram | None = None,
    alpha: float = 0.5,
    beta: float = 0.0,
    lexicon: Lexicon | None = None,
    num_threads: int | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest labels of each line, all alignments of the same labels added up.

    After every frame the beam_width best prefixes are kept, by

        ctc_score + alpha * lm_score + beta * number of labels + lexicon_score.

    Of equally good ones the shorter, then the lexicographically smaller is preferred. Scores are float64: of readings
    that are equally good, but for the order in which their alignments were added up, rounding decides. A line's result
    depends neither on its batch nor on num_threads.

    A character model scores a character when it is appended. A word model and a lexicon score a word at the white space
    after it; white space before the first word or next to other white space costs nothing, nor does that after the last
    word unless it is a token of the model. Once all frames are read, the last word and the end of the line are scored,
    and the final ranking is made: so lm_score is language_model.score and lexicon_score is lexicon.score of the text,
    exactly.

    Args:
        log_probs: (B, T, K) floating point. Log-softmax of the logits, where -inf is allowed; frames past logit_length
            are ignored.
        logit_length: (B,) integer, 0..T; None: T for every line.
        blank_index: class of the blank; negative counts from the end.
        beam_width: prefixes kept after each frame, at least 1.
        top_paths: hypotheses wanted of each line, at least 1.
        characters: the K - 1 characters that the classes stand for, in class order without the blank, such as
            Charset.characters. Needed by language_model and lexicon; gives hypotheses their word_spans.
        language_model: a model of characters or of words; what it does not know gets the score of its <unk>.
        alpha: weight of the language model, at least 0.
        beta: nats gained by each label, against the taste of language models for short lines.
        lexicon: the words that are allowed, or wanted.
        num_threads: lines searched at the same time, at most one on every core that this process may use; None: that
            many.

    Returns:
        For each line at most top_paths hypotheses, best first: fewer where the beam holds fewer of non-zero
        probability. There is always at least one: it is empty if there are no frames, and empty with score -inf if
        nothing is possible, or nothing in the beam consists of words that the lexicon allows. If the beam was wide
        enough to prune nothing, ctc_score is minus the CTC loss of the labels.

    Raises:
        ValueError: an argument is out of range, shapes or characters do not fit, or log_probs cannot be
            log-probabilities.

    Source: Graves and Jaitly, ICML 2014, algorithm 1, in the form of Hannun et al., arXiv 1408.2873, with two masses
        for each prefix. Compared with enumeration and with a plain version in tests/core/ctc/test_decoding.py.
    """
    lines, blank, num_classes = _checked_lines(log_probs, logit_length, blank_index)
    beam_width, top_paths = _checked_count("beam_width", beam_width), _checked_count("top_paths", top_paths)
    num_threads = num_cores() if num_threads is None else min(_checked_count("num_threads", num_threads), num_cores())
    classes = _checked_classes(characters, num_classes, blank)
    language = _language(classes, language_model, alpha, beta, lexicon)
    is_space = _is_space(classes)

    def search_line(frames: np.ndarray) -> list[Hypothesis]:
        # Frames of K classes lead to at most this many prefixes, so a wider beam would only cost memory.
        width = _num_prefixes(len(frames), frames.shape[1], beam_width)
        if width > _WIDEST_BEAM:
            raise ValueError(f"beam_width = {beam_width}: expected at most {_WIDEST_BEAM}, a matter of memory.")
        num_paths = min(width, top_paths)
        lengths, scores, labels, spans, confidences = search(frames, blank, width, num_paths, *language)
        hypotheses = [
            Hypothesis(
                labels=labels[path, :length],
                score=score,
                ctc_score=ctc_score,
                lm_score=lm_score,
                frame_spans=spans[path, :length],
                confidences=confidences[path, :length],
                lexicon_score=lexicon_score,
                word_spans=_word_spans(labels[path, :length], is_space),
            )
            for path, (length, (score, ctc_score, lm_score, lexicon_score)) in enumerate(
                zip(lengths.tolist(), scores.tolist(), strict=True)
            )
        ]
        ranked = sorted(hypotheses, key=lambda found: (-found.score, len(found.labels), found.labels.tolist()))
        return ranked or [_impossible_line(is_space)]

    return _in_threads(search_line, lines, num_threads)


def warm_up() -> None:
    """Compiles beam_search, or reads it from the cache of an earlier run, so that the first line need not wait for it.

    First without a language model, then with one of characters and an open lexicon. Runs beside the loading of data as
    Thread(target=warm_up, daemon=True).start().
    """
    nothing = np.zeros((1, 1, 1))
    beam_search(nothing)
    beam_search(
        nothing, characters="", language_model=CharacterNGram.train([""], 1), lexicon=Lexicon(unknown_price=1.0)
    )


def _impossible_line(is_space: np.ndarray | None) -> Hypothesis:
    nothing = np.empty(0, np.int32)
    return Hypothesis(
        labels=nothing,
        score=-math.inf,
        ctc_score=-math.inf,
        lm_score=0.0,
        frame_spans=np.empty((0, 2), np.int32),
        confidences=np.empty(0),
        word_spans=_word_spans(nothing, is_space),
    )


def _word_spans(labels: np.ndarray, is_space: np.ndarray | None) -> np.ndarray | None:
    if is_space is None:
        return None
    in_word = np.concatenate([[False], ~is_space[labels], [False]])
    return np.flatnonzero(np.diff(in_word)).reshape(-1, 2).astype(np.int32)


def _in_threads(
    search_line: Callable[[np.ndarray], list[Hypothesis]], lines: list[np.ndarray], num_threads: int
) -> list[list[Hypothesis]]:
    found: list[list[Hypothesis]] = [[]] * len(lines)
    remaining = iter(range(len(lines)))  # shared: who is done takes the next line

    def search_lines() -> None:
        for index in remaining:
            found[index] = search_line(lines[index])

    others = [thread_pool().submit(search_lines) for _ in range(min(num_threads, len(lines)) - 1)]
    search_lines()
    for other in others:
        if not other.cancel():  # not begun: nothing is left to do
            other.result()
    return found


def _num_prefixes(num_frames: int, num_classes: int, limit: int) -> int:
    """Number of label sequences of at most num_frames labels, or limit if there are more."""
    count = 1
    for _ in range(num_frames):
        count = 1 + count * (num_classes - 1)
        if count >= limit or num_classes == 1:
            break
    return min(count, limit)


def _checked_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")
    return int(value)  # NumPy's integers overflow


def _checked_lines(
    log_probs: npt.ArrayLike, logit_length: npt.ArrayLike | None, blank_index: int
) -> tuple[list[np.ndarray], int, int]:
    """The valid frames of each line, (T_i, K) float64 in C order, the blank as a non-negative class, and K."""
    values = np.asarray(log_probs)
    if values.dtype.kind == "c":
        raise ValueError(f"log_probs has dtype {values.dtype}: expected real numbers.")
    if values.ndim != 3 or values.shape[2] == 0:
        raise ValueError(
            f"log_probs has shape {values.shape}: expected (lines, frames, classes) with at least one class. "
            "Give a single line as log_probs[None]."
        )
    num_lines, num_frames, num_classes = values.shape
    if not isinstance(blank_index, int | np.integer) or not -num_classes <= blank_index < num_classes:
        raise ValueError(
            f"blank_index = {blank_index}: expected {-num_classes} to {num_classes - 1} for {num_classes} classes."
        )
    lengths = np.full(num_lines, num_frames) if logit_length is None else np.asarray(logit_length)
    if lengths.shape != (num_lines,) or (num_lines and lengths.dtype.kind not in "iu"):
        raise ValueError(
            f"logit_length has shape {lengths.shape} and dtype {lengths.dtype}: expected whole numbers of "
            f"shape ({num_lines},), the valid frames of each line of log_probs, whose shape is {values.shape}."
        )
    wrong = np.flatnonzero((lengths < 0) | (lengths > num_frames))
    if len(wrong):
        raise ValueError(
            f"logit_length[{wrong[0]}] = {lengths[wrong[0]]}: expected 0 to {num_frames}, the number of frames."
        )
    lines = [np.ascontiguousarray(values[i, : lengths[i]], dtype=np.float64) for i in range(num_lines)]
    for index, frames in enumerate(lines):
        # The maximum is NaN if any value is.
        if frames.size and not frames.max() <= _LOG_PROB_TOLERANCE:
            frame, label = np.argwhere(~(frames <= _LOG_PROB_TOLERANCE))[0]
            raise ValueError(
                f"log_probs[{index}, {frame}, {label}] = {frames[frame, label]}: expected natural logs of "
                "probabilities, which are not above 0. Apply a log-softmax to logits, a logarithm to probabilities; "
                "for NaN look at the network's weights and input."
            )
    return lines, int(blank_index) % num_classes, num_classes


def _checked_classes(characters: Sequence[str] | None, num_classes: int, blank: int) -> tuple[str, ...] | None:
    """The character of each class, "" for the blank."""
    if characters is None:
        return None
    found = tuple(characters)
    if len(found) != num_classes - 1:
        raise ValueError(
            f"{len(found)} characters for {num_classes} classes: expected {num_classes - 1}, one for each class but "
            f"the blank, class {blank}. Give the characters in the order in which the network was trained on them."
        )
    wrong = [c for c in found if not isinstance(c, str) or len(c) != 1]
    if not wrong:
        counts = Counter(found)
        wrong = [c for c in found if counts[c] > 1]
    if wrong:
        raise ValueError(f"characters has {wrong[:5]}: expected distinct single code points.")
    return (*found[:blank], "", *found[blank:])


def _is_space(classes: tuple[str, ...] | None) -> np.ndarray | None:
    """(K,) bool: the classes between words, as for str.split."""
    return None if classes is None else np.array([character.isspace() for character in classes])


def _language(
    classes: tuple[str, ...] | None,
    language_model: CharacterNGram | WordNGram | None,
    alpha: float,
    beta: float,
    lexicon: Lexicon | None,
) -> tuple[Weights, Characters | None, Words | None, Entries | None]:
    """What is known of a text without looking at its image: the last arguments of the compiled search."""
    if not isinstance(alpha, numbers.Real) or not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha}: expected a finite weight of at least 0.")
    if not isinstance(beta, numbers.Real) or not math.isfinite(beta):
        raise ValueError(f"beta = {beta}: expected a finite number of nats.")
    if not isinstance(language_model, CharacterNGram | WordNGram | None):
        raise ValueError(f"language_model is {language_model!r}: expected a CharacterNGram or a WordNGram.")
    if not isinstance(lexicon, Lexicon | None):
        raise ValueError(f"lexicon is {lexicon!r}: expected a Lexicon. Make one of words by Lexicon(words).")
    if classes is None:
        if language_model is not None or lexicon is not None:
            raise ValueError("A language model or lexicon needs characters, the character of each class: got None.")
        return Weights(float(alpha), float(beta), ROUNDING, ROUNDING), None, None, None

    kind = np.array([SPACE if c.isspace() else LETTER if c and is_letter(c) else OTHER for c in classes], np.int8)
    max_word_gain, characters, words, entries = ROUNDING, None, None, None
    max_gain = 0.0
    if isinstance(language_model, CharacterNGram):
        token_of_class = language_model.token_of_class(classes)
        next_class = np.empty_like(token_of_class)
        class_of_token = np.full(len(language_model.vocabulary), -1, np.int32)
        for label, token in enumerate(token_of_class.tolist()):
            next_class[label], class_of_token[token] = class_of_token[token], label
        characters = Characters(
            language_model.trie,
            language_model.start_state,
            token_of_class,
            class_of_token,
            next_class,
            language_model.order,
        )
        max_gain = alpha * language_model.max_log_prob
    if isinstance(language_model, WordNGram):
        words = Words(
            language_model.trie,
            language_model.start_state,
            language_model.spelling(classes),
            kind,
            language_model.space_token,
        )
        max_word_gain += 2 * max(alpha * language_model.max_log_prob, 0.0)  # a word, and the space behind it
    if lexicon is not None:
        entries = Entries(*lexicon.for_classes(classes), kind)
        max_word_gain += lexicon.max_score()
    return Weights(float(alpha), float(beta), max_gain + max_word_gain, max_word_gain), characters, words, entries


def _best_path(frames: np.ndarray, blank: int, is_space: np.ndarray | None) -> Hypothesis:
    best = frames.max(axis=1, initial=-np.inf)  # (T,)
    path = np.where(best > -np.inf, frames.argmax(axis=1), blank)
    starts = np.flatnonzero(np.diff(path, prepend=-1))
    ends = np.append(starts[1:], len(path))
    confidences = np.exp(np.minimum(np.maximum.reduceat(best, starts), 0.0)) if len(path) else best
    written = path[starts] != blank
    score = float(best.sum())
    labels = path[starts][written].astype(np.int32)
    return Hypothesis(
        labels=labels,
        score=score,
        ctc_score=score,
        lm_score=0.0,
        frame_spans=np.stack([starts, ends[: len(starts)]], axis=1)[written].astype(np.int32),
        confidences=confidences[written],
        word_spans=_word_spans(labels, is_space),
    )
