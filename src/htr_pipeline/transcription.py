"""New lines read with a trained network and written for other programs: what `kedro transcribe` does."""

import hashlib
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig, signature
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.io.atomic import check_writable
from htr_pipeline.io.checkpoints import DAMAGED_ARCHIVE
from htr_pipeline.io.exporters import (
    ProtectedFolders,
    check_output,
    export_lines,
    of_format,
    protected_folders,
    to_tsv,
    write_output,
)
from htr_pipeline.io.features import line_images
from htr_pipeline.io.importers import NewLinesConfig, import_lines, source_root
from htr_pipeline.io.importers.lines import visible_files
from htr_pipeline.io.starting_point import PROVENANCE, StartingPoint

if TYPE_CHECKING:
    from htr_pipeline.mlflow_model import LineReader

logger = logging.getLogger(__name__)

REJECTED = "rejected_lines.tsv"
# Read, and kept, at a time: what a killed process loses.
_LINES_AT_A_TIME = 256
_REJECTED_COLUMNS = ("line_id", "file", "reason", "detail")
_OTHER_IMAGES = (".bmp", ".gif", ".heic", ".jp2", ".pdf", ".webp")  # which are not read
_LAYOUTS = ("page", "alto")  # formats of sources that have a layout to write into


@dataclass(frozen=True)
class Transcription:
    """What was read.

    Attributes:
        files: that were written, in the source's order.
        decoder: that read.
        num_lines: that were read.
        num_known: those among them that the same model had read before.
        num_right: how many of them are without an error by the model's estimate; None where its confidences are not
            calibrated.
        num_empty: on how many nothing was found.
        num_kept: lines that were not read, since they have a text.
        num_rejected: lines that could not be read; the table REJECTED beside the files says why.
    """

    files: list[Path]
    decoder: str
    num_lines: int
    num_known: int
    num_right: float | None
    num_empty: int
    num_kept: int
    num_rejected: int


def transcribe(
    source: NewLinesConfig,
    output: Path,
    model: StartingPoint,
    store: Path,
    *,
    format: str | None = None,
    decoder: str | None = None,
    looks: int | None = None,
    only_empty: bool = False,
) -> Transcription:
    """Reads the lines of a source, transcribed or not, and writes what was read.

    Args:
        source: where the lines are: all that import_lines takes, and a folder of line images alone.
        output: folder to write to; not within the source's.
        model: a registered model, or a network alone, which reads greedily.
        store: database of what was read, by model and image, so that nothing is read twice; it is made where there is
            none.
        format: one of io.exporters.FORMATS; None for page or alto where the source has such files, tsv elsewhere.
        decoder: one of core.recipe.DECODERS; None for that of the model.
        looks: at a line, 1 or 3; None for those of the model.
        only_empty: lines that have a text already are not read, and keep it.

    Raises:
        UserError: there is no line to be read, the output cannot be written, or model and decoder do not fit.
    """
    # Whether a line is of the training or the test of others does not matter.
    source = replace(source, split="by_writer")
    lines, rejected = import_lines(source.path, source.format, source)
    every = lines.to_pylist()
    rows = [row for row in every if not (only_empty and row["text"])]
    if not rows:
        raise UserError(_nothing_to_read(source.path, len(lines), rejected))
    source_format = rows[0]["format"]
    roots = {rows[0]["source"]: source_root(source.path, source_format, source)}
    entries = {"image_roots": roots, "source_paths": dict.fromkeys(roots, source.path)}
    lines = lines.replace_schema_metadata({name: json.dumps(values, default=str) for name, values in entries.items()})
    format = format or (source_format if source_format in _LAYOUTS else "tsv")
    protected = protected_folders(lines)
    check_output(output / REJECTED, protected)
    try:
        check_writable(output)  # now, not when all has been read
    except OSError as exc:
        raise UserError(f"{output}: nothing can be written there ({exc.strerror}).") from exc
    if format in _LAYOUTS:
        of_format(rows, format)
    _warn_of_pages(rows)
    _warn_of_other_images(Path(source.path))
    _write_rejected(output / REJECTED, rejected, protected)

    files = model.files()
    reader = _load(model, files)
    decoding = reader.decoding(decoder=decoder, looks=looks)
    hashes = {row["content_hash"] for row in rows}
    with _Readings(store, _reading_hash(files.values(), reader.image_config, decoding)) as readings:
        known = readings.find(hashes)
        num_known = sum(row["content_hash"] in known for row in rows)
        new = {row["content_hash"]: row for row in rows if row["content_hash"] not in known}
        left = iter(new.values())
        with tqdm(total=len(known) + len(new), initial=len(known), desc="Reading lines", unit="line") as bar:
            while some := list(islice(left, _LINES_AT_A_TIME)):
                answers = reader.read((grey for _, grey in line_images(some, roots)), decoding)
                readings.add(_without_errors(some, answers))
                bar.update(len(some))
        known = readings.find(hashes)

    read = {row["line_id"]: known[row["content_hash"]] for row in rows}
    readings_or_texts = [read.get(row["line_id"], (row["text"], None)) for row in every]
    predictions = pa.table(
        {
            "line_id": lines["line_id"],
            "split": lines["split"],
            "decoder": pa.repeat(decoding.decoder, len(lines)),
            "hypothesis": [text for text, _ in readings_or_texts],
            "confidence": [confidence for _, confidence in readings_or_texts],
        }
    )
    written = export_lines(format, lines, predictions, output, decoder=decoding.decoder)
    return Transcription(
        written,
        decoding.decoder,
        num_lines=len(rows),
        num_known=num_known,
        num_right=sum(sure for _, sure in read.values()) if reader.is_calibrated(decoding.decoder) else None,
        num_empty=sum(not text for text, _ in read.values()),
        num_kept=len(lines) - len(rows),
        num_rejected=len(rejected),
    )


