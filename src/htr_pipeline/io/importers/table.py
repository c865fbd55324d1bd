"""Tables of lines, one a row, with text and image path: tab-separated, comma-separated, JSON lines or Parquet.

A Parquet table may hold the images themselves, as Hugging Face's datasets do: a column of bytes, or of structures
{bytes, path}. They are unpacked once, into files named by their content, so that every later step reads files.
"""

import csv
import hashlib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from htr_pipeline.core.config import UserError
from htr_pipeline.core.splits import SPLIT_NAMES, SplitFolders, parse_split
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.importers.lines import IMAGE_SUFFIXES, find_splits

if TYPE_CHECKING:
    from htr_pipeline.io.importers import SourceConfig

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")

_USUAL_NAMES = {
    "image": ("image", "image_path", "image_file", "path", "file", "filename", "file_name", "img"),
    "text": ("text", "transcription", "transcript", "ground_truth", "gt", "label"),
    "split": ("split", "set", "subset", "partition"),
    "writer": ("writer", "writer_id", "author", "hand", "document", "document_id"),
    "page": ("page", "page_id"),
    "group": ("group", "font"),
    "id": ("id", "line_id"),
}
_DOCUMENT_COLUMNS = ("document", "document_id")  # of the writer's, whose pages may be numbered each from 1
_DELIMITER_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)  # as Excel writes it above the header
# Where the image of a line lies when the table has ids but no image paths.
_FOLDERS_BY_ID = ("lines/", "images/", "")
# A split's file, or one of several: train.tsv, train-00000-of-00002.parquet, train-00000-of-00002-3f0c….parquet
_SPLIT_FILE = re.compile(r"([a-z]+)(-\d+-of-\d+(-\w+)?)?", re.IGNORECASE)
_SUFFIX_BY_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif"}
# Limits on images within a table: of one, and of the whole file unpacked over packed. Images are compressed already.
MAX_IMAGE_BYTES = 64 * 2**20
_MAX_EXPANSION = 50
_EXPANSION_FROM_BYTES = 2**30  # a smaller table does no harm


def read_table(path: Path, config: "SourceConfig") -> Iterable[dict[str, Any]]:
    """One row for each row of the table; image paths are relative to its folder, or else to the source's.

    A .tsv has no quoting: a quotation mark in it is part of the text. Without an image column the image of line ID is
    lines/ID.png, images/ID.png or ID.png (or .jpg, .tif) beside the table. Images within the table are written to
    `config.unpack_path`, and their paths are relative to it.

    Args:
        path: the table's file, or a folder with one table, with tables that are named for their splits, or with one
            table in each of the splits' folders.
        config: names of the columns.

    Raises:
        UserError: there is no table or more than one, it cannot be read, it lacks a column, or names a split that
            there is not.
    """
    files = _table_files(path)
    root = path.parent if path.is_file() else path
    stems = Counter(file.stem for file in files)  # train/0000.parquet and test/0000.parquet are two tables
    rows = (
        row
        for file in files
        for row in _rows_of_table(file, root, config, len(files) > 1, is_named_alike=stems[file.stem] > 1)
    )
    if unpacked_folder(path, config) and "id" not in _find_columns(files[0], _parquet_schema(files[0]).names, config):
        return _named_as_in_table(list(rows))
    return rows


def _rows_of_table(
    file: Path, root: Path, config: "SourceConfig", is_split: bool, is_named_alike: bool
) -> Iterator[dict[str, Any]]:
    columns, rows = _read_parquet(file, config) if file.suffix.lower() == ".parquet" else _read_text_table(file)
    names = _find_columns(file, columns, config)
    if config.split != "given":
        names.pop("split", None)
    split = _split_of(file) if is_split else None
    splits = _split_folders(file, names, config) if config.split == "given" and not split else None
    table = file.relative_to(root).with_suffix("").as_posix() if is_named_alike else file.stem
    num_texts = num_quoted = num_doubled = 0
    for number, values in rows:
        row = _row(file, root, f"{table}/{number:06d}", number, values, names)
        text = row.get("text") or ""
        num_texts += bool(text)
        num_quoted += len(text) > 1 and text[0] == text[-1] == '"'
        num_doubled += _is_quoted_cell(text)
        of_folder = splits.parse(_folders(values, names))[0] if splits else None
        yield row | {"split": row.get("split") or split or of_folder}
    if file.suffix.lower() == ".tsv" and (num_doubled or num_quoted > num_texts / 2):
        logger.warning(
            "%s: %d of %d texts stand in quotation marks%s, which in a .tsv belong to the text. If they should not, "
            "rename the table to .csv.",
            file, num_doubled or num_quoted, num_texts, " and have each of theirs twice" if num_doubled else "",
        )  # fmt: skip


