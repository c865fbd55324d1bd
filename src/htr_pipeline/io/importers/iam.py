"""The IAM Handwriting Database, as its archives unpack.

    FOLDER/ascii/lines.txt, words.txt     transcriptions; also directly in FOLDER
    FOLDER/ascii/forms.txt                the writer of each form
    FOLDER/xml/a01-000u.xml               a form: writer, lines
    FOLDER/lines/a01/a01-000u/a01-000u-00.png    also without the outer folders
    FOLDER/*.txt, *.lst, *.uttlist        official splits, also one folder below

Source of the formats: the comments at the head of the files themselves; U.-V. Marti and H. Bunke, The IAM-database,
IJDAR 5 (2002); https://fki.tic.heia-fr.ch/databases/iam-handwriting-database
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers.xml import read_xml, root_tag
from htr_pipeline.io.manifest import LEFT_OUT

if TYPE_CHECKING:
    from htr_pipeline.io.importers import SourceConfig

# The task's own lists, and those of RWTH Aachen in the names under which they are passed on.
_SPLIT_FILES = {
    "train": ("trainset.txt", "tr.lst", "train.lst", "train.uttlist"),
    "validation": (
        "validationset1.txt",
        "validationset2.txt",
        "va.lst",
        "va1.lst",
        "va2.lst",
        "val.uttlist",
        "valid.uttlist",
        "validation.uttlist",
    ),
    "test": ("testset.txt", "te.lst", "test.lst", "test.uttlist"),
}
_LINE_ID = re.compile(r"[a-z]\d\d-\d{3}[a-z]*-\d\d")
# id, segmentation, grey level; then 5 figures, or 4 figures and a word's grammatical tag; then the text.
_ENTRY = re.compile(r"(\S+) (ok|err) (?:\S+ ){6}(.+)")


def is_iam(path: Path) -> bool:
    """Whether the folder has a list of IAM's lines or words, or a form."""
    for name in ("lines.txt", "words.txt"):
        file = _find(path, name)
        if file and any(_ENTRY.fullmatch(entry) for _, entry in _entries(file)):
            return True
    return any(root_tag(form) == "form" for form in sorted(path.glob("xml/*.xml")))


def read_iam(path: Path, config: "SourceConfig") -> list[dict[str, Any]]:
    """One row for each line, in the order of the list; `group` tells whether its segmentation was found right.

    Lines whose segmentation is marked `err` are kept, as published results keep them. With split files (and
    source.split = given), a line that none of them names is left out, and a name without a line is rejected.

    Args:
        path: the folder.
        config: source.iam_text chooses between lines.txt, words.txt and the forms' XML.

    Raises:
        UserError: none of the files is there, or a line stands in two splits.
    """
    if not path.is_dir():
        raise UserError(f"source.path = {str(path)!r}: format 'iam' expected a folder, got a file. Give its folder.")
    rows = _read_transcriptions(path, config.iam_text)
    writers = _read_writers(path)
    for row in rows:
        if "reason" in row:
            continue
        form_id = row["line_id"].rpartition("-")[0]
        row |= {"page_id": form_id, "writer_id": row.get("writer_id") or writers.get(form_id)}
        row |= _find_image(path, row["line_id"])
    return _with_splits(path, rows) if config.split == "given" else rows


def _read_transcriptions(path: Path, choice: str) -> list[dict[str, Any]]:
    lines, words, forms = _find(path, "lines.txt"), _find(path, "words.txt"), sorted(path.glob("xml/*.xml"))
    found: dict[str, Any] = {"lines": lines, "xml": forms, "words": words}
    kind = next((kind for kind in found if found[kind]), "") if choice == "auto" else choice
    if not found.get(kind):
        raise UserError(
            f"source.path = {str(path)!r}: no transcriptions for source.iam_text = {choice!r}. Expected "
            "ascii/lines.txt (lines), ascii/words.txt (words) or xml/*.xml (xml) in the folder."
        )
    if kind == "xml":
        return [row for form in forms for row in _read_form(path, form)]
    rows = list(_read_list(path, found[kind]))
    return rows if kind == "lines" else _join_words(rows)


def _read_list(path: Path, file: Path) -> Iterator[dict[str, Any]]:
    """The rows of lines.txt or words.txt."""
    for number, entry in _entries(file):
        place = f"{file.relative_to(path).as_posix()}:{number}"
        match = _ENTRY.fullmatch(entry)
        if not match or not _LINE_ID.match(match[1]):
            yield {
                "line_id": place,
                "file": place,
                "reason": "bad_row",
                "detail": f"{place}: {entry[:80]!r} is not of the form 'a01-000u-00 ok 154 19 408 746 1661 89 A|MOVE'. "
                "Correct it or remove it.",
            }
            continue
        yield {"line_id": match[1], "file": place, "group": _group(match[2]), "text": match[3].replace("|", " ")}


