"""Transcriptions as code points and as CTC labels."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from htr_pipeline.core.config import UserError

UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def normalise_text(text: str, unicode_form: str = "NFC") -> str:
    """Text as it is trained on and scored: one Unicode form, runs of white space made one blank, ends trimmed.

    Args:
        text: a transcription.
        unicode_form: NFC, NFD, NFKC or NFKD.
    """
    return " ".join(unicodedata.normalize(unicode_form, text).split())  # type: ignore[arg-type]


def unicode_form_of(texts: Sequence[str]) -> str:
    """The first of UNICODE_FORMS that all the texts are in, or mixed."""
    forms = (form for form in UNICODE_FORMS if all(unicodedata.is_normalized(form, text) for text in texts))  # type: ignore[arg-type]
    return next(forms, "mixed")


def required_frames(text: str) -> int:
    """Fewest frames that can hold the text under CTC: its length plus one blank between equal neighbours."""
    return len(text) + sum(left == right for left, right in pairwise(text))


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
        """(len(text),) int32 classes.

        Raises:
            UserError: the text has a character that the charset lacks.
        """
        unknown = self.unknown(text)
        if unknown:
            raise UserError(f"{text!r} has characters that the charset of {len(self)} lacks: {unknown!r}.")
        return np.array([self._index[character] for character in text], dtype=np.int32)

    def decode(self, labels: Iterable[int]) -> str:
        """Text of a sequence of classes without blanks."""
        return "".join(self.characters[label] for label in labels)
