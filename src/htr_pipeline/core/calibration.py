"""From how sure a decoder is to how often it is right: fitted on lines whose text is known, judged on others."""

import dataclasses

import numpy as np
import numpy.typing as npt

from htr_pipeline.core.metrics import align

# Confidences of 0 and 1 exactly have no logarithm of their odds; float32 ends about here.
_SMALLEST_DOUBT = 1e-7
# A slope of zero would forget the order of the confidences.
_SMALLEST_SLOPE = 0.01
# How far the fit may leave the identity for a few lines' sake: a normal prior of deviation 3 on each parameter.
_PRIOR_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Beta calibration: log-odds of being right = a ln(confidence) - b ln(1 - confidence) + c; by default the identity.

    With a and b above zero it is increasing, so it turns no ranking by confidence round; what is nearer to 0 or 1 than
    1e-7 counts as so near.

    Source: Kull, Silva Filho and Flach, Beta calibration, AISTATS 2017. Compared with temperature, Platt scaling and
        isotonic regression in docs/decoding.md.
    """

    a: float = 1.0
    b: float = 1.0
    c: float = 0.0

    def __call__(self, confidences: npt.ArrayLike) -> np.ndarray:
        """Probabilities of being right.

        Args:
            confidences: any shape, 0..1, as the decoder gives them.

        Returns:
            float64 of the same shape, 0..1.
        """
        log_odds = _features(confidences) @ np.array([self.a, self.b, self.c])
        return np.exp(-np.logaddexp(0.0, -log_odds))


@dataclasses.dataclass(frozen=True)
class Bin:
    """The readings with a confidence between two bounds.

    Attributes:
        num: how many.
        confidence: mean of their confidences, 0..1.
        right: share of them that is right, 0..1.
    """

    num: int
    confidence: float
    right: float


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How well confidences say how often a reader is right; figures are None where there are none.

    Attributes:
        num: number of confidences.
        expected_calibration_error: mean over all confidences of |mean confidence - share right| of their bin.
        brier: mean of (confidence - right)^2, which also rewards telling right from wrong; always 0.5 earns 0.25.
        bins: those that are not empty, from the least confident.
    """

    num: int
    expected_calibration_error: float | None
    brier: float | None
    bins: list[Bin]


def fit_calibration(confidences: npt.ArrayLike, is_right: npt.ArrayLike) -> Calibration:
    """The calibration under which the outcomes are likeliest, held near the identity where there are few of them.

    Args:
        confidences: (N,) 0..1.
        is_right: (N,) bool.

    Raises:
        ValueError: shapes differ, or a confidence is not from 0 to 1.
    """
    from scipy.optimize import minimize

    values, right = _checked(confidences, is_right)
    features, identity = _features(values), np.array([1.0, 1.0, 0.0])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds, moved = features @ parameters, parameters - identity
        surprise = np.logaddexp(0.0, log_odds) - right * log_odds
        gradient = features.T @ (np.exp(-np.logaddexp(0.0, -log_odds)) - right)
        return surprise.sum() + _PRIOR_WEIGHT / 2 * moved @ moved, gradient + _PRIOR_WEIGHT * moved

    bounds = [(_SMALLEST_SLOPE, None), (_SMALLEST_SLOPE, None), (None, None)]
    return Calibration(*minimize(loss, identity, jac=True, method="L-BFGS-B", bounds=bounds).x.tolist())


def reliability(confidences: npt.ArrayLike, is_right: npt.ArrayLike, num_bins: int = 10) -> Reliability:
    """Compares confidences with outcomes, in bins of equal width.

    Args:
        confidences: (N,) 0..1.
        is_right: (N,) bool.
        num_bins: between 0 and 1.

    Raises:
        ValueError: shapes differ, or a confidence is not from 0 to 1.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017; Brier, Monthly Weather Review, 1950.
    """
    values, right = _checked(confidences, is_right)
    if not len(values):
        return Reliability(0, None, None, [])
    place = np.minimum((values * num_bins).astype(int), num_bins - 1)
    bins = [
        Bin(int(chosen.sum()), float(values[chosen].mean()), float(right[chosen].mean()))
        for chosen in (place == index for index in np.unique(place))
    ]
    error = sum(b.num * abs(b.confidence - b.right) for b in bins) / len(values)
    return Reliability(len(values), error, float(np.square(values - right).mean()), bins)


def right_characters(reference: str, hypothesis: str) -> np.ndarray:
    """(len(hypothesis),) bool: the characters that also stand in the reference, on an alignment with fewest edits."""
    return np.array([tag == "equal" for tag, _, piece in align(reference, hypothesis) for _ in piece], dtype=bool)


def _features(confidences: npt.ArrayLike) -> np.ndarray:
    """(..., 3): what a, b and c are multiplied by."""
    clipped = np.clip(np.asarray(confidences, dtype=np.float64), _SMALLEST_DOUBT, 1.0 - _SMALLEST_DOUBT)
    return np.stack([np.log(clipped), -np.log1p(-clipped), np.ones_like(clipped)], axis=-1)


def _checked(confidences: npt.ArrayLike, is_right: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, right = np.asarray(confidences, dtype=np.float64), np.asarray(is_right, dtype=bool).astype(np.float64)
    if values.ndim != 1 or values.shape != right.shape:
        raise ValueError(
            f"confidences has shape {values.shape} and is_right {right.shape}: expected one of each for every reading."
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"Confidences reach from {values.min()} to {values.max()}: expected 0 to 1.")
    return values, right
