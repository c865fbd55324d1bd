"""Edit counts of lines, the error rates made of them, and how far such a rate can be trusted.

Texts are compared as they are given, code point by code point: bring references and hypotheses to one form with
core.text.normalise_text first, and keep the `signature` of what was done beside every figure.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

_FEWEST_WRITERS = 5  # for an interval over them
_NUMBERS_PER_CHUNK = 2**22  # of a bootstrap: bounds its memory at some 100 MB


@dataclasses.dataclass(frozen=True, eq=False)
class EditCounts:
    """How each reference becomes its hypothesis with the fewest edits, line by line.

    Attributes:
        hits: (L,) int64. Units (characters or words) that are equal.
        substitutions: (L,) int64. Units of the reference written as another.
        insertions: (L,) int64. Units of the hypothesis that the reference lacks.
        deletions: (L,) int64. Units of the reference that the hypothesis lacks.
    """

    hits: np.ndarray
    substitutions: np.ndarray
    insertions: np.ndarray
    deletions: np.ndarray

    @property
    def edits(self) -> np.ndarray:
        """(L,) int64 Levenshtein distances."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def lengths(self) -> np.ndarray:
        """(L,) int64 lengths of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """All edits over the length of all references, 0 or more; above 1 where the hypotheses are far too long."""
        return float(_rates(self.edits.sum(), self.lengths.sum()))


@dataclasses.dataclass(frozen=True, eq=False)
class LineScores:
    """Edit counts of the characters and of the words of the same lines, and the rates that follow.

    An empty reference cannot be divided by; its length counts as 1 wherever a rate has it alone as denominator, so that
    a line that should be empty and is not makes a finite error.
    """

    characters: EditCounts
    words: EditCounts

    @property
    def num_lines(self) -> int:
        """Number of lines."""
        return len(self.characters.hits)

    @property
    def num_characters(self) -> int:
        """Code points of all references."""
        return int(self.characters.lengths.sum())

    @property
    def num_words(self) -> int:
        """Words of all references."""
        return int(self.words.lengths.sum())

    @property
    def cer(self) -> float:
        """Character error rate, micro: all edits over all reference characters."""
        return self.characters.rate

    @property
    def wer(self) -> float:
        """Word error rate, micro: all edits over all reference words."""
        return self.words.rate

    @property
    def macro_cer(self) -> float:
        """Mean of the character error rates of the lines, each line counting alike however short."""
        return float(_rates(self.characters.edits, self.characters.lengths).mean())

    @property
    def line_accuracy(self) -> float:
        """Share of the lines without any error, 0..1."""
        return float((self.characters.edits == 0).mean())


@dataclasses.dataclass(frozen=True)
class PairedBootstrap:
    """Two systems compared on the same lines.

    Attributes:
        difference: error rate of A minus that of B; negative where A is better.
        low: lower end of the interval of the difference.
        high: upper end of the interval of the difference.
        probability_a_better: share of the resamples in which A makes fewer errors, 0..1; equally many count one half.
        p_value: two-sided; how often resampling alone would put the difference on the other side of zero; 1 for a
            single group, which says nothing about others.
    """

    difference: float
    low: float
    high: float
    probability_a_better: float
    p_value: float


def score_lines(references: Sequence[str], hypotheses: Sequence[str]) -> LineScores:
    """Edit counts of every line, in characters (code points) and in words (split at white space).

    Raises:
        ValueError: there are no lines, or not one hypothesis for each reference.
    """
    pairs = list(_pairs(references, hypotheses))
    if not pairs:
        raise ValueError("There are no lines to score: an error rate needs at least one reference.")
    return LineScores(
        characters=_edit_counts(pairs), words=_edit_counts([(left.split(), right.split()) for left, right in pairs])
    )


def confusions(references: Sequence[str], hypotheses: Sequence[str]) -> Counter[tuple[str, str]]:
    """How often each character was written as another, over all lines.

    Returns:
        Counts of (reference character, hypothesis character); '' for the first is an insertion, for the second a
        deletion.

    Raises:
        ValueError: there is not one hypothesis for each reference.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in _pairs(references, hypotheses):
        for operation in Levenshtein.editops(reference, hypothesis):
            left = "" if operation.tag == "insert" else reference[operation.src_pos]
            right = "" if operation.tag == "delete" else hypothesis[operation.dest_pos]
            counts[left, right] += 1
    return counts


