"""Lines from outside: one reader a format, then the same checks for all of them.

A reader is a function (path, config) -> rows, one dictionary for each line that it met, in a fixed order. A row has
`line_id` and `file` (relative to the source's folder) and, as far as the format tells, `text`, `image_path`, `split`,
`writer_id`, `page_id`, `group`, `image_name` (what an unpacked image was called before); a line of a page also has
`polygon`, `baseline` and, in the same units, `page_size` (or None), or `problem`, why its place cannot be used. A row
that cannot become a line has `reason` (a code) and `detail` (a sentence) instead. Another format is one more module
beside this one, an entry in READERS, its name among the choices of SourceConfig.format and, for `auto`, a rule in
_recognise.
"""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.cutting import cut_line
from htr_pipeline.core.image import perceptual_hash, read_image
from htr_pipeline.core.text import UNICODE_FORMS, normalise_text, visual_text
from htr_pipeline.core.threads import num_cores
from htr_pipeline.io.importers.alto import ALTO
from htr_pipeline.io.importers.iam import is_iam, read_iam
from htr_pipeline.io.importers.lines import IMAGE_SUFFIXES, has_images, has_lines, read_lines
from htr_pipeline.io.importers.page import PAGE
from htr_pipeline.io.importers.table import TABLE_SUFFIXES, find_tables, read_table, unpacked_folder
from htr_pipeline.io.importers.xml import MAX_DISTORTION, find_roots, has_area
from htr_pipeline.io.manifest import MANIFEST, REJECTED_LINES, line_hash, to_table

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 10_000  # of a line
DEMO_FOLDER = "data/01_raw/demo"  # where the demo is rendered, unless another format is asked for
_OF_THE_TEXT = ("missing_text", "unreadable_text")  # reasons of rows that have an image all the same
# Pages decoded at the same time; one of MAX_IMAGE_PIXELS takes half a gigabyte, or one if it has to be turned.
_MAX_THREADS = 8
_PARTS_A_THREAD = 16
# The manifest before every line has its split.
_LINES = MANIFEST.set(MANIFEST.get_field_index("split"), pa.field("split", pa.string()))


@config("source")
class SourceConfig:
    """Where the lines come from and how they are read.

    A column name of null is guessed from the usual names; an empty name says that there is no such column. The default
    path is that of the demo, so a path of one's own is all that takes its place.
    """

    path: str = setting(default=DEMO_FOLDER)
    format: str = setting(default="auto", choices=("auto", "lines", "table", "page", "alto", "iam", "demo"))
    image_column: str | None = setting(default=None)
    text_column: str | None = setting(default=None)
    split_column: str | None = setting(default=None)
    writer_column: str | None = setting(default=None)
    page_column: str | None = setting(default=None)
    group_column: str | None = setting(default=None)
    id_column: str | None = setting(default=None)
    unpack_path: str = setting(default="data/01_raw/unpacked")  # where images go that lie within a table
    iam_text: str = setting(default="auto", choices=("auto", "lines", "words", "xml"))
    writer_pattern: str | None = setting(default=None)  # searched in the image path; its one group is the writer
    split: str = setting(default="given", choices=("given", "by_writer", "train", "validation", "test"))
    unicode_form: str = setting(default="NFC", choices=UNICODE_FORMS)
    text_order: str = setting(default="logical", choices=("logical", "visual"))
    validation_share: float = setting(default=0.1, minimum=0.01, maximum=0.4)  # of the writers that have no split yet
    test_share: float = setting(default=0.1, minimum=0.01, maximum=0.4)
    needs_text: ClassVar[bool] = True  # no setting: whether a line that nobody has transcribed is left out

    def __post_init__(self) -> None:
        is_demo = self.needs_text and Path(self.path).absolute() == Path(DEMO_FOLDER).absolute()
        if self.format == "auto" and is_demo:
            object.__setattr__(self, "format", "demo")
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


class NewLinesConfig(SourceConfig):
    """The same for lines that are yet to be read: those without a text are lines like all others, their text empty."""

    needs_text: ClassVar[bool] = False


