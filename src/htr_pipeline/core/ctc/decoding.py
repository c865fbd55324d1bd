"""Best path and prefix beam search over CTC outputs, one line of text a thread.

The search keeps every prefix once, as a node of a trie in flat arrays, and works in log space with float64 throughout:
there is nothing to underflow, so an unpruned search is exact.
"""

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import numpy.typing as npt

from htr_pipeline.core.ctc.threads import num_cores

# A log-softmax in half precision may end up this much above zero by rounding; logits and probabilities lie far above.
_LOG_PROB_TOLERANCE = 1e-2

_compiled = numba.njit(cache=True, nogil=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Hypothesis:
    """One reading of a line.

    Attributes:
        labels: (N,) int32. Classes, without blanks.
        score: what hypotheses are ranked by, natural log: ctc_score, as long as no language model takes part.
        ctc_score: natural log of the probability of all alignments that the search followed to these labels; of the one
            best path for greedy_search.
        lm_score: natural log of the language model's probability; 0 without one.
        frame_spans: (N, 2) int32. First frame of each label and the frame after its last, on the best alignment of
            these labels; frames between two spans are blank.
        confidences: (N,) float64, 0..1. The highest probability of each label in a frame of its span.
    """

    labels: np.ndarray
    score: float
    ctc_score: float
    lm_score: float
    frame_spans: np.ndarray
    confidences: np.ndarray


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
    log_probs: npt.ArrayLike, logit_length: npt.ArrayLike | None = None, *, blank_index: int = -1
) -> list[list[Hypothesis]]:
    """The best path of each line: the likeliest class of every frame, repeats merged, blanks removed.

    Args:
        log_probs: (B, T, K) floating point. Log-softmax of the logits; frames past logit_length are ignored.
        logit_length: (B,) integer, 0..T; None: T for every line.
        blank_index: class of the blank; negative counts from the end.

    Returns:
        For each line a list of one Hypothesis, as beam_search returns with top_paths=1. Its score is that of the path,
        not of all alignments of the labels. Of equally likely classes in a frame the lowest is taken.

    Raises:
        ValueError: shapes, lengths or blank_index do not fit, or log_probs cannot be log-probabilities.
    """
    lines, blank = _checked_lines(log_probs, logit_length, blank_index)
    return [[_best_path(frames, blank)] for frames in lines]


