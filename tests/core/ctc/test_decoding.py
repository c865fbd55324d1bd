import functools
import gc
import io
import itertools
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from htr_pipeline.core.ctc.compilation import without_collection
from htr_pipeline.core.ctc.decoding import beam_search, greedy_search, line_confidence, warm_up
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram, advance
from htr_pipeline.core.ctc.lexicon import Lexicon, bare_word, is_letter

# Two float64 sums of the same terms in another order.
ROUNDING = 1e-9

MATRICES = Path(__file__).parents[4] / "shared" / "data" / "ctc_matrices"
real_matrices = pytest.mark.skipif(not MATRICES.is_dir(), reason=f"needs the network outputs in {MATRICES}")
FOLDERS = {"line": "rnnOutput", "word": "rnnOutput", "wbs_bentham": "mat_2", "wbs_iam": "mat_0", "wbs_mini": "mat_0"}


def random_log_probs(seed, *shape, scale=1.0):
    logits = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def logs(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array([rows]))


def read_matrix(path):
    """Log-probabilities (1, T, K); only wbs_mini holds probabilities already."""
    values = np.array([[float(cell) for cell in row.split(";")[:-1]] for row in path.read_text().split()])[None]
    if "wbs_mini" in path.parts:
        with np.errstate(divide="ignore"):
            return np.log(values)
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def read_text(matrix, labels):
    local = matrix.parent / "chars.txt"
    characters = (local if local.exists() else MATRICES / "chars.txt").read_text(encoding="utf-8")
    return "".join(characters[label] for label in labels)


def as_pairs(hypotheses):
    return [(tuple(found.labels.tolist()), found.ctc_score) for found in hypotheses]


def assert_same_list(found, expected):
    """The same labels in the same order with the same scores."""
    assert [labels for labels, _ in found] == [labels for labels, _ in expected]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=ROUNDING, atol=ROUNDING)


