"""What the expectations look at: one column for each question that is asked of a line.

Only distinct characters and the lines that have a doubtful one are looked at in Python; the rest is done by columns, so
that a million lines take seconds and little memory.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, groupby
from operator import itemgetter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from htr_pipeline.core.characters import describe_characters, is_debris, is_invisible, look_alike_words, plain_form
from htr_pipeline.core.image import ImageConfig, find_near_duplicates, largest_width, num_frames, scaled_width
from htr_pipeline.core.splits import FEWEST_WRITERS
from htr_pipeline.core.text import required_frames
from htr_pipeline.io.manifest import id_prefixes
from htr_pipeline.pipelines.data_validation.expectations import ValidationConfig

_COLUMNS = ["line_id", "page_id", "writer_id", "split", "text", "image_path"]
_COLUMNS += ["width_pixels", "height_pixels", "content_hash", "image_hash", "grey_range"]
# The width of fewer characters says more about the margins than about the hand.
_MIN_CHARACTERS_FOR_WIDTH = 5
# Of fewer lines no norm of the writer can be told.
_MIN_LINES_FOR_NORM = 10
# Writers more regular than this (as a share of their width per character) are measured as if they were not.
_MIN_SPREAD = 0.05
_STANDARD_DEVIATIONS = 1.4826  # of a normal distribution in one median absolute deviation
# Shorter pages may share their text by chance.
_MIN_PAGE_CHARACTERS = 40


def collect_facts(lines: pa.Table, config: ValidationConfig, image_config: ImageConfig) -> pd.DataFrame:
    """The lines with the columns that the expectations look at.

    Args:
        lines: schema MANIFEST.
        config: which characters are allowed, which are rare, which images look alike.
        image_config: the height to which lines will be scaled, which decides how many frames they have.

    Returns:
        Columns of the manifest, `file` (the image, after the name of its source where there are several) and `place`
        (the same, or the line's id where the image is a page); empty text where there is nothing to find:
        unknown_characters, invisible_characters, mixed_forms, look_alikes, rare_characters, untrained_characters (words
        for what the text has of them), same_image, near_image (id of the earlier line), same_split, near_split (its
        split), other_page (page of another split with the same text); numbers: aspect, frames, most_frames (where small
        letters are enlarged), required_frames, spare_frames (of the most), texts_of_image, width_per_character (in line
        heights) and width_deviation (in standard deviations from the writer's norm).
        writer_splits names the splits of the line's writer, page_splits those of its page, image_splits of its image.
    """
    frame = lines.select(_COLUMNS).to_pandas().rename(columns={"image_path": "file"})
    prefixes = id_prefixes(lines)
    if any(prefixes.values()):  # as in import_rejections
        frame["file"] = lines["source"].to_pandas().map(prefixes).fillna("") + frame["file"]
    frame["place"] = frame["line_id"].where(pc.is_valid(lines["polygon"]).to_numpy(), frame["file"])
    _add_characters(frame, lines, config)

    height = frame["height_pixels"].clip(lower=1)
    frame["aspect"] = frame["width_pixels"] / height
    for name, width_of in (("frames", scaled_width), ("most_frames", largest_width)):
        widths = (width_of(*size, image_config) for size in zip(frame["width_pixels"], height, strict=True))
        frame[name] = num_frames(np.fromiter(widths, np.int64, len(frame)))
    frame["required_frames"] = np.fromiter(map(required_frames, _strings(lines["text"])), np.int64, len(frame))
    frame["spare_frames"] = frame["most_frames"] - frame["required_frames"]
    _add_width_deviation(frame)

    # By numbers: as text, the hashes of a million lines would be a million Python strings.
    images = frame["content_hash"].factorize()[0]
    frame["texts_of_image"] = pd.Series(frame["text"].factorize()[0]).groupby(images).transform("nunique")
    rows = pd.Series(np.arange(len(frame)))
    first = rows.groupby(images).transform("first")
    same = first.where(first < rows, -1).to_numpy(np.int64)
    frame["same_image"], frame["same_split"] = _at(frame["line_id"], same), _at(frame["split"], same)
    frame["image_splits"] = _splits_of(frame, "content_hash")
    near = _near_images(frame["image_hash"].where(first == rows), config)
    frame["near_image"], frame["near_split"] = _at(frame["line_id"], near), _at(frame["split"], near)
    frame["other_page"] = _pages_of_same_text(frame)
    frame["writer_splits"] = _splits_of_writer(frame)
    # Without pages in the source, a page is what one writer wrote.
    has_pages = frame["page_id"] != frame["writer_id"]
    frame["page_splits"] = _splits_of(frame, "page_id").where(has_pages, frame["split"])
    return frame


def _splits_of(frame: pd.DataFrame, column: str) -> pd.Series:
    """For each line, the splits of all lines with the same value, in words."""
    # Only few values are in several splits, and words for each of a million would take most of the time.
    several = frame["split"].groupby(frame[column].factorize()[0]).transform("nunique") > 1
    splits = frame[several].groupby(column)["split"].unique().map(lambda found: " and ".join(sorted(found)))
    return frame[column].map(splits).fillna(frame["split"]).astype("str")


def _splits_of_writer(frame: pd.DataFrame) -> pd.Series:
    """The splits of each line's writer in words; the line's own where hands cannot be kept apart.

    That is: fewer than three writers in all, or a single one to train and to validate with, who is not in the test.
    """
    of_writer = _splits_of(frame, "writer_id")
    if frame["writer_id"].nunique() < FEWEST_WRITERS:
        return frame["split"]
    not_in_test = of_writer.isin(("train", "validation", "train and validation"))
    if frame["writer_id"][not_in_test].nunique() == 1:
        return of_writer.where(of_writer != "train and validation", frame["split"])
    return of_writer


def count_characters(texts: pa.ChunkedArray) -> Counter[str]:
    """How often each character stands in the texts."""
    return Counter(chain.from_iterable(_strings(texts)))


def _strings(column: pa.ChunkedArray) -> Iterator[str]:
    """The values as Python strings, a batch at a time: all at once they would take several times the memory."""
    for batch in pa.table({"value": column}).to_batches(max_chunksize=65536):
        yield from batch["value"].to_pylist()


# Characters


def _add_characters(frame: pd.DataFrame, lines: pa.Table, config: ValidationConfig) -> None:
    texts, allowed = lines["text"], config.allowed_characters
    if allowed is not None:  # also typed as letter and accent; a blank parts words
        allowed = {" "}.union(allowed, unicodedata.normalize("NFC", allowed))
    everywhere = count_characters(texts)
    trained = count_characters(texts.filter(pc.equal(lines["split"], "train")))
    unknown = {c for c in everywhere if (is_debris(c) if allowed is None else c not in allowed)}
    invisible = {c for c in everywhere if is_invisible(c)} - unknown
    mixed = _mixed_forms(texts, everywhere)
    rare = {c: f"{c!r} ({num} in training)" for c, num in trained.items() if num < config.min_occurrences}
    untrained = {c: repr(c) for c in everywhere if c not in trained}

    def words(found: Mapping[str, str]) -> Callable[[str], str]:
        return lambda text: ", ".join(dict.fromkeys(found[c] for c in sorted(set(text) & found.keys())))

    def codes(found: set[str]) -> Callable[[str], str]:
        return lambda text: describe_characters(set(text) & found)

    frame["unknown_characters"] = _describe(texts, _have_any(texts, unknown), codes(unknown))
    frame["invisible_characters"] = _describe(texts, _have_any(texts, invisible), codes(invisible))
    frame["rare_characters"] = _describe(texts, _have_any(texts, rare), words(rare))
    frame["untrained_characters"] = _describe(texts, _have_any(texts, untrained), words(untrained))
    forms = [
        _describe(texts, pc.match_substring(texts, form), lambda _, note=note: note) for form, note in mixed.items()
    ]
    frame["mixed_forms"] = _join(forms, len(frame))
    scripts = [pc.match_substring_regex(texts, rf"\p{{{name}}}").to_numpy() for name in ("Latin", "Greek", "Cyrillic")]
    several = pa.array(np.sum(scripts, axis=0) > 1)
    frame["look_alikes"] = _describe(texts, several, lambda text: ", ".join(look_alike_words(text)))


def _mixed_forms(texts: pa.ChunkedArray, characters: Collection[str]) -> dict[str, str]:
    """Signs that the set writes in two ways: the form on fewer lines, with a note what the other one is."""
    notes = {}
    for character in sorted(characters):
        plain = plain_form(character)
        if plain is None:
            continue
        num = pc.sum(pc.match_substring(texts, character)).as_py()
        num_plain = pc.sum(pc.match_substring(texts, plain)).as_py()
        if num_plain:
            rarer, other, lines = (plain, character, num) if num_plain < num else (character, plain, num_plain)
            notes[rarer] = f"{_name(rarer)}, which {lines} lines write {_name(other)}"
    return notes


def _name(form: str) -> str:
    return f"{form!r} (U+{ord(form):04X})" if len(form) == 1 else repr(form)


def _have_any(texts: pa.ChunkedArray, characters: Collection[str]) -> pa.ChunkedArray:
    if not characters:
        return pc.is_in(texts, pa.array([], pa.string()))
    codes = "".join(rf"\x{{{ord(c):X}}}" for c in sorted(characters))
    return pc.match_substring_regex(texts, f"[{codes}]")


def _describe(texts: pa.ChunkedArray, chosen: pa.Array, describe: Callable[[str], str]) -> pd.Series:
    """What `describe` says of the chosen texts; empty for the others."""
    found = np.full(len(texts), "", object)
    found[np.asarray(chosen)] = [describe(text) for text in _strings(texts.filter(chosen))]
    return pd.Series(found, dtype="str")


def _join(columns: list[pd.Series], num_rows: int) -> pd.Series:
    joined = pd.Series(np.full(num_rows, "", object), dtype="str")
    for column in columns:
        joined = joined.where(column == "", joined.where(joined == "", joined + "; ") + column)
    return joined


# Widths


def _add_width_deviation(frame: pd.DataFrame) -> None:
    """How far a line's width per character is from the median of its writer, on a logarithmic scale.

    The spread is the median absolute deviation, which wrong lines do not move. Writers with few lines are measured by
    the whole set, and so are all of them together.
    """
    length = frame["text"].str.len()
    frame["width_per_character"] = frame["aspect"] / length.clip(lower=1)
    widths = np.log(frame["width_per_character"].clip(lower=1e-6)).where(length >= _MIN_CHARACTERS_FOR_WIDTH)
    writers = frame["writer_id"]
    few = widths.groupby(writers).transform("count") < _MIN_LINES_FOR_NORM
    middle = widths.groupby(writers).transform("median").mask(few, widths.median())
    distance = (widths - middle).abs()
    spread = distance.groupby(writers).transform("median").mask(few, (widths - widths.median()).abs().median())
    deviation = (widths - middle) / (_STANDARD_DEVIATIONS * spread).clip(lower=_MIN_SPREAD)
    frame["width_deviation"] = deviation.fillna(0.0)


# Duplicates


def _at(column: pd.Series, rows: np.ndarray) -> pd.Series:
    """The value of the row that each line names; empty for -1."""
    values = np.full(len(column), "", object)
    values[rows >= 0] = column.iloc[rows[rows >= 0]]
    return pd.Series(values, dtype="str")


def _near_images(hashes: pd.Series, config: ValidationConfig) -> np.ndarray:
    """Row of an earlier image that looks the same, or -1."""
    digits = pa.array(hashes.fillna("0" * 32), pa.string()).to_pylist()
    pairs = np.frombuffer(bytes.fromhex("".join(digits)), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return find_near_duplicates(pairs, config.near_duplicate_bits)


def _pages_of_same_text(frame: pd.DataFrame) -> pd.Series:
    """For each line, a page of another split whose lines, one after the other, are the text of its own page."""
    order = frame["page_id"].argsort(kind="stable")
    rows = zip(*(frame[name].iloc[order] for name in ("page_id", "split", "text")), strict=True)
    pages: dict[str, list[tuple[str, str]]] = {}
    for page_id, page in groupby(rows, key=itemgetter(0)):
        _, splits, texts = zip(*page, strict=True)
        text = "".join(texts).replace(" ", "")
        if len(text) >= _MIN_PAGE_CHARACTERS:
            pages.setdefault(text, []).append((page_id, splits[0]))
    others = {}
    for same in pages.values():
        if len({split for _, split in same}) > 1:
            for page_id, split in same:
                others[page_id] = next(f"{other} ({where})" for other, where in same if where != split)
    return frame["page_id"].map(others).fillna("").astype("str")
