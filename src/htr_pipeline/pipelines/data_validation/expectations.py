"""What must hold of the lines, as Great Expectations suites; each expectation has a reason code and a sentence.

Great Expectations takes five seconds to import, so it is imported where it is used.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.io.manifest import SPLITS

# What happens where a check fails, unless validation.levels says otherwise.
LINE_LEVELS = {
    "duplicate_id": "reject",
    "empty_text": "reject",
    "unknown_character": "reject",
    "unreadable_image": "reject",
    "blank_image": "reject",
    "height": "reject",
    "width": "reject",
    "aspect": "reject",
    "too_narrow": "reject",
    "same_image_two_texts": "reject",
    "same_image": "warn",
    "near_duplicate_image": "warn",
    "same_page_text": "warn",
    "unusual_width": "warn",
    "invisible_character": "warn",
    "mixed_forms": "warn",
    "look_alike": "warn",
    "rare_character": "warn",
    "untrained_character": "warn",
}
# What compression makes of a blank sheet is less.
_LEAST_GREY_RANGE = 8
AT_IMPORT = ("duplicate_id", "empty_text", "unreadable_image")  # found there already; of them no line can be made
SET_LEVELS = {
    "writer_in_two_splits": "stop",
    "page_in_two_splits": "warn",
    "image_in_two_splits": "warn",
    "missing_split": "stop",
}


@config("validation")
class ValidationConfig:
    """Which lines are good enough, what happens to the others, and how many may be rejected before the run stops."""

    max_rejected_share: float = setting(default=0.05, minimum=0.0, maximum=1.0)
    levels: dict[str, str] = setting(default=LINE_LEVELS | SET_LEVELS)
    allowed_characters: str | None = setting(default=None)  # null: any but control, private-use, replacement
    min_height_pixels: int = setting(default=8, minimum=1)
    max_height_pixels: int = setting(default=1000, minimum=1)
    min_width_pixels: int = setting(default=8, minimum=1)
    max_width_pixels: int = setting(default=20000, minimum=1)
    max_aspect: float = setting(default=100.0, minimum=1.0)  # width over height
    max_width_deviation: float = setting(default=5.0, minimum=1.0)  # standard deviations from the writer's norm
    near_duplicate_bits: int = setting(default=8, minimum=0, maximum=32)  # of 128, that may differ
    min_occurrences: int = setting(default=10, minimum=0)  # in training; a character with fewer is rare
    shown_per_reason: int = setting(default=40, minimum=0, maximum=1000)  # lines on the page, with their images
    docs_path: str = setting(default="data/08_reporting/validation")

    def __post_init__(self) -> None:
        for side in ("height", "width"):
            low, high = getattr(self, f"min_{side}_pixels"), getattr(self, f"max_{side}_pixels")
            if low > high:
                raise UserError(
                    f"validation.min_{side}_pixels = {low}: expected at most validation.max_{side}_pixels, now {high}."
                )
        levels = {reason: "off" if level is False else level for reason, level in self.levels.items()}  # YAML's off
        object.__setattr__(self, "levels", levels)
        for reason, level in levels.items():
            if reason not in LINE_LEVELS | SET_LEVELS:
                close = difflib.get_close_matches(reason, LINE_LEVELS | SET_LEVELS, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise UserError(
                    f"validation.levels.{reason}: there is no such check.{hint} "
                    f"Allowed: {', '.join(LINE_LEVELS | SET_LEVELS)}."
                )
            allowed = ("reject", "warn", "stop", "off") if reason in LINE_LEVELS else ("warn", "stop", "off")
            if reason == "missing_split":  # what comes after needs all three
                allowed = ("stop",)
            elif reason in AT_IMPORT:
                allowed = ("reject", "stop")
            if level not in allowed:
                raise UserError(f"validation.levels.{reason} = {level!r}: expected one of {', '.join(allowed)}.")

    def level(self, reason: str) -> str:
        """What happens where the check fails: "reject", "warn", "stop" or "off"."""
        return self.levels.get(reason) or (LINE_LEVELS | SET_LEVELS)[reason]


@dataclass(frozen=True)
class Check:
    """One expectation.

    Attributes:
        reason: code that a line carries which fails it.
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
    """What came of a check: the rows of the lines that failed; a check of the whole set may fail without any."""

    check: Check
    success: bool
    failed_rows: np.ndarray


