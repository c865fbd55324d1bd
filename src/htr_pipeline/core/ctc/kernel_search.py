"""The prefix beam search of one line, compiled by Numba.

Every prefix that was ever in the beam is kept once, as a node of a trie in flat arrays. What model and lexicon say of a
prefix is a function of its labels alone, so it is stored with the prefix and asked once, when the prefix grows. Scores
are logarithms in float64 throughout: there is nothing to underflow.

Language parts that are not given are None. Numba compiles a function anew for each combination and leaves out what
stands behind `is not None`, so a search pays for what it uses only, in time and in compilation.

Compilation is what the first search waits for. So what every search needs compares where max and min would do, which
Numba compiles for each combination of types, and calls are nested little, since LLVM optimises a function once more
within each of its callers.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np

from htr_pipeline.core.ctc.compilation import WITHOUT_COUNTS, compiled, without_collection
from htr_pipeline.core.ctc.kernel_cpu import LN_2_HIGH, LN_2_LOW, LOG2_E
from htr_pipeline.core.ctc.language_model import END, UNKNOWN, advance, child_of

OTHER, LETTER, SPACE = 0, 1, 2
ROUNDING = 1e-6  # far above what sums of some hundred float64 scores are off

_compiled = compiled(error_model="numpy")
_of_helpers = {"error_model": "numpy", "no_cpython_wrapper": True, **WITHOUT_COUNTS}
_helper = compiled(**_of_helpers)
_vectorised = compiled(**_of_helpers, fastmath={"contract"})


# Numba's cache files hold the names of the tuples below: to rename one means to delete src's __pycache__ folders.
class Weights(NamedTuple):
    """How scores are put together, and what a label can gain at most, whatever the network says."""

    alpha: float
    beta: float
    max_gain: float  # from model and lexicon
    max_word_gain: float  # from a model of words and lexicon, which speak at the end of words


class Characters(NamedTuple):
    """A model of characters in terms of a network's classes."""

    trie: np.ndarray  # (N,) language_model.NODE
    start_state: int
    token_of_class: np.ndarray  # (K,) int32
    class_of_token: np.ndarray  # (V,) int32: the first of its classes, or -1
    next_class: np.ndarray  # (K,) int32: the next class of the same token, or -1
    order: int


class Words(NamedTuple):
    """A model of words in terms of a network's classes."""

    trie: np.ndarray  # (N,) language_model.NODE
    start_state: int
    spelling: np.ndarray  # (N,) lexicon.SPELLING
    kind: np.ndarray  # (K,) int8: OTHER, LETTER or SPACE
    space_token: int  # of a model to which the space behind a word is a token; -1 where spaces only part words


class Entries(NamedTuple):
    """A lexicon in terms of a network's classes."""

    trie: np.ndarray  # (N,) lexicon.SPELLING, as in BoundLexicon
    word_scores: np.ndarray  # (N,) float64, as in BoundLexicon
    kind: np.ndarray  # (K,) int8, as in Words


_NODE = np.dtype(
    [
        ("parent", np.int32),  # node of the prefix without its last label
        ("label", np.int32),  # last label; -1 for the empty prefix, node 0
        ("slot", np.int32),  # place in the current beam, or -1
    ]
)
_PREFIX = np.dtype(
    [
        ("ctc_score", np.float64),  # log mass of all alignments to the prefix
        ("blank_score", np.float64),  # of those that end in a blank
        ("label_score", np.float64),  # of those that end in the last label
        ("prior", np.float64),  # alpha * lm_score + beta * length + lexicon_score
        ("lm_score", np.float64),  # of the characters, or of the complete words
        ("lexicon_score", np.float64),  # of the complete words
        ("word_log_prob", np.float64),  # of its last word, if that ended here; NaN until somebody asks
        ("space_log_prob", np.float64),  # of the space behind it, where that is a token
        ("node", np.int32),  # its node in the trie
        ("parent", np.int32),  # as in the trie
        ("label", np.int32),  # as in the trie
        ("length", np.int32),  # number of labels
        ("lm_state", np.int32),  # after the last character or complete word
        ("word", np.int32),  # node in the spelling of the vocabulary: 0 between words, -1 off the trie
        ("word_state", np.int32),  # the state if the last word ended here and a space followed
        ("entry", np.int32),  # place in the lexicon, see _look_up
        ("first_child", np.int32),  # place in the beam of a prefix that is one label longer, or -1
        ("sibling", np.int32),  # place of the next one of the same parent, or -1
        ("row", np.int32),  # place in _Rows
    ],
    align=True,
)