def _is_quoted_cell(text: str) -> bool:
    """Whether a text looks like what writers of .csv make of one with quotation marks."""
    inner = text[1:-1]
    return text == f'"{inner}"' and '""' in inner and '"' not in inner.replace('""', "")


def _split_folders(file: Path, names: Mapping[str, str], config: "SourceConfig") -> SplitFolders | None:
    """The folders of the images of a text table that are named like splits; None for tables that have other splits."""
    if "split" in names or "image" not in names or file.suffix.lower() == ".parquet":
        return None
    return find_splits(file, (_folders(values, names) for _, values in _read_text_table(file)[1]), config)


def _folders(values: Mapping[str, Any] | str, names: Mapping[str, str]) -> tuple[str, ...]:
    """Those of a row's image."""
    image = "" if isinstance(values, str) else str(values.get(names["image"]) or "")
    return PurePosixPath(image.replace("\\", "/")).parts[:-1]


def find_tables(path: Path) -> list[Path]:
    """The tables directly in a folder, or else in its subfolder data/, or in folders of splits, sorted by name."""
    for folder in (path, path / "data"):
        subfolders = [entry for entry in _entries(folder) if entry.is_dir() and parse_split(entry.name)]
        for folders in ([folder], subfolders):
            entries = (entry for some in folders for entry in _entries(some))
            if tables := [entry for entry in entries if entry.suffix.lower() in TABLE_SUFFIXES and entry.is_file()]:
                return tables
    return []


def _entries(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if not entry.name.startswith(".")]


def _split_of(file: Path) -> str | None:
    """The split that a table or, of a table of any other name, its folder is named for."""
    match = _SPLIT_FILE.fullmatch(file.stem)
    return (parse_split(match[1]) if match else None) or parse_split(file.parent.name)


def unpacked_folder(path: Path, config: "SourceConfig") -> Path | None:
    """The folder for the images of a source whose tables hold them; None for any other source."""
    tables = [path] if path.is_file() else find_tables(path)
    if not tables or tables[0].suffix.lower() != ".parquet":
        return None
    schema = _parquet_schema(tables[0])
    image = _find_columns(tables[0], schema.names, config).get("image")
    return Path(config.unpack_path) if image and _holds_bytes(schema.field(image).type) else None


def _table_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return [path]
        raise UserError(
            f"source.path = {str(path)!r}: a table ends in {', '.join(TABLE_SUFFIXES)}, this file in {path.suffix!r}."
        )
    tables = find_tables(path)
    if not tables or (len(tables) > 1 and not all(map(_split_of, tables))):
        found = f"{len(tables)}: {', '.join(table.name for table in tables)}" if tables else "none"
        raise UserError(
            f"source.path = {str(path)!r}: expected one table ({', '.join(TABLE_SUFFIXES)}) in the folder, or one for "
            f"each split (train.tsv, test-00000-of-00001.parquet, train/metadata.csv), found {found}. Give the path of "
            "the table itself."
        )
    return tables


def _read_text_table(file: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    """Column names, and for each row its line number with the values it has, or with what is wrong with it."""
    if file.suffix.lower() == ".jsonl":
        return _read_json_lines(file)
    rows = _read_cells(file)
    columns = [name.strip() for name in next(rows, (0, []))[1]]
    problem = f"{{}} cells where the header has {len(columns)}"
    return columns, (
        (number, dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else problem.format(len(cells)))
        for number, cells in rows
        if any(cells)
    )


def _read_cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, the header first."""
    begin = skipped = 0
    try:
        with _utf8(file), file.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            if declared := _DELIMITER_LINE.fullmatch(header):
                header, skipped = stream.readline(), 1
            dialect = _dialect(file, header, declared[1] if declared else "")
            reader = csv.reader(chain([header], stream), **dialect)
            for cells in reader:
                yield skipped + reader.line_num, cells
                begin = reader.line_num
    except csv.Error as exc:
        raise UserError(
            f"{file}, in the row that begins on line {skipped + begin + 1}: {exc}. Look for a quotation mark that is "
            'not closed. A cell that has one stands in quotation marks, and in it each is written twice: """yes"", he '
            'said".'
        ) from exc


