"""Nodes of data_validation: source to imported_lines, to validated, rejected and warned lines, to the manifest."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.core.splits import FEWEST_WRITERS, NO_NEW_HANDS, assign_splits, with_validation
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.importers import SourceConfig, SourcesConfig, import_lines, source_root
from htr_pipeline.io.importers.demo import DemoConfig
from htr_pipeline.io.manifest import MANIFEST, NO_FAULTS, REJECTED_LINES, SPLITS, WARNED_LINES, to_table
from htr_pipeline.pipelines.data_validation.expectations import (
    AT_IMPORT,
    LINE_LEVELS,
    SET_LEVELS,
    Check,
    Outcome,
    ValidationConfig,
    line_checks,
    run_checks,
    set_checks,
)
from htr_pipeline.pipelines.data_validation.facts import collect_facts
from htr_pipeline.pipelines.data_validation.page import render_page

logger = logging.getLogger(__name__)

PAGE = "summary.html"
_LEVELS = ("reject", "warn", "stop")
# As mappings, a million lines would take gigabytes.
_ROWS_AT_A_TIME = 10_000


def import_sources(
    source: SourceConfig, sources: SourcesConfig, demo: DemoConfig
) -> tuple[pa.Table, pa.Table, list[str]]:
    """params:source, params:sources to imported_lines (with splits), import_rejections and import_warnings."""
    lines, rejected = [MANIFEST.empty_table()], [REJECTED_LINES.empty_table()]
    warnings: list[str] = []
    roots: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name, config in sources.resolve(source).items():
        # Two sources may have a writer "w1". The split is found by the plain name, so that a source which others join
        # keeps its splits.
        prefix, label = (f"{name}/", f"sources.{name}: ") if name else ("", "")
        try:
            found, rejections = import_lines(config.path, config.format, config, demo)
        except UserError as exc:
            raise UserError(f"{label}{exc}") from exc
        splits, notes = assign_splits(
            *(found[column].to_pylist() for column in ("line_id", "writer_id", "split")),
            page_ids=found["page_id"].to_pylist(),
            validation_share=config.validation_share,
            test_share=config.test_share,
        )
        source_name = name or source_root(config.path).resolve().name
        columns = _with_prefix(found, prefix, ("line_id", "page_id", "writer_id"))
        columns |= {"split": splits, "source": pa.repeat(source_name, len(found))}
        lines.append(pa.table(columns, MANIFEST))
        rejected.append(pa.table(_with_prefix(rejections, prefix, ("line_id", "file")), REJECTED_LINES))
        roots[source_name] = str(source_root(config.path, config.format, config))
        prefixes[source_name] = prefix
        paths[source_name] = config.path
        warnings += [label + note for note in notes]
    by_source = {"image_roots": roots, "id_prefixes": prefixes, "source_paths": paths}
    metadata = {entry: json.dumps(values) for entry, values in by_source.items()}
    imported = pa.concat_tables(lines)
    if "validation" not in pc.unique(imported["split"]).to_pylist():
        splits, notes = with_validation(
            *(_plain_ids(imported, column, prefixes) for column in ("line_id", "writer_id")),
            imported["split"].to_pylist(),
            page_ids=_plain_ids(imported, "page_id", prefixes),
            validation_share=source.validation_share,
            test_share=source.test_share,
        )
        place, field = imported.column_names.index("split"), MANIFEST.field("split")
        imported = imported.set_column(place, field, pa.array(splits, field.type))
        warnings += notes
    writers = pc.unique(imported["writer_id"]).to_pylist()
    if 0 < len(writers) < FEWEST_WRITERS and not any(NO_NEW_HANDS in note for note in warnings):
        warnings.append(
            f"All lines are by {len(writers)} writer(s) ({', '.join(writers)}): where the test has hands seen "
            f"in training, {NO_NEW_HANDS}."
        )
    imported = imported.replace_schema_metadata({**MANIFEST.metadata, **metadata})
    return imported, pa.concat_tables(rejected), warnings


def _plain_ids(imported: pa.Table, column: str, prefixes: dict[str, str]) -> list[str]:
    """The ids as their sources have them, by which the hash goes; those of several sources may be equal."""
    names = zip(imported[column].to_pylist(), imported["source"].to_pylist(), strict=True)
    return [name.removeprefix(prefixes[source]) for name, source in names]


def _with_prefix(table: pa.Table, prefix: str, names: Sequence[str]) -> dict[str, Any]:
    """The table's columns, some of them with the prefix before each value."""
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return columns | {name: pc.binary_join_element_wise(prefix, table[name], "") for name in names}


