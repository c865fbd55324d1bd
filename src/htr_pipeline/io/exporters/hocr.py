"""Readings as hOCR 1.2, XHTML with the place and confidence of each line: https://kba.github.io/hocr-spec/1.2/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from htr_pipeline.core.image import image_size
from htr_pipeline.core.text import visual_order
from htr_pipeline.io.exporters.xml_edit import markup, quote

_HEAD = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml">
 <head>
  <title>{title}</title>
  <meta http-equiv="Content-Type" content="text/html; charset=utf-8"/>
  <meta name="ocr-system" content="htr_pipeline"/>
  <meta name="ocr-capabilities" content="ocr_page ocr_line ocrx_word"/>
 </head>
 <body>
"""
_TAIL = """ </body>
</html>
"""


def to_hocr(page_id: str, lines: list[dict[str, Any]], root: Path) -> bytes:
    """An hOCR document; a line image is an ocr_page of its own, as nobody knows where on a page it was.

    The boxes of words are estimates: the line's box, parted by the number of characters.

    Args:
        page_id: its title.
        lines: rows of the manifest with `text` and `confidence`, which may be None.
        root: folder that their image paths are relative to.

    Raises:
        UserError: the image of a page cannot be opened.
    """
    images: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        images.setdefault(line["image_path"], []).append(line)
    parts = [_HEAD.format(title=markup(page_id))]
    number = 0
    for index, (image, image_lines) in enumerate(images.items(), start=1):
        on_page = image_lines[0]["polygon"] is not None
        first = image_lines[0]
        width, height = image_size(root / image) if on_page else (first["width_pixels"], first["height_pixels"])
        title = f"image {_property(image)}; bbox 0 0 {width} {height}; ppageno {index - 1}"
        parts.append(f'  <div class="ocr_page" id="page_{index}" title={quote(title)}>\n')
        for line in image_lines:
            number += 1
            box = _box(line["polygon"]) if on_page else (0, 0, width, height)
            confidence = "" if line["confidence"] is None else f"; x_wconf {round(100 * line['confidence'])}"
            parts.append(f'   <span class="ocr_line" id="line_{number}" title="bbox {_words(box)}{confidence}">')
            parts.append(
                " ".join(
                    f'<span class="ocrx_word" id="word_{number}_{position}" title="bbox {_words(part)}{confidence}">'
                    f"{markup(word)}</span>"
                    for position, (word, part) in enumerate(_word_boxes(line["text"], box), start=1)
                )
            )
            parts.append("</span><br/>\n")
        parts.append("  </div>\n")
    return "".join([*parts, _TAIL]).encode()


def _word_boxes(text: str, box: tuple[int, int, int, int]) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    left, upper, right, lower = box
    scale = (right - left) / max(len(text), 1)
    on_line = np.argsort(visual_order(text))  # where each character of the text stands, from the left
    position = 0
    for word in text.split(" "):
        if word:
            places = on_line[position : position + len(word)]
            start, end = round(left + scale * places.min()), round(left + scale * (places.max() + 1))
            yield word, (start, upper, end, lower)
        position += len(word) + 1


def _box(polygon: list[list[int]]) -> tuple[int, int, int, int]:
    xs, ys = zip(*polygon, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _words(box: tuple[int, int, int, int]) -> str:
    return " ".join(map(str, box))


def _property(path: str) -> str:
    """A path as a string of an hOCR property, which has backslashes for quotation marks."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'