def _read_json_lines(file: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    """The same of a file with a JSON object on each line, whose columns are those of any of its lines."""
    columns = dict.fromkeys(name for _, values in _json_rows(file) if isinstance(values, dict) for name in values)
    return list(columns), _json_rows(file)


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with _utf8(file), file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as exc:
                yield number, f"this line is not JSON ({exc})"
                continue
            yield number, values if isinstance(values, dict) else "this line is JSON, but no object {...}"


@contextmanager
def _utf8(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as exc:
        raise UserError(
            f"{file}: not UTF-8 ({exc.reason} at byte {exc.start}). Save the table again as UTF-8."
        ) from exc


def _dialect(file: Path, header: str, declared: str) -> dict[str, Any]:
    if file.suffix.lower() == ".tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    # Spreadsheets write semicolons where the comma is the decimal sign. Strict: else a quotation mark that nobody has
    # closed would take the rows behind it for one text, without a word.
    return {"delimiter": declared or max(",;\t", key=header.count), "strict": True, "skipinitialspace": True}


def _read_parquet(file: Path, config: "SourceConfig") -> tuple[list[str], Iterator[tuple[int, dict[str, Any] | str]]]:
    """Column names, and for each row its number with its values; images within the table are unpacked."""
    schema = _parquet_schema(file)
    names = _find_columns(file, schema.names, config)
    return schema.names, enumerate(_parquet_rows(file, schema, names, Path(config.unpack_path)), start=1)


def _parquet_schema(file: Path) -> pa.Schema:
    with _reading(file):
        return pq.read_schema(file)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as exc:
        raise UserError(f"{file}: cannot be read as Parquet ({exc}). Write the table again.") from exc


def _parquet_rows(file: Path, schema: pa.Schema, names: Mapping[str, str], folder: Path) -> Iterator[dict[str, Any]]:
    image = names.get("image", "")
    unpacks = bool(image) and _holds_bytes(schema.field(image).type)
    columns = sorted(set(names.values()))
    with _reading(file), pq.ParquetFile(file, read_dictionary=_byte_leaves(file, columns)) as table:
        _refuse_bomb(file, sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)))
        unpacked = 0
        for batch in table.iter_batches(batch_size=16 if unpacks else 10_000, columns=columns):
            unpacked += sum(_num_bytes(column) for column in batch.columns)
            _refuse_bomb(file, unpacked)
            for row in batch.to_pylist():
                yield row | {image: _unpack(row[image], folder)} if unpacks else row


def _byte_leaves(file: Path, columns: Sequence[str]) -> list[str]:
    """Paths of all texts and bytes in the columns: read as dictionaries, a value that repeats is in memory once."""
    schema = pq.read_metadata(file).schema
    leaves = [schema.column(index) for index in range(len(schema))]
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.split(".")[0] in columns]


def _num_bytes(array: Any) -> int:
    """Bytes of an array's values, those of a dictionary as often as they occur."""
    if pa.types.is_struct(array.type):
        return sum(_num_bytes(part) for part in array.flatten())
    if pa.types.is_dictionary(array.type):
        return pc.sum(pc.cast(pc.binary_length(array.dictionary), pa.int64()).take(array.indices)).as_py() or 0
    return int(array.nbytes)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column's cells are images: bytes, or structures with them."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _refuse_bomb(file: Path, num_bytes: int) -> None:
    size = file.stat().st_size
    if num_bytes > max(_EXPANSION_FROM_BYTES, _MAX_EXPANSION * size):
        raise UserError(
            f"{file}: {size} bytes that unpack to {num_bytes} or more, over {_MAX_EXPANSION} times as many. "
            "Lines do not compress like that; the table is not read."
        )


@dataclass(frozen=True)
class _Unpacked:
    """An image that lay within a table.

    Attributes:
        path: of the file that holds it now, relative to the folder; None where there is a problem.
        name: what the table calls it.
        problem: why it is no image, in words.
    """

    path: str | None
    name: str | None
    problem: str | None = None


def _unpack(cell: Any, folder: Path) -> _Unpacked:
    """Writes the image to a file named by its content, if it is not there yet."""
    data, name = (cell["bytes"], str(cell.get("path") or "")) if isinstance(cell, dict) else (cell, None)
    if not data:
        return _Unpacked(None, name, "there is no image in the table. Write it into the table, or remove the row")
    if len(data) > MAX_IMAGE_BYTES:
        return _Unpacked(None, name, f"the image has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read")
    suffix = next((suffix for magic, suffix in _SUFFIX_BY_MAGIC.items() if data.startswith(magic)), None)
    if suffix is None:
        return _Unpacked(None, name, "the image is neither PNG nor JPEG nor TIFF. Export it again as PNG")
    digest = hashlib.sha256(data).hexdigest()
    path = f"{digest[:2]}/{digest}{suffix}"
    if not (folder / path).exists():
        with replacing(folder / path) as partial:
            partial.write_bytes(data)
    return _Unpacked(path, name)


