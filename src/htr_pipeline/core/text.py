"""Transcriptions as code points and as CTC labels."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from htr_pipeline.core.config import UserError

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# The blocks that Unicode keeps for scripts written from right to left: Hebrew, Arabic, Syriac, Thaana and others.
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]")
# Unicode's bidirectional classes as letters: Right, Left, European and Arabic Numbers, Terminators of numbers (signs of
# currency, per cent), Blanks, separators within numbers (CS), Signs of plus and minus, Other.
_KINDS = {
    "R": "R",
    "AL": "R",
    "L": "L",
    "EN": "N",
    "AN": "A",
    "ET": "T",
    "WS": "B",
    "B": "B",
    "S": "B",
    "CS": "C",
    "ES": "S",
}
_ARABIC_SEPARATORS = "\u066b\u066c"  # of decimals and thousands, also between the European numbers of Persian
# Numbers keep their order. Arabic ones are not joined by hyphens: years "from - to" stand in the order of the text.
_NUMBERS = re.compile("A(?:C?A)*|N(?:[CS]?N)*")
_SIGNED_NUMBERS = re.compile("[TN]+")
_FROM_LEFT_TO_RIGHT = re.compile("[^R]+")
_TURNED = re.compile("R[^L]*R|R")  # what is turned round within text from left to right


def normalise_text(text: str, unicode_form: str = "NFC") -> str:
    """Text as it is trained on and scored: one Unicode form, runs of white space made one blank, ends trimmed.

    Args:
        text: a transcription.
        unicode_form: NFC, NFD, NFKC or NFKD.
    """
    return " ".join(unicodedata.normalize(unicode_form, text).split())  # type: ignore[arg-type]


def visual_order(text: str) -> list[int]:
    """The places of the characters of a text in the order in which they stand on the line, from left to right.

    Text is kept as it is read and typed; frames run from left to right. So a line in Arabic or Hebrew is learnt and
    decoded in visual order. The way back is the same: the order of the text in visual order. A line runs from right to
    left if most of its letters do, on which both orders agree. Within it, words of the other direction keep their order
    together with digits and signs that stand in one word with them, and so do numbers; brackets are not mirrored.

    Args:
        text: a line. A word has the same order in a line of its own, but for signs at its edges.

    Source: after the Unicode Bidirectional Algorithm (UAX 9). That cannot be undone where text has both directions, so
        here a number beside a word of the other direction, parted from it by a blank, never belongs to it.
    """
    places = list(range(len(text)))
    if not _RIGHT_TO_LEFT.search(text):  # nearly always
        return places
    kinds = "".join(map(_kind, text))
    if any(unicodedata.bidirectional(character) == "AL" for character in text):
        # Beside Arabic letters all numbers are Arabic ones, and their signs are read on from them, to the left.
        kinds = kinds.replace("N", "A").replace("T", "O")
    else:
        kinds = _SIGNED_NUMBERS.sub(lambda found: ("N" if "N" in found[0] else "T") * len(found[0]), kinds)
    if kinds.count("R") >= kinds.count("L"):
        return _turned(kinds, 0, len(text))
    for run in _TURNED.finditer(kinds):
        places[run.start() : run.end()] = _turned(kinds, *run.span())
    return places


def _kind(character: str) -> str:
    kind = unicodedata.bidirectional(character)
    if kind == "NSM":  # a mark stands with the letters of its script
        return "R" if _RIGHT_TO_LEFT.match(character) else "L"
    return "C" if character in _ARABIC_SEPARATORS else _KINDS.get(kind, "O")


def _turned(kinds: str, start: int, end: int) -> list[int]:
    places = list(range(start, end))
    for first, last in _kept(kinds, start, end):
        places[first - start : last - start] = reversed(range(first, last))
    return places[::-1]


def _kept(kinds: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where what keeps its order begins and ends, within text from right to left."""
    for stretch in _FROM_LEFT_TO_RIGHT.finditer(kinds, start, end):
        begin, stop = stretch.span()
        first, last = kinds.find("L", begin, stop), kinds.rfind("L", begin, stop)
        if first >= 0:  # from the first word with a letter to the last, without the signs at the edges
            before, after = max(kinds.rfind("B", begin, first) + 1, begin), kinds.find("B", last, stop)
            after = stop if after < 0 else after
            yield from (found.span() for found in _NUMBERS.finditer(kinds, begin, before))
            yield (
                next(place for place in range(before, stop) if kinds[place] in "LNAT"),
                next(place for place in range(after - 1, begin - 1, -1) if kinds[place] in "LNAT") + 1,
            )
            begin = after
        yield from (found.span() for found in _NUMBERS.finditer(kinds, begin, stop))