# Labels worth appending are sorted, if they are few, or else put into buckets.
_FEW, _NUM_BUCKETS = 16, 32
_LOWEST = -np.finfo(np.float64).max  # leaves out impossible labels
_LANES = 8  # numbers that a vector instruction takes at once
# Rows of an array (7, W) about the W prefixes of a beam. Numba counts references whenever it takes an array out of a
# tuple, which every frame would pay for.
_BLANK_SCORE, _LABEL_SCORE, _CTC_SCORE = 0, 1, 2  # of the prefix as it is after the frame, as in _PREFIX
_OWN, _INHERITED = 3, 4  # parts of label_score: from the prefix itself, from its parent
_FRAME = 5  # log-probability of the last label in the frame
_BOUND = 6  # at least the score after a label of log-probability 0


class _Rows(NamedTuple):
    """What a character model says after a state about all classes, for the R states that were asked last."""

    state: np.ndarray  # (R,) int32, -1 where there is nothing yet; R is a power of two
    log_probs: np.ndarray  # (R, K) float64
    best: np.ndarray  # (R,) float64, at least the highest of them
    next_states: np.ndarray  # (R, K) int32
    latest: np.ndarray  # (power of two,) int64: by the low bits of a state, the row that was filled last
    oldest: np.ndarray  # (1,) int64: the row to be filled next
    contexts: np.ndarray  # (longest n-gram,) int32, to work in
    backoffs: np.ndarray  # (longest n-gram,) float64, to work in


# Language parts, given or not, that _search was called with and is compiled for.
_known_parts: set[tuple[bool, bool, bool]] = set()

# 2 ** -n; e^-40, the smallest power wanted, is above the last.
_POWERS = 0.5 ** np.arange(60)
_E2, _E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12, _E13 = (1 / math.factorial(n) for n in range(2, 14))
_L3, _L5, _L7, _L9, _L11, _L13, _L15, _L17, _L19, _L21, _L23, _L25, _L27, _L29, _L31 = (1 / n for n in range(3, 32, 2))


@_vectorised
def _log_add(scores, a, b, total, size):
    """Fills a row with log(exp(a) + exp(b)); without branches and calls, so that it becomes vector instructions."""
    for i in range(size):
        first, second = scores[a, i], scores[b, i]
        high = first if first > second else second
        low = second if first > second else first
        difference = low - high if low > high - 40.0 else -40.0  # e^-40 is below the resolution of float64
        halvings = np.int32(0.5 - difference * LOG2_E)
        x = (difference + halvings * LN_2_HIGH) + halvings * LN_2_LOW
        y = 1.0 + x * (1.0 + x * (_E2 + x * (_E3 + x * (_E4 + x * (_E5 + x * (_E6 + x * (_E7 + x * (
            _E8 + x * (_E9 + x * (_E10 + x * (_E11 + x * (_E12 + x * _E13))))))))))))  # fmt: skip
        y *= _POWERS[halvings]
        y = y if low > high - 40.0 else 0.0
        # log(1 + y) = 2 artanh(s), of which s^2 is at most 1/9.
        s = y / (2.0 + y)
        z = s * s
        series = 1.0 + z * (_L3 + z * (_L5 + z * (_L7 + z * (_L9 + z * (_L11 + z * (_L13 + z * (_L15 + z * (_L17 + z * (
            _L19 + z * (_L21 + z * (_L23 + z * (_L25 + z * (_L27 + z * (_L29 + z * _L31))))))))))))))  # fmt: skip
        scores[total, i] = high + 2.0 * s * series