def line_checks(config: ValidationConfig) -> list[Check]:
    """What must hold of each line, in terms of facts.py; a line is rejected for the first of these that it fails."""
    height = (config.min_height_pixels, config.max_height_pixels)
    width = (config.min_width_pixels, config.max_width_pixels)
    allowed = "only validation.allowed_characters"
    if config.allowed_characters is None:
        allowed = "any character, but no control, private-use or replacement character"
    return [
        Check(
            "duplicate_id",
            "every line has an id of its own",
            lambda gxe: gxe.ExpectColumnValuesToBeUnique(column="line_id"),
            lambda line: f"{line['place']}: the id {line['line_id']!r} belongs to another line too. Rename one.",
        ),
        Check(
            "empty_text",
            "the text is not empty",
            lambda gxe: gxe.ExpectColumnValueLengthsToBeBetween(column="text", min_value=1),
            lambda line: f"{line['place']}: there is no text. Transcribe the line or remove it.",
        ),
        Check(
            "unknown_character",
            f"the text has {allowed}",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="unknown_characters", value_set=[""]),
            lambda line: (
                f"{line['place']}: {line['text']!r} has {line['unknown_characters']}. Correct the text, or "
                + (
                    "keep such lines by validation.levels.unknown_character=warn."
                    if config.allowed_characters is None
                    else "add the character to validation.allowed_characters."
                )
            ),
        ),
        Check(
            "unreadable_image",
            "the image was decoded and its bytes hashed",
            lambda gxe: gxe.ExpectColumnValuesToMatchRegex(column="content_hash", regex="^[0-9a-f]{64}$"),
            lambda line: f"{line['place']}: the image was not decoded. Export it again as PNG.",
        ),
        Check(
            "blank_image",
            "the image is not of one brightness everywhere",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="grey_range", min_value=_LEAST_GREY_RANGE),
            lambda line: f"{line['place']}: nothing can be seen on the image. Export it again, or remove the line.",
        ),
        Check(
            "height",
            f"the image is {height[0]} to {height[1]} pixels high",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(
                column="height_pixels", min_value=height[0], max_value=height[1]
            ),
            lambda line: (
                f"{line['place']}: {line['height_pixels']} pixels high, {height[0]} to {height[1]} are "
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
                f"{line['place']}: {line['width_pixels']} pixels wide, {width[0]} to {width[1]} are "
                "allowed. Is it one line? If so, change validation.min_width_pixels or max_width_pixels."
            ),
        ),
        Check(
            "aspect",
            f"the image is at most {config.max_aspect:g} times as wide as high",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="aspect", max_value=config.max_aspect),
            lambda line: (
                f"{line['place']}: {line['aspect']:.1f} times as wide as high, {config.max_aspect:g} is "
                "allowed. Cut the line out again, or raise validation.max_aspect."
            ),
        ),
        Check(
            "too_narrow",
            "the image has enough frames for its text under CTC",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="spare_frames", min_value=0),
            lambda line: (
                f"{line['place']}: {len(line['text'])} characters need at least {line['required_frames']} "
                f"frames, {line['width_pixels']} x {line['height_pixels']} pixels give {line['frames']}"
                f"{_if_enlarged(line)}. Is it the text of this image? If so, raise features.height_pixels, or remove "
                "the line."
            ),
        ),
        Check(
            "same_image_two_texts",
            "no image stands under two texts",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(column="texts_of_image", max_value=1),
            lambda line: (
                f"{line['place']}: the same image stands under {line['texts_of_image']} different texts, "
                f"here {line['text']!r}. Keep the right one."
            ),
        ),
        Check(
            "same_image",
            "no image stands twice under one text",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="same_image", value_set=[""]),
            lambda line: (
                f"{line['place']} ({line['split']}): the image is that of {line['same_image']} ({line['same_split']}). "
                "Remove one."
            ),
        ),
        Check(
            "near_duplicate_image",
            f"no two images look the same (perceptual hashes within {config.near_duplicate_bits} of 128 bits)",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="near_image", value_set=[""]),
            lambda line: (
                f"{line['place']} ({line['split']}): the image looks like {line['near_image']} ({line['near_split']}). "
                "If they are two scans of one line, remove one."
            ),
        ),
        Check(
            "same_page_text",
            "no page has the text of a page in another split",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="other_page", value_set=[""]),
            lambda line: (
                f"{line['place']}: page {line['page_id']!r} ({line['split']}) has the text of page "
                f"{line['other_page']}, so that the test would reward a text known by heart. Put both into one split."
            ),
        ),
        Check(
            "unusual_width",
            "the width per character is near the norm of the writer "
            f"(within {config.max_width_deviation:g} standard deviations)",
            lambda gxe: gxe.ExpectColumnValuesToBeBetween(
                column="width_deviation", min_value=-config.max_width_deviation, max_value=config.max_width_deviation
            ),
            lambda line: (
                f"{line['place']}: {len(line['text'])} characters on {line['width_pixels']} x "
                f"{line['height_pixels']} pixels are {'wider' if line['width_deviation'] > 0 else 'narrower'} than "
                f"this hand writes, by {abs(line['width_deviation']):.1f} standard deviations. Is {line['text']!r} the "
                "text of this image, and all of it?"
            ),
        ),
        Check(
            "invisible_character",
            "the text has no character that leaves nothing on paper (soft hyphen, zero-width, direction mark)",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="invisible_characters", value_set=[""]),
            lambda line: f"{line['place']}: {line['text']!r} has {line['invisible_characters']}. Remove it.",
        ),
        Check(
            "mixed_forms",
            "the same sign is always written with the same code (not now \N{RIGHT SINGLE QUOTATION MARK}, now ')",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="mixed_forms", value_set=[""]),
            lambda line: f"{line['place']}: the text has {line['mixed_forms']}. Decide for one form.",
        ),
        Check(
            "look_alike",
            "no word mixes Latin, Greek and Cyrillic letters that look alike",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="look_alikes", value_set=[""]),
            lambda line: (
                f"{line['place']}: letters of another script in {line['look_alikes']}. Type the letters again."
            ),
        ),
        Check(
            "rare_character",
            f"every character stands at least {config.min_occurrences} times in training",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="rare_characters", value_set=[""]),
            lambda line: (
                f"{line['place']}: the text has {line['rare_characters']}, too few to learn. Is it a slip? "
                "If not, add training lines with it."
            ),
        ),
        Check(
            "untrained_character",
            "every character of validation and test stands in training too",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="untrained_characters", value_set=[""]),
            lambda line: (
                f"{line['place']}: no training line has {line['untrained_characters']}; it cannot be learnt. "
                "Add training lines with it; dropping this line would only make the test easier."
            ),
        ),
    ]


