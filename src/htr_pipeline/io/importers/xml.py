"""XML files from strangers: parsed within limits."""

from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

from htr_pipeline.core.config import UserError

MAX_XML_BYTES = 64 * 2**20
MAX_ELEMENTS = 1_000_000
MAX_DEPTH = 64
_CHUNK_BYTES = 64 * 1024


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