@dataclass(frozen=True, init=False)
class SourcesConfig:
    """Several sources by name. Each entry overrides settings of `source`, but has a path and a format of its own.

    Raises:
        UserError: by the constructor: a name or an entry that cannot be used.
    """

    entries: dict[str, dict[str, Any]]

    def __init__(self, **entries: dict[str, Any]) -> None:
        for name, entry in entries.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(f"sources.{name}: a name has letters, digits, _ and - only.")
            if not isinstance(entry, dict) or "path" not in entry:
                raise UserError(f"sources.{name} = {entry!r}: expected settings of a source, at least its path.")
        object.__setattr__(self, "entries", entries)
        self.resolve(SourceConfig())

    def resolve(self, source: SourceConfig) -> dict[str | None, SourceConfig]:
        """The settings of each source by its name; None is the name of `source` where it is the only one."""
        return {name: _override(source, name, entry) for name, entry in self.entries.items()} or {None: source}


def _override(source: SourceConfig, name: str, entry: dict[str, Any]) -> SourceConfig:
    try:
        return replace(source, **({"format": "auto"} | entry))
    except UserError as exc:
        raise UserError(f"In sources.{name}: {exc}") from exc


Reader = Callable[[Path, SourceConfig], Iterable[dict[str, Any]]]
READERS: dict[str, Reader] = {
    "lines": read_lines,
    "table": read_table,
    "page": PAGE.read,
    "alto": ALTO.read,
    "iam": read_iam,
    "demo": read_table,
}


