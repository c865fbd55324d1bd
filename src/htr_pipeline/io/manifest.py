"""The tables that the pipelines exchange: one Arrow schema each, with a version in the file's metadata."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = "1"
SPLITS = ("train", "validation", "test")


def _schema(table: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"table": table, "schema_version": SCHEMA_VERSION})


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


# Reasons of rejected lines that are no fault of the source: nobody has transcribed the line yet; its official split
# files leave it out.
LEFT_OUT = "left_out"
NO_FAULTS = ("empty_text", "missing_text", LEFT_OUT)

_POINTS = pa.list_(pa.list_(pa.int32()))

MANIFEST = _schema(
    "manifest",
    [
        _required("line_id", pa.string()),
        _required("page_id", pa.string()),
        _required("writer_id", pa.string()),  # the document where the writer is unknown
        _required("split", pa.string()),
        _required("text", pa.string()),
        _required("image_path", pa.string()),  # relative to the root of its source
        pa.field("polygon", _POINTS),  # pixels of the page; null for line images
        pa.field("baseline", _POINTS),
        _required("source", pa.string()),
        _required("format", pa.string()),
        _required("width_pixels", pa.int32()),
        _required("height_pixels", pa.int32()),
        _required("content_hash", pa.string()),  # of the image; for a line on a page, of its polygon and baseline too
        pa.field("group", pa.string()),  # anything to break results down by: font, hand, collection
        pa.field("image_hash", pa.string()),  # core.image.perceptual_hash, 32 hexadecimal digits
        pa.field("grey_range", pa.int32()),  # of the line, 0 to 255: the brightest pixel less the darkest
    ],
)

_FINDINGS = [
    _required("line_id", pa.string()),
    pa.field("file", pa.string()),
    _required("stage", pa.string()),
    _required("reason", pa.string()),  # a code
    _required("detail", pa.string()),  # a sentence
]
REJECTED_LINES = _schema("rejected_lines", _FINDINGS)  # a line once
WARNED_LINES = _schema("warned_lines", _FINDINGS)  # lines that stay, once for each reason

FEATURES = _schema(
    "features",
    [
        _required("line_id", pa.string()),
        _required("split", pa.string()),
        _required("writer_id", pa.string()),
        pa.field("group", pa.string()),
        _required("text", pa.string()),
        _required("content_hash", pa.string()),  # as in the manifest
        _required("pixels", pa.binary()),  # uint8, one column of height_pixels after the other, ink high
        _required("width_pixels", pa.int32()),
        _required("height_pixels", pa.int32()),
        _required("ink_share", pa.float32()),
        _required("contrast", pa.float32()),
        _required("slant_degrees", pa.float32()),
    ],
)

HISTORY = _schema(
    "history",
    [
        _required("epoch", pa.int32()),
        _required("step", pa.int32()),
        _required("train_loss", pa.float64()),  # nats a line
        _required("train_cer", pa.float64()),  # greedy, on the augmented batches
        _required("validation_loss", pa.float64()),
        _required("validation_cer", pa.float64()),
        _required("learning_rate", pa.float64()),
        _required("blank_share", pa.float64()),
        _required("output_length_ratio", pa.float64()),  # mean output length over mean label length
        _required("gradient_norm", pa.float64()),
        _required("lines_per_second", pa.float64()),
        _required("data_wait_seconds", pa.float64()),
        _required("elapsed_seconds", pa.float64()),
        pa.field("skipped_batches", pa.int32()),  # for their gradient was not finite
        pa.field("verdict", pa.string()),  # of core.collapse at the end of the epoch
    ],
)

PREDICTIONS = _schema(
    "predictions",
    [
        _required("line_id", pa.string()),
        _required("split", pa.string()),
        _required("writer_id", pa.string()),
        pa.field("group", pa.string()),
        _required("decoder", pa.string()),
        _required("reference", pa.string()),
        _required("hypothesis", pa.string()),
        _required("confidence", pa.float32()),
        _required("hits", pa.int32()),
        _required("substitutions", pa.int32()),
        _required("insertions", pa.int32()),
        _required("deletions", pa.int32()),
        _required(
            "characters",
            pa.list_(
                pa.struct(
                    [
                        pa.field("character", pa.string()),
                        pa.field("start_frame", pa.int32()),
                        pa.field("end_frame", pa.int32()),  # exclusive
                        pa.field("confidence", pa.float32()),
                    ]
                )
            ),
        ),
    ],
)


def to_table(
    rows: Iterable[Mapping[str, Any]], schema: pa.Schema, metadata: Mapping[str, str] | None = None
) -> pa.Table:
    """An Arrow table of the rows with the schema's columns, types and metadata, plus more metadata.

    Args:
        rows: mappings from column name to value; a missing nullable column is null.
        schema: one of this module's schemas.
        metadata: further entries of the file's metadata.

    Raises:
        ValueError: a required column is missing or null.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(
                f"Column {field.name!r} must have a value in every row; {table.column(field.name).null_count} lack it."
            )
    entries: dict[Any, Any] = dict(schema.metadata or {})
    entries.update(metadata or {})
    return table.replace_schema_metadata(entries)


def image_roots(manifest: pa.Table) -> dict[str, Path]:
    """The folder that image paths are relative to, for each name in the column `source`.

    Args:
        manifest: table of MANIFEST whose metadata has the entry image_roots, a JSON object.
    """
    return {name: Path(root) for name, root in json.loads((manifest.schema.metadata or {})[b"image_roots"]).items()}


def source_paths(manifest: pa.Table) -> dict[str, Path]:
    """The folder or file that each source was given as, by its name; empty for a manifest of before there were any."""
    return {
        name: Path(path)
        for name, path in json.loads((manifest.schema.metadata or {}).get(b"source_paths", "{}")).items()
    }


def line_hash(file_hash: str, polygon: list[list[int]] | None, baseline: list[list[int]] | None) -> str:
    """The content_hash of a line: that of its image's file, or, on a page, of that and its place.

    Args:
        file_hash: SHA-256 of the image's file, in hexadecimal digits.
        polygon: [x, y] points in pixels of the page, or None for a line image.
        baseline: [x, y] points, or None.
    """
    if polygon is None and baseline is None:
        return file_hash
    return hashlib.sha256(json.dumps([file_hash, polygon, baseline]).encode()).hexdigest()


def id_prefixes(manifest: pa.Table) -> dict[str, str]:
    """What stands before the line, page and writer ids of each source: its name and a slash, or nothing."""
    return json.loads((manifest.schema.metadata or {}).get(b"id_prefixes", b"{}"))
