"""Line images with their text beside them: NAME.png, .jpg, .jpeg, .tif or .tiff and NAME.gt.txt or NAME.txt."""

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htr_pipeline.core.config import UserError
from htr_pipeline.core.splits import SplitFolders

if TYPE_CHECKING:
    from htr_pipeline.io.importers import SourceConfig

logger = logging.getLogger(__name__)

# In upper or lower case. The first of these that a folder has counts for all of it: beside ground truth, .txt is what
# some engine has read.
TEXT_SUFFIXES = (".gt.txt", ".txt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# What OCRopus calls an image by what was done to it: 0001.bin.png beside 0001.gt.txt.
_STAGES = (".bin", ".nrm", ".dew", ".raw")


def read_lines(path: Path, config: "SourceConfig") -> Iterator[dict[str, Any]]:
    """One row for each image and each text file below the folder, sorted by path; hidden files are not looked at.

    The first folder below `path` is the writer, and the folder of the image is the page. Where folders are named like
    splits (train/, val/, test/), the folder below is the writer.

    Args:
        path: the folder; or an image, where lines need no text.
        config: says whether they do; the writer rule applies to every format.

    Raises:
        UserError: the path is a file that cannot be a source.
    """
    if path.is_dir():
        files = sorted(visible_files(path))
    elif config.needs_text or not path.name.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"source.path = {str(path)!r}: format 'lines' expected a folder, got a file. Give its folder.")
    else:
        names = (path.name, *(path.stem + suffix for suffix in TEXT_SUFFIXES))
        path, files = path.parent, [name for name in names if (path.parent / name).exists()]
    images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    stems = {_composed(stem) for name in images for stem in _stems(name)}
    suffixes = _text_suffixes(files, stems)
    usual = min(suffixes.values(), key=TEXT_SUFFIXES.index, default=TEXT_SUFFIXES[0])
    texts = {}  # by composed stem
    for name in files:
        suffix = suffixes.get(_folder(name), usual)
        if name.lower().endswith(suffix):
            texts[_composed(name[: -len(suffix)])] = name
    alone = {name: stem for stem, name in texts.items() if stem not in stems}
    splits = find_splits(path, map(_place, images), config)

    for name in sorted([*images, *alone]):
        if name in alone:
            stem = alone[name]
            detail = f"{name}: there is no image {stem} ending in {', '.join(IMAGE_SUFFIXES)}. "
            detail += "Put the image beside it or remove the text."
            yield {"line_id": stem, "file": name, "reason": "missing_image", "detail": detail}
            continue
        line_id = next((stem for stem in _stems(name) if _composed(stem) in texts), _stem(name))
        row: dict[str, Any] = {"line_id": line_id, "file": name, "image_path": name}
        row["split"], folders = splits.parse(_place(name))
        if folders:
            row |= {"writer_id": folders[0], "page_id": "/".join(folders)}
        expected = line_id + suffixes.get(_folder(name), usual)
        yield row | _read_text(path, texts.get(_composed(line_id), expected))


def find_splits(path: Path, places: Iterable[Sequence[str]], config: "SourceConfig") -> SplitFolders:
    """The folders of the source that are splits; a warning names those beside them that are none."""
    splits = SplitFolders(places)
    if splits.others and config.split == "given" and config.needs_text:
        logger.warning(
            "%s: the folders with names of splits are splits; beside them lies %s, whose lines go where the hash of "
            "their writer's name falls. Move it into a split or out of the source, or set source.split=by_writer.",
            path, ", ".join(map(repr, splits.others)),
        )  # fmt: skip
    return splits


def _place(name: str) -> list[str]:
    return name.split("/")[:-1]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _stems(name: str) -> list[str]:
    """What the text of an image may be called."""
    stem = _stem(name)
    return [stem, *(stem.removesuffix(stage) for stage in _STAGES if stem.endswith(stage))]


def _composed(name: str) -> str:
    """A name as most systems write it: a Mac may have written é as two characters."""
    return unicodedata.normalize("NFC", name)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _text_suffixes(files: Iterable[str], stems: set[str]) -> dict[str, str]:
    """By folder, which of TEXT_SUFFIXES its texts have; folders without texts that belong to images are left out."""
    ground_truth, plain = TEXT_SUFFIXES
    found: dict[str, str] = {}
    for name in files:
        if name.lower().endswith(ground_truth):
            found[_folder(name)] = ground_truth
        elif name.lower().endswith(plain) and _composed(_stem(name)) in stems:
            found.setdefault(_folder(name), plain)
    return found


def has_lines(path: Path) -> bool:
    """Whether the folder has a text that is named as ground truth or lies beside an image of its name."""
    files = list(visible_files(path))
    images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES))
    return bool(_text_suffixes(files, {_composed(stem) for name in images for stem in _stems(name)}))


def has_images(path: Path) -> bool:
    """Whether there is an image at or below the folder."""
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in visible_files(path))


def visible_files(path: Path) -> Iterator[str]:
    """Files below the folder, relative to it; hidden files and folders are left out, links to folders not followed."""
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(path).as_posix()


def _read_text(root: Path, name: str) -> dict[str, str]:
    """The text of a line, or why there is none."""
    try:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            detail = f"{name} is a link out of the source's folder, which is not followed. Copy the file."
            return {"reason": "outside_folder", "detail": detail}
        if not (root / name).is_file() and (root / name).exists():
            return {"reason": "unreadable_text", "detail": f"{name} is not a regular file. Remove it."}
        return {"text": (root / name).read_text(encoding="utf-8-sig")}
    except FileNotFoundError:
        detail = f"there is no {name} beside the image. Transcribe the line into it or remove the image."
        return {"reason": "missing_text", "detail": detail}
    except UnicodeDecodeError as exc:
        detail = f"{name} is not UTF-8 (byte {exc.start}). Save it again as UTF-8."
        return {"reason": "unreadable_text", "detail": detail}
    except (OSError, RuntimeError) as exc:
        return {
            "reason": "unreadable_text",
            "detail": f"{name} cannot be read ({exc}). Check its permissions.",
        }
