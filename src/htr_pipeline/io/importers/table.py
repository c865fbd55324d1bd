"""A table of lines, one a row, with image path and text: tab-separated, comma-separated or Parquet."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from htr_pipeline.core.config import UserError
from htr_pipeline.core.splits import SPLIT_NAMES, parse_split

if TYPE_CHECKING:
    from htr_pipeline.io.importers import SourceConfig

TABLE_SUFFIXES = (".tsv", ".csv", ".parquet")

_USUAL_NAMES = {
    "image": ("image", "image_path", "image_file", "path", "file", "filename", "file_name", "img"),
    "text": ("text", "transcription", "transcript", "ground_truth", "gt", "label"),
    "split": ("split", "set", "subset", "partition"),
    "writer": ("writer", "writer_id", "author", "hand", "document", "document_id"),
    "page": ("page", "page_id"),
    "group": ("group", "font"),
    "id": ("id", "line_id"),
}
# Where the image of a line lies when the table has ids but no image paths.
_FOLDERS_BY_ID = ("lines/", "images/", "")
_SUFFIXES_BY_ID = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def read_table(path: Path, config: "SourceConfig") -> list[dict[str, Any]]:
    """One row for each row of the table; image paths are relative to its folder.

    A .tsv has no quoting: a quotation mark in it is part of the text. Without an image column the image of line ID is
    lines/ID.png, images/ID.png or ID.png (or .jpg, .tif) beside the table.

    Args:
        path: the table's file, or a folder with exactly one table.
        config: names of the columns.

    Raises:
        UserError: there is no table or more than one, it cannot be read, it lacks a column, or names a split that
            there is not.
    """
    file = _table_file(path)
    columns, table_rows = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_text_table(file)
    names = _find_columns(file, columns, config)
    return [_row(file, number, values, names) for number, values in table_rows]


def find_tables(path: Path) -> list[Path]:
    """The tables directly in a folder, sorted by name."""
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() in TABLE_SUFFIXES and entry.is_file() and not entry.name.startswith(".")
    )


def _table_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return path
        raise UserError(
            f"source.path = {str(path)!r}: a table ends in {', '.join(TABLE_SUFFIXES)}, this file in {path.suffix!r}."
        )
    tables = find_tables(path)
    if len(tables) != 1:
        found = f"{len(tables)}: {', '.join(table.name for table in tables)}" if tables else "none"
        raise UserError(
            f"source.path = {str(path)!r}: expected one table ({', '.join(TABLE_SUFFIXES)}) in the folder, "
            f"found {found}. Give the path of the table itself."
        )
    return tables[0]


def _read_text_table(file: Path) -> tuple[list[str], list[tuple[int, dict[str, Any] | str]]]:
    """Column names, and for each row its line number with its values, or with what is wrong with it."""
    rows: list[tuple[int, dict[str, Any] | str]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, **_dialect(file, stream.readline()))
            stream.seek(0)
            columns = [name.strip() for name in next(reader, [])]
            doubled = sorted({name for name in columns if columns.count(name) > 1})
            if doubled:
                raise UserError(
                    f"{file}: columns with the same name: {', '.join(map(repr, doubled))}. Rename one of them."
                )
            for cells in reader:
                if not any(cells):
                    continue
                if len(cells) == len(columns):
                    rows.append((reader.line_num, dict(zip(columns, cells, strict=True))))
                else:
                    rows.append((reader.line_num, f"{len(cells)} cells where the header has {len(columns)}"))
    except UnicodeDecodeError as exc:
        raise UserError(
            f"{file}: not UTF-8 ({exc.reason} at byte {exc.start}). Save the table again as UTF-8."
        ) from exc
    except csv.Error as exc:
        raise UserError(
            f"{file}, line {reader.line_num}: {exc}. Look for a quotation mark that is not closed."
        ) from exc
    return columns, rows


def _dialect(file: Path, header: str) -> dict[str, Any]:
    if file.suffix.lower() == ".tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # Spreadsheets write semicolons where the comma is the decimal sign.
    return {"delimiter": ";" if header.count(";") > header.count(",") else ","}


def _read_parquet(file: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as exc:
        raise UserError(f"{file}: cannot be read as Parquet ({exc}). Write the table again.") from exc
    return table.column_names, enumerate(
        (row for batch in table.to_batches(max_chunksize=10_000) for row in batch.to_pylist()), start=1
    )


def _find_columns(file: Path, columns: list[str], config: "SourceConfig") -> dict[str, str]:
    """Name of the table's column for each of image, text, split, writer, page, group and id that it has."""
    lower = {name.lower(): name for name in reversed(columns)}
    has = f"{file} has the columns {', '.join(map(repr, columns)) or '(none)'}."
    found = {}
    for kind, usual_names in _USUAL_NAMES.items():
        wanted = getattr(config, f"{kind}_column")
        if wanted and wanted not in columns:
            raise UserError(f"source.{kind}_column = {wanted!r}: there is no such column. {has}")
        guess = next((lower[name] for name in usual_names if name in lower), None) if wanted is None else wanted
        if guess:
            found[kind] = guess
    if "text" not in found:
        raise UserError(
            f"{has} None is the text (looked for {', '.join(_USUAL_NAMES['text'])}): name it in source.text_column."
        )
    if "image" not in found and "id" not in found:
        raise UserError(
            f"{has} None is the image path (looked for {', '.join(_USUAL_NAMES['image'])}) and none an id "
            f"({', '.join(_USUAL_NAMES['id'])}) by which to find lines/ID.png: name one in source.image_column or "
            "source.id_column."
        )
    return found


