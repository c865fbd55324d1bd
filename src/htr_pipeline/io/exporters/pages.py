"""Readings written back into the PAGE or ALTO file that their lines came from.

Only the texts of lines that were read are changed, each with its confidence, and what would contradict them:

- Words (PAGE Word, ALTO String) are kept and take the words of the reading, one each, where there are as many of them;
  otherwise PAGE words are removed, and in ALTO one String with the whole line stands for them.
- Readings of other engines, glyphs, hyphenation and character confidences of such a line are removed.
- A text of a whole PAGE region is made of the texts of its lines again, in their reading order.
- Transkribus's tags of a part of the text (custom="abbrev {offset:3; length:2;}") are removed.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from htr_pipeline.core.config import UserError
from htr_pipeline.io.exporters.xml_edit import Element, XmlFile, markup, quote
from htr_pipeline.io.importers.page import in_custom_order, text_of

# The look-behinds keep the time linear in the length of the attribute.
_TAG = re.compile(r"(?<!\s)\s*(?<![\w-])[\w-]+\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class NewText:
    """The text that a line gets, and how sure it is (0 to 1)."""

    text: str
    confidence: float


def edit_page(data: bytes, new_texts: Mapping[str, NewText]) -> bytes:
    """A PAGE file with the readings as the texts of its lines.

    Args:
        data: the file.
        new_texts: by the id of the TextLine.

    Raises:
        UserError: the file cannot be read, is not PAGE, or lacks a line.
    """
    xml, lines = _open(data, "PcGts", "id", new_texts)
    for line_id, new in new_texts.items():
        line = lines[line_id]
        words, texts = in_custom_order(line.findall("Word")), new.text.split(" ")
        for word in words:
            if len(words) != len(texts):
                xml.remove(word)
        if len(words) == len(texts):
            for word, text in zip(words, texts, strict=True):
                for glyph in word.findall("Glyph"):
                    xml.remove(glyph)
                _set_text_equiv(xml, word, text, new.confidence)
        _set_text_equiv(xml, line, new.text, new.confidence)
        custom = line.attributes.get("custom", "")
        if (untagged := _TAG.sub(lambda tag: "" if "offset" in tag[1] else tag[0], custom)) != custom:
            xml.set_attributes(line, {"custom": untagged.strip()})
    for region in xml.root.iter("TextRegion"):
        own = in_custom_order(region.findall("TextLine"))
        ids = [line.attributes.get("id", "") for line in own]
        if region.findall("TextEquiv") and not new_texts.keys().isdisjoint(ids):
            texts = [
                new_texts[line_id].text if line_id in new_texts else text_of(line)
                for line_id, line in zip(ids, own, strict=True)
            ]
            _set_text_equiv(xml, region, "\n".join(texts), None)
    return xml.to_bytes()


def edit_alto(data: bytes, new_texts: Mapping[str, NewText]) -> bytes:
    """An ALTO file with the readings as the texts of its lines.

    Args:
        data: the file.
        new_texts: by the ID of the TextLine.

    Raises:
        UserError: the file cannot be read, is not ALTO, or lacks a line.
    """
    xml, lines = _open(data, "alto", "ID", new_texts)
    for line_id, new in new_texts.items():
        line = lines[line_id]
        strings, texts = line.findall("String"), new.text.split(" ")
        confidence = f"{new.confidence:.4f}"
        whole_line = len(strings) != len(texts)
        box = {key: line.attributes[key] for key in ("HPOS", "VPOS", "WIDTH", "HEIGHT") if key in line.attributes}
        for string, text in zip(strings, [new.text] if whole_line else texts, strict=False):
            for child in string.children:
                if child.name in ("Glyph", "ALTERNATIVE") or whole_line:
                    xml.remove(child)
            stale: dict[str, str | None] = dict.fromkeys(("CC", "SUBS_TYPE", "SUBS_CONTENT"))
            fresh = {"CONTENT": text, "WC": confidence} | (box if whole_line and len(strings) > 1 else {})
            xml.set_attributes(string, stale | fresh)
        if not strings:
            xml.insert(line, _tag(line, "String", {"CONTENT": new.text, "WC": confidence} | box))
        surplus = [*strings[1:], *line.findall("SP")] if whole_line else []
        for element in [*surplus, *line.findall("HYP")]:
            xml.remove(element)
    return xml.to_bytes()


def _open(data: bytes, root: str, id_name: str, new_texts: Mapping[str, NewText]) -> tuple[XmlFile, dict[str, Element]]:
    xml = XmlFile(data)
    if xml.root.name != root:
        raise UserError(f"expected <{root}>, got <{xml.root.name}>. Was the file changed since the import?")
    elements = list(xml.root.iter("TextLine"))
    ids = [element.attributes.get(id_name, "") for element in elements]
    lines, counts = dict(zip(ids, elements, strict=True)), Counter(ids)
    if doubled := sorted(line_id for line_id in new_texts if counts[line_id] > 1):
        raise UserError(
            f"several lines have the id {', '.join(doubled[:3])}, so that it cannot be said which was read. "
            "Give each an id of its own, and read the page again."
        )
    if missing := [line_id for line_id in new_texts if line_id not in lines]:
        raise UserError(
            f"there is no line with the id {', '.join(missing[:3])}. Was the file changed since the import? "
            "Lines without ids, which are imported as line1, line2, …, cannot be written back."
        )
    return xml, lines


def _set_text_equiv(xml: XmlFile, element: Element, text: str, confidence: float | None) -> None:
    """Makes `text` the only TextEquiv of a line, word or region."""
    conf = {} if confidence is None else {"conf": f"{confidence:.4f}"}
    equivs = element.findall("TextEquiv")
    first = next((equiv for equiv in equivs if equiv.findall("Unicode")), None)
    for other in equivs:
        if other is not first:
            xml.remove(other)
    if first is None:
        unicode = f"<{element.prefix}Unicode>{markup(text)}</{element.prefix}Unicode>"
        xml.insert(element, _tag(element, "TextEquiv", conf, unicode), before=("TextStyle", "UserDefined", "Labels"))
        return
    xml.set_attributes(first, {"conf": conf.get("conf")})
    for stale in (*first.findall("PlainText"), *first.findall("Unicode")[1:]):
        xml.remove(stale)
    xml.set_text(first.findall("Unicode")[0], text)


def _tag(sibling: Element, name: str, attributes: Mapping[str, str], content: str = "") -> str:
    """Markup of an element in the namespace of another one."""
    name = sibling.prefix + name
    words = "".join(f" {key}={quote(value)}" for key, value in attributes.items())
    return f"<{name}{words}>{content}</{name}>" if content else f"<{name}{words}/>"
