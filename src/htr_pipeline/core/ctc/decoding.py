"""Best path and prefix beam search over CTC outputs, one line of text a thread.

The search keeps every prefix once, as a node of a trie in flat arrays, and works in log space with float64 throughout:
there is nothing to underflow, so an unpruned search is exact. What language model and lexicon say of a prefix is a
function of its labels alone, so it is stored with the prefix and asked once, when the prefix grows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from htr_pipeline.core.ctc.compilation import compiled
from htr_pipeline.core.ctc.language_model import (
    END,
    NODE,
    UNKNOWN,
    CharacterNGram,
    WordNGram,
    advance,
    advance_all,
    child_of,
)
from htr_pipeline.core.ctc.lexicon import SPELLING, Lexicon, is_letter
from htr_pipeline.core.ctc.threads import num_cores

# A log-softmax in half precision may end up this much above zero by rounding; logits and probabilities lie far above.
_LOG_PROB_TOLERANCE = 1e-2
_ROUNDING = 1e-6  # far above what sums of some hundred float64 scores are off

_compiled = compiled()


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
        not of all alignments of the labels. Of equally likely classes in a frame the lowest is taken.

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

    Of equally good ones the shorter, then the lexicographically smaller is preferred. A line's result depends neither
    on its batch nor on num_threads.

    A character model scores a character when it is appended. A word model and a lexicon score a word at the white space
    after it; white space before the first word, after the last or next to other white space costs nothing. Once all
    frames are read, the last word and the end of the line are scored, and the final ranking is made: so lm_score is
    language_model.score and lexicon_score is lexicon.score of the text, exactly.

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
        num_threads: lines searched at the same time; None: one on every core that this process may use.

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
    for name, value in (("beam_width", beam_width), ("top_paths", top_paths), ("num_threads", num_threads)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")
    classes = _checked_classes(characters, num_classes, blank)
    language = _language(classes, num_classes, language_model, alpha, beta, lexicon)
    is_space = _is_space(classes)

    def search(frames: np.ndarray) -> list[Hypothesis]:
        # Frames of K classes lead to at most this many prefixes, so a wider beam would only cost memory.
        width = _num_prefixes(len(frames), frames.shape[1], beam_width)
        lengths, scores, labels, spans, confidences = _search(frames, blank, width, top_paths, language)
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

    return _in_threads(search, lines, num_threads or num_cores())


def warm_up() -> None:
    """Compiles beam_search, or reads it from the cache of an earlier run, so that the first line need not wait for it.

    Runs beside the loading of data as Thread(target=warm_up, daemon=True).start().
    """
    beam_search(np.zeros((1, 1, 1)))


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
    search: Callable[[np.ndarray], list[Hypothesis]], lines: list[np.ndarray], num_threads: int
) -> list[list[Hypothesis]]:
    if min(num_threads, len(lines)) <= 1:
        return [search(frames) for frames in lines]
    with ThreadPoolExecutor(min(num_threads, len(lines))) as pool:
        return list(pool.map(search, lines))


def _num_prefixes(num_frames: int, num_classes: int, limit: int) -> int:
    """Number of label sequences of at most num_frames labels, or limit if there are more."""
    count = 1
    for _ in range(num_frames):
        count = 1 + count * (num_classes - 1)
        if count >= limit or num_classes == 1:
            break
    return min(count, limit)


def _checked_lines(
    log_probs: npt.ArrayLike, logit_length: npt.ArrayLike | None, blank_index: int
) -> tuple[list[np.ndarray], int, int]:
    """The valid frames of each line, (T_i, K) float64 in C order, the blank as a non-negative class, and K."""
    values = np.asarray(log_probs)
    if values.ndim != 3 or values.shape[2] == 0:
        raise ValueError(
            f"log_probs has shape {values.shape}: expected (lines, frames, classes) with at least one class. "
            "Give a single line as log_probs[None]."
        )
    num_lines, num_frames, num_classes = values.shape
    if not -num_classes <= blank_index < num_classes:
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
    return lines, blank_index % num_classes, num_classes


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
    wrong = [c for c in found if not isinstance(c, str) or len(c) != 1] or [c for c in found if found.count(c) > 1]
    if wrong:
        raise ValueError(f"characters has {wrong[:5]}: expected distinct single code points.")
    return (*found[:blank], "", *found[blank:])


def _is_space(classes: tuple[str, ...] | None) -> np.ndarray | None:
    """(K,) bool: the classes between words, as for str.split."""
    return None if classes is None else np.array([character.isspace() for character in classes])


# Numba's cache files hold the names of the tuples below: to rename one means to delete src's __pycache__ folders.
class _Language(NamedTuple):
    """What is known of a text without looking at its image, for compiled code; parts that are not used are empty."""

    alpha: float
    beta: float
    max_gain: float  # no label makes a prefix better by more than this, whatever the network says
    kind: np.ndarray  # (K,) int8: _OTHER, _LETTER or _SPACE
    ngrams: np.ndarray  # (N,) NODE: the language model
    start_state: int
    token_of_class: np.ndarray  # (K,) int32 for a model of characters
    vocabulary_size: int
    spelling: np.ndarray  # (N,) SPELLING for a model of words
    lexicon: np.ndarray  # (N,) SPELLING, as in BoundLexicon
    word_scores: np.ndarray  # (N,) float64, as in BoundLexicon


_OTHER, _LETTER, _SPACE = 0, 1, 2


def _language(
    classes: tuple[str, ...] | None,
    num_classes: int,
    language_model: CharacterNGram | WordNGram | None,
    alpha: float,
    beta: float,
    lexicon: Lexicon | None,
) -> _Language:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha = {alpha}: expected a finite weight of at least 0.")
    if not math.isfinite(beta):
        raise ValueError(f"beta = {beta}: expected a finite number of nats.")
    if not isinstance(language_model, CharacterNGram | WordNGram | None):
        raise ValueError(f"language_model is {language_model!r}: expected a CharacterNGram or a WordNGram.")
    if not isinstance(lexicon, Lexicon | None):
        raise ValueError(f"lexicon is {lexicon!r}: expected a Lexicon. Make one of words by Lexicon(words).")
    if classes is None:
        if language_model is not None or lexicon is not None:
            raise ValueError("A language model or lexicon needs characters, the character of each class: got None.")
        classes = ("",) * num_classes

    language = _Language(
        alpha=float(alpha),
        beta=float(beta),
        max_gain=float(beta),
        kind=np.array([_SPACE if c.isspace() else _LETTER if c and is_letter(c) else _OTHER for c in classes], np.int8),
        ngrams=np.empty(0, NODE),
        start_state=0,
        token_of_class=np.empty(0, np.int32),
        vocabulary_size=0,
        spelling=np.empty(0, SPELLING),
        lexicon=np.empty(0, SPELLING),
        word_scores=np.empty(0),
    )
    if language_model is not None:
        best = alpha * language_model.max_log_prob
        language = language._replace(
            ngrams=language_model.trie,
            start_state=language_model.start_state,
            max_gain=language.max_gain + (best if isinstance(language_model, CharacterNGram) else max(best, 0.0)),
        )
    if isinstance(language_model, CharacterNGram):
        language = language._replace(
            token_of_class=language_model.token_of_class(classes), vocabulary_size=len(language_model.vocabulary)
        )
    if isinstance(language_model, WordNGram):
        language = language._replace(spelling=language_model.spelling(classes))
    if lexicon is not None:
        trie, word_scores = lexicon.for_classes(classes)
        language = language._replace(
            lexicon=trie, word_scores=word_scores, max_gain=language.max_gain + lexicon.max_score()
        )
    if language_model is not None or lexicon is not None or beta:
        # The gain is added up in another order than the score is.
        language = language._replace(max_gain=language.max_gain + _ROUNDING)
    return language


def _best_path(frames: np.ndarray, blank: int, is_space: np.ndarray | None) -> Hypothesis:
    path = frames.argmax(axis=1)
    best = frames.max(axis=1, initial=-np.inf)  # (T,)
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


# Every prefix that was ever in the beam is a node of the trie; node 0 is the empty prefix.
_NODE = np.dtype(
    [
        ("parent", np.int32),  # node of the prefix without its last label
        ("label", np.int32),  # last label; -1 for the empty prefix
        ("slot", np.int32),  # place in the current beam, or -1
    ]
)
# What language model and lexicon make of a node of the trie.
_CONTEXT = np.dtype(
    [
        ("lm_score", np.float64),  # of the characters, or of the complete words
        ("lexicon_score", np.float64),  # of the complete words
        ("lm_state", np.int32),  # after the last character or complete word
        ("word", np.int32),  # node in the spelling of the vocabulary: 0 between words, -1 off the trie
        ("entry", np.int32),  # place in the lexicon, see _look_up
    ],
    align=True,
)
# A prefix in the beam, or a candidate for the next one. Its slot does not move; it is reached through an array `order`
# of slot numbers, whose first entries are the prefixes and whose others are free slots.
_PREFIX = np.dtype(
    [
        ("score", np.float64),  # what it is ranked by: ctc_score + prior
        ("ctc_score", np.float64),  # log mass of all alignments to the prefix
        ("blank_score", np.float64),  # of those that end in a blank
        ("label_score", np.float64),  # of those that end in the last label
        ("prior", np.float64),  # alpha * lm_score + beta * length + lexicon_score
        ("node", np.int32),  # its node in the trie, or -1 if it is not there yet
        ("parent", np.int32),  # as in the trie
        ("label", np.int32),  # as in the trie
        ("length", np.int32),  # number of labels
        ("row", np.int32),  # where _Rows may hold the continuations of its state
    ],
    align=True,
)


class _Rows(NamedTuple):
    """What a character model says after a state about all classes, for the R states that were asked last."""

    state: np.ndarray  # (R,) int32, -1 where there is nothing yet
    log_probs: np.ndarray  # (R, K) float64
    next_states: np.ndarray  # (R, K) int32
    latest: np.ndarray  # (power of two,) int32: by the low bits of a state, the row that was filled last
    oldest: np.ndarray  # (1,) int64: the row to be filled next
    token_log_probs: np.ndarray  # (V,) float64, to work in
    token_states: np.ndarray  # (V,) int32, to work in


@_compiled
def _log_add(a, b):
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    if b < a - 40.0 or b == -np.inf:  # e^-40 is below the resolution of float64
        return a
    return a + math.log1p(math.exp(b - a))


@_compiled
def _place_of(trie, table, parent, label):
    """Where the hash table of nodes holds the prefix `parent` followed by label, or the free place (0) for it."""
    place = ((parent * 1000003 + label) * 2654435761 >> 12) & (len(table) - 1)
    while table[place] != 0 and (trie[table[place]].parent != parent or trie[table[place]].label != label):
        place = (place + 1) & (len(table) - 1)
    return place


@_compiled
def _is_better(trie, a, b):
    """Whether prefix a ranks above prefix b: a total order, since prefixes are distinct."""
    if a.score != b.score:
        return a.score > b.score
    if a.length != b.length:
        return a.length < b.length
    label_a, label_b, node_a, node_b = a.label, b.label, a.parent, b.parent
    while node_a != node_b:  # of the places where they differ, the first decides
        label_a, label_b = trie[node_a].label, trie[node_b].label
        node_a, node_b = trie[node_a].parent, trie[node_b].parent
    return label_a < label_b


@_compiled
def _select(trie, beam, order, size, width):
    """Moves the `width` best of the first `size` slots of `order` to its front, in any order (Hoare's quickselect).

    Returns:
        The score of the worst of them.
    """
    first, end = 0, size
    while True:
        middle, last = (first + end) // 2, end - 1  # the pivot is the median of three
        if _is_better(trie, beam[order[middle]], beam[order[first]]):
            order[middle], order[first] = order[first], order[middle]
        if _is_better(trie, beam[order[last]], beam[order[middle]]):
            order[last], order[middle] = order[middle], order[last]
            if _is_better(trie, beam[order[middle]], beam[order[first]]):
                order[middle], order[first] = order[first], order[middle]
        order[middle], order[last] = order[last], order[middle]
        pivot = beam[order[last]]
        boundary = first
        for place in range(first, last):
            slot = order[place]
            order[place] = order[boundary]
            order[boundary] = slot
            boundary += _is_better(trie, beam[slot], pivot)
        order[boundary], order[last] = order[last], order[boundary]
        if boundary == width - 1:
            return beam[order[boundary]].score
        if boundary < width:
            first = boundary + 1
        else:
            end = boundary


@_compiled
def _parts(language):
    """Whether there is anything to know, a model of characters, one of words, a lexicon."""
    knows_characters, knows_words = len(language.token_of_class) > 0, len(language.spelling) > 0
    has_lexicon = len(language.lexicon) > 0
    return knows_characters or knows_words or has_lexicon, knows_characters, knows_words, has_lexicon


@_compiled
def _row_of(rows, language, state):
    """A row of the state, filled if need be."""
    place = state & (len(rows.latest) - 1)
    row = rows.latest[place]
    if rows.state[row] != state:
        rows.latest[place] = row = rows.oldest[0]
        rows.oldest[0] = (row + 1) % len(rows.state)
        rows.state[row] = state
        advance_all(language.ngrams, state, rows.token_log_probs, rows.token_states)
        for label in range(len(language.token_of_class)):
            token = language.token_of_class[label]
            rows.log_probs[row, label] = rows.token_log_probs[token]
            rows.next_states[row, label] = rows.token_states[token]
    return row


@_compiled
def _end_word(ngrams, spelling, state, word):
    """Log-probability of the word that ends at a node of the spelling, and the state after it."""
    if word == 0:  # there is no word between two spaces
        return 0.0, state
    return advance(ngrams, state, spelling[word].word if word > 0 else UNKNOWN)


@_compiled
def _end_entry(lexicon, word_scores, entry):
    """What a word gains by the lexicon when it ends at an entry."""
    if entry == 0:  # no word, or one without a letter
        return 0.0
    return word_scores[lexicon[entry].word if entry > 0 else -1 - entry]


@_compiled
def _look_up(lexicon, word_scores, kind, entry, label):
    """What a label gains by the lexicon, -inf if it leads to a forbidden word, and the entry after it.

    An entry is a node of the lexicon's trie, which begins at the first letter of a word; or -1 - node after signs that
    may follow a word but lead no further in the trie, where node is that of the word's last letter; or -1 if the word
    is unknown whatever follows.
    """
    if kind == _SPACE:
        return _end_entry(lexicon, word_scores, entry), 0
    if entry == 0 and kind == _OTHER:
        return 0.0, 0
    child = child_of(lexicon, entry, label) if entry >= 0 else 0
    if child != 0:
        return 0.0, child
    if kind == _LETTER:
        entry = -1
    elif entry > 0:
        entry = -1 - lexicon[entry].word
    return (-np.inf if word_scores[-1 - entry] == -np.inf else 0.0), entry


@_compiled
def _extend(ngrams, spelling, lexicon, word_scores, kind, row_log_probs, row_next_states, row, old, label, new):
    """Fills the context of a prefix that grows by a label; row is that of the old state under a character model."""
    new.lm_score, new.lm_state, new.word = old.lm_score, old.lm_state, 0
    if row >= 0:
        new.lm_score += row_log_probs[row, label]
        new.lm_state = row_next_states[row, label]
    elif len(spelling) > 0:
        if kind[label] == _SPACE:
            log_prob, new.lm_state = _end_word(ngrams, spelling, old.lm_state, old.word)
            new.lm_score += log_prob
        else:
            child = child_of(spelling, old.word, label) if old.word >= 0 else 0
            new.word = child if child != 0 else -1
    new.lexicon_score, new.entry = old.lexicon_score, 0
    if len(lexicon) > 0:
        gain, new.entry = _look_up(lexicon, word_scores, kind[label], old.entry, label)
        new.lexicon_score += gain


@_compiled
def _advance(
    frame, blank, width, language, rows, contexts, trie, table, num_nodes, beam, order, size, next_beam, next_order
):
    """One frame: fills next_beam from the size prefixes of beam.

    Returns:
        The number of prefixes in next_beam and of nodes in the trie.
    """
    kept = np.int64(0)
    best, worst = -np.inf, np.inf  # the best score of the beam; the worst that the next beam can have
    # Prefixes that stay as they are, by a blank or by their last label once more. A prefix whose parent is in the beam
    # too also takes over the alignments by which the parent grows into it.
    for slot in order[:size]:
        old = beam[slot]
        best = max(best, old.score)
        blank_score = old.ctc_score + frame[blank]
        label_score = -np.inf
        if old.label >= 0:
            label_score = old.label_score
            parent_slot = trie[old.parent].slot
            if parent_slot >= 0:
                parent = beam[parent_slot]
                growing = parent.blank_score if parent.label == old.label else parent.ctc_score
                label_score = _log_add(label_score, growing)
            label_score += frame[old.label]
        ctc_score = _log_add(blank_score, label_score)
        if ctc_score > -np.inf:
            score = ctc_score + old.prior
            new = next_beam[next_order[kept]]
            new.node, new.parent, new.label, new.length = old.node, old.parent, old.label, old.length
            new.row = old.row
            new.blank_score, new.label_score, new.ctc_score = blank_score, label_score, ctc_score
            new.prior, new.score = old.prior, score
            worst = min(worst, score)
            kept += 1
    if kept < width:
        worst = -np.inf

    # Prefixes that grow by a label. Most labels cannot take even the best prefix to the score that is needed.
    alpha, beta, max_gain = language.alpha, language.beta, language.max_gain
    has_context, knows_characters, knows_words, has_lexicon = _parts(language)
    # Numba counts references whenever it takes an array out of a tuple: too slow for the innermost loop.
    ngrams, spelling, lexicon, word_scores = language.ngrams, language.spelling, language.lexicon, language.word_scores
    kind, row_state, row_log_probs, row_next_states = language.kind, rows.state, rows.log_probs, rows.next_states
    latest_row = rows.latest
    is_strict = has_lexicon and word_scores[0] == -np.inf
    for label in range(len(frame)):
        if label == blank or frame[label] == -np.inf or best + frame[label] + max_gain < worst:
            continue
        for slot in order[:size]:
            old = beam[slot]
            # A repeated label needs a blank between.
            ctc_score = (old.blank_score if label == old.label else old.ctc_score) + frame[label]
            if ctc_score + old.prior + max_gain < worst or ctc_score == -np.inf:
                continue
            lm_score = lexicon_score = 0.0
            if has_context:
                context = contexts[old.node]
                lm_score, lexicon_score = context.lm_score, context.lexicon_score
                if knows_characters:
                    if row_state[old.row] != context.lm_state:
                        old.row = _row_of(rows, language, context.lm_state)
                    lm_score += row_log_probs[old.row, label]
                elif knows_words and kind[label] == _SPACE:
                    lm_score += _end_word(ngrams, spelling, context.lm_state, context.word)[0]
                if has_lexicon and (is_strict or kind[label] == _SPACE):
                    lexicon_score += _look_up(lexicon, word_scores, kind[label], context.entry, label)[0]
            prior = alpha * lm_score + beta * (old.length + 1) + lexicon_score
            score = ctc_score + prior
            if score < worst or score == -np.inf:
                continue
            node = table[_place_of(trie, table, old.node, label)]
            if node != 0 and trie[node].slot >= 0:  # it is in the beam: counted among those that stay
                continue
            new = next_beam[next_order[kept]]
            new.node, new.parent, new.label, new.length = node if node != 0 else -1, old.node, label, old.length + 1
            new.blank_score, new.label_score, new.ctc_score = -np.inf, ctc_score, ctc_score
            new.prior, new.score, new.row = prior, score, 0
            kept += 1
            if kept == len(next_order):
                worst = _select(trie, next_beam, next_order, kept, width)
                kept = width
    if kept > width:
        _select(trie, next_beam, next_order, kept, width)
        kept = width

    for slot in order[:size]:
        trie[beam[slot].node].slot = -1
    for slot in next_order[:kept]:
        new = next_beam[slot]
        if new.node < 0:
            new.node = num_nodes
            trie[num_nodes].parent = new.parent
            trie[num_nodes].label = new.label
            table[_place_of(trie, table, new.parent, new.label)] = num_nodes
            if has_context:
                context = contexts[new.parent]
                row = np.int64(-1)
                if knows_characters:  # the row is nearly always there still
                    row = latest_row[context.lm_state & (len(latest_row) - 1)]
                    if row_state[row] != context.lm_state:
                        row = _row_of(rows, language, context.lm_state)
                _extend(
                    ngrams,
                    spelling,
                    lexicon,
                    word_scores,
                    kind,
                    row_log_probs,
                    row_next_states,
                    row,
                    context,
                    new.label,
                    contexts[num_nodes],
                )
            num_nodes += 1
        trie[new.node].slot = slot
    return kept, num_nodes


@_compiled
def _end(language, contexts, beam, order, size):
    """Scores the last word and the end of the line in every prefix, and moves those that may end here to the front.

    Returns:
        Their number.
    """
    _, knows_characters, knows_words, has_lexicon = _parts(language)
    kept = np.int64(0)
    for place in range(size):
        found = beam[order[place]]
        context = contexts[found.node]
        state = context.lm_state
        if knows_words:
            log_prob, state = _end_word(language.ngrams, language.spelling, state, context.word)
            context.lm_score += log_prob
        if knows_words or knows_characters:
            context.lm_score += advance(language.ngrams, state, END)[0]
        if has_lexicon:
            context.lexicon_score += _end_entry(language.lexicon, language.word_scores, context.entry)
        prior = language.alpha * context.lm_score + language.beta * found.length + context.lexicon_score
        found.score = found.ctc_score + prior
        if found.score > -np.inf:
            order[kept], order[place] = order[place], order[kept]
            kept += 1
    return kept


@_compiled
def _align(frames, blank, labels, spans, confidences):
    """Writes spans and confidences of the labels on their best alignment; on equal scores the path stays put."""
    num_frames, num_states = len(frames), 2 * len(labels) + 1  # blank, label, blank, ..., label, blank
    step = np.zeros((num_frames, num_states), np.int8)  # states moved on arrival
    score = np.empty(num_states)
    score[:] = -np.inf
    score[0] = 0.0  # before the first frame: as if a blank had been there
    for frame in range(num_frames):
        for state in range(num_states - 1, -1, -1):  # downwards: lower states still hold the previous frame's scores
            label = labels[state // 2] if state % 2 else blank
            best = score[state]
            if state >= 1 and score[state - 1] > best:
                best = score[state - 1]
                step[frame, state] = 1
            if state >= 3 and state % 2 and label != labels[state // 2 - 1] and score[state - 2] > best:
                best = score[state - 2]
                step[frame, state] = 2
            score[state] = best + frames[frame, label]
    state = num_states - 1
    if state > 0 and score[state - 1] > score[state]:
        state -= 1
    for place in range(len(labels)):
        spans[place, 1] = 0
        confidences[place] = 0.0
    for frame in range(num_frames - 1, -1, -1):
        place = state // 2
        if state % 2:
            spans[place, 0] = frame
            spans[place, 1] = max(spans[place, 1], frame + 1)
            confidences[place] = max(confidences[place], min(1.0, math.exp(frames[frame, labels[place]])))
        state -= step[frame, state]


@_compiled
def _search(frames, blank, width, top_paths, language):
    """Searches one line.

    Returns:
        lengths (P,) int64, score, ctc_score, lm_score and lexicon_score (P, 4) float64, labels (P, T) int32, frame
        spans (P, T, 2) int32 and confidences (P, T) float64 of the P <= top_paths best hypotheses, in any order;
        entries past the length are undefined.
    """
    num_frames = len(frames)
    max_nodes = 1 + width * num_frames
    table_size = 16
    while table_size < 2 * max_nodes:
        table_size *= 2
    table = np.zeros(table_size, np.int32)
    trie = np.empty(max_nodes, _NODE)
    has_context, knows_characters, _, _ = _parts(language)
    # At most `width` states are asked about in a frame, so that none of their rows is lost before the next.
    num_rows = 4 * width if knows_characters else 1
    latest_size = 1
    while latest_size < 4 * num_rows:
        latest_size *= 2
    rows = _Rows(
        np.full(num_rows, -1, np.int32),
        np.empty((num_rows, frames.shape[1])),
        np.empty((num_rows, frames.shape[1]), np.int32),
        np.zeros(latest_size, np.int32),
        np.zeros(1, np.int64),
        np.empty(language.vocabulary_size),
        np.empty(language.vocabulary_size, np.int32),
    )
    contexts = np.empty(max_nodes if has_context else 0, _CONTEXT)
    if has_context:
        start = contexts[0]
        start.lm_score, start.lexicon_score = 0.0, 0.0
        start.lm_state, start.word, start.entry = language.start_state, 0, 0
    beam, next_beam = np.empty(2 * width, _PREFIX), np.empty(2 * width, _PREFIX)
    order, next_order = np.arange(2 * width), np.arange(2 * width)
    root = beam[0]
    root.node, root.parent, root.label, root.length, root.row = 0, -1, -1, 0, 0
    root.blank_score, root.label_score, root.ctc_score, root.score, root.prior = 0.0, -np.inf, 0.0, 0.0, 0.0
    trie[0].parent, trie[0].label, trie[0].slot = -1, -1, 0
    size = num_nodes = np.int64(1)  # not the literal 1, for which Numba would compile _advance once more
    for frame in range(num_frames):
        size, num_nodes = _advance(
            frames[frame],
            blank,
            width,
            language,
            rows,
            contexts,
            trie,
            table,
            num_nodes,
            beam,
            order,
            size,
            next_beam,
            next_order,
        )
        beam, order, next_beam, next_order = next_beam, next_order, beam, order
    if has_context:
        size = _end(language, contexts, beam, order, size)

    num_paths = min(size, top_paths)
    if size > num_paths:
        _select(trie, beam, order, size, num_paths)
    lengths = np.empty(num_paths, np.int64)
    scores = np.empty((num_paths, 4), np.float64)
    labels = np.empty((num_paths, num_frames), np.int32)
    spans = np.empty((num_paths, num_frames, 2), np.int32)
    confidences = np.empty((num_paths, num_frames), np.float64)
    for path in range(num_paths):
        found = beam[order[path]]
        lengths[path] = length = found.length
        scores[path, 0], scores[path, 1] = found.score, found.ctc_score
        node = found.node
        scores[path, 2] = contexts[node].lm_score if has_context else 0.0
        scores[path, 3] = contexts[node].lexicon_score if has_context else 0.0
        for place in range(length - 1, -1, -1):
            labels[path, place] = trie[node].label
            node = trie[node].parent
        _align(frames, blank, labels[path, :length], spans[path], confidences[path])
    return lengths, scores, labels, spans, confidences
