"""Edits of an XML file that leave every byte outside them as it is.

A library would parse the file and write it anew: other quotes, other line ends, other empty elements. Here the parser
(expat) only tells where the elements lie in the bytes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from xml.parsers import expat
from xml.sax.saxutils import escape

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers.xml import MAX_XML_BYTES

# One after the other from the tag's name on, so that nothing within a value is taken for an attribute. The look-behinds
# keep the time linear in the white space of a tag.
_ATTRIBUTE = re.compile(r"(?P<blank>(?<!\s)\s+)(?P<name>[^\s=<>/\"']+)\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_TAG_END = re.compile(r"(?<!\s)\s*/?>$")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def quote(value: str) -> str:
    """A text as the value of an attribute, with its quotation marks."""
    return f'"{markup(value)}"'


def markup(text: str) -> str:
    """A text as content of an element; characters that XML cannot hold become U+FFFD."""
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text), {'"': "&quot;"})


@dataclass
class Element:
    """An element and where it lies in the file: `start` and `end` around all of it, the others around its content.

    Attributes:
        name: without a prefix.
        prefix: of the namespace, with its colon; empty where there is none.
        attributes: as in the file, references resolved.
        pieces: of the characters directly in it, of which the parser gives one for each line end.
    """

    name: str
    prefix: str
    attributes: dict[str, str]
    parent: "Element | None"
    start: int
    content_start: int = -1
    content_end: int = -1
    end: int = -1
    pieces: list[str] = field(default_factory=list)
    children: list["Element"] = field(default_factory=list)

    # The next three as ElementTree calls them, so that what reads its elements reads these.

    def get(self, name: str, default: str | None = None) -> str | None:
        """An attribute."""
        return self.attributes.get(name, default)

    def findall(self, name: str) -> list["Element"]:
        """Children of this name."""
        return [child for child in self.children if child.name == name]

    def itertext(self) -> Iterator[str]:
        """Characters directly in it."""
        yield from self.pieces

    def iter(self, name: str) -> Iterator["Element"]:
        """Elements of this name below this one, in the order of the file."""
        waiting = [self]
        while waiting:
            element = waiting.pop()
            if element.name == name:
                yield element
            waiting.extend(reversed(element.children))


class XmlFile:
    """The bytes of an XML file and the edits to be made to them.

    Args:
        data: the file.

    Raises:
        UserError: larger than MAX_XML_BYTES, with a DOCTYPE, or not well-formed.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_XML_BYTES:
            raise UserError(f"larger than {MAX_XML_BYTES} bytes. Is it one page?")
        self._data = data
        self._edits: list[tuple[int, int, bytes]] = []
        self._encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(data[:2], "")
        reader = _Reader(data)
        self._encoding = self._encoding or reader.encoding or "utf-8"
        self.root = reader.root

    def set_attributes(self, element: Element, values: Mapping[str, str | None]) -> None:
        """Sets attributes of an element, or removes those whose value is None; the others keep their place and form."""
        tag = self._data[element.start : element.content_start].decode(self._encoding)
        missing = {name: value for name, value in values.items() if value is not None}

        def changed(match: re.Match[str]) -> str:
            name = match["name"]
            if name not in values:
                return match[0]
            value = missing.pop(name, None)
            return "" if value is None else f"{match['blank']}{name}={quote(value)}"

        tag = _ATTRIBUTE.sub(changed, tag)
        more = "".join(f" {name}={quote(value)}" for name, value in missing.items())
        self._replace(element.start, element.content_start, _TAG_END.sub(lambda end: more + end[0], tag))

    def set_text(self, element: Element, text: str) -> None:
        """Puts a text in the place of everything in an element."""
        if element.content_end == element.end:  # <Unicode/>
            name = element.prefix + element.name
            tag = self._data[element.start : element.end].decode(self._encoding)
            tag = _TAG_END.sub(">", tag) + f"{markup(text)}</{name}>"
            self._replace(element.start, element.end, tag)
        else:
            self._replace(element.content_start, element.content_end, markup(text))

    def insert(self, parent: Element, new: str, before: tuple[str, ...] = ()) -> None:
        """Adds an element to the end of an element, or before its first child of one of these names.

        Args:
            parent: the element.
            new: markup of one element.
            before: names of elements that may only follow.
        """
        if parent.content_end == parent.end:
            tag = _TAG_END.sub(">", self._data[parent.start : parent.end].decode(self._encoding))
            self._replace(parent.start, parent.end, f"{tag}{new}</{parent.prefix}{parent.name}>")
            return
        last = next((child for child in reversed(parent.children) if child.name not in before), None)
        place = last.end if last else parent.content_start
        indent = self._data[self._blank_before(last.start) : last.start].decode(self._encoding) if last else ""
        self._replace(place, place, indent + new)

    def remove(self, element: Element) -> None:
        """Removes an element and the white space before it."""
        self._replace(self._blank_before(element.start), element.end, "")

    def to_bytes(self) -> bytes:
        """The file with all edits made."""
        parts, done = [], 0
        for start, end, new in sorted(self._edits, key=lambda edit: edit[:2]):
            parts += [self._data[done:start], new]
            done = end
        return b"".join([*parts, self._data[done:]])

    def _replace(self, start: int, end: int, text: str) -> None:
        self._edits.append((start, end, text.encode(self._encoding, "xmlcharrefreplace")))

    def _blank_before(self, position: int) -> int:
        width = len(" ".encode(self._encoding))
        while self._data[position - width : position].decode(self._encoding, "replace") in (" ", "\t", "\r", "\n"):
            position -= width
        return position


class _Reader:
    """Reads the elements with their places; the end of a token is the place of the next one."""

    def __init__(self, data: bytes) -> None:
        self.encoding: str | None = None
        self.root: Element = Element("", "", {}, None, 0)
        self._current: Element | None = None
        self._open_ends: list[tuple[Element, str]] = []
        self._parser = parser = expat.ParserCreate()
        parser.XmlDeclHandler = self._declaration
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        for name in ("CommentHandler", "DefaultHandler", "StartCdataSectionHandler", "ProcessingInstructionHandler"):
            setattr(parser, name, lambda *_: self._close(parser.CurrentByteIndex))
        try:
            parser.Parse(data, True)
        except (expat.ExpatError, ValueError, LookupError) as exc:
            if isinstance(exc, UserError):
                raise
            raise UserError(f"not well-formed XML ({exc}).") from exc
        self._close(len(data))

    def _close(self, position: int) -> None:
        for element, edge in self._open_ends:
            setattr(element, edge, position)
        self._open_ends.clear()

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        self._close(self._parser.CurrentByteIndex)
        self.encoding = encoding

    def _doctype(self, *_: object) -> None:
        raise UserError("it has a DOCTYPE, which could declare entities. Remove the declaration.")

    def _start(self, qualified_name: str, attributes: dict[str, str]) -> None:
        position = self._parser.CurrentByteIndex
        self._close(position)
        prefix, colon, name = qualified_name.rpartition(":")
        element = Element(name, prefix + colon, attributes, self._current, position)
        if self._current is None:
            self.root = element
        else:
            self._current.children.append(element)
        self._current = element
        self._open_ends.append((element, "content_start"))

    def _end(self, _: str) -> None:
        position = self._parser.CurrentByteIndex
        self._close(position)
        element = self._current
        if element is not None:
            element.content_end = position
            self._open_ends.append((element, "end"))
            self._current = element.parent

    def _characters(self, text: str) -> None:
        self._close(self._parser.CurrentByteIndex)
        if self._current is not None:
            self._current.pieces.append(text)