@_helper
def _place_of(trie, table, parent, label):
    """Where the hash table of nodes holds the prefix `parent` followed by label, or the free place (0) for it."""
    place = ((parent * 1000003 + label) * 2654435761 >> 12) & (len(table) - 1)
    while table[place] != 0 and (trie[table[place]].parent != parent or trie[table[place]].label != label):
        place = (place + 1) & (len(table) - 1)
    return place


@_helper
def _packed(slot, label):
    """A candidate: the prefix at a place of the beam followed by a label, or as it is for label -1."""
    return (slot << 32) | (label + 1)


@_helper
def _unpacked(candidate):
    return candidate >> 32, (candidate & 0xFFFFFFFF) - 1


@_helper
def _precedes(trie, beam, a, b):
    """Whether candidate a ranks above candidate b of the same score: a total order, since prefixes are distinct."""
    slot_a, label_a = _unpacked(a)
    slot_b, label_b = _unpacked(b)
    length_a, length_b = beam[slot_a].length + (label_a >= 0), beam[slot_b].length + (label_b >= 0)
    if length_a != length_b:
        return length_a < length_b
    node_a, node_b = beam[slot_a].node, beam[slot_b].node
    if label_a < 0:
        label_a, node_a = np.int64(beam[slot_a].label), beam[slot_a].parent
    if label_b < 0:
        label_b, node_b = np.int64(beam[slot_b].label), beam[slot_b].parent
    while node_a != node_b:  # of the places where they differ, the first decides
        label_a, label_b = np.int64(trie[node_a].label), np.int64(trie[node_b].label)
        node_a, node_b = trie[node_a].parent, trie[node_b].parent
    return label_a < label_b


@_helper
def _select(trie, beam, ranking, candidate, size, width):
    """Moves the `width` best of the first `size` candidates to the front, in any order (Hoare's quickselect).

    Returns:
        The score of the worst of them.
    """
    first, end = 0, size
    while True:
        middle, last = (first + end) // 2, end - 1  # the pivot is the median of three
        low, high = ranking[first], ranking[last]
        if low > high:
            low, high = high, low
        pivot_place = middle
        if ranking[middle] < low:
            pivot_place = first if ranking[first] == low else last
        elif ranking[middle] > high:
            pivot_place = first if ranking[first] == high else last
        pivot_score, pivot = ranking[pivot_place], candidate[pivot_place]
        ranking[pivot_place], candidate[pivot_place] = ranking[last], candidate[last]
        boundary = first
        for place in range(first, last):
            key, moved = ranking[place], candidate[place]
            ranking[place], candidate[place] = ranking[boundary], candidate[boundary]
            ranking[boundary], candidate[boundary] = key, moved
            boundary += key > pivot_score or (key == pivot_score and _precedes(trie, beam, moved, pivot))
        ranking[last], candidate[last] = ranking[boundary], candidate[boundary]
        ranking[boundary], candidate[boundary] = pivot_score, pivot
        if boundary == width - 1:
            return pivot_score
        if boundary < width:
            first = boundary + 1
        else:
            end = boundary


def _rows(width: int, num_classes: int, order: int) -> _Rows:
    num_rows = 4
    while num_rows < 4 * width:
        num_rows *= 2
    return _Rows(
        np.full(num_rows, -1, np.int32),
        np.empty((num_rows, num_classes)),
        np.empty(num_rows),
        np.empty((num_rows, num_classes), np.int32),
        np.zeros(4 * num_rows, np.int64),
        np.zeros(1, np.int64),
        np.empty(order, np.int32),
        np.empty(order),
    )