def align(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """The two texts cut into pieces that are equal or differ, in order, to show where they differ.

    Returns:
        (tag, reference piece, hypothesis piece) with the tags equal, replace, insert and delete; the reference piece of
        an insert and the hypothesis piece of a delete are empty.
    """
    return [
        (block.tag, reference[block.src_start : block.src_end], hypothesis[block.dest_start : block.dest_end])
        for block in Levenshtein.opcodes(reference, hypothesis)
    ]


def independent_groups(writer_ids: Sequence[str]) -> np.ndarray | None:
    """The groups that intervals are resampled over: writers, or None for lines.

    Over few writers an interval may have no width at all and look like certainty. Writers of one line each are mostly
    lines whose writer nobody knows.

    Args:
        writer_ids: (L,) one a line.
    """
    return np.asarray(writer_ids) if _FEWEST_WRITERS <= len(set(writer_ids)) < len(writer_ids) else None


def bootstrap_interval(
    edits: npt.ArrayLike,
    lengths: npt.ArrayLike,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a micro error rate by resampling lines, or whole groups of lines, with replacement.

    Lines of one writer succeed or fail together. Pass the writers as groups, or the interval promises more than the
    next writer will keep.

    Args:
        edits: (L,) edits of each line.
        lengths: (L,) reference lengths of the lines.
        groups: (L,) label of each line's group, for instance writer_id; None: every line for itself.
        confidence: probability that the interval covers, between 0 and 1.
        num_samples: number of resamples.
        seed: of the random numbers.

    Returns:
        Lower and upper end. With a single line or group both are its rate: nothing is known about others.

    Raises:
        ValueError: shapes differ, there are no lines, or confidence or num_samples is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for groups, the cluster bootstrap.
    """
    (edits_by_unit,), lengths_by_unit = _by_unit([edits], lengths, groups, confidence, num_samples)
    samples = _resampled_sums([edits_by_unit, lengths_by_unit], num_samples, seed)
    return _interval(_rates(samples[0], samples[1]), confidence)


def paired_bootstrap(
    edits_a: npt.ArrayLike,
    edits_b: npt.ArrayLike,
    lengths: npt.ArrayLike,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> PairedBootstrap:
    """Whether system A makes fewer errors than system B, judged on the same resamples of the same lines.

    Args:
        edits_a: (L,) edits of each line by system A.
        edits_b: (L,) edits of the same lines by system B.
        lengths: (L,) reference lengths of the lines.
        groups: as for bootstrap_interval.
        confidence: as for bootstrap_interval.
        num_samples: as for bootstrap_interval.
        seed: as for bootstrap_interval.

    Raises:
        ValueError: as bootstrap_interval.

    Source: Koehn, Statistical significance tests for machine translation evaluation, EMNLP 2004.
    """
    (a, b), lengths_by_unit = _by_unit([edits_a, edits_b], lengths, groups, confidence, num_samples)
    samples = _resampled_sums([a, b, lengths_by_unit], num_samples, seed)
    differences = _rates(samples[0] - samples[1], samples[2])
    low, high = _interval(differences, confidence)
    # One more on either side: a finite number of resamples cannot show that a chance is zero.
    not_better, not_worse = (differences >= 0).sum() + 1, (differences <= 0).sum() + 1
    return PairedBootstrap(
        difference=float(_rates(a.sum() - b.sum(), lengths_by_unit.sum())),
        low=low,
        high=high,
        probability_a_better=float((differences < 0).mean() + (differences == 0).mean() / 2),
        # Of a single unit every resample is the same, which shows nothing.
        p_value=min(1.0, float(2 * min(not_better, not_worse) / (num_samples + 1))) if len(a) > 1 else 1.0,
    )


def signature(unicode_form: str, split: str, num_lines: int, version: str) -> str:
    """What a character error rate was measured on and how; only figures of equal signatures may be compared.

    >>> signature("NFC", "test", 345, "0.1.0")
    'CER|norm:NFC|space:single|case:mixed|split:test|n:345|v:0.1.0'
    """
    return f"CER|norm:{unicode_form}|space:single|case:mixed|split:{split}|n:{num_lines}|v:{version}"


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError(f"{name} is one string: expected a list of lines.")
    found = list(texts)
    wrong = next((place for place, text in enumerate(found) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(
            f"{name}[{wrong}] = {found[wrong]!r}: expected str; a line of which nothing was read is empty."
        )
    return found


def _pairs(references: Sequence[str], hypotheses: Sequence[str]) -> Iterator[tuple[str, str]]:
    references, hypotheses = _texts("references", references), _texts("hypotheses", hypotheses)
    if len(references) != len(hypotheses):
        raise ValueError(
            f"Got {len(references)} references and {len(hypotheses)} hypotheses: expected one hypothesis each."
        )
    return zip(references, hypotheses, strict=True)


def _edit_counts(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> EditCounts:
    counts = np.zeros((4, len(pairs)), np.int64)
    row = {"replace": 1, "insert": 2, "delete": 3}
    for line, (reference, hypothesis) in enumerate(pairs):
        for operation in Levenshtein.editops(reference, hypothesis):
            counts[row[operation.tag], line] += 1
        counts[0, line] = len(reference) - counts[1, line] - counts[3, line]
    return EditCounts(*counts)


def _rates(edits: Any, lengths: Any) -> Any:
    return edits / np.maximum(lengths, 1)


def _by_unit(
    edits: Sequence[npt.ArrayLike], lengths: npt.ArrayLike, groups: Any, confidence: float, num_samples: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Checks the arguments of a bootstrap and adds up the lines of each group."""
    columns = [np.asarray(column, dtype=np.float64) for column in (*edits, lengths)]
    shapes = [column.shape for column in columns] + ([np.shape(groups)] if groups is not None else [])
    if len(set(shapes)) != 1 or columns[0].ndim != 1 or not len(columns[0]):
        raise ValueError(
            f"edits, lengths and groups have the shapes {shapes}: expected one number for each of the lines."
        )
    if not 0 < confidence < 1 or num_samples < 1:
        raise ValueError(
            f"confidence = {confidence}, num_samples = {num_samples}: expected a confidence between 0 and 1, "
            "such as 0.95, and at least one sample."
        )
    if not all((np.isfinite(column) & (column >= 0)).all() for column in columns):
        raise ValueError("edits and lengths hold something that is no number of at least 0.")
    if groups is not None:
        missing = next((place for place, group in enumerate(groups) if group is None or group != group), None)
        if missing is not None:
            raise ValueError(f"groups[{missing}] is missing: expected the line's group. Give the line one of its own.")
        _, unit = np.unique(np.asarray(groups), return_inverse=True)
        columns = [np.bincount(unit, weights=column).astype(np.float64) for column in columns]
    return columns[:-1], columns[-1]


def _resampled_sums(columns: Sequence[np.ndarray], num_samples: int, seed: int) -> np.ndarray:
    """(len(columns), num_samples) sums over as many units as there are, drawn with replacement, the same for all."""
    table = np.stack(columns)  # (C, U)
    num_units = table.shape[1]
    draws = np.random.default_rng(seed)
    per_chunk = max(1, _NUMBERS_PER_CHUNK // num_units)
    sums = []
    for start in range(0, num_samples, per_chunk):
        drawn = draws.integers(num_units, size=(min(per_chunk, num_samples - start), num_units))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in table]))
    return np.concatenate(sums, axis=1)


def _interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
