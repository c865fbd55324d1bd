"""What must hold of the lines, as Great Expectations suites; each expectation has a reason code and a sentence.

Great Expectations takes five seconds to import, so it is imported where it is used.
"""

import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape, unescape
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
from jinja2 import Template

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.image import ImageConfig, num_frames, scaled_width
from htr_pipeline.core.text import required_frames
from htr_pipeline.io.atomic import replace_folder
from htr_pipeline.io.manifest import SPLITS


@config("validation")
class ValidationConfig:
    """Which lines are good enough, and how many may be rejected before the run stops."""

    max_rejected_share: float = setting(default=0.05, minimum=0.0, maximum=1.0)
    allowed_characters: str | None = setting(default=None)  # null: any but control, private-use, replacement
    min_height_pixels: int = setting(default=8, minimum=1)
    max_height_pixels: int = setting(default=1000, minimum=1)
    min_width_pixels: int = setting(default=8, minimum=1)
    max_width_pixels: int = setting(default=20000, minimum=1)
    max_aspect: float = setting(default=100.0, minimum=1.0)  # width over height
    docs_path: str = setting(default="data/08_reporting/validation")

    def __post_init__(self) -> None:
        for side in ("height", "width"):
            low, high = getattr(self, f"min_{side}_pixels"), getattr(self, f"max_{side}_pixels")
            if low > high:
                raise UserError(
                    f"validation.min_{side}_pixels = {low}: expected at most validation.max_{side}_pixels, now {high}."
                )


@dataclass(frozen=True)
class Check:
    """One expectation.

    Attributes:
        reason: code that a rejected line carries.
        claim: what is expected, in words for a curator.
        expectation: makes the expectation from the module great_expectations.expectations.
        explain: the sentence for one line that failed (a mapping), or, for a check of the whole set, for all the lines
            (a frame).
    """

    reason: str
    claim: str
    expectation: Callable[[ModuleType], Any]
    explain: Callable[[Any], str]


@dataclass(frozen=True)
class Outcome:
    """What came of a check: the ids of the lines that failed; a check of the whole set may fail without any."""

    check: Check
    success: bool
    failed_ids: frozenset[str]


def line_checks(config: ValidationConfig) -> list[Check]:
    """What must hold of each line; a line is rejected for the first of these that it fails."""
    height = (config.min_height_pixels, config.max_height_pixels)
    width = (config.min_width_pixels, config.max_width_pixels)
    allowed = "any character" if config.allowed_characters is None else "only validation.allowed_characters"
    return [
        Check(
            "duplicate_id",
            "every line has an id of its own",
            lambda gxe: gxe.ExpectColumnValuesToBeUnique(column="line_id"),
            lambda line: f"{line['image_path']}: the id {line['line_id']!r} belongs to another line too. Rename one.",
        ),
        Check(
            "empty_text",
            "the text is not empty",
            lambda gxe: gxe.ExpectColumnValueLengthsToBeBetween(column="text", min_value=1),
            lambda line: f"{line['image_path']}: there is no text. Transcribe the line or remove it.",
        ),
        Check(
            "unknown_character",
            f"the text has {allowed}, but no control, private-use or replacement character",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="unknown_characters", value_set=["none"]),
            lambda line: (
                f"{line['image_path']}: {line['text']!r} has {line['unknown_characters']}. "
                "Correct the text, or add the character to validation.allowed_characters."
            ),
        ),
        Check(
            "unreadable_image",
            "the image was decoded and its bytes hashed",
            lambda gxe: gxe.ExpectColumnValuesToMatchRegex(column="content_hash", regex="^[0-9a-f]{64}$"),
            lambda line: f"{line['image_path']}: the image was not decoded. Export it again as PNG.",
        ),
        Check(
            "height",
            f"the image is {height[0]} to {height[1]} pixels high",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(
                column="height_pixels", min_value=height[0], max_value=height[1]
            ),
            lambda line: (
                f"{line['image_path']}: {line['height_pixels']} pixels high, {height[0]} to {height[1]} are "
                "allowed. Is it one line? If so, change validation.min_height_pixels or max_height_pixels."
            ),
        ),
        Check(
            "width",
            f"the image is {width[0]} to {width[1]} pixels wide",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(
                column="width_pixels", min_value=width[0], max_value=width[1]
            ),
            lambda line: (
                f"{line['image_path']}: {line['width_pixels']} pixels wide, {width[0]} to {width[1]} are "
                "allowed. Is it one line? If so, change validation.min_width_pixels or max_width_pixels."
            ),
        ),
        Check(
            "aspect",
            f"the image is at most {config.max_aspect:g} times as wide as high",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="aspect", max_value=config.max_aspect),
            lambda line: (
                f"{line['image_path']}: {line['aspect']:.1f} times as wide as high, {config.max_aspect:g} is "
                "allowed. Cut the line out again, or raise validation.max_aspect."
            ),
        ),
        Check(
            "too_narrow",
            "the image has enough frames for its text under CTC",
            lambda gxe: gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="frames", column_B="required_frames", or_equal=True
            ),
            lambda line: (
                f"{line['image_path']}: {len(line['text'])} characters need at least {line['required_frames']} "
                f"frames, {line['width_pixels']} x {line['height_pixels']} pixels give {line['frames']}. Is it the "
                "text of this image? If so, raise features.height_pixels, or remove the line."
            ),
        ),
        Check(
            "same_image_two_texts",
            "no image stands under two texts",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="texts_of_image", max_value=1),
            lambda line: (
                f"{line['image_path']}: the same image stands under {line['texts_of_image']} different texts, "
                f"here {line['text']!r}. Keep the right one."
            ),
        ),
    ]


