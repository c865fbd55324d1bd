"""Which split a line belongs to: decided by writer, once, and the same on every machine."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import takewhile

# Each split with the names that data sets have for it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval"),
    "test": ("test", "testing"),
}
FEWEST_WRITERS = len(SPLIT_NAMES)  # with fewer, a hand is in two splits
FEWEST_PAGES = 20  # with fewer, a page is too large a share of one or two hands to go to the test as a whole
NO_NEW_HANDS = "its CER says nothing about new hands"  # part of a warning


def parse_split(name: str) -> str | None:
    """The split that a data set calls by this name, in upper or lower case; None where it is no such name."""
    return next((split for split, names in SPLIT_NAMES.items() if name.strip().lower() in names), None)


class SplitFolders:
    """The folders of a data set that are its splits, if it has such.

    They stand side by side, below the folders that all files share. All have names of splits, or some do, for training
    and for test among them, and the others hold more lines.

    Args:
        places: the folders that each file lies in, outermost first.

    Attributes:
        others: names of the folders beside those of the splits, sorted.
    """

    def __init__(self, places: Iterable[Sequence[str]]) -> None:
        distinct = {tuple(place) for place in places}
        level = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*distinct, strict=False)))
        names = {place[level] for place in distinct if len(place) > level}
        splits = set(map(parse_split, names))
        found = len(names) > 1 and (None not in splits or {"train", "test"} <= splits)
        self._level = level if found else None
        self.others = sorted(name for name in names if found and not parse_split(name))

    def parse(self, place: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
        """The split of a file, None where it is in none, and the folders that say whose it is."""
        if self._level is None or len(place) <= self._level:
            return None, tuple(place)
        split = parse_split(place[self._level])
        return split, tuple(place[self._level + bool(split) :])


def assign_splits(
    line_ids: Sequence[str],
    writer_ids: Sequence[str],
    given: Sequence[str | None],
    *,
    page_ids: Sequence[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> tuple[list[str], list[str]]:
    """A split for every line, and warnings in words where a test line may be by a hand seen in training.

    Splits that are given stay. Every other writer goes where the hash of the writer's id falls, so that lines which
    arrive later join their writer's split and no line ever moves. Two departures, both only for lines without a split:

    - The hash leaves a split empty (few writers): the writers are dealt out in the order of their hashes by shares.
    - Fewer than three writers: their pages are dealt out, with a warning; of fewer than FEWEST_PAGES, the lines.

    Args:
        line_ids: one a line, distinct.
        writer_ids: one a line.
        given: split of a line where it is known, else None.
        page_ids: one a line; None where pages are not known.
        validation_share: share of the writers for validation, 0 to 1.
        test_share: share of the writers for test, 0 to 1.

    Returns:
        "train", "validation" or "test" for each line, and the warnings.
    """
    split_of: dict[str, str] = {}
    for writer_id, split in zip(writer_ids, given, strict=True):
        if split is not None:
            split_of.setdefault(writer_id, split)
    free = sorted(set(writer_ids) - split_of.keys(), key=_position)
    warnings = []
    if free and len(set(writer_ids)) == len(line_ids) >= 3:
        warnings.append(
            "Every line counts as a writer of its own, so the test may contain hands seen in training. "
            "Name the writers: source.writer_pattern for files, source.writer_column for a table."
        )
    units: Sequence[str] = writer_ids
    if free and len(set(writer_ids)) < FEWEST_WRITERS and not split_of:
        units, name = _pages_or_lines(line_ids, page_ids)
        warnings.append(
            f"Only {len(free)} writer(s) for three splits: split by {name}, so the test has hands seen in training and "
            f"{NO_NEW_HANDS}. Add lines of more writers, or give the splits in the source."
        )
        free = sorted(set(units), key=_position)

    for unit in free:
        split_of[unit] = _split_at(_position(unit), validation_share, test_share)
    if len(free) >= 3 and set(split_of.values()) != SPLIT_NAMES.keys():
        num_test = max(1, round(test_share * len(free)))
        num_validation = min(max(1, round(validation_share * len(free))), len(free) - num_test - 1)
        for index, unit in enumerate(free):
            split_of[unit] = (
                "test" if index < num_test else "validation" if index < num_test + num_validation else "train"
            )
    return [split or split_of[unit] for unit, split in zip(units, given, strict=True)], warnings


def with_validation(
    line_ids: Sequence[str],
    writer_ids: Sequence[str],
    splits: Sequence[str],
    *,
    page_ids: Sequence[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> tuple[list[str], list[str]]:
    """The splits, with validation lines where there are only lines to train on and to test, and a warning that says so.

    Writers of training lines become writers of validation lines, those that the hash would have sent there; of a single
    writer, pages or lines do. Test lines stay test lines.

    Args:
        line_ids: one a line, distinct.
        writer_ids: one a line.
        splits: one a line.
        page_ids: as for assign_splits.
        validation_share: as for assign_splits.
        test_share: as for assign_splits.
    """
    of_training = [index for index, split in enumerate(splits) if split == "train"]
    if set(splits) != {"train", "test"} or len(of_training) < 2:
        return list(splits), []
    units = writer_ids
    if len({writer_ids[index] for index in of_training}) < 2:
        units, _ = _pages_or_lines(line_ids, page_ids, of_training)
    free = sorted({units[index] for index in of_training}, key=_position)
    chosen = {unit for unit in free if _split_at(_position(unit), validation_share, test_share) == "validation"}
    if not chosen or len(chosen) == len(free):
        chosen = set(free[: max(1, round(validation_share * len(free)))])
    dealt = list(splits)
    for index in of_training:
        if units[index] in chosen:
            dealt[index] = "validation"
    return dealt, [
        f"There are lines to train on and to test, none for validation: {dealt.count('validation')} of the "
        f"{len(of_training)} training lines are taken for it"
        + (f", those of {len(chosen)} of {len(free)} writers." if units is writer_ids else ", all by one writer.")
    ]


def _pages_or_lines(
    line_ids: Sequence[str], page_ids: Sequence[str] | None, chosen: Sequence[int] | None = None
) -> tuple[Sequence[str], str]:
    """What the lines of one hand (all, or those chosen) are dealt out by, and its name.

    Lines of one page share ink, light and half a sentence with the next: the test is to have other pages.
    """
    if page_ids is None or len(set(page_ids if chosen is None else [page_ids[i] for i in chosen])) < FEWEST_PAGES:
        return line_ids, "line"
    return page_ids, "page"


def _position(identifier: str) -> float:
    """Where the identifier falls between 0 and 1; SHA-256, since Python's own hash changes from run to run."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8]) / 2**64


def _split_at(position: float, validation_share: float, test_share: float) -> str:
    if position < test_share:
        return "test"
    return "validation" if position < test_share + validation_share else "train"
