"""PAGE XML, as Transkribus and eScriptorium write it: 2013, 2017, 2019 and the versions between."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers.xml import Page, PageFormat, PageLine, has_area, parse_number, parse_points


def _parse(root: Element) -> Page:
    pages = root.findall("Page")
    if len(pages) != 1:
        advice = "Split it into pages." if pages else "Export the page again."
        raise UserError(f"{len(pages)} elements Page; expected one. {advice}")
    element = pages[0]
    page = Page(
        image_name=element.get("imageFilename"),
        width=parse_number(element.get("imageWidth")) or None,  # 0: whoever wrote it did not know
        height=parse_number(element.get("imageHeight")) or None,
    )
    ranks: dict[str, int] = {}
    for reading_order in element.findall("ReadingOrder"):
        for region_id in _ordered_regions(reading_order):
            ranks.setdefault(region_id, len(ranks))
    regions = sorted(_regions(element, ranks, len(ranks)), key=lambda ranked: ranked[0])
    page.lines = [_line(line) for _, region in regions for line in in_custom_order(region.findall("TextLine"))]
    return page


def _ordered_regions(group: Element) -> Iterator[str]:
    """Ids of regions in the order of a ReadingOrder's groups and references, however they are nested."""
    for child in sorted(group, key=lambda child: _number(child.get("index"))):
        if region_id := child.get("regionRef"):
            yield region_id
        yield from _ordered_regions(child)


def _regions(parent: Element, ranks: dict[str, int], rank: int) -> Iterator[tuple[int, Element]]:
    """The element and all regions in it, each with its place; one that has none of its own follows its parent."""
    yield rank, parent
    for child in in_custom_order([e for e in parent if e.tag.endswith("Region") or e.tag == "TableCell"]):
        yield from _regions(child, ranks, ranks.get(child.get("id", ""), rank))


def in_custom_order(elements: Sequence[Any]) -> list[Any]:
    """The elements by custom="readingOrder {index:3;}" where all of them have it, else as they stand in the file.

    Args:
        elements: with the methods of ElementTree's, as for text_of.
    """
    found = [re.search(r"readingOrder\s*\{[^{}]*?index\s*:\s*(\d{1,9})\b", e.get("custom", "")) for e in elements]
    if not all(found):
        return list(elements)
    order = sorted(range(len(elements)), key=lambda position: int(found[position][1]))  # type: ignore[index]
    return [elements[position] for position in order]


def _line(element: Element) -> PageLine:
    line = PageLine(element.get("id"), text_of(element))
    try:
        polygon, baseline = (_points(element.find(name)) for name in ("Coords", "Baseline"))
    except UserError as exc:
        line.problem = str(exc)
        return line
    # Transkribus writes Coords without an area where only the baseline was drawn.
    line.polygon = polygon if has_area(polygon) else None
    line.baseline = baseline
    return line


def _points(element: Element | None) -> list[list[float]] | None:
    return parse_points(element.get("points", "")) or None if element is not None else None


def text_of(line: Any) -> str:
    """The line's own text, or else that of its words, or else that of their glyphs."""
    text = _main_text(line)
    if text.strip():
        return text
    words = in_custom_order(line.findall("Word"))
    texts = (_main_text(word) or "".join(_main_text(glyph) for glyph in word.findall("Glyph")) for word in words)
    return " ".join(filter(None, texts))


def _main_text(element: Any) -> str:
    """Text of the TextEquiv with the lowest index; without an index the one with the highest confidence."""

    def rank(equivalent: Any) -> tuple[float, float]:
        return _number(equivalent.get("index")), -(parse_number(equivalent.get("conf")) or 0.0)

    main = min(element.findall("TextEquiv"), key=rank, default=None)
    if main is None:
        return ""
    texts = main.findall("Unicode") or main.findall("PlainText")
    return "".join(texts[0].itertext()) if texts else ""


def _number(value: str | None) -> float:
    number = parse_number(value)
    return math.inf if number is None else number


PAGE = PageFormat("page", "PcGts", r"https?://schema\.primaresearch\.org/PAGE/", _parse)