def _find_columns(file: Path, columns: list[str], config: "SourceConfig") -> dict[str, str]:
    """Name of the table's column for each of image, text, split, writer, page, group and id that it has."""
    if doubled := sorted(name for name, count in Counter(columns).items() if name and count > 1):
        raise UserError(f"{file}: columns with the same name: {', '.join(map(repr, doubled))}. Rename one of them.")
    lower = {name.lower(): name for name in reversed(columns)}
    has = f"{file} has the columns {', '.join(map(repr, columns)) or '(none)'}."
    if not columns and file.suffix.lower() == ".jsonl":
        has += " It should have a JSON object on each line."
    elif file.suffix.lower() in (".tsv", ".csv") and any(re.search("[,;\t]", name) for name in columns):
        has += " Are its cells parted as its name says? In a .csv they are by commas or semicolons, in a .tsv by tabs."
    found = {}
    for kind, usual_names in _USUAL_NAMES.items():
        wanted = getattr(config, f"{kind}_column")
        if wanted and wanted not in columns:
            raise UserError(f"source.{kind}_column = {wanted!r}: there is no such column. {has}")
        guess = next((lower[name] for name in usual_names if name in lower), None) if wanted is None else wanted
        if guess:
            found[kind] = guess
    if "text" not in found and config.needs_text:
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


def _row(
    file: Path, root: Path, unnamed: str, number: int, values: Mapping[str, Any] | str, names: Mapping[str, str]
) -> dict[str, Any]:
    """The row of a line; `unnamed` is its id where the table has none for its image."""
    folder = file.parent.relative_to(root)
    place = f"{(folder / file.name).as_posix()}:{number}"
    if isinstance(values, str):
        detail = f"{place}: {values}. Correct the row; a tab or comma in a text must not part it."
        return {"line_id": place, "file": place, "reason": "bad_row", "detail": detail}
    unpacked = values.get(names["image"]) if "image" in names else None
    if isinstance(unpacked, _Unpacked):
        values = {**values, names["image"]: unpacked.path}
    cells = {kind: _cell(values.get(name), place, name) for kind, name in names.items()}
    split = cells.get("split")
    if split and not parse_split(split):
        allowed = "; ".join(f"{name} ({', '.join(others)})" for name, others in SPLIT_NAMES.items())
        raise UserError(
            f"{place}: {names['split']} = {split!r} is not a split. Allowed: {allowed}. Or set source.split=by_writer."
        )
    image_path, line_id = cells.get("image"), cells.get("id")
    if isinstance(unpacked, _Unpacked):
        line_id = line_id or unnamed
        if unpacked.problem:
            problem = {"reason": "unreadable_image", "detail": f"{place}: {unpacked.problem}."}
            return {"line_id": line_id, "file": place, "image_name": unpacked.name} | problem
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
    if not image_path.isascii() and not _is_file(file.parent / image_path):  # é in one character and in two
        forms = (unicodedata.normalize(form, image_path) for form in ("NFC", "NFD"))
        image_path = next((form for form in forms if _is_file(file.parent / form)), image_path)
    if not isinstance(unpacked, _Unpacked):
        image_path = _from_root(_plain(image_path), folder, root)
    page, document = cells.get("page"), cells.get("writer")
    if page and document and names["writer"].lower() in _DOCUMENT_COLUMNS and not page.startswith(document):
        page = f"{document}/{page}"  # the page 1 of each is a page of its own
    return {
        "line_id": line_id or image_path.rpartition(".")[0] or image_path,
        "file": place,
        "image_path": image_path,
        "text": cells.get("text"),
        "split": parse_split(split) if split else None,
        "writer_id": document,
        "page_id": page,
        "group": cells.get("group"),
        "image_name": unpacked.name if isinstance(unpacked, _Unpacked) else None,
    }


def _plain(image_path: str) -> str:
    """Without the ./ that find writes."""
    return PurePosixPath(image_path).as_posix() if image_path else ""


def _from_root(image_path: str, folder: Path, root: Path) -> str:
    """The path of an image of a table in `folder`: beside the table, or from the source's folder if it is there."""
    beside = (folder / image_path).as_posix()
    is_beside = folder.parts and (_is_file(root / beside) or not _is_file(root / image_path))
    return beside if is_beside else image_path


def _named_as_in_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of unpacked images under the images' old names instead of numbers, where these tell them apart."""
    names = [row.get("image_name") or "" for row in rows]
    line_ids = [name.rpartition(".")[0] or name for name in names]
    if not all(names) or len(set(line_ids)) < len(line_ids):
        return rows
    return [row | {"line_id": line_id} for row, line_id in zip(rows, line_ids, strict=True)]


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
    candidates = (f"{place}{line_id}{suffix}" for place in _FOLDERS_BY_ID for suffix in IMAGE_SUFFIXES)
    return next((name for name in candidates if _is_file(folder / name)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long or with a null byte
        return False