def _load(model: StartingPoint, files: Mapping[str, Path]) -> "LineReader":
    """The model, ready to read.

    Raises:
        UserError: it cannot be loaded.
    """
    from htr_pipeline.mlflow_model import LineReader

    if not {"settings", Path(PROVENANCE).stem} & files.keys():
        logger.warning(
            "%s: no %s says how the lines were made that this network was trained on. Lines are made with the defaults "
            "of `features`; a network that learnt from others reads badly.",
            model.name, PROVENANCE,
        )  # fmt: skip
    try:
        return LineReader().load(files, model.model())
    except UserError:
        raise
    except DAMAGED_ARCHIVE as exc:
        raise UserError(f"{model.name}: the model cannot be loaded ({exc!r}). Copy or register it again.") from exc


class _Readings:
    """What one model has read, by the content hash of the line, in a database of all models.

    Args:
        path: of the database.
        reader: hash of model and decoding.
    """

    def __init__(self, path: Path, reader: str) -> None:
        self._path, self._reader = path, reader

    def __enter__(self) -> "_Readings":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors_in_words():
            self._database = sqlite3.connect(self._path, timeout=60.0)
            with self._database:
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS readings (reader TEXT, content_hash TEXT, text TEXT, confidence REAL, "
                    "PRIMARY KEY (reader, content_hash)) WITHOUT ROWID"
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise UserError(
                f"{self._path.absolute()}: what was read before is kept there, and it cannot be used ({exc}). If it is "
                "damaged, remove it: everything is read anew."
            ) from exc

    def find(self, wanted: Collection[str]) -> dict[str, tuple[str, float]]:
        """Text and confidence of those of the lines that were read, by content hash."""
        query = "SELECT content_hash, text, confidence FROM readings WHERE reader = ?"
        with self._errors_in_words():
            rows = self._database.execute(query, [self._reader])
            return {key: (text, sure) for key, text, sure in rows if key in wanted}

    def add(self, readings: Iterable[tuple[str, str, float]]) -> None:
        """Keeps content hash, text and confidence of some lines, all of them or, in a killed process, none."""
        with self._errors_in_words(), self._database:
            rows = ((self._reader, *reading) for reading in readings)
            self._database.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?, ?, ?)", rows)


def _without_errors(
    rows: Sequence[Mapping[str, Any]], readings: Sequence[tuple[str | None, float | None, str | None]]
) -> Iterator[tuple[str, str, float]]:
    """Content hash, text and confidence of each line."""
    for row, (text, confidence, error) in zip(rows, readings, strict=True):
        if text is None or confidence is None:
            raise UserError(f"line {row['line_id']!r}: {error}")
        yield row["content_hash"], text, confidence


def _reading_hash(files: Iterable[Path], image_config: ImageConfig, decoding: DecodingConfig) -> str:
    """Of all that a reading depends on beside the image."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    versions = [version(package) for package in ("htr-pipeline", "keras")]
    content = json.dumps([versions, signature(image_config), contents, asdict(decoding)])
    return hashlib.sha256(content.encode()).hexdigest()


def _nothing_to_read(path: str, num_found: int, rejected: pa.Table) -> str:
    if num_found:
        return (
            f"{path}: no line is without a text (with one: {num_found}). Without --only-empty they are read all the "
            "same."
        )
    reasons = Counter(rejected["reason"].to_pylist())
    words = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return f"{path}: none of its lines can be read ({words}), for instance: {rejected['detail'][0]}"


def _warn_of_pages(rows: Sequence[Mapping[str, Any]]) -> None:
    pages = [row for row in rows if row["polygon"] is None and row["height_pixels"] > row["width_pixels"]]
    if len(pages) > len(rows) / 2:
        logger.warning(
            "%d of %d images are higher than wide, for instance %s: are they pages? Each image is read as one line. "
            "Have the lines found first, for instance by eScriptorium, Transkribus or kraken, and give their PAGE or "
            "ALTO files together with the images.",
            len(pages), len(rows), pages[0]["image_path"],
        )  # fmt: skip


def _warn_of_other_images(path: Path) -> None:
    others = sorted(name for name in visible_files(path) if name.lower().endswith(_OTHER_IMAGES))
    if others:
        logger.warning(
            "%d files are neither PNG, JPEG nor TIFF and are not read, for instance %s: convert them.",
            len(others), others[0],
        )  # fmt: skip


def _write_rejected(path: Path, rejected: pa.Table, protected: ProtectedFolders) -> None:
    """A table of the lines that were left out; none where there are none."""
    if len(rejected):
        rows = [[row[name] or "" for name in _REJECTED_COLUMNS] for row in rejected.to_pylist()]
        write_output(path, to_tsv(_REJECTED_COLUMNS, rows), protected)
        return
    try:
        if path.exists() and path.read_bytes().startswith(to_tsv(_REJECTED_COLUMNS, [])):  # of an earlier command
            path.unlink()
    except OSError as exc:
        raise UserError(f"{path}: it cannot be written ({exc.strerror}).") from exc