def collapsed(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def enumerate_labels(frames, blank):
    """Every label sequence with its log-probability, summed over all K^T paths, best first."""
    paths = defaultdict(list)
    for path in itertools.product(range(frames.shape[1]), repeat=len(frames)):
        paths[collapsed(path, blank)].append(math.fsum(frames[t, label] for t, label in enumerate(path)))
    totals = {labels: float(np.logaddexp.reduce(scores)) for labels, scores in paths.items()}
    possible = [(labels, total) for labels, total in totals.items() if total > -math.inf]
    return sorted(possible, key=lambda pair: (-pair[1], len(pair[0]), pair[0]))


class Language:
    """What models and lexicon make of labels, asked anew of the whole text each time, by the definitions."""

    def __init__(self, characters, blank, model=None, alpha=0.5, beta=0.0, lexicon=None):
        self.classes = [*characters[:blank], None, *characters[blank:]]
        self.model, self.alpha, self.beta, self.lexicon = model, alpha, beta, lexicon
        self.prior = functools.cache(self.prior)

    def text(self, labels):
        return "".join(self.classes[label] for label in labels)

    def scores(self, labels):
        """lm_score and lexicon_score of a whole line."""
        text = self.text(labels)
        return self.model.score(text) if self.model else 0.0, self.lexicon.score(text) if self.lexicon else 0.0

    def total(self, labels):
        lm_score, lexicon_score = self.scores(labels)
        return self.alpha * lm_score + self.beta * len(labels) + lexicon_score

    def prior(self, labels):
        """What a prefix is worth during the search."""
        text = self.text(labels)
        words = text.split()
        unfinished = words.pop() if words and not text[-1].isspace() else ""
        lm_score = 0.0
        if self.model:
            state = self.model.start_state
            for token in self.model.encode(" ".join([*words, ""]) if isinstance(self.model, WordNGram) else text):
                gain, state = advance(self.model.trie, state, token)
                lm_score += gain
        lexicon_score = self.lexicon.score(" ".join(words)) if self.lexicon else 0.0
        if self.lexicon and self.lexicon.unknown_price == math.inf:
            begun = "".join(itertools.dropwhile(lambda character: not is_letter(character), unfinished))
            if begun and bare_word(begun) not in self.lexicon and not self.begins_a_word(begun):
                return -math.inf
        return self.alpha * lm_score + self.beta * len(labels) + lexicon_score

    def begins_a_word(self, begun):
        return any(word.startswith(begun) and set(word) <= set(self.classes) for word in self.lexicon._weights)


def textbook_search(frames, blank, beam_width, language=None):
    """Prefix beam search as in Hannun et al., arXiv 1408.2873: labels, scores, and under a language ctc_scores."""
    prior = language.prior if language else lambda prefix: 0.0

    def rank(item):
        prefix, (ends_in_blank, ends_in_label) = item
        return -(np.logaddexp(ends_in_blank, ends_in_label) + prior(prefix)), len(prefix), prefix

    beam = {(): (0.0, -math.inf)}
    for frame in frames:
        following = defaultdict(lambda: [-math.inf, -math.inf])
        for prefix, (ends_in_blank, ends_in_label) in beam.items():
            total = np.logaddexp(ends_in_blank, ends_in_label)
            following[prefix][0] = np.logaddexp(following[prefix][0], total + frame[blank])
            for label in range(len(frame)):
                if label == blank:
                    continue
                longer = (*prefix, label)
                if prefix and prefix[-1] == label:
                    following[prefix][1] = np.logaddexp(following[prefix][1], ends_in_label + frame[label])
                    following[longer][1] = np.logaddexp(following[longer][1], ends_in_blank + frame[label])
                else:
                    following[longer][1] = np.logaddexp(following[longer][1], total + frame[label])
        possible = [item for item in following.items() if max(item[1]) > -math.inf and prior(item[0]) > -math.inf]
        beam = dict(sorted(possible, key=rank)[:beam_width])
    if language is None:
        return [(prefix, float(np.logaddexp(*scores))) for prefix, scores in sorted(beam.items(), key=rank)]
    return ranked([(prefix, float(np.logaddexp(*scores))) for prefix, scores in beam.items()], language)


def ranked(pairs, language):
    """Labels, scores and ctc_scores from labels and ctc_scores, best first."""
    found = [(labels, ctc_score + language.total(labels), ctc_score) for labels, ctc_score in pairs]
    return sorted((f for f in found if f[1] > -math.inf), key=lambda f: (-f[1], len(f[0]), f[0]))


class TestGreedySearch:
    def test_repeats_are_merged_and_a_blank_separates_equal_labels(self):
        best = [0, 0, 2, 0, 1, 1]  # a a - a b b
        log_probs = logs(*(np.where(np.arange(3) == label, 0.8, 0.1) for label in best))
        ((found,),) = greedy_search(log_probs)
        assert found.labels.tolist() == [0, 0, 1]
        assert found.frame_spans.tolist() == [[0, 2], [3, 4], [4, 6]]
        assert found.score == found.ctc_score == pytest.approx(6 * math.log(0.8))
        np.testing.assert_allclose(found.confidences, 0.8)

    def test_confidence_is_the_highest_probability_of_the_label_in_its_span(self):
        ((found,),) = greedy_search(logs([0.6, 0.4], [0.9, 0.1], [0.2, 0.8]))
        assert found.confidences.tolist() == pytest.approx([0.9])

    def test_blank_may_be_any_class(self):
        log_probs = random_log_probs(1, 1, 9, 4)
        last = greedy_search(log_probs)[0][0]
        first = greedy_search(np.roll(log_probs, 1, axis=2), blank_index=0)[0][0]
        np.testing.assert_array_equal(first.labels, last.labels + 1)
        assert first.score == last.score

    def test_frame_without_any_possible_class_writes_nothing(self):
        frames = logs([0.9, 0.1], [0.0, 0.0], [0.0, 0.0])
        ((found,),) = greedy_search(frames)
        assert (found.labels.tolist(), found.frame_spans.tolist(), found.score) == ([0], [[0, 1]], -math.inf)
        ((found,),) = greedy_search(frames[:, 1:], blank_index=0)
        assert (found.labels.tolist(), found.score, line_confidence(found)) == ([], -math.inf, 0)

    def test_misses_the_likelier_text_that_beam_search_finds(self):
        # '' has one path, 0.6 * 0.6; 'a' has three: a-, -a, aa.
        log_probs = logs([0.4, 0.6], [0.4, 0.6])
        assert greedy_search(log_probs)[0][0].labels.tolist() == []
        (found,) = beam_search(log_probs)[0]
        assert found.labels.tolist() == [0]
        assert found.ctc_score == pytest.approx(math.log(0.64))

    def test_no_frames_and_no_lines(self):
        ((found,),) = greedy_search(np.zeros((1, 5, 3)), [0])
        assert (len(found.labels), found.score, found.frame_spans.shape) == (0, 0.0, (0, 2))
        assert greedy_search(np.zeros((0, 5, 3))) == []

    @real_matrices
    def test_best_paths_of_real_matrices_are_those_of_the_reference(self):
        rows = [row.split("\t") for row in (MATRICES / "reference.tsv").read_text(encoding="utf-8").splitlines()]
        expected = {name: text for name, method, text, _ in rows[1:] if method == "best path"}
        assert len(expected) >= 5
        for name, text in expected.items():
            log_probs = read_matrix(MATRICES / name)
            assert read_text(MATRICES / name, greedy_search(log_probs)[0][0].labels) == text, name


class TestExactness:
    @pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 6])
    @pytest.mark.parametrize("blank", [0, 1, -1])
    def test_unpruned_search_lists_every_text_with_its_exact_score(self, num_frames, blank):
        log_probs = random_log_probs(num_frames, 3, num_frames, 4, scale=2)
        found = beam_search(log_probs, blank_index=blank, beam_width=10**6, top_paths=10**6)
        for frames, hypotheses in zip(log_probs, found, strict=True):
            assert_same_list(as_pairs(hypotheses), enumerate_labels(frames, blank % 4))
            assert np.logaddexp.reduce([h.ctc_score for h in hypotheses]) == pytest.approx(0, abs=ROUNDING)

    def test_impossible_classes_are_left_out(self):
        frames = logs([0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0])[0]
        expected = enumerate_labels(frames, 2)
        assert 1 < len(expected) < 10
        assert_same_list(as_pairs(beam_search(frames[None], beam_width=1000, top_paths=1000)[0]), expected)

    def test_confidently_wrong_frames_do_not_underflow(self):
        logits = np.random.default_rng(0).choice([-800.0, 0.0, 800.0], size=(5, 3))
        frames = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        expected = enumerate_labels(frames, 2)
        assert expected[-1][1] < -1500  # e^-745 is the smallest float64
        assert_same_list(as_pairs(beam_search(frames[None], beam_width=1000, top_paths=1000)[0]), expected)

    def test_equal_scores_rank_shorter_then_lexicographically_smaller_texts_first(self):
        uniform = np.log(np.full((1, 2, 4), 1 / 4))
        found = [labels for labels, _ in as_pairs(beam_search(uniform, beam_width=100, top_paths=100)[0])]
        assert found == [(0,), (1,), (2,), (), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
        for width in range(1, 11):
            best = [labels for labels, _ in as_pairs(beam_search(uniform, beam_width=width, top_paths=3)[0])]
            assert best[0] in {(), (0,)}
            assert (1,) not in best or best.index((0,)) < best.index((1,))

    def test_equal_scores_rank_alike_deep_in_the_search(self):
        half = math.log(0.5)
        frames = np.full((1, 12, 3), -math.inf)
        frames[0, ::2, :2] = half  # a or b, each followed by a certain blank: all 64 texts are equally likely
        frames[0, 1::2, 2] = 0.0
        found = [labels for labels, _ in as_pairs(beam_search(frames, beam_width=5, top_paths=5)[0])]
        assert found == list(itertools.product([0, 1], repeat=6))[:5]


class TestAgainstTextbook:
    @pytest.mark.parametrize("beam_width", range(1, 21))
    @pytest.mark.parametrize("scale", [0.5, 3.0])
    def test_random_matrices(self, beam_width, scale):
        log_probs = random_log_probs(beam_width, 3, 25, 6, scale=scale)
        found = beam_search(log_probs, blank_index=2, beam_width=beam_width, top_paths=beam_width)
        for frames, hypotheses in zip(log_probs, found, strict=True):
            assert_same_list(as_pairs(hypotheses), textbook_search(frames, 2, beam_width))

    @pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
    def test_more_classes_than_are_sorted_one_by_one(self, scale):
        frames = random_log_probs(3, 12, 60, scale=scale)
        frames[5, :50] = frames[5, 0]  # equally likely
        frames[6, 7] = -math.inf
        found = beam_search(frames[None], beam_width=15, top_paths=15)[0]
        assert_same_list(as_pairs(found), textbook_search(frames, 59, 15))

    def test_prefixes_that_leave_the_beam_and_return(self):
        # Few classes and a narrow beam: prefixes drop out and come back many times.
        for seed in range(40):
            log_probs = random_log_probs(seed, 1, 40, 3, scale=0.3)
            found = beam_search(log_probs, beam_width=4, top_paths=4)[0]
            assert_same_list(as_pairs(found), textbook_search(log_probs[0], 2, 4))

    @real_matrices
    @pytest.mark.parametrize("folder", FOLDERS)
    def test_real_matrices(self, folder):
        log_probs = read_matrix(MATRICES / folder / f"{FOLDERS[folder]}.csv")
        for beam_width in (1, 2, 3, 7, 20):
            found = beam_search(log_probs, beam_width=beam_width, top_paths=beam_width)[0]
            assert_same_list(as_pairs(found), textbook_search(log_probs[0], log_probs.shape[2] - 1, beam_width))

    @real_matrices
    def test_wider_beams_find_likelier_texts_on_a_real_matrix(self):
        log_probs = read_matrix(MATRICES / "line" / "rnnOutput.csv")
        scores = [beam_search(log_probs, beam_width=width)[0][0].ctc_score for width in (1, 10, 100, 1000)]
        assert scores == sorted(scores)
        assert scores[-1] > -28.090722  # minus the CTC loss of the true text, from reference.tsv


class TestBeamSearch:
    def test_repeated_label_needs_a_blank_between(self):
        certain = logs([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
        (found,) = beam_search(certain)[0]
        assert (found.labels.tolist(), found.score) == ([0, 0], 0.0)
        assert beam_search(certain[:, [0, 2]])[0][0].labels.tolist() == [0]

    def test_no_frames_give_one_empty_hypothesis_of_score_zero(self):
        for log_probs, length in ((np.zeros((1, 0, 3)), None), (np.full((1, 4, 3), np.nan), [0])):
            (found,) = beam_search(log_probs, length, top_paths=5)[0]
            assert (len(found.labels), found.score, found.ctc_score, found.lm_score) == (0, 0.0, 0.0, 0.0)
            assert found.frame_spans.shape == (0, 2)
        assert beam_search(np.zeros((0, 4, 3))) == []

    def test_fewer_hypotheses_than_asked(self):
        found = beam_search(random_log_probs(0, 1, 1, 3), top_paths=10)[0]
        assert sorted(labels for labels, _ in as_pairs(found)) == [(), (0,), (1,)]
        assert len(beam_search(random_log_probs(0, 1, 9, 3), beam_width=2, top_paths=10)[0]) == 2

    def test_all_blank_frames_give_the_empty_text_only(self):
        log_probs = np.full((1, 6, 4), -math.inf)
        log_probs[..., -1] = 0.0
        (found,) = beam_search(log_probs, top_paths=5)[0]
        assert (found.labels.tolist(), found.score) == ([], 0.0)

    def test_blank_as_the_only_class_gives_the_empty_text(self):
        (found,) = beam_search(np.zeros((1, 6, 1)), top_paths=5)[0]
        assert (found.labels.tolist(), found.score) == ([], 0.0)

    def test_frame_without_any_possible_class_gives_the_empty_text_of_probability_zero(self):
        log_probs = random_log_probs(0, 1, 4, 3)
        log_probs[0, 2] = -math.inf
        (found,) = beam_search(log_probs, top_paths=5)[0]
        assert (found.labels.tolist(), found.score) == ([], -math.inf)
        assert line_confidence(found) == 0

    def test_line_depends_neither_on_its_batch_nor_on_threads_nor_on_padding(self):
        log_probs = random_log_probs(5, 9, 30, 12, scale=2)
        lengths = np.array([30, 0, 1, 29, 17, 30, 5, 12, 30])
        padded = np.where((np.arange(30) < lengths[:, None])[..., None], log_probs, np.nan)
        batches = [beam_search(padded, lengths, beam_width=7, top_paths=3, num_threads=n) for n in (1, 2, 5, None)]
        for line, length in enumerate(lengths):
            alone = as_pairs(beam_search(log_probs[line : line + 1, :length], beam_width=7, top_paths=3)[0])
            assert all(as_pairs(batch[line]) == alone for batch in batches)

    def test_dtype_and_memory_layout_of_the_input_do_not_matter(self):
        log_probs = random_log_probs(6, 2, 12, 5).astype(np.float32)
        expected = [as_pairs(line) for line in beam_search(log_probs, np.array([12, 9], np.int32))]
        time_major = np.ascontiguousarray(log_probs.swapaxes(0, 1)).swapaxes(0, 1)
        for same in (log_probs.astype(np.float64), time_major, np.asfortranarray(log_probs), log_probs.tolist()):
            assert [as_pairs(line) for line in beam_search(same, [12, 9])] == expected

    def test_spans_are_the_best_alignment_of_the_labels(self):
        for seed in range(20):
            frames = random_log_probs(seed, 6, 3, scale=2)
            for found in beam_search(frames[None], beam_width=1000, top_paths=20)[0]:
                path = np.full(6, 2)
                for label, (first, end) in zip(found.labels, found.frame_spans, strict=True):
                    assert first < end
                    path[first:end] = label
                assert collapsed(path, 2) == tuple(found.labels)
                best = max(
                    sum(frames[t, label] for t, label in enumerate(other))
                    for other in itertools.product(range(3), repeat=6)
                    if collapsed(other, 2) == tuple(found.labels)
                )
                assert frames[np.arange(6), path].sum() == pytest.approx(best)

    def test_confidence_is_the_highest_probability_of_the_label_in_its_span(self):
        (found,) = beam_search(logs([0.6, 0.1, 0.3], [0.9, 0.0, 0.1], [0.1, 0.2, 0.7], [0.05, 0.75, 0.2]))[0]
        assert found.labels.tolist() == [0, 1]
        assert found.confidences.tolist() == pytest.approx([0.9, 0.75])
        assert line_confidence(found) == pytest.approx(math.sqrt(0.9 * 0.75))

    def test_confidence_of_an_empty_line_is_the_probability_that_it_is_empty(self):
        (found,) = beam_search(logs([0.1, 0.9], [0.2, 0.8]))[0]
        assert found.labels.tolist() == []
        assert line_confidence(found) == pytest.approx(0.72)

    def test_random_inputs_of_every_kind_agree_with_the_textbook(self):
        random = np.random.default_rng(11)
        for _ in range(60):
            num_frames, num_classes, beam_width = random.integers(1, [20, 7, 12])
            logits = random.normal(scale=random.choice([0.1, 1, 30]), size=(num_frames, num_classes))
            logits[random.random(logits.shape) < random.choice([0, 0.3])] = -math.inf
            logits[:, 0] = np.maximum(logits[:, 0], -5)  # leaves no frame without a possible class
            frames = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            blank = int(random.integers(num_classes))
            found = beam_search(frames[None], blank_index=blank, beam_width=beam_width, top_paths=5)[0]
            assert_same_list(as_pairs(found), textbook_search(frames, blank, beam_width)[:5])


# Few letters, so that words meet again and again: two letters, a sign within and after words, the space.
LETTERS = "ab' "
TEXTS = ["a ba", "ab a'b", "b", "a'b ba ab", "", "ba' b", "aa b a", "ab ab a"]


def known_texts(seed, count=200, alphabet=LETTERS):
    generator = random.Random(seed)
    return ["".join(generator.choices(alphabet, k=generator.randrange(9))) for _ in range(count)]


def with_blanks_as_words(texts, order):
    """A model of words and of the blanks between them, as PyLaia's users make them."""
    spaced = WordNGram.train([re.sub(r"\s+", " <space> ", text.strip()) for text in texts], order)
    arpa = io.StringIO()
    spaced.to_arpa(arpa, space_token="▁")
    return WordNGram.from_arpa(arpa.getvalue().splitlines())


LANGUAGES = {
    "characters": {"model": CharacterNGram.train(TEXTS, 3), "alpha": 0.7, "beta": 0.4},
    "characters that the model does not know": {"model": CharacterNGram.train(["aa", "a a"], 4), "alpha": 1.3},
    "words": {"model": WordNGram.train(TEXTS, 3), "alpha": 0.6, "beta": -0.3},
    "words of which many are unknown": {"model": WordNGram.train(["a ba a", "ba"], 2), "alpha": 1.0},
    "words and blanks": {"model": with_blanks_as_words(TEXTS, 4), "alpha": 0.8, "beta": 0.2},
    "words and blanks, and a lexicon": {
        "model": with_blanks_as_words(TEXTS, 3),
        "lexicon": Lexicon(["a", "ba", "a'b"], unknown_price=0.5),
    },
    "label bonus": {"beta": 0.8},
    "strict lexicon": {"lexicon": Lexicon(["a", "ba", "a'b", "bab"])},
    "open lexicon": {"lexicon": Lexicon(["a", "ba", "a'b"], unknown_price=1.5)},
    "hot words": {"lexicon": Lexicon(unknown_price=0, hot_words={"ab": 2.0, "b": -0.5})},
    "characters, lexicon and hot words": {
        "model": CharacterNGram.train(TEXTS, 2),
        "beta": 0.5,
        "lexicon": Lexicon(["a", "aa"], unknown_price=0.7, hot_words={"b'a": 3.0}),
    },
    "words and strict lexicon": {
        "model": WordNGram.train(TEXTS, 2),
        "alpha": 0.9,
        "lexicon": Lexicon(["ab", "a", "b"], hot_words={"ba": 1.0}),
    },
}


def search_under(language, log_probs, blank, **options):
    characters = [character for character in language.classes if character is not None]
    return beam_search(
        log_probs,
        blank_index=blank,
        characters=characters,
        language_model=language.model,
        alpha=language.alpha,
        beta=language.beta,
        lexicon=language.lexicon,
        **options,
    )


def assert_same_hypotheses(hypotheses, expected, language):
    """The expected labels and scores, whose parts are what models and lexicon say of the text, to the last bit."""
    if not expected:
        assert [(h.labels.tolist(), h.score) for h in hypotheses] == [([], -math.inf)]
        return
    assert [tuple(h.labels.tolist()) for h in hypotheses] == [labels for labels, _, _ in expected]
    for hypothesis, (labels, score, ctc_score) in zip(hypotheses, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, rel=ROUNDING, abs=ROUNDING)
        assert hypothesis.ctc_score == pytest.approx(ctc_score, rel=ROUNDING, abs=ROUNDING)
        lm_score, lexicon_score = language.scores(labels)
        assert hypothesis.lm_score == lm_score
        assert hypothesis.lexicon_score == pytest.approx(lexicon_score)
        prior = language.alpha * lm_score + language.beta * len(labels) + hypothesis.lexicon_score
        assert hypothesis.score == hypothesis.ctc_score + prior


class TestFusion:
    @pytest.mark.parametrize("name", LANGUAGES)
    @pytest.mark.parametrize("num_frames", [0, 1, 2, 4, 5])
    def test_unpruned_search_lists_every_text_with_its_exact_score(self, name, num_frames):
        for blank in (0, 2, 4):
            language = Language(LETTERS, blank, **LANGUAGES[name])
            frames = random_log_probs(num_frames + 10 * blank, num_frames, 5, scale=2)
            (found,) = search_under(language, frames[None], blank, beam_width=10**6, top_paths=10**6)
            assert_same_hypotheses(found, ranked(enumerate_labels(frames, blank), language), language)

    @pytest.mark.parametrize("name", LANGUAGES)
    @pytest.mark.parametrize("beam_width", [*range(1, 21, 2), 20])
    def test_pruned_search_is_that_of_the_textbook(self, name, beam_width):
        for scale in (0.5, 3.0):
            log_probs = random_log_probs(beam_width, 2, 18, 5, scale=scale)
            language = Language(LETTERS, 4, **LANGUAGES[name])
            found = search_under(language, log_probs, 4, beam_width=beam_width, top_paths=beam_width)
            for frames, hypotheses in zip(log_probs, found, strict=True):
                assert_same_hypotheses(hypotheses, textbook_search(frames, 4, beam_width, language), language)

    def test_equal_scores_rank_shorter_then_lexicographically_smaller_texts_first(self):
        model = CharacterNGram.train(["ab", "ba"], 1)  # a is as likely as b
        uniform = np.log(np.full((1, 3, 3), 1 / 3))
        language = Language("ab", 2, model, alpha=1.0)
        found = beam_search(uniform, characters="ab", language_model=model, alpha=1.0, top_paths=100)[0]
        assert_same_hypotheses(found, ranked(enumerate_labels(uniform[0], 2), language), language)
        for earlier, later in itertools.pairwise(found):
            if earlier.score == later.score:
                assert (len(earlier.labels), earlier.labels.tolist()) < (len(later.labels), later.labels.tolist())

    @real_matrices
    @pytest.mark.parametrize("folder", ["line", "wbs_bentham"])
    @pytest.mark.parametrize("kind", ["characters", "words", "words and lexicon"])
    def test_real_matrices(self, folder, kind):
        matrix = MATRICES / folder / f"{FOLDERS[folder]}.csv"
        log_probs = read_matrix(matrix)
        characters = read_text(matrix, range(log_probs.shape[2] - 1))
        corpus = (MATRICES / folder / "corpus.txt").read_text(encoding="utf-8").splitlines()
        model = CharacterNGram.train(corpus, 4) if kind == "characters" else WordNGram.train(corpus, 2)
        words = [word for line in corpus for word in line.split() if bare_word(word)]
        lexicon = Lexicon(words, unknown_price=4, hot_words={words[0]: 1}) if "lexicon" in kind else None
        language = Language(characters, len(characters), model, alpha=0.8, beta=0.5, lexicon=lexicon)
        for beam_width in (1, 3, 10):
            (found,) = search_under(language, log_probs, -1, beam_width=beam_width, top_paths=beam_width)
            expected = textbook_search(log_probs[0], len(characters), beam_width, language)
            assert_same_hypotheses(found, expected, language)

    @real_matrices
    def test_a_model_of_its_corpus_corrects_a_real_line(self):
        matrix = MATRICES / "line" / "rnnOutput.csv"
        log_probs = read_matrix(matrix)
        characters = read_text(matrix, range(79))
        corpus = (MATRICES / "line" / "corpus.txt").read_text(encoding="utf-8").splitlines()
        model = CharacterNGram.train(corpus, 5)
        (found,) = beam_search(log_probs, characters=characters, language_model=model, alpha=1.0)[0]
        assert read_text(matrix, found.labels).startswith("the fake friend of the family")

    @real_matrices
    def test_strict_lexicon_lets_only_its_words_through_on_a_real_line(self):
        matrix = MATRICES / "wbs_bentham" / "mat_2.csv"
        log_probs = read_matrix(matrix)
        characters = read_text(matrix, range(log_probs.shape[2] - 1))
        words = (MATRICES / "wbs_bentham" / "corpus.txt").read_text(encoding="utf-8").split()
        lexicon = Lexicon([word for word in words if bare_word(word)])
        (found,) = beam_search(log_probs, characters=characters, lexicon=lexicon)[0]
        assert read_text(matrix, found.labels) == "submitt both mental and corporeal, is far beyond any idea"

    @pytest.mark.parametrize("name", ["characters", "words"])
    def test_model_of_weight_zero_is_no_model(self, name):
        log_probs = random_log_probs(3, 4, 30, 5)
        model = LANGUAGES[name]["model"]
        options = {"beam_width": 6, "top_paths": 4}
        without = beam_search(log_probs, **options)
        found = beam_search(log_probs, characters=LETTERS, language_model=model, alpha=0.0, **options)
        assert [as_pairs(line) for line in found] == [as_pairs(line) for line in without]
        assert all(h.score == h.ctc_score for line in found for h in line)

    @pytest.mark.parametrize("name", LANGUAGES)
    def test_line_depends_neither_on_its_batch_nor_on_threads_nor_on_padding(self, name):
        log_probs = random_log_probs(5, 7, 30, 5, scale=2)
        lengths = np.array([30, 0, 1, 29, 17, 30, 5])
        language = Language(LETTERS, 4, **LANGUAGES[name])

        def found(log_probs, lengths, num_threads=None):
            lines = search_under(
                language, log_probs, 4, logit_length=lengths, beam_width=7, top_paths=3, num_threads=num_threads
            )
            return [[(h.labels.tolist(), h.score, h.ctc_score, h.lm_score, h.lexicon_score) for h in x] for x in lines]

        alone = [found(log_probs[i : i + 1], lengths[i : i + 1])[0] for i in range(7)]
        assert found(log_probs, lengths, 1) == found(log_probs, lengths, 3) == found(log_probs, lengths) == alone

    def test_random_languages_on_random_inputs_agree_with_the_textbook(self):
        generator = np.random.default_rng(17)
        for seed in range(60):
            characters = "".join(generator.permutation(list("aé-. ")))[: generator.integers(1, 6)]
            num_classes, blank = len(characters) + 1, int(generator.integers(len(characters) + 1))
            texts = known_texts(seed, count=int(generator.integers(1, 30)), alphabet="aé-.b ")
            order = int(generator.integers(1, 5))
            model = [None, CharacterNGram.train(texts, order), WordNGram.train(texts, order)][generator.integers(3)]
            words = [word for word in " ".join(texts).split() if bare_word(word)]
            price = generator.choice([0.0, 2.0, math.inf])
            hot_words = {bare_word(word): generator.normal() for word in words[:2]}
            lexicon = Lexicon(words[::2], unknown_price=price, hot_words=hot_words) if generator.integers(2) else None
            language = Language(
                characters, blank, model, float(generator.exponential()), float(generator.normal()), lexicon
            )
            logits = generator.normal(
                scale=generator.choice([0.1, 1, 30]), size=(generator.integers(1, 16), num_classes)
            )
            logits[generator.random(logits.shape) < generator.choice([0, 0.3])] = -math.inf
            logits[:, 0] = np.maximum(logits[:, 0], -5)  # leaves no frame without a possible class
            frames = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            beam_width = int(generator.integers(1, 12))
            (found,) = search_under(language, frames[None], blank, beam_width=beam_width, top_paths=5)
            assert_same_hypotheses(found, textbook_search(frames, blank, beam_width, language)[:5], language)

    def test_white_space_around_words_costs_a_word_model_nothing(self):
        model, lexicon = WordNGram.train(["a b"], 2), Lexicon(["a", "b"])
        certain = np.full((1, 9, 4), -math.inf)
        certain[0, np.arange(9), [2, 3, 2, 0, 2, 3, 2, 1, 2]] = 0.0  # "  a  b " over the classes a, b, space, blank
        (found,) = beam_search(certain, characters="ab ", language_model=model, lexicon=lexicon)[0]
        assert "".join("ab "[label] for label in found.labels) == "  a  b "
        assert (found.lm_score, found.lexicon_score) == (model.score("a b"), 0.0)
        assert found.word_spans.tolist() == [[2, 3], [5, 6]]

    def test_blanks_that_are_words_count_once_and_only_behind_a_word(self):
        model = with_blanks_as_words(["a b", "ba"], 3)
        certain = np.full((1, 9, 4), -math.inf)
        certain[0, np.arange(9), [2, 3, 2, 0, 2, 3, 2, 1, 3]] = 0.0  # "  a  b" over the classes a, b, space, blank
        (found,) = beam_search(certain, characters="ab ", language_model=model)[0]
        tokens = {token: number for number, token in enumerate(model.vocabulary)}
        assert model.encode("  a  b").tolist() == [tokens["a"], tokens[" "], tokens["b"]]
        assert model.encode("a ").tolist() == [tokens["a"], tokens[" "]]
        assert found.lm_score == model.score("  a  b") == model.score("a b")

    def test_positive_backoff_weights_of_a_model_with_blanks_do_not_mislead_the_pruning(self):
        arpa = ["\\data\\", "ngram 1=6", "ngram 2=2", "", "\\1-grams:", "-9 <s> 2", "-2 </s>", "-2 aa 3"]
        arpa += ["-2 b", "-5 <unk>", "-1 <space> 2.5", "", "\\2-grams:", "-1 aa b", "-1 <space> aa", "", "\\end\\"]
        language = Language("ab ", 3, WordNGram.from_arpa(arpa), alpha=2.0)
        for seed in range(10):
            frames = random_log_probs(seed, 12, 4)
            (found,) = search_under(language, frames[None], 3, beam_width=4, top_paths=4)
            assert_same_hypotheses(found, textbook_search(frames, 3, 4, language), language)

    def test_nothing_that_a_strict_lexicon_allows_gives_the_empty_text_of_probability_zero(self):
        certain = logs([1.0, 0.0, 0.0])
        (found,) = beam_search(certain, characters="ab", lexicon=Lexicon(["ab"]))[0]
        assert (found.labels.tolist(), found.score, found.word_spans.tolist()) == ([], -math.inf, [])

    def test_positive_backoff_weights_do_not_mislead_the_pruning(self):
        arpa = ["\\data\\", "ngram 1=5", "ngram 2=1", "", "\\1-grams:", "-9 <s> 2", "-2 </s>", "-2 a 3"]
        arpa += ["-2 b", "-5 <unk>", "", "\\2-grams:", "-1 a b", "", "\\end\\"]
        language = Language("ab", 2, CharacterNGram.from_arpa(arpa), alpha=2.0)
        for seed in range(10):
            frames = random_log_probs(seed, 12, 3)
            (found,) = search_under(language, frames[None], 2, beam_width=4, top_paths=4)
            assert_same_hypotheses(found, textbook_search(frames, 2, 4, language), language)


class TestWordSpans:
    def test_words_stand_between_spaces(self):
        best = [3, 0, 4, 0, 1, 3, 2, 4, 3]  # " aab ." and blanks
        log_probs = logs(*(np.where(np.arange(5) == label, 0.8, 0.05) for label in best))
        for search in (greedy_search, beam_search):
            ((found,),) = search(log_probs, characters="ab. ")
            assert "".join("ab. "[label] for label in found.labels) == " aab . "
            assert found.word_spans.tolist() == [[1, 4], [5, 6]]
            first, end = found.word_spans[0]
            assert (found.frame_spans[first, 0], found.frame_spans[end - 1, 1]) == (1, 5)

    def test_there_are_none_without_characters(self):
        assert beam_search(np.zeros((1, 0, 3)))[0][0].word_spans is None
        assert beam_search(np.zeros((1, 0, 3)), characters="a ")[0][0].word_spans.shape == (0, 2)


def test_warm_up_may_run_beside_a_search():
    thread = threading.Thread(target=warm_up)
    thread.start()
    assert beam_search(logs([0.9, 0.1]))[0][0].labels.tolist() == [0]
    thread.join()


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_after_a_compilation_as_before_it(before):
    try:
        (gc.enable if before else gc.disable)()
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == before
    finally:
        gc.enable()


class TestWrongLanguage:
    @pytest.mark.parametrize("given", [{"language_model": CharacterNGram.train(["a"], 1)}, {"lexicon": Lexicon(["a"])}])
    def test_characters_are_needed(self, given):
        with pytest.raises(ValueError, match="needs characters"):
            beam_search(np.zeros((1, 3, 3)), **given)

    @pytest.mark.parametrize("search", [greedy_search, beam_search])
    def test_characters_fit_the_classes(self, search):
        with pytest.raises(ValueError, match="3 characters for 3 classes: expected 2"):
            search(np.zeros((1, 3, 3)), characters="abc")
        with pytest.raises(ValueError, match=r"\['a', 'a'\]: expected distinct single code points"):
            search(np.zeros((1, 3, 3)), characters="aa")
        with pytest.raises(ValueError, match=r"\[\['b'\]\]: expected distinct single code points"):
            search(np.zeros((1, 3, 3)), characters=["a", ["b"]])
        with pytest.raises(ValueError, match=r"\['bc'\]: expected distinct single code points"):
            search(np.zeros((1, 3, 3)), characters=["a", "bc"])

    @pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, None, "1"])
    def test_alpha(self, wrong):
        with pytest.raises(ValueError, match=f"alpha = {wrong}: expected a finite weight of at least 0"):
            beam_search(np.zeros((1, 3, 3)), alpha=wrong)

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_beta(self, wrong):
        with pytest.raises(ValueError, match=f"beta = {wrong}: expected a finite number"):
            beam_search(np.zeros((1, 3, 3)), beta=wrong)

    def test_types(self):
        with pytest.raises(ValueError, match=r"language_model is 'fr\.arpa': expected a CharacterNGram or a WordNGram"):
            beam_search(np.zeros((1, 3, 3)), characters="ab", language_model="fr.arpa")
        with pytest.raises(ValueError, match=r"lexicon is \['a'\]: expected a Lexicon"):
            beam_search(np.zeros((1, 3, 3)), characters="ab", lexicon=["a"])


@pytest.mark.parametrize("search", [greedy_search, beam_search])
class TestWrongInput:
    @pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.5])
    def test_value_that_is_no_log_probability_is_named_with_its_place(self, search, wrong):
        log_probs = random_log_probs(0, 2, 3, 4)
        log_probs[1, 2, 3] = wrong
        with pytest.raises(ValueError, match=r"log_probs\[1, 2, 3\] = .*Apply a log-softmax"):
            search(log_probs)
        search(log_probs, [3, 2])  # in the padding it does not matter

    def test_rounding_above_zero_is_accepted(self, search):
        (found,) = search(np.array([[[1e-4, -10.0]]]))[0]
        assert found.confidences.max(initial=0) <= 1

    def test_rank(self, search):
        with pytest.raises(ValueError, match=r"shape \(3, 4\).*\(lines, frames, classes\).*log_probs\[None\]"):
            search(np.zeros((3, 4)))
        with pytest.raises(ValueError, match="at least one class"):
            search(np.zeros((1, 3, 0)))

    def test_complex_numbers(self, search):
        with pytest.raises(ValueError, match="dtype complex128: expected real numbers"):
            search(np.zeros((1, 3, 4), complex))

    def test_lengths(self, search):
        log_probs = random_log_probs(0, 2, 3, 4)
        with pytest.raises(ValueError, match=r"logit_length\[1\] = 4: expected 0 to 3"):
            search(log_probs, [3, 4])
        with pytest.raises(ValueError, match=r"logit_length\[0\] = -1"):
            search(log_probs, [-1, 3])
        with pytest.raises(ValueError, match=r"shape \(1,\).*shape \(2,\)"):
            search(log_probs, [3])
        with pytest.raises(ValueError, match=r"float64: expected whole numbers"):
            search(log_probs, [3.0, 3.0])

    @pytest.mark.parametrize("blank_index", [4, -5, 1.0, None])
    def test_blank(self, search, blank_index):
        with pytest.raises(ValueError, match=rf"blank_index = {blank_index}: expected -4 to 3 for 4 classes"):
            search(np.zeros((1, 3, 4)), blank_index=blank_index)


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint8, np.uint64])
def test_numbers_of_numpy_are_numbers(kind):
    log_probs = random_log_probs(7, 2, 12, 200)
    expected = beam_search(log_probs, blank_index=100, beam_width=100, top_paths=3, num_threads=2)
    numbers = {"blank_index": 100, "beam_width": 100, "top_paths": 3, "num_threads": 2}
    found = beam_search(log_probs, **{name: kind(number) for name, number in numbers.items()})
    for ours, theirs in zip(found, expected, strict=True):
        assert as_pairs(ours) == as_pairs(theirs)
    (best,) = greedy_search(log_probs[:1], blank_index=kind(100))[0]
    assert best.labels.tolist() == greedy_search(log_probs[:1], blank_index=100)[0][0].labels.tolist()


