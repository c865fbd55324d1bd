"""What can be wrong with the characters of a transcription: debris, several codes for one sign, look-alikes."""

import re
import unicodedata
from collections.abc import Iterable

# One sign, several codes that handwriting cannot tell apart, and no decomposition in Unicode that says so.
_VARIANTS = {
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{MODIFIER LETTER APOSTROPHE}": "'",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{HYPHENATION POINT}": "\N{MIDDLE DOT}",
    "\N{BULLET OPERATOR}": "\N{MIDDLE DOT}",
}
# Decompositions that change the code and not the sign. Others (superscript, fraction, circle) change the sign too.
_SAME_SIGN = ("<compat>", "<font>", "<wide>", "<narrow>", "<initial>", "<medial>", "<final>", "<isolated>")
_LONG_S = "\N{LATIN SMALL LETTER LONG S}"  # a letter of its own to those who transcribe it

# Letters of other scripts that are drawn as a Latin letter is: the commonest of Unicode's confusables.txt (UTS #39).
_LATIN_LOOK_ALIKES = frozenset("аеорсухіјѕԁһԛԝАВЕКМНОРСТУХІЈЅԌԚԜ" + "ονρυιΑΒΕΖΗΙΚΜΝΟΡΤΥΧ")
_SCRIPTS = ("LATIN", "GREEK", "CYRILLIC")  # those with look-alikes among each other
_WORD = re.compile(r"[^\W\d_]+")


def describe_characters(characters: Iterable[str]) -> str:
    """Code points with names, in their order: "U+00E9 LATIN SMALL LETTER E WITH ACUTE, ..."."""
    return ", ".join(f"U+{ord(c):04X} {unicodedata.name(c, 'without a name')}" for c in sorted(characters))


def is_debris(character: str) -> bool:
    """Whether it is left over from a wrong encoding or a font of one's own: control, private use, replacement."""
    return character == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(character) in ("Cc", "Co", "Cs")


def is_invisible(character: str) -> bool:
    """Whether nothing of it is on the page: soft hyphens, zero-width and direction marks, codes without a character.

    The two that say whether neighbours join are part of the spelling in Persian and in scripts of India.
    """
    return unicodedata.category(character) in ("Cf", "Cn") and character not in "\u200c\u200d"


def plain_form(character: str) -> str | None:
    """What else the same sign is commonly written with ("fi" for the ligature, "A" for full-width A), or None."""
    if character in _VARIANTS:
        return _VARIANTS[character]
    decomposition = unicodedata.decomposition(character)
    if character == _LONG_S or not decomposition.startswith(_SAME_SIGN):
        return None
    plain = unicodedata.normalize("NFKC", character)
    # Accents that stand alone decompose into a blank and a combining accent, which nobody types.
    return None if " " in plain else plain


def look_alike_words(text: str) -> list[str]:
    """Words with letters of a script that is not theirs, in the order of the text.

    A word counts if it mixes Latin, Greek and Cyrillic letters, or if it is in another of them than most of the text
    and has only letters that look Latin (a Cyrillic "о" alone among Latin words).

    Args:
        text: a transcription.
    """
    words = _WORD.findall(text)
    scripts = [_scripts(word) for word in words]
    letters: dict[str, int] = {}
    for word, found in zip(words, scripts, strict=True):
        if len(found) == 1:
            (script,) = found
            letters[script] = letters.get(script, 0) + len(word)
    main = max(letters, key=lambda script: (letters[script], script == "LATIN"), default="LATIN")
    return [
        word
        for word, found in zip(words, scripts, strict=True)
        if len(found) > 1
        or (found and main == "LATIN" and found != {main} and all(letter in _LATIN_LOOK_ALIKES for letter in word))
    ]


def _scripts(word: str) -> set[str]:
    return {script for letter in word if (script := unicodedata.name(letter, "").partition(" ")[0]) in _SCRIPTS}