def _if_enlarged(line: Mapping[str, Any]) -> str:
    """Whether small letters, which are enlarged, might have made room."""
    return f", {line['most_frames']} at most if its letters are small" if line["most_frames"] > line["frames"] else ""


def set_checks() -> list[Check]:
    """What must hold of all the lines together."""
    return [
        Check(
            "writer_in_two_splits",
            "every writer is in one split",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="writer_splits", value_set=list(SPLITS)),
            lambda frame: (
                "Writers in more than one split, so that the test would have hands seen in training: "
                + _list_ids(frame[~frame["writer_splits"].isin(SPLITS)], "writer")
                + ". Correct the splits in the source, or set source.split=by_writer to split by writer. If the "
                "test is to be of the same hands, set validation.levels.writer_in_two_splits=warn."
            ),
        ),
        Check(
            "page_in_two_splits",
            "every page is in one split",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="page_splits", value_set=list(SPLITS)),
            lambda frame: (
                "Pages in more than one split, whose lines share ink, light and half a sentence with the next: "
                + _list_ids(frame[~frame["page_splits"].isin(SPLITS)], "page")
                + ". The test is easier for it. Give whole pages to a split in the source."
            ),
        ),
        Check(
            "image_in_two_splits",
            "every image is in one split",
            lambda gxe: gxe.ExpectColumnValuesToBeInSet(column="image_splits", value_set=list(SPLITS)),
            lambda frame: (
                "Images in more than one split, of which the test knows the answers: "
                + _list_ids(frame[~frame["image_splits"].isin(SPLITS)].assign(image_id=frame["line_id"]), "image")
                + ". Remove those of training, or give them to one split in the source."
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


def _list_ids(frame: pd.DataFrame, kind: str) -> str:
    """The first writers or pages with their splits, and how many more there are."""
    splits = dict(sorted(zip(frame[f"{kind}_id"], frame[f"{kind}_splits"], strict=True)))
    words = [f"{identifier!r} ({found})" for identifier, found in list(splits.items())[:5]]
    return ", ".join(words) + (f" and {len(splits) - 5} more" if len(splits) > 5 else "")


def run_checks(frame: pd.DataFrame, checks: Sequence[Check]) -> list[Outcome]:
    """What came of each check on the frame, by Great Expectations, with no project folder of its own.

    Args:
        frame: facts.collect_facts.
        checks: any of line_checks and set_checks.

    Raises:
        RuntimeError: an expectation could not be evaluated.
    """
    if not checks:
        return []
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            # Without its own site, which it would leave in the system's temporary folder.
            store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
            progress_bars=ProgressBarsConfig(globally=False),
        ),
    )
    expectations = [check.expectation(gxe) for check in checks]
    for check, expectation in zip(checks, expectations, strict=True):
        expectation.notes = check.claim
        expectation.meta = {"reason": check.reason}
    suite = context.suites.add(gx.ExpectationSuite(name="lines", expectations=expectations))
    asset = context.data_sources.add_pandas("lines").add_dataframe_asset("lines")
    batch = asset.add_batch_definition_whole_dataframe("lines")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="lines", data=batch, suite=suite))
    result = definition.run(
        # Great Expectations holds on to what it was given last: no more than it needs.
        batch_parameters={"dataframe": frame[sorted({expectation.column for expectation in expectations})]},
        # The query is a text that names every row that failed.
        result_format={"result_format": "COMPLETE", "return_unexpected_index_query": False},
    )
    # The results come in an order of their own where an expectation could not be evaluated.
    found = {found.expectation_config.meta["reason"]: found for found in result.results}
    return [_outcome(check, found[check.reason]) for check in checks]


def _outcome(check: Check, found: Any) -> Outcome:
    details: Mapping[str, Any] = found.result or {}
    failed = np.array(details.get("unexpected_index_list") or (), np.int64)
    if not found.success and not len(failed) and "observed_value" not in details:
        raise RuntimeError(f"Great Expectations could not evaluate {check.reason!r}: {found.exception_info}")
    return Outcome(check, bool(found.success), failed)