def validate_lines(
    imported_lines: pa.Table,
    import_rejections: pa.Table,
    import_warnings: list[str],
    validation: ValidationConfig,
    image_config: ImageConfig,
) -> tuple[pa.Table, pa.Table, pa.Table, dict[str, Any]]:
    """imported_lines to validated_lines, rejected_lines, warned_lines and validation_summary; a page to docs_path."""
    checks = {level: [c for c in line_checks(validation) if validation.level(c.reason) == level] for level in _LEVELS}
    about_set = [check for check in set_checks() if validation.level(check.reason) != "off"]

    facts = collect_facts(imported_lines, validation, image_config)
    rejecting = run_checks(facts, checks["reject"])
    rejected_by = np.full(len(facts), -1)
    for index, outcome in reversed(list(enumerate(rejecting))):
        rejected_by[outcome.failed_rows] = index
    is_rejected = rejected_by >= 0
    by_check = [(outcome.check, np.flatnonzero(rejected_by == index)) for index, outcome in enumerate(rejecting)]
    rejected = _sort(pa.concat_tables([import_rejections, *_list_lines(facts, by_check, REJECTED_LINES)]))
    validated = imported_lines.filter(pa.array(~is_rejected))

    # Again for the lines that are left: what is rare or stands twice among them does not depend on those that are not.
    if is_rejected.any():
        del facts  # the memory of a million lines
        facts = collect_facts(validated, validation, image_config)
    outcomes = run_checks(facts, [*checks["warn"], *checks["stop"], *about_set])
    warning = [outcome for outcome in outcomes if outcome.check.reason in LINE_LEVELS]
    of_set = [outcome for outcome in outcomes if outcome.check.reason in SET_LEVELS]
    doubted = [(outcome.check, outcome.failed_rows) for outcome in warning]
    warned = _sort(pa.concat_tables([WARNED_LINES.empty_table(), *_list_lines(facts, doubted, WARNED_LINES)]))

    before = _count_reasons(import_rejections)
    num_faults = sum(reason not in NO_FAULTS for reason in rejected["reason"].to_pylist())
    summary = {
        "num_lines": _per_split(facts, len),
        "num_writers": _per_split(facts, lambda part: part["writer_id"].nunique()),
        "num_characters": _per_split(facts, lambda part: part["text"].str.len().sum()),
        "num_rejected": rejected.num_rows,
        "num_warned": len(np.unique(np.concatenate([np.empty(0, np.int64), *(rows for _, rows in doubted)]))),
        "rejected_share": num_faults / max(num_faults + validated.num_rows, 1),
        "max_rejected_share": validation.max_rejected_share,
        "reasons": _count_reasons(rejected),
        "warned_reasons": _count_reasons(warned),
        "expectations": [
            *(_describe(outcome, validation, len(imported_lines), before) for outcome in rejecting),
            *(_describe(outcome, validation, len(facts), before) for outcome in (*warning, *of_set)),
        ],
        "checks_off": [reason for reason in LINE_LEVELS | SET_LEVELS if validation.level(reason) == "off"],
        "failures": [
            *(
                f"{before[reason]} lines were left out at the import for {reason!r}, and "
                f"validation.levels.{reason} = stop. They are in the table rejected_lines."
                for reason in AT_IMPORT
                if reason in before and validation.level(reason) == "stop"
            ),
            *(_stop_for(outcome, facts) for outcome in warning if _stops(outcome, validation)),
            *(outcome.check.explain(facts) for outcome in of_set if _stops(outcome, validation)),
        ],
        "warnings": [
            *import_warnings,
            *(
                outcome.check.explain(facts)
                for outcome in of_set
                if not outcome.success and not _stops(outcome, validation)
            ),
        ],
    }
    findings = pa.concat_tables([rejected, warned.replace_schema_metadata(rejected.schema.metadata)])
    page = render_page(summary, facts, imported_lines, findings, validation.shown_per_reason)
    with replacing(Path(validation.docs_path) / PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
    return validated, rejected, warned, summary


def check_manifest(
    validated_lines: pa.Table,
    rejected_lines: pa.Table,
    validation_summary: dict[str, Any],
    validation: ValidationConfig,
) -> pa.Table:
    """validated_lines to manifest, unless too many lines were rejected or a check failed that stops the run."""
    page = Path(validation.docs_path) / PAGE
    for warning in validation_summary["warnings"]:
        logger.warning("%s", warning)
    logger.info("%s\nMore in %s", _reason_table(validation_summary), page)
    share = validation_summary["rejected_share"]
    if share > validation.max_rejected_share or validated_lines.num_rows == 0:
        faults = [row for row in rejected_lines.to_pylist() if row["reason"] not in NO_FAULTS]
        num_others = rejected_lines.num_rows - len(faults)
        # Lines of a page without an image have one sentence for all of them.
        sentences = Counter(
            f"{row['file']} | {row['reason']} | {row['detail']}" for row in faults or rejected_lines.to_pylist()
        )
        first = [f"  {words}{f' ({num} lines)' * (num > 1)}" for words, num in list(sentences.items())[:10]]
        raise UserError(
            f"{len(faults)} of {len(faults) + validated_lines.num_rows} lines were rejected ({share:.1%})"
            + (f", besides {num_others} without text or split" if num_others else "")
            + (
                f"; validation.max_rejected_share = {validation.max_rejected_share} allows no more. "
                if validated_lines.num_rows
                else ", and no line is left. "
            )
            + "The first of them (file | reason | detail):\n"
            + "\n".join(first)
            + f"\nAll are in the table rejected_lines and in {page}. Put the source right"
            + (", or raise validation.max_rejected_share." if validated_lines.num_rows else ".")
        )
    if validation_summary["failures"]:
        raise UserError("\n".join(validation_summary["failures"]))
    return validated_lines


def _list_lines(
    facts: pd.DataFrame, found: Iterable[tuple[Check, np.ndarray]], schema: pa.Schema
) -> Iterable[pa.Table]:
    """A table for each check and some of the rows that failed it, with a sentence a line."""
    for check, rows in found:
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            lines = facts.iloc[rows[start : start + _ROWS_AT_A_TIME]].to_dict("records")
            yield to_table(
                (
                    {
                        "line_id": line["line_id"],
                        "file": line["file"],
                        "stage": "validation",
                        "reason": check.reason,
                        "detail": check.explain(line),
                    }
                    for line in lines
                ),
                schema,
            )


def _sort(findings: pa.Table) -> pa.Table:
    return findings.sort_by([(name, "ascending") for name in ("line_id", "file", "reason", "detail")]).combine_chunks()


def _stops(outcome: Outcome, validation: ValidationConfig) -> bool:
    return not outcome.success and validation.level(outcome.check.reason) == "stop"


def _stop_for(outcome: Outcome, facts: pd.DataFrame) -> str:
    """A sentence for a check of the lines that stops the run."""
    first = facts.iloc[outcome.failed_rows[:5]].to_dict("records")
    return (
        f"{len(outcome.failed_rows)} lines fail {outcome.check.reason!r}, expected: {outcome.check.claim}. They are in "
        f"the table warned_lines; the run stops because validation.levels.{outcome.check.reason} = stop. "
        "The first of them:\n" + "\n".join(f"  {outcome.check.explain(line)}" for line in first)
    )


def _per_split(facts: pd.DataFrame, count: Any) -> dict[str, int]:
    return {split: int(count(facts[facts["split"] == split])) for split in SPLITS}


def _count_reasons(findings: pa.Table) -> dict[str, int]:
    return dict(sorted(Counter(findings["reason"].to_pylist()).items()))


def _describe(
    outcome: Outcome, validation: ValidationConfig, num_checked: int, before: Mapping[str, int]
) -> dict[str, Any]:
    """A check and how it ended, with the lines that failed it at the import already."""
    num_before = before.get(outcome.check.reason, 0)
    return {
        "reason": outcome.check.reason,
        "claim": outcome.check.claim,
        "level": validation.level(outcome.check.reason),
        "num_checked": num_checked + num_before,
        "num_failed": len(outcome.failed_rows) + num_before,
        "success": outcome.success and not num_before,
    }


def _reason_table(summary: Mapping[str, Any]) -> str:
    rows: Sequence[tuple[str, Any]] = [
        *(
            (f"lines for {split}", f"{num}, writers: {summary['num_writers'][split]}")
            for split, num in summary["num_lines"].items()
        ),
        ("rejected", summary["num_rejected"]),
        *((f"  {reason}", num) for reason, num in summary["reasons"].items()),
        ("lines with a warning", summary["num_warned"]),
        *((f"  {reason}", num) for reason, num in summary["warned_reasons"].items()),
    ]
    return "Validation of the lines:\n" + "\n".join(f"  {name:<28}{value}" for name, value in rows)