def _row(file: Path, number: int, values: Mapping[str, Any] | str, names: Mapping[str, str]) -> dict[str, Any]:
    place = f"{file.name}:{number}"
    if isinstance(values, str):
        detail = f"{place}: {values}. Correct the row; a tab or comma in a text must not part it."
        return {"line_id": place, "file": place, "reason": "bad_row", "detail": detail}
    cells = {kind: _cell(values[name], place, name) for kind, name in names.items()}
    split = cells.get("split")
    if split and not parse_split(split):
        allowed = "; ".join(f"{name} ({', '.join(others)})" for name, others in SPLIT_NAMES.items())
        raise UserError(
            f"{place}: {names['split']} = {split!r} is not a split. Allowed: {allowed}. "
            'Or set source.split_column="" to have the lines split by writer.'
        )
    image_path, line_id = cells.get("image"), cells.get("id")
    rejected = {"line_id": line_id or image_path or place, "file": place}
    if not image_path and not line_id:
        return rejected | {
            "reason": "bad_row",
            "detail": f"{place}: neither image path nor id. Fill it in or remove it.",
        }
    if "image" not in names:
        image_path = _image_of(file.parent, str(line_id))
        detail = (
            f"{place}: no image lines/{line_id}.png, images/{line_id}.png or {line_id}.png (or .jpg, .tif). "
            "Put the image there, or name the column with its path in source.image_column."
        )
    else:
        detail = f"{place}: no image path. Fill it in or remove the row."
    if not image_path:
        return rejected | {"reason": "missing_image", "detail": detail}
    if "\\" in image_path and not _is_file(file.parent / image_path):
        image_path = image_path.replace("\\", "/")  # a table written on Windows
    return {
        "line_id": line_id or image_path.rpartition(".")[0] or image_path,
        "file": place,
        "image_path": image_path,
        "text": cells.get("text"),
        "split": parse_split(split) if split else None,
        "writer_id": cells.get("writer"),
        "page_id": cells.get("page"),
        "group": cells.get("group"),
    }


def _cell(value: Any, place: str, column: str) -> str | None:
    """A cell as trimmed text; None where it is empty."""
    if value is None or value != value:  # NaN, as pandas writes an empty cell
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns whole numbers with gaps into floats
    if not isinstance(value, str | int | float):
        raise UserError(f"{place}: column {column!r} holds {type(value).__name__}, expected text. Name another column.")
    return str(value).strip() or None


def _image_of(folder: Path, line_id: str) -> str | None:
    candidates = (f"{place}{line_id}{suffix}" for place in _FOLDERS_BY_ID for suffix in _SUFFIXES_BY_ID)
    return next((name for name in candidates if _is_file(folder / name)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long or with a null byte
        return False