def test_widths_of_a_range_of_numpy():
    frames = random_log_probs(8, 1, 9, 4)
    for width in np.arange(1, 21):
        assert as_pairs(beam_search(frames, beam_width=width)[0]) == as_pairs(
            beam_search(frames, beam_width=int(width))[0]
        )


@pytest.mark.parametrize("argument", ["beam_width", "top_paths", "num_threads"])
@pytest.mark.parametrize("wrong", [0, 1.5, True, np.int8(0)])
def test_counts_are_whole_numbers_of_at_least_one(argument, wrong):
    with pytest.raises(ValueError, match=re.escape(f"{argument} = {wrong!r}: expected a whole number of at least 1")):
        beam_search(np.zeros((1, 3, 4)), **{argument: wrong})


def test_beam_wider_than_any_memory_is_refused():
    with pytest.raises(ValueError, match="beam_width = 1000000000: expected at most 1000000"):
        beam_search(random_log_probs(5, 1, 200, 80), beam_width=10**9)


def test_more_paths_wanted_than_any_integer_counts():
    assert (
        len(beam_search(random_log_probs(5, 1, 2, 3), beam_width=10**30, top_paths=10**30)[0]) == 5
    )  # '', a, b, ab, ba


def test_a_full_disk_keeps_no_search_from_being_compiled(tmp_path):
    code = """
import resource
import numpy as np
from htr_pipeline.core.ctc.decoding import beam_search
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(beam_search(np.log([[[0.9, 0.1]]]))[0][0].labels)
"""
    variables = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert found.stdout == "[0]\n"