def import_lines(
    path: str | Path, format: str = "auto", config: SourceConfig | None = None, demo: Any = None
) -> tuple[pa.Table, pa.Table]:
    """Every line of a source, with its image decoded once to prove that it can be.

    Args:
        path: a folder, or a file: a table, a PAGE or ALTO file or, of NewLinesConfig, an image.
        format: a key of READERS, or "auto", which looks at what is there.
        config: columns, writer and split rule, Unicode form; its own path and format are not looked at. Of
            NewLinesConfig, lines without a text are not rejected.
        demo: DemoConfig for format "demo", which renders its lines into the folder first.

    Returns:
        Lines with the columns of MANIFEST, in the source's order; `split` is null where the source gives none, and
        `writer_id` is the page or else the line where it names no writer. And the lines that were rejected:
        REJECTED_LINES.

    Raises:
        UserError: nothing at the path, no line in it, or it does not fit the format.
    """
    path, config = Path(path), config or SourceConfig()
    if format not in (*READERS, "auto"):
        raise UserError(f"source.format = {format!r}: there is no such format. Allowed: auto, {', '.join(READERS)}.")
    if format == "demo" and config.needs_text:
        from htr_pipeline.io.importers.demo import DemoConfig, render_demo

        render_demo(path, demo or DemoConfig())
    if not path.exists():
        raise UserError(
            f"source.path = {str(path)!r}: there is no such file or folder (working folder: {Path.cwd()}). "
            "Give the folder with the lines or the table's file."
        )
    format = _recognise(path, config.needs_text) if format == "auto" else format
    root = source_root(path, format, config)
    resolved_root, name = root.resolve(), source_root(path).resolve().name
    # Remembered, also where it fails: ten thousand lines must not have the same bad page decoded ten thousand times.
    measure = lru_cache(maxsize=_MAX_THREADS)(_measure_image)

    def finish(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [_finish(row, root, resolved_root, config, measure) for row in part]

    records, rejected = [_LINES.empty_table()], [REJECTED_LINES.empty_table()]
    first_file: dict[str, str] = {}
    for finished in _in_threads(finish, _parts(READERS[format](path, config))):
        for row in finished:
            if "reason" not in row and row["line_id"] in first_file:
                row |= _reject(
                    "duplicate_id", f"The id already belongs to {first_file[row['line_id']]}: give each line its own."
                )
            if "reason" not in row:
                first_file[row["line_id"]] = row["file"]
        good = [row | {"source": name, "format": format} for row in finished if "reason" not in row]
        bad = [row | {"stage": "import"} for row in finished if "reason" in row]
        records.append(to_table(good, _LINES))
        rejected.append(to_table(bad, REJECTED_LINES))
    lines, rejections = pa.concat_tables(records), pa.concat_tables(rejected)
    if not len(lines) + len(rejections):
        raise UserError(f"source.path = {str(path)!r}: read as {format!r}, but it has no line. {_contents(path)}")
    logger.info("%s: %d lines read as %r, %d rejected.", path, len(lines), format, len(rejections))
    return lines, rejections


def source_root(path: str | Path, format: str = "auto", config: SourceConfig | None = None) -> Path:
    """The folder that the image paths of a source are relative to.

    Args:
        path: of the source.
        format: of the source.
        config: names the folder of the images that lie within a table; None leaves such images out of account.
    """
    path = Path(path)
    unpacked = unpacked_folder(path, config) if config and format in ("auto", "table") else None
    return unpacked or (path.parent if path.is_file() else path)


def _recognise(path: Path, needs_text: bool) -> str:
    """The format of what lies at the path."""
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table"
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        if is_image and not needs_text:
            return "lines"
        for page_format in (PAGE, ALTO):
            if find_roots(path)[page_format.root_tag]:
                return page_format.name
        advice = " Give the folder of the image." if is_image else ""
        raise UserError(
            f"source.path = {str(path)!r}: expected a folder, a table ({', '.join(TABLE_SUFFIXES)}), a PAGE or ALTO "
            f"file, got a file ending in {path.suffix!r}.{advice}"
        )
    tables = find_tables(path)
    roots = find_roots(path)
    found = {
        "lines": has_lines(path) and "texts beside images",
        "table": tables and f"a table ({', '.join(table.name for table in tables)})",
        "page": roots[PAGE.root_tag] and f"{roots[PAGE.root_tag]} PAGE files",
        "alto": roots[ALTO.root_tag] and f"{roots[ALTO.root_tag]} ALTO files",
        "iam": is_iam(path) and "IAM's transcriptions",
    }
    formats = [format for format, words in found.items() if words]
    if len(formats) > 1:
        raise UserError(
            f"source.path = {str(path)!r} holds both {' and '.join(str(found[format]) for format in formats)}. "
            f"Say which one counts: {' or '.join(f'source.format={format}' for format in formats)}."
        )
    if formats:
        return formats[0]
    if not needs_text:
        if has_images(path):
            return "lines"
        raise UserError(
            f"{path}: no lines recognised. {_contents(path)} Expected images of lines (.png, .jpg, .tif), a table "
            f"({', '.join(TABLE_SUFFIXES)}) with images, or pages with PAGE or ALTO files (.xml)."
        )
    raise UserError(
        f"source.path = {str(path)!r}: no lines recognised. {_contents(path)} Expected images (.png, .jpg, .tif) with "
        f"NAME.gt.txt or NAME.txt beside each, a table ({', '.join(TABLE_SUFFIXES)}) with images and texts, pages with "
        "PAGE or ALTO files (.xml), or IAM's lines.txt, words.txt or xml/."
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


def _parts(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows to be finished one after the other: those of one page, so that its image is decoded once, or a few lines."""
    part: list[dict[str, Any]] = []
    for row in rows:
        if part and (len(part) >= 16 if "page_size" not in row else row["file"] != part[-1]["file"]):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _in_threads(
    finish: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], parts: Iterator[list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    """Finished rows in the order of the parts, some at a time: all of a million as mappings would take gigabytes."""
    num_threads = min(num_cores(), _MAX_THREADS)
    with ThreadPool(num_threads) as pool, tqdm(desc="Reading line images", unit="line") as bar:
        while some := list(islice(parts, _PARTS_A_THREAD * num_threads)):
            finished = list(chain.from_iterable(pool.map(finish, some)))
            bar.update(len(finished))
            yield finished


def _measure_image(image: Path) -> tuple[str, np.ndarray] | str:
    """Hash of an image's file and the grey image, or else what is wrong with it."""
    try:
        with image.open("rb") as stream:
            content_hash = hashlib.file_digest(stream, "sha256").hexdigest()
        return content_hash, read_image(image)
    except (UserError, OSError) as exc:
        return str(exc).removeprefix(f"{image}: ")


def _finish(
    row: dict[str, Any],
    root: Path,
    resolved_root: Path,
    config: SourceConfig,
    measure: Callable[[Path], tuple[str, np.ndarray] | str],
) -> dict[str, Any]:
    """The row as a record of the manifest, or with the reason why it cannot be one."""
    printable = {key: _printable(value) for key, value in row.items()}
    if printable != row:
        wrong = next(value for key, value in printable.items() if value != row[key])
        detail = (
            f"{printable['file']}: {_shortened(wrong)!r} is not valid UTF-8. Rename the file or write the table again "
            "in UTF-8."
        )
        return printable | _reject("bad_name", detail)
    if "reason" in row and (config.needs_text or row["reason"] not in _OF_THE_TEXT):
        return row
    text = normalise_text(row.get("text") or "", config.unicode_form)
    if config.text_order == "visual":
        text = visual_text(text)
    if config.needs_text and len(text) > MAX_CHARACTERS:
        detail = f"{row['line_id']}: {len(text)} characters; at most {MAX_CHARACTERS} are read. Is it one line?"
        return row | _reject("long_text", detail)
    if config.needs_text and not text:
        place = row["line_id"] if "page_size" in row else row["file"]
        return row | _reject("empty_text", f"{place}: there is no text. Transcribe the line or remove it.")
    if row.get("problem"):
        return row | _reject("bad_geometry", f"{row['line_id']}: {row['problem']}")
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
    measured = measure(image)
    if isinstance(measured, str):
        return row | _reject("unreadable_image", f"{row['image_path']}: {measured}")
    content_hash, grey = measured
    polygon = baseline = None
    if "page_size" in row:
        try:
            polygon, baseline = _on_image(row, *reversed(grey.shape))
            grey = cut_line(grey, polygon, baseline)
        except UserError as exc:
            return row | _reject("bad_geometry", f"{row['line_id']}: {exc}")
        content_hash = line_hash(content_hash, polygon, baseline)

    # Two files of one archive may write é in two ways; a hand must not be in two splits for it.
    page_id, writer_id = (unicodedata.normalize("NFC", row.get(name) or "") for name in ("page_id", "writer_id"))
    writer_id = writer_id or page_id or row["line_id"]
    if config.writer_pattern:
        match = re.search(config.writer_pattern, row.get("image_name") or row["image_path"])
        if not match or not match[1]:
            detail = (
                f"source.writer_pattern {config.writer_pattern!r} finds no writer in "
                f"{row.get('image_name') or row['image_path']}: widen it."
            )
            return row | _reject("no_writer", detail)
        writer_id = unicodedata.normalize("NFC", match[1])
    return {
        "line_id": row["line_id"],
        "file": row["file"],
        "page_id": page_id or writer_id,
        "writer_id": writer_id,
        "split": {"given": row.get("split"), "by_writer": None}.get(config.split, config.split),
        "text": text,
        "image_path": row["image_path"],
        "polygon": polygon,
        "baseline": baseline,
        "width_pixels": grey.shape[1],
        "height_pixels": grey.shape[0],
        "content_hash": content_hash,
        "image_hash": f"{perceptual_hash(grey):032x}",
        "grey_range": int(grey.max()) - int(grey.min()),
        "group": row.get("group") or None,
    }


def _on_image(row: dict[str, Any], width: int, height: int) -> tuple[list[list[int]], list[list[int]] | None]:
    """Polygon and baseline of a page's line in pixels of its image, within the image.

    Raises:
        UserError: the page has another shape than the image, or the line lies outside it.
    """
    page_width, page_height = row["page_size"] or (width, height)
    scale = np.array([width / page_width, height / page_height])
    if abs(scale[0] / scale[1] - 1) > MAX_DISTORTION:
        guess = advice = ""
        if abs(page_width / page_height * width / height - 1) <= MAX_DISTORTION:
            guess = ", or the other way round without its EXIF orientation, by which it is turned"
            advice = ", or remove the orientation: exiftool -Orientation= FILE"
        raise UserError(
            f"the XML describes a page of {page_width:g} x {page_height:g}, {row['image_path']} has {width} x {height} "
            f"pixels{guess}. Give the image that was transcribed, not turned and not cut{advice}."
        )

    def place(points: list[list[float]]) -> list[list[int]]:
        inside = np.clip(np.rint(np.asarray(points) * scale), 0, (width - 1, height - 1))
        placed: list[list[int]] = inside.astype(int).tolist()
        return placed

    polygon = place(row["polygon"])
    if not has_area(polygon):
        raise UserError(
            f"nothing of its polygon lies on {row['image_path']} of {width} x {height} pixels. Draw the line again."
        )
    return polygon, place(row["baseline"]) if row["baseline"] else None


def _printable(value: Any) -> Any:
    """The value with what is not UTF-8 spelled out, so that it can be stored and shown.

    That are bytes of a file name, or half a character beyond U+FFFF, as JSON can have it.
    """
    if not isinstance(value, str):
        return value
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return value.encode("utf-8", "backslashreplace").decode()


def _shortened(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:60]}…"
