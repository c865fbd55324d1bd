import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from htr_pipeline.core.ctc.decoding import beam_search, greedy_search, line_confidence

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


def textbook_search(frames, blank, beam_width):
    """Prefix beam search as in Hannun et al., arXiv 1408.2873, without a language model."""

    def rank(item):
        prefix, (ends_in_blank, ends_in_label) = item
        return -np.logaddexp(ends_in_blank, ends_in_label), len(prefix), prefix

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
        possible = [item for item in following.items() if max(item[1]) > -math.inf]
        beam = dict(sorted(possible, key=rank)[:beam_width])
    return [(prefix, float(np.logaddexp(*scores))) for prefix, scores in sorted(beam.items(), key=rank)]


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
            found = beam_search(frames[None], blank_index=blank, beam_width=int(beam_width), top_paths=5)[0]
            assert_same_list(as_pairs(found), textbook_search(frames, blank, beam_width)[:5])


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

    @pytest.mark.parametrize("blank_index", [4, -5])
    def test_blank(self, search, blank_index):
        with pytest.raises(ValueError, match=rf"blank_index = {blank_index}: expected -4 to 3 for 4 classes"):
            search(np.zeros((1, 3, 4)), blank_index=blank_index)


@pytest.mark.parametrize("argument", ["beam_width", "top_paths", "num_threads"])
@pytest.mark.parametrize("wrong", [0, 1.5])
def test_counts_are_whole_numbers_of_at_least_one(argument, wrong):
    with pytest.raises(ValueError, match=f"{argument} = {wrong}: expected a whole number of at least 1"):
        beam_search(np.zeros((1, 3, 4)), **{argument: wrong})