def _join_words(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the words, in the order of the list; a line is marked if one of its words is."""
    joined: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "reason" in row:
            joined[row["line_id"]] = row
            continue
        line_id = row["line_id"].rpartition("-")[0]
        line = joined.setdefault(line_id, row | {"line_id": line_id, "text": ""})
        line["text"] = f"{line['text']} {row['text']}".strip()
        line["group"] = max(line["group"], row["group"], key=(_group("ok"), _group("err")).index)
    return list(joined.values())


def _read_form(path: Path, file: Path) -> list[dict[str, Any]]:
    """The handwritten lines of a form."""
    name = file.relative_to(path).as_posix()
    try:
        form, _ = read_xml(path, file)
        lines = form.findall("handwritten-part/line")
        if form.tag != "form" or not lines:
            raise UserError(f"expected <form> with <handwritten-part> and lines in it, got <{form.tag}>. Remove it.")
    except UserError as exc:
        detail = f"{name}: {exc}"
        return [{"line_id": file.stem, "file": name, "reason": "unreadable_xml", "detail": detail}]
    return [
        {
            "line_id": line.get("id", ""),
            "file": name,
            "writer_id": form.get("writer-id"),
            # The forms escape characters twice: &amp;quot; for a quotation mark.
            "text": html.unescape(line.get("text", "")),
            "group": _group(line.get("segmentation", "ok")),
        }
        for line in lines
    ]


def _read_writers(path: Path) -> dict[str, str]:
    """The writer of each form, by forms.txt: a01-000u 000 2 prt 7 5 52 36."""
    file = _find(path, "forms.txt")
    return {fields[0]: fields[1] for _, entry in _entries(file) if len(fields := entry.split()) > 1} if file else {}


def _find_image(path: Path, line_id: str) -> dict[str, str]:
    if not _LINE_ID.fullmatch(line_id):
        detail = f"{line_id!r} is not the id of a line, such as a01-000u-00. Correct it or remove it."
        return {"reason": "bad_row", "detail": detail}
    form_id = line_id.rpartition("-")[0]
    folder = f"{form_id.partition('-')[0]}/{form_id}/"
    places = ("lines/" + folder, folder, f"lines/{form_id}/", "lines/", form_id + "/", "")
    names = [f"{place}{line_id}{suffix}" for place in places for suffix in (".png", ".tif", ".jpg")]
    if image := next((name for name in names if (path / name).is_file()), None):
        return {"image_path": image}
    return {"reason": "missing_image", "detail": f"{line_id}: no image {names[0]}. Unpack lines.tgz into lines/."}


def _with_splits(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the official splits, where the folder has split files."""
    splits = _read_splits(path)
    if not splits:
        return rows
    named: set[str] = set()
    for row in rows:
        ids = (row["line_id"], row["line_id"].rpartition("-")[0])  # the lists name lines or forms
        named.update(ids)
        split = next((splits[identifier][0] for identifier in ids if identifier in splits), None)
        if split:
            row["split"] = split
        elif "reason" not in row:
            row |= {
                "reason": LEFT_OUT,
                "detail": f"{row['line_id']}: in none of the split files. source.split=by_writer takes all lines.",
            }
    return rows + [
        {
            "line_id": identifier,
            "file": file,
            "reason": "unknown_id",
            "detail": f"{file} names {identifier}, but there is no such line. Is the list of another edition?",
        }
        for identifier, (_, file) in splits.items()
        if identifier not in named
    ]


def _read_splits(path: Path) -> dict[str, tuple[str, str]]:
    """The split of each line or form that a split file names, with the file."""
    splits: dict[str, tuple[str, str]] = {}
    for split, names in _SPLIT_FILES.items():
        for file in filter(None, (_find(path, name) for name in names)):
            name = file.relative_to(path).as_posix()
            for _, entry in _entries(file):
                identifier = entry.split()[0].removesuffix(".png")
                known, other = splits.setdefault(identifier, (split, name))
                if known != split:
                    raise UserError(
                        f"{path}: {identifier} is for {known} in {other}, for {split} in {name}. Two sets of split "
                        "files? Keep one of them."
                    )
    return splits


def _entries(file: Path) -> Iterator[tuple[int, str]]:
    """Line number and content of each line that is neither empty nor a comment."""
    with file.open(encoding="utf-8-sig", errors="backslashreplace") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip() and not line.startswith("#"):
                yield number, line.strip()


def _find(path: Path, name: str) -> Path | None:
    """The file of this name in the folder, or in a folder of it."""
    file = next((file for file in (path / name, *sorted(path.glob(f"*/{name}"))) if file.is_file()), None)
    if file and not file.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{file} is a link out of {path}, which is not followed. Copy the file.")
    return file


def _group(segmentation: str) -> str:
    return f"segmentation {segmentation}"