def beam_search(
    log_probs: npt.ArrayLike,
    logit_length: npt.ArrayLike | None = None,
    *,
    blank_index: int = -1,
    beam_width: int = 100,
    top_paths: int = 1,
    num_threads: int | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest labels of each line, all alignments of the same labels added up.

    After every frame the beam_width likeliest prefixes are kept. Of equally likely ones the shorter, then the
    lexicographically smaller is preferred. A line's result depends neither on its batch nor on num_threads.

    Args:
        log_probs: (B, T, K) floating point. Log-softmax of the logits, where -inf is allowed; frames past logit_length
            are ignored.
        logit_length: (B,) integer, 0..T; None: T for every line.
        blank_index: class of the blank; negative counts from the end.
        beam_width: prefixes kept after each frame, at least 1.
        top_paths: hypotheses wanted of each line, at least 1.
        num_threads: lines searched at the same time; None: one on every core that this process may use.

    Returns:
        For each line at most top_paths hypotheses, best first: fewer where the beam holds fewer of non-zero
        probability. There is always at least one; it is empty with score 0 if there are no frames, and empty with score
        -inf if nothing is possible. If the beam was wide enough to prune nothing, ctc_score is minus the CTC loss of
        the labels.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or log_probs cannot be log-probabilities.

    Source: Graves and Jaitly, ICML 2014, algorithm 1, in the form of Hannun et al., arXiv 1408.2873, with two masses
        for each prefix. Compared with enumeration and with a plain version in tests/core/ctc/test_decoding.py.
    """
    lines, blank = _checked_lines(log_probs, logit_length, blank_index)
    for name, value in (("beam_width", beam_width), ("top_paths", top_paths), ("num_threads", num_threads)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1.")

    def search(frames: np.ndarray) -> list[Hypothesis]:
        # Frames of K classes lead to at most this many prefixes, so a wider beam would only cost memory.
        width = _num_prefixes(len(frames), frames.shape[1], beam_width)
        lengths, scores, labels, spans, confidences = _search(frames, blank, width, top_paths)
        if not len(lengths):
            return [_impossible_line()]
        hypotheses = [
            Hypothesis(labels[path, :length], score, score, 0.0, spans[path, :length], confidences[path, :length])
            for path, (length, score) in enumerate(zip(lengths.tolist(), scores.tolist(), strict=True))
        ]
        return sorted(hypotheses, key=lambda found: (-found.score, len(found.labels), found.labels.tolist()))

    return _in_threads(search, lines, num_threads or num_cores())


def _impossible_line() -> Hypothesis:
    nothing = np.empty(0, np.int32)
    return Hypothesis(nothing, -math.inf, -math.inf, 0.0, np.empty((0, 2), np.int32), np.empty(0))


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
) -> tuple[list[np.ndarray], int]:
    """The valid frames of each line, (T_i, K) float64 in C order, and the blank as a non-negative class."""
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
    return lines, blank_index % num_classes


def _best_path(frames: np.ndarray, blank: int) -> Hypothesis:
    path = frames.argmax(axis=1)
    best = frames.max(axis=1, initial=-np.inf)  # (T,)
    starts = np.flatnonzero(np.diff(path, prepend=-1))
    ends = np.append(starts[1:], len(path))
    confidences = np.exp(np.minimum(np.maximum.reduceat(best, starts), 0.0)) if len(path) else best
    written = path[starts] != blank
    score = float(best.sum())
    return Hypothesis(
        labels=path[starts][written].astype(np.int32),
        score=score,
        ctc_score=score,
        lm_score=0.0,
        frame_spans=np.stack([starts, ends[: len(starts)]], axis=1)[written].astype(np.int32),
        confidences=confidences[written],
    )


# Every prefix that was ever in the beam is a node of the trie; node 0 is the empty prefix.
_NODE = np.dtype(
    [
        ("parent", np.int32),  # node of the prefix without its last label
        ("label", np.int32),  # last label; -1 for the empty prefix
        ("slot", np.int32),  # place in the current beam, or -1
    ]
)
# A prefix in the beam, or a candidate for the next one. Its slot does not move; it is reached through an array `order`
# of slot numbers, whose first entries are the prefixes and whose others are free slots.
_PREFIX = np.dtype(
    [
        ("score", np.float64),  # log mass of all alignments to the prefix
        ("blank_score", np.float64),  # of those that end in a blank
        ("label_score", np.float64),  # of those that end in the last label
        ("node", np.int32),  # its node in the trie, or -1 if it is not there yet
        ("parent", np.int32),  # as in the trie
        ("label", np.int32),  # as in the trie
        ("length", np.int32),  # number of labels
    ]
)


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
def _advance(frame, blank, width, trie, table, num_nodes, beam, order, size, next_beam, next_order):
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
        blank_score = old.score + frame[blank]
        label_score = -np.inf
        if old.label >= 0:
            label_score = old.label_score
            parent_slot = trie[old.parent].slot
            if parent_slot >= 0:
                parent = beam[parent_slot]
                label_score = _log_add(label_score, parent.blank_score if parent.label == old.label else parent.score)
            label_score += frame[old.label]
        score = _log_add(blank_score, label_score)
        if score > -np.inf:
            new = next_beam[next_order[kept]]
            new.node, new.parent, new.label, new.length = old.node, old.parent, old.label, old.length
            new.blank_score, new.label_score, new.score = blank_score, label_score, score
            worst = min(worst, score)
            kept += 1
    if kept < width:
        worst = -np.inf

    # Prefixes that grow by a label. Most labels cannot take even the best prefix to the score that is needed.
    for label in range(len(frame)):
        if label == blank or frame[label] == -np.inf or best + frame[label] < worst:
            continue
        for slot in order[:size]:
            old = beam[slot]
            # A repeated label needs a blank between.
            score = (old.blank_score if label == old.label else old.score) + frame[label]
            if score < worst or score == -np.inf:
                continue
            node = table[_place_of(trie, table, old.node, label)]
            if node != 0 and trie[node].slot >= 0:  # it is in the beam: counted among those that stay
                continue
            new = next_beam[next_order[kept]]
            new.node, new.parent, new.label, new.length = node if node != 0 else -1, old.node, label, old.length + 1
            new.blank_score, new.label_score, new.score = -np.inf, score, score
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
            num_nodes += 1
        trie[new.node].slot = slot
    return kept, num_nodes


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
def _search(frames, blank, width, top_paths):
    """Searches one line.

    Returns:
        lengths (P,) int64, scores (P,) float64, labels (P, T) int32, frame spans (P, T, 2) int32 and confidences (P, T)
        float64 of the P <= top_paths best hypotheses, in any order; entries past the length are undefined.
    """
    num_frames = len(frames)
    max_nodes = 1 + width * num_frames
    table_size = 16
    while table_size < 2 * max_nodes:
        table_size *= 2
    table = np.zeros(table_size, np.int32)
    trie = np.empty(max_nodes, _NODE)
    beam, next_beam = np.empty(2 * width, _PREFIX), np.empty(2 * width, _PREFIX)
    order, next_order = np.arange(2 * width), np.arange(2 * width)
    root = beam[0]
    root.node, root.parent, root.label, root.length = 0, -1, -1, 0
    root.blank_score, root.label_score, root.score = 0.0, -np.inf, 0.0
    trie[0].parent, trie[0].label, trie[0].slot = -1, -1, 0
    size = num_nodes = np.int64(1)  # not the literal 1, for which Numba would compile _advance once more
    for frame in range(num_frames):
        size, num_nodes = _advance(
            frames[frame], blank, width, trie, table, num_nodes, beam, order, size, next_beam, next_order
        )
        beam, order, next_beam, next_order = next_beam, next_order, beam, order

    num_paths = min(size, top_paths)
    if size > num_paths:
        _select(trie, beam, order, size, num_paths)
    lengths = np.empty(num_paths, np.int64)
    scores = np.empty(num_paths, np.float64)
    labels = np.empty((num_paths, num_frames), np.int32)
    spans = np.empty((num_paths, num_frames, 2), np.int32)
    confidences = np.empty((num_paths, num_frames), np.float64)
    for path in range(num_paths):
        found = beam[order[path]]
        lengths[path] = length = found.length
        scores[path] = found.score
        node = found.node
        for place in range(length - 1, -1, -1):
            labels[path, place] = trie[node].label
            node = trie[node].parent
        _align(frames, blank, labels[path, :length], spans[path], confidences[path])
    return lengths, scores, labels, spans, confidences