def set_checks() -> list[Check]:
    """What must hold of all the lines together; the run stops where one of these fails."""
    return [
        Check(
            "writer_in_two_splits",
            "every writer is in one split",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="writer_splits", value_set=list(SPLITS)),
            lambda frame: (
                "Writers in more than one split, so that the test would have hands seen in training: "
                + _list_writers(frame[~frame["writer_splits"].isin(SPLITS)])
                + ". Correct the splits in the source, or set source.split=by_writer to split by writer."
            ),
        ),
        Check(
            "missing_split",
            "there are lines for training, validation and test",
            lambda gxe: gxe.ExpectColumnDistinctValuesToContainSet(column="split", value_set=list(SPLITS)),
            lambda frame: (
                "Every split needs a line, got "
                + (
                    ", ".join(f"{split} {num}" for split, num in sorted(Counter(frame["split"]).items()))
                    or "none at all"
                )
                + ". Add lines, leave the split of some empty, or set source.split=by_writer to split by writer."
            ),
        ),
    ]


def _list_writers(frame: pd.DataFrame) -> str:
    splits = dict(sorted(zip(frame["writer_id"], frame["writer_splits"], strict=True)))
    words = [f"{writer_id!r} ({found})" for writer_id, found in list(splits.items())[:5]]
    return ", ".join(words) + (f" and {len(splits) - 5} more" if len(splits) > 5 else "")


def check_frame(lines: pa.Table, config: ValidationConfig, image_config: ImageConfig) -> pd.DataFrame:
    """The lines with the columns that the expectations look at.

    Args:
        lines: schema MANIFEST.
        config: the characters that are allowed.
        image_config: the height to which lines will be scaled, which decides how many frames they have.
    """
    frame = lines.drop_columns(["polygon", "baseline"]).to_pandas()
    frame["unknown_characters"] = [unknown_characters(text, config.allowed_characters) for text in frame["text"]]
    frame["aspect"] = frame["width_pixels"] / frame["height_pixels"].clip(lower=1)
    sizes = zip(frame["width_pixels"], frame["height_pixels"].clip(lower=1), strict=True)
    frame["frames"] = [num_frames(scaled_width(int(width), int(height), image_config)) for width, height in sizes]
    frame["required_frames"] = [required_frames(text) for text in frame["text"]]
    frame["texts_of_image"] = frame.groupby("content_hash")["text"].transform("nunique").astype("int64")
    splits_of_writer = frame.groupby("writer_id")["split"].unique().map(lambda splits: " and ".join(sorted(splits)))
    frame["writer_splits"] = frame["writer_id"].map(splits_of_writer)
    return frame