@_helper
def _new_row(rows, characters, state):
    """A row of the state, in place of the oldest: what language_model.advance says of every class."""
    row = rows.oldest[0]
    rows.oldest[0] = (row + 1) & (len(rows.state) - 1)
    rows.latest[state & (len(rows.latest) - 1)] = row
    rows.state[row] = state
    trie, token_of_class, class_of_token = characters.trie, characters.token_of_class, characters.class_of_token
    log_probs, next_states, contexts, backoffs = rows.log_probs, rows.next_states, rows.contexts, rows.backoffs
    depth, backoff = 0, 0.0
    while state != 0:
        contexts[depth], backoffs[depth] = state, backoff
        backoff += trie[state].backoff
        state = trie[state].suffix
        depth += 1
    best = -np.inf
    for label in range(len(token_of_class)):
        node = 1 + token_of_class[label]
        log_probs[row, label], next_states[row, label] = backoff + trie[node].log_prob, trie[node].next_state
        best = max(best, log_probs[row, label])
    for place in range(depth - 1, -1, -1):  # longer contexts overrule shorter ones
        state, backoff = contexts[place], backoffs[place]
        for child in range(trie[state].first_child, trie[state + 1].first_child):
            token, log_prob = trie[child].token, backoff + trie[child].log_prob
            label = class_of_token[token]
            while label >= 0:  # many classes may be unknown to the model
                log_probs[row, label], next_states[row, label] = log_prob, trie[child].next_state
                label = characters.next_class[label]
            best = max(best, log_prob)
    rows.best[row] = best
    return row


@_helper
def _last_word(words, prefix):
    """Log-probability of the last word of a prefix, and the state after it."""
    if prefix.word == 0:  # there is no word between two spaces
        return 0.0, prefix.lm_state
    return advance(words.trie, prefix.lm_state, words.spelling[prefix.word].word if prefix.word > 0 else UNKNOWN)


@_helper
def _end_word(words, prefix):
    """Asks for the last word of a prefix and the space behind it, unless that was done before."""
    if np.isnan(prefix.word_log_prob):
        prefix.word_log_prob, prefix.word_state = _last_word(words, prefix)
        prefix.space_log_prob = 0.0
        if words.space_token >= 0 and prefix.word != 0:
            prefix.space_log_prob, prefix.word_state = advance(words.trie, prefix.word_state, words.space_token)


@_helper
def _end_entry(lexicon, entry):
    """What a word gains by the lexicon when it ends at an entry."""
    if entry == 0:  # no word, or one without a letter
        return 0.0
    return lexicon.word_scores[lexicon.trie[entry].word if entry > 0 else -1 - entry]


@_helper
def _look_up(lexicon, entry, label):
    """What a label gains by the lexicon, -inf if it leads to a forbidden word, and the entry after it.

    An entry is a node of the lexicon's trie, which begins at the first letter of a word; or -1 - node after signs that
    may follow a word but lead no further in the trie, where node is that of the word's last letter; or -1 if the word
    is unknown whatever follows.
    """
    kind = lexicon.kind[label]
    if kind == SPACE:
        return _end_entry(lexicon, entry), 0
    if entry == 0 and kind == OTHER:
        return 0.0, 0
    child = child_of(lexicon.trie, entry, label) if entry >= 0 else 0
    if child != 0:
        return 0.0, child
    if kind == LETTER:
        entry = -1
    elif entry > 0:
        entry = -1 - lexicon.trie[entry].word
    return (-np.inf if lexicon.word_scores[-1 - entry] == -np.inf else 0.0), entry


@_helper
def _stay(frame, blank, width, weights, trie, beam, size, scores, ranking, candidate):
    """Prefixes that stay as they are, by a blank or by their last label once more: the first candidates.

    A prefix whose parent is in the beam too also takes over the alignments by which the parent grows into it.

    Returns:
        Their number, the score that a candidate needs at least, and the highest bound of a prefix that grows.
    """
    for slot in range(size):
        beam[slot].first_child = -1
    for slot in range(size):
        old = beam[slot]
        scores[_BLANK_SCORE, slot] = old.ctc_score + frame[blank]
        scores[_OWN, slot] = old.label_score
        scores[_INHERITED, slot] = -np.inf
        scores[_FRAME, slot] = frame[old.label]  # any for the empty prefix, label -1: no mass of it ends in a label
        parent_slot = trie[old.parent].slot if old.parent >= 0 else -1
        if parent_slot >= 0:
            parent = beam[parent_slot]
            scores[_INHERITED, slot] = parent.blank_score if parent.label == old.label else parent.ctc_score
            old.sibling = parent.first_child
            parent.first_child = slot
    padded = (size + _LANES - 1) & -_LANES  # what lies behind the beam is computed for nobody
    # As literals the rows would have the function compiled for each call.
    _log_add(scores, np.int64(_OWN), np.int64(_INHERITED), np.int64(_LABEL_SCORE), padded)
    for slot in range(size):
        scores[_LABEL_SCORE, slot] += scores[_FRAME, slot]
    _log_add(scores, np.int64(_BLANK_SCORE), np.int64(_LABEL_SCORE), np.int64(_CTC_SCORE), padded)
    kept = np.int64(0)
    needed, best = np.inf, -np.inf
    for slot in range(size):
        bound = beam[slot].ctc_score + beam[slot].prior + weights.beta + weights.max_gain
        scores[_BOUND, slot] = bound
        best = best if best > bound else bound
        if scores[_CTC_SCORE, slot] > -np.inf:
            ranking[kept], candidate[kept] = scores[_CTC_SCORE, slot] + beam[slot].prior, _packed(slot, -1)
            needed = needed if needed < ranking[kept] else ranking[kept]
            kept += 1
    return kept, needed if kept == width else -np.inf, best


