"""Lines from outside: one reader a format, then the same checks for all of them.

A reader is a function (path, config) -> rows, one dictionary for each line that it met, in a fixed order. A row has
`line_id` and `file` (relative to the source's folder) and, as far as the format tells, `text`, `image_path`, `split`,
`writer_id`, `page_id`, `group`. A row that cannot become a line has `reason` (a code) and `detail` (a sentence)
instead. Another format is another module beside this one and one entry in READERS.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.image import perceptual_hash, read_image
from htr_pipeline.core.text import normalise_text
from htr_pipeline.io.importers.lines import TEXT_SUFFIX, read_lines
from htr_pipeline.io.importers.table import TABLE_SUFFIXES, find_tables, read_table

logger = logging.getLogger(__name__)


@config("source")
class SourceConfig:
    """Where the lines come from and how they are read.

    A column name of null is guessed from the usual names; an empty name says that there is no such column.
    """

    path: str = setting(default="data/01_raw/demo")
    format: str = setting(default="auto", choices=("auto", "lines", "table", "demo"))
    image_column: str | None = setting(default=None)
    text_column: str | None = setting(default=None)
    split_column: str | None = setting(default=None)
    writer_column: str | None = setting(default=None)
    page_column: str | None = setting(default=None)
    group_column: str | None = setting(default=None)
    id_column: str | None = setting(default=None)
    writer_pattern: str | None = setting(default=None)  # searched in the image path; its one group is the writer
    unicode_form: str = setting(default="NFC", choices=("NFC", "NFD", "NFKC", "NFKD"))
    validation_share: float = setting(default=0.1, minimum=0.01, maximum=0.4)  # of the writers that have no split yet
    test_share: float = setting(default=0.1, minimum=0.01, maximum=0.4)

    def __post_init__(self) -> None:
        if self.writer_pattern is None:
            return
        try:
            num_groups = re.compile(self.writer_pattern).groups
        except re.error as exc:
            raise UserError(
                f"source.writer_pattern = {self.writer_pattern!r}: not a regular expression ({exc})."
            ) from exc
        if num_groups != 1:
            raise UserError(
                f"source.writer_pattern = {self.writer_pattern!r}: expected one group in parentheses, the writer, "
                f"got {num_groups}. For 'ms12_f003_l07.png' and writer 'ms12' write ^([^_]+)_"
            )


Reader = Callable[[Path, SourceConfig], list[dict[str, Any]]]
READERS: dict[str, Reader] = {"lines": read_lines, "table": read_table, "demo": read_table}


def import_lines(
    path: str | Path, format: str = "auto", config: SourceConfig | None = None, demo: Any = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every line of a source, with its image decoded once to prove that it can be.

    Args:
        path: a folder, or a table's file.
        format: "lines", "table", "demo", or "auto", which looks at what is there.
        config: columns, writer rule, Unicode form; its own path and format are not looked at.
        demo: DemoConfig for format "demo", which renders its lines into the folder first.

    Returns:
        Records with the columns of MANIFEST, in the source's order; `split` is None where the source gives none, and
        `writer_id` is the page or else the line where it names no writer. And the lines that were rejected, with the
        columns of REJECTED_LINES.

    Raises:
        UserError: nothing at the path, no line in it, or it does not fit the format.
    """
    path, config = Path(path), config or SourceConfig()
    if format not in (*READERS, "auto"):
        raise UserError(f"source.format = {format!r}: there is no such format. Allowed: auto, {', '.join(READERS)}.")
    if format == "demo":
        from htr_pipeline.io.importers.demo import DemoConfig, render_demo

        render_demo(path, demo or DemoConfig())
    if not path.exists():
        raise UserError(
            f"source.path = {str(path)!r}: there is no such file or folder (working folder: {Path.cwd()}). "
            "Give the folder with the lines or the table's file."
        )
    format = _recognise(path) if format == "auto" else format
    root = source_root(path)
    rows = READERS[format](path, config)
    if not rows:
        raise UserError(f"source.path = {str(path)!r}: read as {format!r}, but it has no line. {_contents(path)}")

    resolved_root = root.resolve()
    with ThreadPool(os.cpu_count()) as pool:
        found = pool.imap(lambda row: _finish(row, root, resolved_root, config), rows, chunksize=16)
        finished = list(tqdm(found, total=len(rows), desc="Reading line images", unit="line", mininterval=0.5))

    records, rejected = [], []
    first_file: dict[str, str] = {}
    for row in finished:
        if "reason" not in row and row["line_id"] in first_file:
            row |= _reject(
                "duplicate_id", f"The id already belongs to {first_file[row['line_id']]}: give each line its own."
            )
        if "reason" in row:
            rejected.append(
                {key: row.get(key) for key in ("line_id", "file", "reason", "detail")} | {"stage": "import"}
            )
            continue
        first_file[row["line_id"]] = row.pop("file")
        records.append(row | {"source": resolved_root.name, "format": format, "polygon": None, "baseline": None})
    logger.info("%s: %d lines read as %r, %d rejected.", path, len(records), format, len(rejected))
    return records, rejected