def unknown_characters(text: str, allowed: str | None) -> str:
    """Characters that a transcription may not have, as code points with names; "none" where it has none.

    Args:
        text: a transcription.
        allowed: the characters that it may have; None for any but control, private-use and replacement characters,
            which are never allowed: they are left over from a wrong encoding or a font of one's own.
    """
    found = sorted(c for c in set(text) if _is_debris(c) or (allowed is not None and c not in allowed))
    return ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, 'without a name')}" for c in found) or "none"


def _is_debris(character: str) -> bool:
    return character == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(character) in ("Cc", "Co", "Cs")


class Validator:
    """Runs checks with Great Expectations and writes its Data Docs, with no project folder of its own.

    Args:
        docs_folder: folder for the Data Docs.
    """

    def __init__(self, docs_folder: Path) -> None:
        import great_expectations as gx
        from great_expectations.data_context.types.base import (
            DataContextConfig,
            InMemoryStoreBackendDefaults,
            ProgressBarsConfig,
        )

        self._gx = gx
        site = {
            "class_name": "SiteBuilder",
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(docs_folder.resolve()),
            },
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
        self._context = gx.get_context(
            mode="ephemeral",
            project_config=DataContextConfig(
                # Without its own site, which it would leave in the system's temporary folder.
                store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
                data_docs_sites={"validation": site},
                progress_bars=ProgressBarsConfig(globally=False),
            ),
        )
        self._source = self._context.data_sources.add_pandas("lines")

    def run(self, name: str, frame: pd.DataFrame, checks: Sequence[Check]) -> list[Outcome]:
        """What came of each check on the frame.

        Raises:
            RuntimeError: an expectation could not be evaluated.
        """
        import great_expectations.expectations as gxe

        expectations = [check.expectation(gxe) for check in checks]
        for check, expectation in zip(checks, expectations, strict=True):
            expectation.notes = check.claim  # shown in the Data Docs
            expectation.meta = {"reason": check.reason}
        suite = self._context.suites.add(self._gx.ExpectationSuite(name=name, expectations=expectations))
        batch = self._source.add_dataframe_asset(name).add_batch_definition_whole_dataframe(name)
        definition = self._context.validation_definitions.add(
            self._gx.ValidationDefinition(name=name, data=batch, suite=suite)
        )
        result = definition.run(
            # Great Expectations writes values into its pages as they are, and these come from strangers' files.
            batch_parameters={"dataframe": frame.map(lambda value: escape(value) if isinstance(value, str) else value)},
            result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["line_id"]},
        )
        # The results come in an order of their own where an expectation could not be evaluated.
        found = {found.expectation_config.meta["reason"]: found for found in result.results}
        return [_outcome(check, found[check.reason]) for check in checks]

    def build_docs(self) -> None:
        """Writes the Data Docs of everything that was run."""
        self._context.build_data_docs()


def _outcome(check: Check, found: Any) -> Outcome:
    details = found.result or {}
    failed = frozenset(unescape(index["line_id"]) for index in details.get("unexpected_index_list") or ())
    if not found.success and not failed and "observed_value" not in details:
        raise RuntimeError(f"Great Expectations could not evaluate {check.reason!r}: {found.exception_info}")
    return Outcome(check, bool(found.success), failed)


def render_summary(summary: Mapping[str, Any]) -> str:
    """One HTML page of the validation summary that needs nothing from outside (Data Docs load scripts from CDNs)."""
    template = files(__package__).joinpath("summary.html").read_text(encoding="utf-8")
    return Template(template, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(summary=summary)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends without an error.

    A reader sees the old files or the new ones. What a run that was killed left behind is removed by the next.
    """
    new = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    replace_folder(new, folder)