@_helper
def _likely_labels(frame, blank, needed, labels, ceilings, passing):
    """Fills `labels` with those of at least the log-probability needed, roughly the likeliest first.

    `ceilings` gets the highest log-probability of each label and those behind it. `passing` is there to work in: labels
    in the order of classes, then, from place K on, the ends of the buckets.

    Returns:
        Their number.
    """
    size = np.int64(0)
    needed = needed if needed > _LOWEST else _LOWEST
    highest, lowest = -np.inf, np.inf
    for label in range(len(frame)):
        passing[size] = label
        if frame[label] >= needed:
            size += label != blank
    for place in range(size):
        log_prob = frame[passing[place]]
        highest = log_prob if log_prob > highest else highest
        lowest = log_prob if log_prob < lowest else lowest
    if size <= _FEW:  # insertion sort
        for place in range(size):
            label = passing[place]
            while place > 0 and frame[labels[place - 1]] < frame[label]:
                labels[place] = labels[place - 1]
                place -= 1
            labels[place] = label
    else:  # into buckets that are equally wide
        per_nat = 0.999 * _NUM_BUCKETS / (highest - lowest + 1e-9)
        for bucket in range(_NUM_BUCKETS):
            passing[len(frame) + bucket] = 0
        for place in range(size):
            passing[len(frame) + int((highest - frame[passing[place]]) * per_nat)] += 1
        for bucket in range(1, _NUM_BUCKETS):
            passing[len(frame) + bucket] += passing[len(frame) + bucket - 1]
        for place in range(size):
            bucket = int((highest - frame[passing[place]]) * per_nat)
            passing[len(frame) + bucket] -= 1
            labels[passing[len(frame) + bucket]] = passing[place]
    ceiling = -np.inf
    for place in range(size - 1, -1, -1):
        ceiling = ceiling if ceiling > frame[labels[place]] else frame[labels[place]]
        ceilings[place] = ceiling
    return size