def source_root(path: str | Path) -> Path:
    """The folder that the image paths of a source are relative to."""
    path = Path(path)
    return path.parent if path.is_file() else path


def _recognise(path: Path) -> str:
    """The format of what lies at the path."""
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table"
        raise UserError(
            f"source.path = {str(path)!r}: expected a folder, or a table ({', '.join(TABLE_SUFFIXES)}), "
            f"got a file ending in {path.suffix!r}."
        )
    has_lines = next(path.rglob(f"*{TEXT_SUFFIX}"), None) is not None
    has_table = bool(find_tables(path))
    if has_lines and has_table:
        tables = ", ".join(table.name for table in find_tables(path))
        raise UserError(
            f"source.path = {str(path)!r} holds both {TEXT_SUFFIX} files and a table ({tables}). "
            "Say which one counts: source.format=lines or source.format=table."
        )
    if has_lines or has_table:
        return "lines" if has_lines else "table"
    raise UserError(
        f"source.path = {str(path)!r}: no lines recognised. {_contents(path)} Expected images (.png, .jpg, .tif) with "
        f"NAME{TEXT_SUFFIX} beside each, or a table ({', '.join(TABLE_SUFFIXES)}) with image path and text."
    )


def _contents(path: Path) -> str:
    """A sentence on what lies at the path, so that a wrong folder is seen at once."""
    if path.is_file():
        return "The table has only its header."
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
    return (
        f"The folder has {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}."
        if names
        else ("The folder is empty.")
    )


def _reject(reason: str, detail: str) -> dict[str, str]:
    return {"reason": reason, "detail": detail}


def _finish(row: dict[str, Any], root: Path, resolved_root: Path, config: SourceConfig) -> dict[str, Any]:
    """The row as a record of the manifest, or with the reason why it cannot be one."""
    printable = {key: _printable(value) for key, value in row.items()}
    if printable != row:
        detail = f"{printable['file']}: the name is not valid UTF-8. Rename the file or write the table again in UTF-8."
        return printable | _reject("bad_name", detail)
    if "reason" in row:
        return row
    text = normalise_text(row["text"] or "", config.unicode_form)
    if not text:
        return row | _reject("empty_text", f"{row['file']}: there is no text. Transcribe the line or remove it.")
    image = root / row["image_path"]
    try:
        inside, there = image.resolve().is_relative_to(resolved_root), image.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, a loop of links
        inside, there = True, False
    if not inside:
        detail = f"{row['image_path']} lies outside {root}, which is not read. Move the image into the source's folder."
        return row | _reject("outside_folder", detail)
    if not there:
        detail = f"{row['image_path']}: there is no such image file in {root}. Correct the path or remove the line."
        return row | _reject("missing_image", detail)
    try:
        with image.open("rb") as stream:
            content_hash = hashlib.file_digest(stream, "sha256").hexdigest()
        grey = read_image(image)
    except (UserError, OSError) as exc:
        detail = str(exc).removeprefix(f"{image}: ")
        return row | _reject("unreadable_image", f"{row['image_path']}: {detail}")

    writer_id = row.get("writer_id") or row.get("page_id") or row["line_id"]
    if config.writer_pattern:
        match = re.search(config.writer_pattern, row["image_path"])
        if not match or not match[1]:
            detail = (
                f"source.writer_pattern {config.writer_pattern!r} finds no writer in {row['image_path']}: widen it."
            )
            return row | _reject("no_writer", detail)
        writer_id = match[1]
    return {
        "line_id": row["line_id"],
        "file": row["file"],
        "page_id": row.get("page_id") or writer_id,
        "writer_id": writer_id,
        "split": row.get("split"),
        "text": text,
        "image_path": row["image_path"],
        "width_pixels": grey.shape[1],
        "height_pixels": grey.shape[0],
        "content_hash": content_hash,
        "image_hash": f"{perceptual_hash(grey):032x}",
        "group": row.get("group") or None,
    }


def _printable(value: Any) -> Any:
    """The value with bytes of a file name that are not UTF-8 spelled out, so that it can be stored and shown."""
    return (
        value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if isinstance(value, str)
        else value
    )