def visual_text(text: str) -> str:
    """A text in visual order, or such a text as it is read again."""
    if not _RIGHT_TO_LEFT.search(text):
        return text
    return "".join(text[place] for place in visual_order(text))


def unicode_form_of(texts: Sequence[str]) -> str:
    """The first of UNICODE_FORMS that all the texts are in, or mixed."""
    forms = (form for form in UNICODE_FORMS if all(unicodedata.is_normalized(form, text) for text in texts))  # type: ignore[arg-type]
    return next(forms, "mixed")


def required_frames(text: str) -> int:
    """Fewest frames that can hold the text under CTC: its length plus one blank between equal neighbours."""
    return len(text) + sum(left == right for left, right in pairwise(visual_text(text)))


class Charset:
    """The ordered characters that a network can write; the CTC blank is the class after the last of them.

    Args:
        characters: distinct single code points; their positions are their classes.

    Raises:
        UserError: a character stands twice or is longer than one code point.
    """

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = tuple(characters)
        self._index = {character: index for index, character in enumerate(self.characters)}
        wrong = [c for c in self.characters if len(c) != 1]
        doubled = [c for c, count in Counter(self.characters).items() if count > 1]
        if wrong or doubled:
            raise UserError(f"A charset holds distinct single characters; not single: {wrong}, doubled: {doubled}.")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "Charset":
        """Every character of the texts, in code point order."""
        return cls(sorted(set().union(*texts)))

    def extended(self, texts: Iterable[str]) -> "Charset":
        """These characters at their places, then the new ones of the texts in code point order."""
        return Charset([*self.characters, *sorted(set().union(*texts) - self._index.keys())])

    @classmethod
    def from_json(cls, document: str) -> "Charset":
        """Reads what to_json wrote."""
        return cls(json.loads(document)["characters"])

    def to_json(self) -> str:
        """A JSON document with the characters in class order."""
        return json.dumps(
            {"characters": self.characters, "blank_index": self.blank_index}, ensure_ascii=False, indent=1
        )

    @property
    def blank_index(self) -> int:
        """Class of the CTC blank: the last."""
        return len(self.characters)

    @property
    def num_classes(self) -> int:
        """Number of characters plus the blank."""
        return len(self.characters) + 1

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, character: str) -> bool:
        return character in self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Charset) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def normalised(self, text: str) -> str:
        """The text as normalise_text makes it, in the Unicode form of which the charset lacks the fewest characters.

        For texts that stand beside the transcriptions, whose form was chosen when they were imported.
        """
        usual = normalise_text(text)
        if not self.unknown(usual):  # nearly every line of a large corpus
            return usual
        return min((normalise_text(text, form) for form in UNICODE_FORMS), key=lambda found: len(self.unknown(found)))

    def known(self, text: str) -> str:
        """The text without the characters that the charset lacks."""
        return "".join(character for character in text if character in self)

    def unknown(self, text: str) -> str:
        """Characters of the text that the charset lacks, each once, in code point order."""
        return "".join(sorted(set(text) - self._index.keys()))

    def encode(self, text: str) -> np.ndarray:
        """(len(text),) int32 classes, in visual order.

        Raises:
            UserError: the text has a character that the charset lacks.
        """
        unknown = self.unknown(text)
        if unknown:
            raise UserError(f"{text!r} has characters that the charset of {len(self)} lacks: {unknown!r}.")
        return np.array([self._index[character] for character in visual_text(text)], dtype=np.int32)

    def decode(self, labels: Iterable[int]) -> str:
        """Text of a sequence of classes in visual order, without blanks.

        Raises:
            UserError: a class stands for no character, as the blank and the -1 of padding.
        """
        classes = list(map(int, labels))
        if classes and not 0 <= min(classes) <= max(classes) < len(self):
            wrong = sorted({label for label in classes if not 0 <= label < len(self)})
            raise UserError(
                f"Labels {wrong} stand for no character of a charset of {len(self)}: expected 0 to {len(self) - 1}, "
                f"without blanks ({self.blank_index}) and padding."
            )
        return visual_text("".join(self.characters[label] for label in classes))
