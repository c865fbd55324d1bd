import math
from collections import Counter

import numpy as np
import pytest

from htr_pipeline.core.metrics import align, bootstrap_interval, confusions, paired_bootstrap, score_lines, signature


def edit_distance(reference, hypothesis):
    """Levenshtein distance by the plain table."""
    row = list(range(len(hypothesis) + 1))
    for i, left in enumerate(reference, start=1):
        above = row
        row = [i]
        for j, right in enumerate(hypothesis, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def random_texts(seed, count):
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abé😀 ")) for _ in range(random.integers(0, 12))) for _ in range(count)]


REFERENCES, HYPOTHESES = random_texts(1, 200), random_texts(2, 200)


class TestScoreLines:
    def test_worked_by_hand(self):
        scores = score_lines(["the cat", "sat"], ["the hat", "sat on"])
        characters = scores.characters
        assert characters.hits.tolist() == [6, 3]
        assert characters.substitutions.tolist() == [1, 0]
        assert characters.insertions.tolist() == [0, 3]
        assert characters.deletions.tolist() == [0, 0]
        assert scores.cer == 4 / 10
        assert scores.wer == 2 / 3
        assert scores.macro_cer == (1 / 7 + 3 / 3) / 2
        assert scores.line_accuracy == 0
        assert (scores.num_lines, scores.num_characters, scores.num_words) == (2, 10, 3)

    def test_counts_agree_with_the_plain_table(self):
        scores = score_lines(REFERENCES, HYPOTHESES)
        for counts, split in ((scores.characters, list), (scores.words, str.split)):
            pairs = [(split(left), split(right)) for left, right in zip(REFERENCES, HYPOTHESES, strict=True)]
            assert counts.edits.tolist() == [edit_distance(left, right) for left, right in pairs]
            assert counts.lengths.tolist() == [len(left) for left, _ in pairs]
            written = counts.hits + counts.substitutions + counts.insertions
            assert written.tolist() == [len(right) for _, right in pairs]

    def test_rates_are_zero_exactly_for_equal_lines(self):
        scores = score_lines(REFERENCES, REFERENCES)
        assert (scores.cer, scores.wer, scores.macro_cer, scores.line_accuracy) == (0, 0, 0, 1)

    def test_characters_are_code_points(self):
        assert score_lines(["é😀"], ["e\u0301😀"]).characters.edits.tolist() == [2]

    def test_empty_reference_counts_its_insertions_and_stays_finite(self):
        scores = score_lines(["", "", "abcd"], ["", "xy", "abcd"])
        assert scores.characters.edits.tolist() == [0, 2, 0]
        assert scores.cer == 2 / 4
        assert scores.macro_cer == 2 / 3
        assert scores.line_accuracy == 2 / 3
        assert score_lines([""], [""]).cer == 0
        assert score_lines([""], ["xy"]).cer == 2

    def test_rate_may_exceed_one(self):
        assert score_lines(["a"], ["bcd"]).cer == 3

    def test_no_lines_or_unequal_numbers_are_errors(self):
        with pytest.raises(ValueError, match="no lines to score"):
            score_lines([], [])
        with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
            score_lines(["a", "b"], ["a"])


def test_confusions_count_each_edit_with_its_characters():
    found = confusions(["hello", "hello", "a"], ["hallo", "halo", "ab"])
    assert found == Counter({("e", "a"): 2, ("l", ""): 1, ("", "b"): 1})
    assert confusions(REFERENCES, HYPOTHESES).total() == score_lines(REFERENCES, HYPOTHESES).characters.edits.sum()


def test_alignment_gives_back_both_texts_and_marks_where_they_differ():
    assert align("kitten", "sitting") == [
        ("replace", "k", "s"),
        ("equal", "itt", "itt"),
        ("replace", "e", "i"),
        ("equal", "n", "n"),
        ("insert", "", "g"),
    ]
    assert align("ab", "a") == [("equal", "a", "a"), ("delete", "b", "")]
    assert align("", "") == []
    for reference, hypothesis in zip(REFERENCES, HYPOTHESES, strict=True):
        pieces = align(reference, hypothesis)
        assert "".join(left for _, left, _ in pieces) == reference
        assert "".join(right for _, _, right in pieces) == hypothesis
        assert all((left == right) == (tag == "equal") for tag, left, right in pieces)


class TestBootstrapInterval:
    def test_agrees_with_the_normal_approximation(self):
        edits = np.random.default_rng(0).poisson(3, size=400)
        lengths = np.full(400, 40)
        low, high = bootstrap_interval(edits, lengths, num_samples=4000)
        mean, margin = edits.mean() / 40, 1.96 * edits.std() / math.sqrt(400) / 40
        assert low == pytest.approx(mean - margin, rel=0.02)
        assert high == pytest.approx(mean + margin, rel=0.02)

    def test_covers_the_true_rate_as_often_as_it_says(self):
        random = np.random.default_rng(1)
        covered = 0
        for trial in range(200):
            low, high = bootstrap_interval(random.poisson(2, size=60), np.full(60, 40), confidence=0.9, seed=trial)
            covered += low <= 2 / 40 <= high
        assert 0.82 <= covered / 200 <= 0.96

    def test_writers_who_succeed_or_fail_together_widen_the_interval(self):
        random = np.random.default_rng(2)
        writers = np.repeat([f"w{i}" for i in range(10)], 30)
        edits = random.poisson(np.repeat(random.uniform(0, 8, size=10), 30))
        lengths = np.full(300, 40)
        low, high = bootstrap_interval(edits, lengths)
        grouped_low, grouped_high = bootstrap_interval(edits, lengths, writers)
        assert grouped_high - grouped_low > 2 * (high - low)

    def test_groups_of_one_line_change_nothing(self):
        edits, lengths = np.arange(20), np.full(20, 40)
        assert bootstrap_interval(edits, lengths, np.arange(20)) == bootstrap_interval(edits, lengths)

    def test_same_seed_gives_the_same_interval(self):
        edits, lengths = np.arange(50), np.full(50, 60)
        assert bootstrap_interval(edits, lengths, seed=3) == bootstrap_interval(edits, lengths, seed=3)
        assert bootstrap_interval(edits, lengths, seed=3) != bootstrap_interval(edits, lengths, seed=4)

    def test_single_line_gives_its_rate_twice(self):
        assert bootstrap_interval([3], [12]) == (0.25, 0.25)

    def test_large_sets_are_resampled_in_pieces(self):
        low, high = bootstrap_interval(np.ones(300_000), np.full(300_000, 10), num_samples=20)
        assert low == high == pytest.approx(0.1)

    def test_wrong_arguments_are_errors(self):
        with pytest.raises(ValueError, match=r"\[\(2,\), \(3,\)\]: expected one number for each"):
            bootstrap_interval([1, 2], [1, 2, 3])
        with pytest.raises(ValueError, match="expected one number for each"):
            bootstrap_interval([], [])
        with pytest.raises(ValueError, match="expected one number for each"):
            bootstrap_interval([1, 2], [3, 4], ["w"])
        with pytest.raises(ValueError, match="confidence = 95"):
            bootstrap_interval([1], [2], confidence=95)


class TestPairedBootstrap:
    def test_clear_difference_is_found_though_the_lines_vary_more_than_the_systems(self):
        random = np.random.default_rng(3)
        edits_b = random.poisson(random.uniform(0, 20, size=300))
        edits_a = np.maximum(edits_b - (random.random(300) < 0.3), 0)
        lengths = np.full(300, 40)
        result = paired_bootstrap(edits_a, edits_b, lengths)
        assert result.difference == pytest.approx((edits_a.sum() - edits_b.sum()) / 12000)
        assert result.low < result.difference < result.high < 0
        assert result.probability_a_better == 1
        assert result.p_value < 0.01
        # Their own intervals overlap: without pairing nothing could be said.
        assert bootstrap_interval(edits_a, lengths)[1] > bootstrap_interval(edits_b, lengths)[0]

    def test_equal_systems_are_undecided(self):
        edits, lengths = np.arange(30), np.full(30, 40)
        result = paired_bootstrap(edits, edits, lengths)
        assert (result.difference, result.low, result.high, result.probability_a_better) == (0, 0, 0, 0.5)
        assert result.p_value == 1

    def test_swapping_the_systems_mirrors_the_result(self):
        random = np.random.default_rng(4)
        a, b, lengths = random.poisson(3, 80), random.poisson(3.3, 80), np.full(80, 30)
        forward, backward = paired_bootstrap(a, b, lengths), paired_bootstrap(b, a, lengths)
        assert forward.difference == -backward.difference
        assert forward.low == pytest.approx(-backward.high)
        assert forward.probability_a_better == pytest.approx(1 - backward.probability_a_better)
        assert forward.p_value == backward.p_value

    def test_one_writer_decides_less_than_many_lines(self):
        writers = np.repeat(["a", "b", "c", "d"], 25)
        edits_b = np.full(100, 4)
        edits_a = np.where(writers == "a", 5, 3)  # better for three writers of four
        lengths = np.full(100, 40)
        by_line = paired_bootstrap(edits_a, edits_b, lengths)
        by_writer = paired_bootstrap(edits_a, edits_b, lengths, writers)
        assert by_line.p_value < 0.01
        assert by_writer.p_value > 0.1


def test_signature_names_form_split_lines_and_version():
    expected = "CER|norm:NFC|space:single|case:mixed|split:test|n:345|v:0.1.0"
    assert signature("NFC", "test", 345, "0.1.0") == expected


def test_missing_texts_figures_and_groups_are_named():
    with pytest.raises(ValueError, match=r"references\[2\] = None: expected str"):
        score_lines(["a", "b", None], ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"hypotheses\[0\] = b'a'"):
        score_lines(["a"], [b"a"])
    with pytest.raises(ValueError, match="hypotheses is one string"):
        score_lines(["a", "b"], "ab")
    with pytest.raises(ValueError, match="no number of at least 0"):
        bootstrap_interval([1, np.nan], [10, 10])
    with pytest.raises(ValueError, match="no number of at least 0"):
        bootstrap_interval([1, -2], [10, 10])
    with pytest.raises(ValueError, match=r"groups\[1\] is missing"):
        bootstrap_interval([1, 2], [10, 10], ["anna", None])


def test_one_writer_proves_nothing():
    edits = np.random.default_rng(0).poisson(4, (2, 100))
    assert paired_bootstrap(*edits, [40] * 100, ["anna"] * 100).p_value == 1.0
