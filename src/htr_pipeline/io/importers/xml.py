"""Pages in XML files from strangers: parsed within limits, each line with its page image."""

import logging
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

import numpy as np

from htr_pipeline.core.config import UserError
from htr_pipeline.core.cutting import line_band
from htr_pipeline.io.importers.lines import IMAGE_SUFFIXES, find_splits, visible_files

if TYPE_CHECKING:
    from htr_pipeline.io.importers import SourceConfig

logger = logging.getLogger(__name__)

MAX_XML_BYTES = 32 * 2**20
MAX_ELEMENTS = 1_000_000
MAX_DEPTH = 64
MAX_LINES = 10_000  # of a page
MAX_POINTS = 5_000  # of a polygon or baseline
MAX_COORDINATE = 1_000_000
MAX_NAME_CHARACTERS = 255  # of an id or a file
# How far width and height may differ in scale between XML and image.
MAX_DISTORTION = 0.05
# Folders that say how a page is kept, not whose it is.
_LAYOUT_FOLDERS = frozenset("page pagexml page_xml alto altoxml alto_xml xml images image img data".split())
_CHUNK_BYTES = 64 * 1024


@dataclass
class PageLine:
    """A text line as the XML has it, in the XML's units; `problem` says why its geometry cannot be used."""

    id: str | None
    text: str = ""
    polygon: list[list[float]] | None = None
    baseline: list[list[float]] | None = None
    problem: str | None = None


@dataclass
class Page:
    """What a PAGE or ALTO file says of one page; width and height are None where it does not say them."""

    image_name: str | None
    width: float | None
    height: float | None
    lines: list[PageLine] = field(default_factory=list)


@dataclass(frozen=True)
class PageFormat:
    """One XML format of pages.

    Attributes:
        name: as in source.format.
        root_tag: local name of the root element.
        namespace: expression that the root's namespace matches; none at all is taken too.
        parse: the page of a root element whose tags are local names.
    """

    name: str
    root_tag: str
    namespace: str
    parse: Callable[[Element], Page]

    def read(self, path: Path, config: "SourceConfig") -> Iterator[dict[str, Any]]:
        """One row for each TextLine of each page, files in order of path, lines in reading order.

        XML files whose root element is of another format (METS, metadata, the other of PAGE and ALTO) are left alone
        and counted in the log; what cannot be parsed at all is a rejected row. So are the lines of a second file of one
        page. Pages without lines, and images that belong to none of the files, are named in a warning.

        Args:
            path: a folder with XML files and page images, or one XML file.
            config: whether folders are splits.
        """
        root = path.parent if path.is_file() else path
        images = ImageIndex(visible_files(root))
        files = xml_files(path)
        splits = find_splits(path, map(_place, files), config)
        others, empty = [], []
        file_of_page: dict[str, str] = {}
        for name in files:
            page_id = page_id_of(name)
            row: dict[str, Any] = {"line_id": page_id, "page_id": page_id, "file": name}
            row["split"], folders = splits.parse(_place(name))
            if folders:
                row["writer_id"] = folders[0]
            try:
                page = _read_page(root, name, self)
            except UserError as exc:
                yield row | {"reason": "unreadable_xml", "detail": f"{name}: {exc}"}
                continue
            if page is None:
                others.append(name)
                continue
            if not page.lines:
                empty.append(name)
            first = file_of_page.setdefault(page_id, name)
            detail = f"{name}: {first} is the file of the page {page_id!r} already. Keep one of them, or rename it."
            again = {"reason": "duplicate_id", "detail": detail} if first != name else {}
            for line in _page_rows(row, page, images):
                yield line | again
        if others:
            logger.info("%d XML files are not %s and were left alone: %s", len(others), self.name, _few(others))
        if empty:
            logger.warning(
                "Pages in which no lines were found, so that there is nothing to read: %d (%s).",
                len(empty),
                _few(empty),
            )
        if path.is_dir() and (unused := images.unused()):
            logger.warning(
                "Page images without a %s file, which are not read: %d (%s).",
                self.name.upper(), len(unused), _few(unused),
            )  # fmt: skip

    def can_read(self, root: Path, name: str) -> bool:
        """Whether `read` takes this file below the folder `root` for a page."""
        try:
            return _read_page(root, name, self) is not None
        except UserError:
            return False


