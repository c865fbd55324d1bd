import numpy as np
import pytest

from htr_pipeline.core.calibration import Calibration, fit_calibration, reliability, right_characters


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def drawn(num, seed, slope=0.5, offset=-1.0):
    """Confidences of an over-confident reader, and outcomes with log-odds slope * log-odds of confidence + offset."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(2.5, 2.0, num)
    return sigmoid(log_odds), rng.random(num) < sigmoid(slope * log_odds + offset)


def test_identity_by_default():
    values = np.linspace(0.001, 0.999, 50).reshape(5, 10)
    np.testing.assert_allclose(Calibration()(values), values, rtol=1e-9)
    np.testing.assert_allclose(Calibration()([0.0, 1.0]), [0.0, 1.0], atol=1.1e-7)


def test_worked_by_hand():
    # ln 0.8 = -0.2231, ln 0.2 = -1.6094: log-odds 2 * -0.2231 + 0.5 * 1.6094 - 1 = -0.6416
    assert Calibration(a=2.0, b=0.5, c=-1.0)([0.8])[0] == pytest.approx(1 / (1 + np.exp(0.64157)), rel=1e-4)


def test_fit_finds_the_law_that_outcomes_follow():
    fitted = fit_calibration(*drawn(50_000, 1))
    assert (fitted.a, fitted.b, fitted.c) == pytest.approx((0.5, 0.5, -1.0), abs=0.08)


def test_over_confident_reader_keeps_its_word_on_other_lines_once_calibrated():
    fitted = fit_calibration(*drawn(2000, 1))
    confidences, is_right = drawn(5000, 2)
    before, after = reliability(confidences, is_right), reliability(fitted(confidences), is_right)
    assert before.expected_calibration_error > 0.25
    assert after.expected_calibration_error < 0.03
    assert after.brier < before.brier - 0.08


@pytest.mark.parametrize("seed", range(5))
def test_ranking_survives_even_where_confidence_tells_nothing_or_the_contrary(seed):
    rng = np.random.default_rng(seed)
    confidences = rng.random(200)
    fitted = fit_calibration(confidences, rng.random(200) > confidences)
    grid = np.concatenate([np.geomspace(1e-6, 0.5, 200), 1 - np.geomspace(0.5, 1e-6, 200)[1:]])
    assert (np.diff(fitted(grid)) > 0).all()


@pytest.mark.parametrize("outcome", [True, False])
def test_lines_that_are_all_right_or_all_wrong_give_finite_probabilities_on_their_side(outcome):
    values = fit_calibration(np.full(40, 0.9), np.full(40, outcome))([0.0, 0.9, 1.0])
    assert np.isfinite(values).all()
    assert 0 <= values.min() <= values.max() <= 1
    assert values[1] > 0.95 if outcome else values[1] < 0.1


def test_nothing_to_learn_from_leaves_the_identity():
    assert fit_calibration([], []) == Calibration()


def test_reliability_worked_by_hand():
    found = reliability([0.95, 0.9, 1.0, 0.15, 0.5], [True, False, True, False, True])
    bins = [(b.num, b.confidence, b.right) for b in found.bins]
    assert bins == [(1, 0.15, 0.0), (1, 0.5, 1.0), (3, pytest.approx(0.95), pytest.approx(2 / 3))]
    assert found.num == 5
    assert found.expected_calibration_error == pytest.approx((0.15 + 0.5 + 3 * (0.95 - 2 / 3)) / 5)
    assert found.brier == pytest.approx((0.05**2 + 0.9**2 + 0 + 0.15**2 + 0.5**2) / 5)


def test_reliability_of_nothing_has_no_figures():
    found = reliability([], [])
    assert (found.num, found.expected_calibration_error, found.brier, found.bins) == (0, None, None, [])


@pytest.mark.parametrize(
    ("confidences", "is_right", "message"),
    [
        ([0.5, 0.6], [True], r"confidences has shape \(2,\) and is_right \(1,\)"),
        ([0.5, 1.2], [True, True], "from 0.5 to 1.2: expected 0 to 1"),
        ([0.5, np.nan], [True, True], "expected 0 to 1"),
    ],
)
def test_wrong_input_is_named(confidences, is_right, message):
    for function in (fit_calibration, reliability):
        with pytest.raises(ValueError, match=message):
            function(confidences, is_right)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "right"),
    [
        ("abc", "abc", [1, 1, 1]),
        ("abc", "axc", [1, 0, 1]),
        ("abc", "abbc", [1, None, None, 1]),  # either of the two
        ("abc", "c", [1]),
        ("", "ab", [0, 0]),
        ("abc", "", []),
    ],
)
def test_characters_that_stand_in_the_reference_are_right(reference, hypothesis, right):
    found = right_characters(reference, hypothesis)
    assert found.dtype == bool
    assert len(found) == len(right)
    assert all(wanted is None or value == wanted for value, wanted in zip(found, right, strict=True))
    assert found.sum() <= len(reference)
