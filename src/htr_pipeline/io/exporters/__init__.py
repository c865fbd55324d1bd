"""Readings for other programs: back into the PAGE or ALTO files, or as plain text, TSV and hOCR.

The files that lines came from are read again for PAGE and ALTO and never written to.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.exporters.hocr import to_hocr
from htr_pipeline.io.exporters.pages import NewText, edit_alto, edit_page
from htr_pipeline.io.importers.alto import ALTO
from htr_pipeline.io.importers.page import PAGE
from htr_pipeline.io.importers.xml import PageFormat, page_id_of, read_bytes, root_tag, xml_files
from htr_pipeline.io.manifest import id_prefixes, image_roots, source_paths

logger = logging.getLogger(__name__)

# Folders, resolved, and their subfolders: of protected_folders.
ProtectedFolders = list[tuple[Path, set[str] | None]]
FORMATS = ("page", "alto", "text", "tsv", "hocr")
_PROBLEMS_NAMED = 5
_EDITORS = {"page": (PAGE, edit_page), "alto": (ALTO, edit_alto)}


def export_lines(
    format: str,
    manifest: pa.Table,
    predictions: pa.Table,
    folder: Path,
    *,
    decoder: str,
    split: str | None = None,
) -> list[Path]:
    """Writes what was read on the lines; returns the files, in the order of the manifest.

    Every page has a file of its name below `folder`, in PAGE and ALTO that of the file which it came from; TSV is one
    file, lines.tsv. Files of an earlier export are replaced, each in one step. The lines of a page stand in the
    manifest's order, which is the reading order. A page that cannot be written does not keep the others from it.

    Args:
        format: one of FORMATS; page and alto need lines that came from files of that format.
        manifest: table of MANIFEST.
        predictions: table of PREDICTIONS, of which line_id, split, decoder, hypothesis and confidence are looked at.
            A line without a confidence was not read: in PAGE and ALTO it stays as it is, elsewhere it has this text.
        folder: where to; it may not lie in the folder of a source.
        decoder: whose readings, of several.
        split: validation or test; None for every line that was read.

    Raises:
        UserError: nothing to export, a file that the lines came from is gone or has changed, two pages would have one
            file, or the folder is a source.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r}: expected one of {', '.join(FORMATS)}.")
    lines = _join(manifest, predictions, decoder, split)
    roots, prefixes, protected = image_roots(manifest), id_prefixes(manifest), protected_folders(manifest)
    paths = source_paths(manifest)
    if format == "tsv":
        rows = ((line["line_id"], line["text"], _shown(line["confidence"])) for line in lines)
        return [write_output(folder / "lines.tsv", to_tsv(("line_id", "text", "confidence"), rows), protected)]
    if format in _EDITORS:
        lines = of_format(lines, format)
    pages: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        pages.setdefault((line["source"], line["page_id"]), []).append(line)
    files: dict[str, dict[str, str]] = {}
    written: dict[Path, str] = {}
    problems = []
    for (source, page_id), page_lines in pages.items():
        root, name = roots[source], page_id
        try:
            if format in _EDITORS:
                if source not in files:
                    files[source] = _page_files(paths.get(source, root), _EDITORS[format][0])
                prefix = prefixes.get(source, "")
                plain_id = page_id.removeprefix(prefix)
                if plain_id not in files[source]:
                    raise UserError(f"page {plain_id!r}: {root} has no {format.upper()} file of it any more.")
                new_texts = {
                    line["line_id"].removeprefix(f"{page_id}/"): NewText(line["text"], line["confidence"])
                    for line in page_lines
                    if line["confidence"] is not None
                }
                name = prefix + files[source][plain_id]
                content = _edit(root / files[source][plain_id], root, _EDITORS[format][1], new_texts)
            elif format == "hocr":
                content = to_hocr(page_id, page_lines, root)
            else:
                content = "".join(f"{line['text']}\n" for line in page_lines).encode()
            path = _output_path(folder, name, {"hocr": ".hocr", "text": ".txt"}.get(format, ""))
            if path in written:
                raise UserError(
                    f"The pages {written[path]!r} and {page_id!r} would both be {path}. Rename one of them."
                )
            written[write_output(path, content, protected)] = page_id
        except UserError as exc:
            problems.append(str(exc))
    if problems:
        more = f"\nAnd {len(problems) - _PROBLEMS_NAMED} more." if len(problems) > _PROBLEMS_NAMED else ""
        others = f"\nThe others are written all the same: {len(written)} in {folder}." if written else ""
        raise UserError("\n".join(problems[:_PROBLEMS_NAMED]) + more + others)
    return list(written)