class _LimitedBuilder(TreeBuilder):
    """Builds a tree with local names only; refuses what a page does not need and an attacker does."""

    def __init__(self) -> None:
        super().__init__()
        self.namespace = ""
        self._num_elements = self._depth = 0

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # Entities, internal and external, can only be declared here.
        raise UserError("it has a DOCTYPE, which could declare entities. Remove the declaration.")

    def start(self, tag: str, attrs: dict[Any, Any]) -> Element:
        self._num_elements += 1
        self._depth += 1
        if self._num_elements > MAX_ELEMENTS or self._depth > MAX_DEPTH:
            raise UserError(
                f"more than {MAX_ELEMENTS} elements or {MAX_DEPTH} levels. Is it one page? Split it into pages."
            )
        namespace, _, name = tag.rpartition("}")
        if self._num_elements == 1:
            self.namespace = namespace.removeprefix("{")
        return super().start(name, attrs)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2])


class _RootFound(Exception):  # noqa: N818  no error: it ends the parsing
    """The first start tag was read."""


class _RootFinder:
    """Parser target that stops at the root element."""

    def start(self, tag: str, attrs: Mapping[str, str]) -> None:
        raise _RootFound(tag.rpartition("}")[2])

    def close(self) -> None:
        """Nothing to finish; parsers call it."""


def parse_xml(data: bytes) -> tuple[Element, str]:
    """The root element, with local names as tags, and its namespace.

    Args:
        data: a whole XML file.

    Raises:
        UserError: not well-formed, of an unknown encoding, with a DOCTYPE, or beyond one of this module's limits.
    """
    if len(data) > MAX_XML_BYTES:
        raise UserError(f"larger than {MAX_XML_BYTES} bytes. Is it one page? Split it into pages.")
    builder = _LimitedBuilder()
    parser = XMLParser(target=builder)
    try:
        # In pieces, so that nothing behind a refused declaration is looked at.
        for start in range(0, len(data), _CHUNK_BYTES):
            parser.feed(data[start : start + _CHUNK_BYTES])
        root = parser.close()
    except ParseError as exc:
        raise UserError(f"not well-formed XML ({exc}). Export the page again.") from exc
    except UserError:
        raise
    except (ValueError, LookupError) as exc:  # an encoding that the parser does not know
        raise UserError(f"its text cannot be decoded ({exc}). Save it again as UTF-8.") from exc
    return root, builder.namespace


def read_xml(root: Path, file: Path) -> tuple[Element, str]:
    """What parse_xml makes of a file of the source in the folder `root`.

    Raises:
        UserError: as parse_xml, or it is no file that may and can be read.
    """
    return parse_xml(read_bytes(root, file))


def read_bytes(root: Path, file: Path) -> bytes:
    """Content of an XML file of the source in the folder `root`; of one that is too large, more than MAX_XML_BYTES.

    Raises:
        UserError: it is no file that may and can be read.
    """
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise UserError("it is a link out of the source's folder, which is not followed. Copy the file.")
        if not file.is_file():
            raise UserError("not a regular file. Remove it.")
        with file.open("rb") as stream:
            return stream.read(MAX_XML_BYTES + 1)
    except (OSError, RuntimeError) as exc:
        raise UserError(f"it cannot be read ({exc}). Check its permissions.") from exc


def root_tag(file: Path) -> str | None:
    """Local name of an XML file's root element, from its beginning; None where it has none or cannot be read."""
    parser = XMLParser(target=_RootFinder())
    try:
        if not file.is_file():
            return None
        with file.open("rb") as stream:
            parser.feed(stream.read(_CHUNK_BYTES))
    except _RootFound as found:
        return str(found)
    except (ParseError, ValueError, LookupError, OSError):
        return None
    return None


def xml_files(path: Path) -> list[str]:
    """Visible .xml files at or below the path, relative to the source's folder, sorted."""
    if path.is_file():
        return [path.name]
    return sorted(name for name in visible_files(path) if name.lower().endswith(".xml"))