@_helper
def _grow(
    frame, width, weights, characters, words, lexicon, rows, trie, beam, size, scores, labels, ceilings, num_labels,
    active, ranking, candidate, kept, needed,
):  # fmt: skip
    """Adds the prefixes that grow by a label to the candidates, and leaves the width best of them.

    Returns:
        Their number.
    """
    alpha, beta, max_gain, max_word_gain = weights
    if characters is not None:
        row_state, row_log_probs, row_best, latest = rows.state, rows.log_probs, rows.best, rows.latest
        oldest, num_rows = rows.oldest, len(rows.state)
    num_active = np.int64(0)  # prefixes that may still grow into the beam
    for slot in range(size):
        active[num_active] = slot
        if scores[_BOUND, slot] + ceilings[0] < needed:
            continue
        num_active += 1
        if characters is not None:
            old = beam[slot]
            row = latest[old.lm_state & (len(latest) - 1)]
            # A row must not be lost before the frame is done, in which there may be as many new ones as prefixes.
            if row_state[row] != old.lm_state or (row - oldest[0]) & (num_rows - 1) < size:
                row = _new_row(rows, characters, old.lm_state)
            old.row = row
            scores[_BOUND, slot] += alpha * row_best[row] + max_word_gain - max_gain
    for place in range(num_labels):
        label, ceiling = labels[place], ceilings[place]
        log_prob = frame[label]
        num_tried, num_active = num_active, np.int64(0)
        for index in range(num_tried):
            slot = active[index]
            if scores[_BOUND, slot] + ceiling < needed:  # neither this label nor those behind it
                continue
            active[num_active] = slot
            num_active += 1
            if scores[_BOUND, slot] + log_prob < needed:
                continue
            old = beam[slot]
            # A repeated label needs a blank between.
            ctc_score = (old.blank_score if label == old.label else old.ctc_score) + log_prob
            lm_score, lexicon_score = old.lm_score, old.lexicon_score
            if characters is not None:
                lm_score += row_log_probs[old.row, label]
            if words is not None:
                if words.kind[label] == SPACE:
                    _end_word(words, old)
                    lm_score += old.word_log_prob
                    lm_score += old.space_log_prob
            if lexicon is not None:
                bound = ctc_score + (alpha * lm_score + beta * (old.length + 1) + lexicon_score) + max_word_gain
                if bound < needed:
                    continue
                lexicon_score += _look_up(lexicon, old.entry, label)[0]
            score = ctc_score + (alpha * lm_score + beta * (old.length + 1) + lexicon_score)
            if score < needed or score == -np.inf:
                continue
            child = old.first_child
            while child >= 0 and beam[child].label != label:
                child = beam[child].sibling
            if child >= 0:  # it is in the beam: counted among those that stay
                continue
            ranking[kept], candidate[kept] = score, _packed(slot, label)
            kept += 1
            if kept == len(ranking):
                needed = _select(trie, beam, ranking, candidate, kept, width)
                kept = width
        if num_active == 0:
            break
    if kept > width:
        _select(trie, beam, ranking, candidate, kept, width)
        kept = width
    return kept


@_helper
def _all_stay(candidate, kept, size):
    """Whether the next beam has the prefixes of this one, as in most frames that are surely blank."""
    if kept != size:
        return False
    for place in range(kept):
        if _unpacked(candidate[place])[1] >= 0:
            return False
    return True


@_helper
def _settle(
    frame, weights, characters, words, lexicon, rows, trie, table, num_nodes, beam, size, next_beam, scores, candidate,
    kept,
):  # fmt: skip
    """Makes the next beam of the candidates.

    Returns:
        The number of nodes in the trie.
    """
    for slot in range(size):
        trie[beam[slot].node].slot = -1
    for place in range(kept):
        slot, label = _unpacked(candidate[place])
        old, new = beam[slot], next_beam[place]
        next_beam[place] = old
        if label < 0:
            new.blank_score, new.label_score = scores[_BLANK_SCORE, slot], scores[_LABEL_SCORE, slot]
            new.ctc_score = scores[_CTC_SCORE, slot]
            trie[new.node].slot = place
            continue
        new.parent, new.label, new.length = old.node, label, old.length + 1
        new.blank_score = -np.inf
        new.label_score = new.ctc_score = (old.blank_score if label == old.label else old.ctc_score) + frame[label]
        in_table = _place_of(trie, table, old.node, label)
        if table[in_table] == 0:
            table[in_table] = num_nodes
            trie[num_nodes].parent, trie[num_nodes].label = old.node, label
            num_nodes += 1
        new.node = table[in_table]
        trie[new.node].slot = place
        if characters is not None:
            new.lm_score += rows.log_probs[old.row, label]
            new.lm_state = rows.next_states[old.row, label]
        if words is not None:
            new.word, new.word_log_prob = 0, np.nan
            if words.kind[label] == SPACE:
                new.lm_score += old.word_log_prob
                new.lm_score += old.space_log_prob
                new.lm_state = old.word_state
            else:
                child = child_of(words.spelling, old.word, label) if old.word >= 0 else 0
                new.word = child if child != 0 else -1
        if lexicon is not None:
            gain, new.entry = _look_up(lexicon, old.entry, label)
            new.lexicon_score += gain
        new.prior = weights.alpha * new.lm_score + weights.beta * new.length + new.lexicon_score
    return num_nodes