def _join(manifest: pa.Table, predictions: pa.Table, decoder: str, split: str | None) -> list[dict[str, Any]]:
    """The manifest's rows of the lines that were read, with `text` and `confidence` as they were read."""
    columns = predictions.select(["line_id", "split", "decoder", "hypothesis", "confidence"]).to_pylist()
    decoders = sorted({row["decoder"] for row in columns})
    if decoder not in decoders:
        raise UserError(f"decoder {decoder!r}: there are no readings of it. Those there are: {', '.join(decoders)}.")
    read = {
        row["line_id"]: {
            "text": row["hypothesis"],
            "confidence": None if row["confidence"] is None else min(max(row["confidence"], 0.0), 1.0),
        }
        for row in columns
        if row["decoder"] == decoder and split in (None, row["split"])
    }
    if not read:
        found = ", ".join(sorted({row["split"] for row in columns}))
        raise UserError(f"split {split!r}: none of its lines was read. Splits with readings: {found}.")
    lines = [row | read.pop(row["line_id"]) for row in manifest.to_pylist() if row["line_id"] in read]
    if read:
        raise UserError(
            f"{len(read)} lines that were read are not in the manifest, for instance {next(iter(read))!r}: the "
            "predictions belong to another one. Run `kedro run` again."
        )
    return lines


def of_format(lines: list[dict[str, Any]], format: str) -> list[dict[str, Any]]:
    """The rows of a manifest that came from files of that format, page or alto.

    Raises:
        UserError: none did.
    """
    fitting = [line for line in lines if line["format"] == format]
    others = sorted({line["format"] for line in lines} - {format})
    if not fitting:
        raise UserError(
            f"None of the lines came from {format.upper()} files, but from: {', '.join(others)}. "
            "Export them as text, tsv or hocr."
        )
    if others:
        num_others = len(lines) - len(fitting)
        logger.warning("%d lines did not come from %s and are left out: %s.", num_others, format.upper(), others)
    return fitting


def _page_files(path: Path, page_format: PageFormat) -> dict[str, str]:
    """The XML file of each page, relative to the source's folder; of several of one page the one that was imported."""
    root = path.parent if path.is_file() else path
    files: dict[str, list[str]] = {}
    for name in xml_files(path):
        if root_tag(root / name) == page_format.root_tag:
            files.setdefault(page_id_of(name), []).append(name)
    return {
        page_id: names[0] if len(names) == 1 else next((n for n in names if page_format.can_read(root, n)), names[0])
        for page_id, names in files.items()
    }


def _edit(
    file: Path, root: Path, edit: Callable[[bytes, Mapping[str, NewText]], bytes], new_texts: Mapping[str, NewText]
) -> bytes:
    """The XML file with the new texts in it."""
    try:
        return edit(read_bytes(root, file), new_texts)
    except UserError as exc:
        raise UserError(f"{file}: {exc}") from exc


def to_tsv(names: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """A table without quoting: any white space in a cell becomes a space."""
    return "".join("\t".join(re.sub(r"\s", " ", cell) for cell in row) + "\n" for row in (names, *rows)).encode()


def _output_path(folder: Path, page_id: str, suffix: str) -> Path:
    """Path of a page's file, always below the folder: ids come from strangers."""
    names = [re.sub(r'[\x00-\x1f\\:*?"<>|]', "_", name) for name in page_id.split("/")]
    return folder.joinpath(*(name if name.strip(". ") else "_" for name in names[:-1]), f"{names[-1] or '_'}{suffix}")


def protected_folders(manifest: pa.Table) -> ProtectedFolders:
    """Folders that nothing may be written into, each with those of its subfolders of which that is true; None: of all.

    Beside a source that is a single file, a table in one's working folder for instance, other folders may lie.
    """
    paths = source_paths(manifest)
    protected: ProtectedFolders = []
    for source, root in image_roots(manifest).items():
        path = paths.get(source, root)
        folder, subfolders = path, None
        if path.is_file():
            rows = zip(manifest["source"].to_pylist(), manifest["image_path"].to_pylist(), strict=True)
            folder = path.parent
            subfolders = {str(image).partition("/")[0] for name, image in rows if name == source and "/" in str(image)}
        protected.append((folder.resolve(), subfolders))
        if root.resolve() != folder.resolve():  # images that lay within a table
            protected.append((root.resolve(), None))
    return protected


def check_output(path: Path, protected: ProtectedFolders) -> None:
    """Raises UserError where a file of that path would lie in one of protected_folders."""
    place = path.resolve()
    for folder, subfolders in protected:
        inner = place.relative_to(folder).parts[:-1] if place.is_relative_to(folder) else None
        if inner is not None and (subfolders is None or not inner or inner[0] in subfolders):
            raise UserError(f"{path} would lie in {folder}, which is a source. Export to a folder outside of it.")


def _shown(confidence: float | None) -> str:
    return "" if confidence is None else f"{confidence:.4f}"


def write_output(path: Path, content: bytes, protected: ProtectedFolders) -> Path:
    """Writes a file in one step, if it may lie there; returns its path."""
    check_output(path, protected)
    try:
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as exc:
        raise UserError(f"{path}: it cannot be written ({exc.strerror}).") from exc
    return path
