"""Nodes of data_validation: source to imported_lines, to validated_lines and rejected_lines, to the manifest."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.core.splits import assign_splits
from htr_pipeline.io.importers import SourceConfig, import_lines, source_root
from htr_pipeline.io.importers.demo import DemoConfig
from htr_pipeline.io.manifest import MANIFEST, REJECTED_LINES, SPLITS, to_table
from htr_pipeline.pipelines.data_validation.expectations import (
    Check,
    Outcome,
    ValidationConfig,
    Validator,
    check_frame,
    line_checks,
    render_summary,
    replaced_folder,
    set_checks,
)

logger = logging.getLogger(__name__)


def import_source(source: SourceConfig, demo: DemoConfig) -> tuple[pa.Table, pa.Table, list[str]]:
    """params:source to imported_lines (as the manifest, with splits), import_rejections and import_warnings."""
    records, rejected = import_lines(source.path, source.format, source, demo)
    records.sort(key=lambda record: record["line_id"])
    splits, warnings = assign_splits(
        [record["line_id"] for record in records],
        [record["writer_id"] for record in records],
        [record["split"] for record in records],
        validation_share=source.validation_share,
        test_share=source.test_share,
    )
    lines = ({**record, "split": split} for record, split in zip(records, splits, strict=True))
    metadata = {"image_root": str(source_root(source.path))}
    return to_table(lines, MANIFEST, metadata), _rejected_table(rejected), warnings


def validate_lines(
    imported_lines: pa.Table,
    import_rejections: pa.Table,
    import_warnings: list[str],
    validation: ValidationConfig,
    features: ImageConfig,
) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """imported_lines to validated_lines, rejected_lines and validation_summary; Data Docs go to docs_path."""
    frame = check_frame(imported_lines, validation, features)
    with replaced_folder(Path(validation.docs_path)) as docs:
        validator = Validator(docs)
        line_outcomes = validator.run("lines", frame, line_checks(validation))
        rejected_by = {line_id: outcome.check for outcome in reversed(line_outcomes) for line_id in outcome.failed_ids}
        is_rejected = frame["line_id"].isin(rejected_by)
        validated = imported_lines.filter(pa.array(~is_rejected))
        kept = check_frame(validated, validation, features)
        set_outcomes = validator.run("set", kept, set_checks())
        validator.build_docs()

        rejected = pa.concat_tables([import_rejections, _rejected_by_checks(frame[is_rejected], rejected_by)])
        rejected = rejected.sort_by([("line_id", "ascending"), ("file", "ascending"), ("reason", "ascending")])
        # A line that nobody has transcribed yet is reported, but it is no fault of the source.
        num_faults = sum(reason != "empty_text" for reason in rejected["reason"].to_pylist())
        outside = _characters_outside_train(kept)
        warnings = [*import_warnings, *_warn_of_characters(outside), *_warn_of_repeated_images(kept)]
        summary = {
            "num_lines": _per_split(kept, lambda part: len(part)),
            "num_writers": _per_split(kept, lambda part: part["writer_id"].nunique()),
            "num_characters": _per_split(kept, lambda part: int(part["text"].str.len().sum())),
            "num_rejected": rejected.num_rows,
            "rejected_share": num_faults / max(num_faults + validated.num_rows, 1),
            "max_rejected_share": validation.max_rejected_share,
            "reasons": dict(sorted(Counter(rejected["reason"].to_pylist()).items())),
            "expectations": [
                *(_describe(outcome, "line", len(frame)) for outcome in line_outcomes),
                *(_describe(outcome, "set", len(kept)) for outcome in set_outcomes),
            ],
            "failures": [outcome.check.explain(kept) for outcome in set_outcomes if not outcome.success],
            "warnings": warnings,
            "characters_outside_train": outside,
        }
        page = render_summary(summary | {"rejected": rejected.slice(0, 200).to_pylist()})
        (docs / "summary.html").write_text(page, encoding="utf-8")
    return validated, rejected, summary


def check_manifest(
    validated_lines: pa.Table,
    rejected_lines: pa.Table,
    validation_summary: dict[str, Any],
    validation: ValidationConfig,
) -> pa.Table:
    """validated_lines to manifest, unless too many lines were rejected or the set as a whole is not sound."""
    page = Path(validation.docs_path) / "summary.html"
    for warning in validation_summary["warnings"]:
        logger.warning("%s", warning)
    logger.info("%s\nMore in %s", _reason_table(validation_summary), page)
    share = validation_summary["rejected_share"]
    if share > validation.max_rejected_share or validated_lines.num_rows == 0:
        faults = [row for row in rejected_lines.to_pylist() if row["reason"] != "empty_text"]
        num_empty = rejected_lines.num_rows - len(faults)
        shown = (faults or rejected_lines.to_pylist())[:10]
        first = [f"  {row['file']} | {row['reason']} | {row['detail']}" for row in shown]
        raise UserError(
            f"{len(faults)} of {len(faults) + validated_lines.num_rows} lines were rejected ({share:.1%})"
            + (f", besides {num_empty} without text" if num_empty else "")
            + f"; validation.max_rejected_share = {validation.max_rejected_share} allows no more. "
            "The first of them (file | reason | detail):\n"
            + "\n".join(first)
            + f"\nAll are in the table rejected_lines and in {page}. Put the source right"
            + (", or raise validation.max_rejected_share." if validated_lines.num_rows else ".")
        )
    if validation_summary["failures"]:
        raise UserError("\n".join(validation_summary["failures"]))
    return validated_lines


def _rejected_by_checks(frame: pd.DataFrame, rejected_by: Mapping[str, Check]) -> pa.Table:
    return _rejected_table(
        {
            "line_id": line["line_id"],
            "file": line["image_path"],
            "stage": "validation",
            "reason": rejected_by[line["line_id"]].reason,
            "detail": rejected_by[line["line_id"]].explain(line),
        }
        for line in frame.to_dict("records")
    )


def _per_split(frame: pd.DataFrame, count: Any) -> dict[str, int]:
    return {split: int(count(frame[frame["split"] == split])) for split in SPLITS}


def _describe(outcome: Outcome, level: str, num_checked: int) -> dict[str, Any]:
    return {
        "reason": outcome.check.reason,
        "claim": outcome.check.claim,
        "level": level,
        "num_checked": num_checked,
        "num_failed": len(outcome.failed_ids),
        "success": outcome.success,
    }


def _characters_outside_train(frame: pd.DataFrame) -> dict[str, int]:
    """Characters of validation and test that training lacks, with the number of their lines."""
    in_train = set().union(*frame.loc[frame["split"] == "train", "text"])
    others = Counter(character for text in frame.loc[frame["split"] != "train", "text"] for character in set(text))
    return {character: num for character, num in sorted(others.items()) if character not in in_train}


def _warn_of_characters(outside: Mapping[str, int]) -> list[str]:
    if not outside:
        return []
    words = ", ".join(f"{character!r} (in {num})" for character, num in outside.items())
    return [
        f"Characters of validation or test lines that no training line has, so that they cannot be learnt: {words}. "
        "The lines are kept, since dropping them would make the test easier; add training lines with them."
    ]


def _warn_of_repeated_images(frame: pd.DataFrame) -> list[str]:
    repeated = frame[frame.duplicated("content_hash", keep=False)]
    if repeated.empty:
        return []
    images = repeated.groupby("content_hash")["split"].nunique()
    return [
        f"{len(images)} images occur more than once with the same text, {int((images > 1).sum())} of them in more than "
        f"one split, for instance {' and '.join(repeated['image_path'].iloc[:2])}. Remove the copies."
    ]


def _rejected_table(rows: Any) -> pa.Table:
    return to_table(rows, REJECTED_LINES)


def _reason_table(summary: Mapping[str, Any]) -> str:
    rows: Sequence[tuple[str, Any]] = [
        *(
            (f"lines for {split}", f"{num} by {summary['num_writers'][split]}")
            for split, num in summary["num_lines"].items()
        ),
        ("rejected", summary["num_rejected"]),
        *((f"  {reason}", num) for reason, num in summary["reasons"].items()),
    ]
    return "Validation of the lines:\n" + "\n".join(f"  {name:<28}{value}" for name, value in rows)