def find_roots(path: Path) -> Counter[str]:
    """How many XML files of each root element lie at or below the path."""
    root = path.parent if path.is_file() else path
    return Counter(tag for name in xml_files(path) if (tag := root_tag(root / name)))


def page_id_of(name: str) -> str:
    """The id of the page of an XML file, which PAGE and ALTO in folders of their own share: without those folders.

    Composed, as all ids are: a Mac may have written é in the name as two characters.
    """
    return unicodedata.normalize("NFC", "/".join([*_place(name), _split_name(name)[1]]))


def _place(name: str) -> list[str]:
    """Folders of an XML file that say whose page it is."""
    return [folder for folder in name.split("/")[:-1] if folder.lower() not in _LAYOUT_FOLDERS]


def _read_page(root: Path, name: str, page_format: PageFormat) -> Page | None:
    """The page; None where the file is XML of another format."""
    element, namespace = read_xml(root, root / name)
    if element.tag != page_format.root_tag:
        return None
    if namespace and not re.match(page_format.namespace, namespace):
        raise UserError(
            f"the namespace {namespace[:100]!r} is not one of {page_format.name.upper()}. Export the page again."
        )
    page = page_format.parse(element)
    if len(page.lines) > MAX_LINES:
        raise UserError(f"{len(page.lines)} lines on one page; at most {MAX_LINES} are read. Split it into pages.")
    return page


def _page_rows(base: Mapping[str, Any], page: Page, images: "ImageIndex") -> Iterator[dict[str, Any]]:
    name = base["file"]
    try:
        found: dict[str, Any] = {"image_path": images.find(name, page.image_name)}
        if not all(size is None or 1 <= size <= MAX_COORDINATE for size in (page.width, page.height)):
            raise UserError(f"a page of {page.width} x {page.height}. Give the image's size in pixels.")
    except UserError as exc:
        found = {"reason": "missing_image", "detail": f"{name}: {exc}"}
    _fill_bands(page)
    page_size = (page.width, page.height) if page.width and page.height else None
    for position, line in enumerate(page.lines, start=1):
        line_id = line.id if line.id and len(line.id) <= MAX_NAME_CHARACTERS else f"line{position}"
        row = {**base, "line_id": f"{base['page_id']}/{line_id}", **found, "text": line.text, "problem": line.problem}
        yield row | {"polygon": line.polygon, "baseline": line.baseline, "page_size": page_size}


def _fill_bands(page: Page) -> None:
    """Gives lines without a polygon a band around their baseline, as high as the page's lines are apart."""
    bare = [line for line in page.lines if line.polygon is None and not line.problem]
    if not any(line.baseline for line in bare):
        spacing = 0.0
    else:
        spacing = _line_spacing([line.baseline for line in page.lines if line.baseline], page.height)
    for line in bare:
        if not line.baseline:
            line.problem = "it has neither polygon, box nor baseline. Draw the line again."
            continue
        try:
            line.polygon = [[float(x), float(y)] for x, y in line_band(line.baseline, spacing)]
        except UserError as exc:
            line.problem = str(exc)


def _line_spacing(baselines: Sequence[list[list[float]]], page_height: float | None) -> float:
    """Usual distance of a baseline from the next one above it."""
    arrays = [np.asarray(baseline) for baseline in baselines]
    boxes = np.array([[a[:, 0].min(), a[:, 0].max(), a[:, 1].mean()] for a in arrays])  # (lines, 3)
    left, right, y = boxes.T
    gaps = []
    for index in range(len(boxes)):
        overlap = np.minimum(right, right[index]) - np.maximum(left, left[index])
        above = y[(overlap > 0) & (y < y[index])]
        if len(above):
            gaps.append(y[index] - above.max())
    if gaps:
        return float(np.median(gaps))
    return (page_height or float(y.max()) * 1.1) / 30