@_helper
def _end(weights, characters, words, lexicon, beam, size, ranking, candidate):
    """Makes candidates of the prefixes that may end here, once their last word and the end of the line are scored.

    Returns:
        Their number.
    """
    kept = np.int64(0)
    for slot in range(size):
        found = beam[slot]
        if characters is not None:
            found.lm_score += advance(characters.trie, found.lm_state, END)[0]
        if words is not None:
            log_prob, state = _last_word(words, found)
            found.lm_score += log_prob
            found.lm_score += advance(words.trie, state, END)[0]
        if lexicon is not None:
            found.lexicon_score += _end_entry(lexicon, found.entry)
        found.prior = weights.alpha * found.lm_score + weights.beta * found.length + found.lexicon_score
        score = found.ctc_score + found.prior
        if score > -np.inf:
            ranking[kept], candidate[kept] = score, _packed(slot, -1)
            kept += 1
    return kept


@_helper
def _align(frames, blank, labels, length, states, skips, path_scores, steps, spans, confidences):
    """Writes spans and confidences of the labels on their best alignment; on equal scores the path stays put.

    Only states that can be reached, and from which the end can be reached, are looked at.
    """
    num_frames, num_states = len(frames), 2 * length + 1  # blank, label, blank, ..., label, blank
    for state in range(num_states):
        states[state] = labels[state // 2] if state % 2 else blank
        skips[state] = 0.0 if state % 2 and state >= 3 and states[state] != states[state - 2] else -np.inf
    for state in range(num_states + 2):  # the score of a state stands two places further
        path_scores[0, state] = path_scores[1, state] = -np.inf
    path_scores[0, 2] = 0.0  # before the first frame: as if a blank had been there
    for frame in range(num_frames):
        old, new = frame & 1, 1 - (frame & 1)
        first, end = num_states - 2 * (num_frames - frame), 2 * frame + 2
        for state in range(first if first > 0 else 0, end if end < num_states else num_states):
            stay, move = path_scores[old, state + 2], path_scores[old, state + 1]
            skip = path_scores[old, state] + skips[state]
            best = move if move > stay else stay
            steps[frame, state] = 2 if skip > best else move > stay
            path_scores[new, state + 2] = (skip if skip > best else best) + frames[frame, states[state]]
    last, state = num_frames & 1, num_states - 1
    if state > 0 and path_scores[last, state + 1] > path_scores[last, state + 2]:
        state -= 1
    for place in range(length):
        spans[place, 1] = 0
        confidences[place] = 0.0
    for frame in range(num_frames - 1, -1, -1):
        place = state // 2
        if state % 2:
            spans[place, 0] = frame
            if spans[place, 1] == 0:
                spans[place, 1] = frame + 1
            confidence = math.exp(frames[frame, states[state]])
            if confidence > confidences[place]:
                confidences[place] = confidence if confidence < 1.0 else 1.0
        state -= steps[frame, state]


@_compiled
def _search(
    frames, blank, width, top_paths, alpha, beta, max_gain, max_word_gain, characters, words, lexicon, rows, table,
    scores, classes, ceilings, passing, active, ranking, candidate, states, skips, path_scores, steps, lengths, totals,
    labels, spans, confidences,
):  # fmt: skip
    weights = Weights(alpha, beta, max_gain, max_word_gain)
    num_frames = len(frames)
    trie, beam, next_beam = np.empty(1 + width * num_frames, _NODE), np.empty(width, _PREFIX), np.empty(width, _PREFIX)
    root = beam[0]
    root.node, root.parent, root.label, root.length = 0, -1, -1, 0
    root.ctc_score, root.blank_score, root.label_score, root.prior = 0.0, 0.0, -np.inf, 0.0
    root.lm_score, root.lexicon_score, root.lm_state, root.word, root.entry = 0.0, 0.0, 0, 0, 0
    root.word_log_prob, root.word_state = np.nan, 0
    if characters is not None:
        root.lm_state = characters.start_state
    if words is not None:
        root.lm_state = words.start_state
    trie[0].parent, trie[0].label, trie[0].slot = -1, -1, 0
    size = num_nodes = np.int64(1)  # not the literal 1, for which Numba would compile the functions below once more
    for t in range(num_frames):
        frame = frames[t]
        kept, needed, best = _stay(frame, blank, width, weights, trie, beam, size, scores, ranking, candidate)
        num_labels = _likely_labels(frame, blank, needed - best, classes, ceilings, passing)
        if num_labels > 0:
            kept = _grow(
                frame, width, weights, characters, words, lexicon, rows, trie, beam, size, scores, classes, ceilings,
                num_labels, active, ranking, candidate, kept, needed,
            )  # fmt: skip
        if _all_stay(candidate, kept, size):
            for slot in range(size):
                beam[slot].blank_score, beam[slot].label_score = scores[_BLANK_SCORE, slot], scores[_LABEL_SCORE, slot]
                beam[slot].ctc_score = scores[_CTC_SCORE, slot]
            continue
        num_nodes = _settle(
            frame, weights, characters, words, lexicon, rows, trie, table, num_nodes, beam, size, next_beam, scores,
            candidate, kept,
        )  # fmt: skip
        beam, next_beam, size = next_beam, beam, kept
    size = _end(weights, characters, words, lexicon, beam, size, ranking, candidate)

    num_paths = size if size < top_paths else top_paths
    if size > num_paths:
        _select(trie, beam, ranking, candidate, size, num_paths)
    for path in range(num_paths):
        found = beam[_unpacked(candidate[path])[0]]
        lengths[path] = length = np.int64(found.length)
        totals[path, 0], totals[path, 1] = ranking[path], found.ctc_score
        totals[path, 2], totals[path, 3] = found.lm_score, found.lexicon_score
        node = found.node
        for place in range(length - 1, -1, -1):
            labels[path, place] = trie[node].label
            node = trie[node].parent
        _align(frames, blank, labels[path], length, states, skips, path_scores, steps, spans[path], confidences[path])
    return num_paths


def search(
    frames: np.ndarray,
    blank: int,
    width: int,
    top_paths: int,
    weights: Weights,
    characters: Characters | None,
    words: Words | None,
    lexicon: Entries | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Searches one line.

    Args:
        frames: (T, K) float64, C order. Log-probabilities.
        blank: class of the blank, 0..K-1.
        width: prefixes kept after each frame.
        top_paths: hypotheses wanted, at most width.
        weights: how scores are put together.
        characters: a model of characters, or None.
        words: a model of words, or None; not beside characters.
        lexicon: a lexicon, or None.

    Returns:
        lengths (P,) int64, score, ctc_score, lm_score and lexicon_score (P, 4) float64, labels (P, T) int32, frame
        spans (P, T, 2) int32 and confidences (P, T) float64 of the P <= top_paths best hypotheses, in any order;
        entries past the length are undefined.
    """
    num_frames, num_classes = frames.shape
    num_states = 2 * num_frames + 1
    # NumPy allocates what it can: in compiled code each array costs a tenth of a second of compilation, but records
    # that Python hands over cost time in every frame.
    found = (
        np.empty(top_paths, np.int64),
        np.empty((top_paths, 4)),
        np.empty((top_paths, num_frames), np.int32),
        np.empty((top_paths, num_frames, 2), np.int32),
        np.empty((top_paths, num_frames)),
    )
    work = (
        None if characters is None else _rows(width, num_classes, characters.order),
        np.zeros(1 << (2 * width * num_frames + 1).bit_length(), np.int32),
        np.empty((7, width + _LANES)),
        np.empty(num_classes, np.int64),
        np.empty(num_classes),
        np.empty(num_classes + _NUM_BUCKETS, np.int64),
        np.empty(width, np.int64),
        np.empty(2 * width),
        np.empty(2 * width, np.int64),
        np.empty(num_states, np.int64),
        np.empty(num_states),
        np.empty((2, num_states + 2)),
        np.empty((num_frames, num_states), np.int8),
    )
    parts = characters is not None, words is not None, lexicon is not None
    with nullcontext() if parts in _known_parts else without_collection():
        num_paths = _search(frames, blank, width, top_paths, *weights, characters, words, lexicon, *work, *found)
    _known_parts.add(parts)
    lengths, totals, labels, spans, confidences = (array[:num_paths] for array in found)
    return lengths, totals, labels, spans, confidences
