"""ALTO XML, versions 2 to 4."""

from xml.etree.ElementTree import Element

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers.xml import Page, PageFormat, PageLine, has_area, parse_number, parse_points

_UNITS = ("pixel", "mm10", "inch1200")


def _parse(root: Element) -> Page:
    pages = root.findall("Layout/Page")
    if len(pages) != 1:
        raise UserError(f"{len(pages)} elements Page; expected one. Split it into pages.")
    image_name = root.findtext("Description/sourceImageInformation/fileName", "").strip()
    page = Page(
        image_name=image_name or None,
        width=parse_number(pages[0].get("WIDTH")) or None,
        height=parse_number(pages[0].get("HEIGHT")) or None,
    )
    unit = root.findtext("Description/MeasurementUnit", "pixel").strip() or "pixel"
    if unit not in _UNITS:
        raise UserError(f"MeasurementUnit {unit[:100]!r}; expected one of {', '.join(_UNITS)}.")
    # With the page's size in the same unit the image's own size tells the scale; nothing else would.
    if unit != "pixel" and not (page.width and page.height):
        raise UserError(f"MeasurementUnit {unit!r} needs WIDTH and HEIGHT of the Page. Export it again in pixels.")
    page.lines = [_line(line) for line in pages[0].iter("TextLine")]
    return page


def _line(element: Element) -> PageLine:
    line = PageLine(element.get("ID"), _text(element))
    try:
        shape = element.find("Shape/Polygon")
        polygon = parse_points(shape.get("POINTS", "")) if shape is not None else None
        box = _box(element)
        line.polygon = polygon if has_area(polygon) else box
        line.baseline = _baseline(element.get("BASELINE", ""), line.polygon)
    except UserError as exc:
        line.problem = str(exc)
    return line


def _box(element: Element) -> list[list[float]] | None:
    """Corners of the line's box, or of the box around its strings."""
    for boxes in ([element], element.findall("String")):
        edges = []
        for box in boxes:
            left, upper, width, height = (parse_number(box.get(key)) for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT"))
            if left is not None and upper is not None and width and height and width > 0 and height > 0:
                edges.append((left, upper, left + width, upper + height))
        if edges:
            lefts, uppers, rights, lowers = zip(*edges, strict=True)
            left, upper, right, lower = min(lefts), min(uppers), max(rights), max(lowers)
            # Through the parser of points for its limits.
            return parse_points(f"{left},{upper} {right},{upper} {right},{lower} {left},{lower}")
    return None


def _baseline(value: str, polygon: list[list[float]] | None) -> list[list[float]] | None:
    """Points of a baseline; one number is the height of a level one that is as long as the polygon."""
    height = parse_number(value)
    if height is None:
        return parse_points(value) or None
    if polygon is None:
        return None
    xs = [x for x, _ in polygon]
    return parse_points(f"{min(xs)},{height} {max(xs)},{height}")


def _text(line: Element) -> str:
    """What stands on the line: of a parted word its part and the hyphen, not SUBS_CONTENT, the whole word."""
    text = ""
    after_string = False
    for part in line:
        if part.tag == "String":
            # Old files leave the SP between two words out.
            text += " " * after_string + part.get("CONTENT", "")
        elif part.tag == "SP":
            text += " "
        elif part.tag == "HYP":
            text = text.removesuffix(part.get("CONTENT", "-")) + part.get("CONTENT", "-")
        after_string = part.tag == "String"
    return text


ALTO = PageFormat(
    "alto", "alto", r"https?://(www\.loc\.gov/standards/alto|schema\.ccs-gmbh\.com|bibnum\.bnf\.fr)", _parse
)