class ImageIndex:
    """Finds page images among the files of a source, by name only, so that no path leads out of it.

    Args:
        names: files relative to the source's folder.
    """

    def __init__(self, names: Iterator[str]) -> None:
        self._in: dict[tuple[str | None, str], list[str]] = defaultdict(list)  # by folder and stem
        self._below: dict[tuple[str | None, str], list[str]] = defaultdict(list)  # by the folder above and stem
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                folder, stem = _split_name(name)
                self._in[folder, _fold(stem)].append(name)
                self._below[_above(folder), _fold(stem)].append(name)
        self._found: set[str] = set()

    def unused(self) -> list[str]:
        """Images that were not found, nor others of their name, as in a folder of smaller copies."""
        stems = {_fold(_split_name(name)[1]) for name in self._found}
        return sorted(name for (_, stem), names in self._in.items() if stem not in stems for name in names)

    def find(self, xml_name: str, image_name: str | None) -> str:
        """Path of the image of a page, relative to the source's folder.

        It lies beside the XML file, one folder up, in a folder beside the XML's, or in a folder below it; the first of
        these counts. The exact name comes before one that differs in upper and lower case, then comes another
        extension, then an image that is called like the XML file.

        Args:
            xml_name: the XML file, relative to the source's folder.
            image_name: as the XML has it; folders in it are not looked at, they are those of another machine.

        Raises:
            UserError: no image fits, or more than one equally well.
        """
        folder, xml_stem = _split_name(xml_name)
        base = (image_name or "")[-MAX_NAME_CHARACTERS:].replace("\\", "/").rpartition("/")[2]
        stem = base.rpartition(".")[0] or base
        rules: list[tuple[str, Callable[[str], bool]]] = [
            (stem, lambda name: name.rpartition("/")[2] == base),
            (stem, lambda name: _fold(name.rpartition("/")[2]) == _fold(base)),
            (stem, lambda name: True),
            (xml_stem, lambda name: True),
        ]
        for wanted, fits in rules:
            for names in self._near(folder, _fold(wanted)):
                fitting = [name for name in names if fits(name)]
                if len(fitting) > 1:
                    raise UserError(f"its image may be {_few(fitting)}. Keep one, or put it beside the XML file.")
                if fitting:
                    self._found.add(fitting[0])
                    return fitting[0]
        if "." in base and not base.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(
                f"its image is {base!r}, and no image of that name ends in {', '.join(IMAGE_SUFFIXES)}; others are not "
                "read. Convert it to PNG, JPEG or TIFF."
            )
        raise UserError(
            f"there is no image {base or xml_stem!r} in its folder, one folder up or in a folder beside it "
            "(within source.path). Put it there; if it lies above source.path, give that folder as source.path."
        )

    def _near(self, folder: str, stem: str) -> Iterator[list[str]]:
        yield self._in.get((folder, stem), [])
        if folder:
            yield self._in.get((_above(folder), stem), [])
            yield self._below.get((_above(folder), stem), [])
        yield self._below.get((folder, stem), [])


def _above(folder: str) -> str | None:
    """The folder above, "" for the source's own, None where that would be outside."""
    return folder.rpartition("/")[0] if folder else None


def _split_name(name: str) -> tuple[str, str]:
    """Folder and stem."""
    folder, _, base = name.rpartition("/")
    return folder, base.rpartition(".")[0]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parse_points(value: str) -> list[list[float]]:
    """[x, y] points of "x,y x,y" or "x y x y".

    Raises:
        UserError: an odd number of coordinates, one that is no number or too large, or more than MAX_POINTS.
    """
    parts = value.replace(",", " ").split()
    if len(parts) > 2 * MAX_POINTS:
        raise UserError(f"{len(parts) // 2} points; at most {MAX_POINTS} are read. Simplify the polygon.")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = [math.nan]
    if len(numbers) % 2 or not all(abs(number) <= MAX_COORDINATE for number in numbers):
        shown = value if len(value) <= 60 else value[:57] + "..."
        raise UserError(
            f"points {shown!r}: expected pairs of numbers up to {MAX_COORDINATE}, as in '10,20 30,40'. "
            "Draw the line again."
        )
    return [[x, y] for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def parse_number(value: str | None) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def has_area(points: Sequence[Sequence[float]] | None) -> bool:
    """Whether the points can be the polygon of a line."""
    return bool(points) and len(points or ()) >= 3 and bool(np.ptp(np.asarray(points), axis=0).min() >= 1)
