"""Words that a decoder may or should write, and the trie by which it follows their spelling."""

import math
import numbers
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

_LARGEST_WEIGHT = 1e6  # beyond it, what the network says of a character would be lost in rounding

# Breadth first: node 0 is the beginning of a word; the children of a node stand together, by class. One more record at
# the end closes the last node's children.
SPELLING = np.dtype(
    [
        ("token", np.int32),  # class of the last character
        ("first_child", np.int32),  # children are first_child up to first_child of the next node
        ("word", np.int32),  # number of the word that ends here, or 0
    ]
)


def spelling_trie(words: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(N,) SPELLING: the trie of the words that can be spelled with the characters of the classes.

    Args:
        words: distinct words; each gets its position as its number. Position 0 and empty words are left out.
        classes: the character of each class of a network, "" for the blank.
    """
    character_of = {ord(character): label for label, character in enumerate(classes) if character}
    known = np.array(sorted(character_of), dtype=np.uint32)
    class_of_known = np.array([character_of[point] for point in known.tolist()], dtype=np.int64)
    text = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    starts = np.cumsum(lengths) - lengths
    place = np.minimum(np.searchsorted(known, text), max(len(known) - 1, 0))
    labels = np.full(len(text), -1) if not len(known) else np.where(known[place] == text, class_of_known[place], -1)

    impossible = np.zeros(len(words), bool)
    impossible[np.repeat(np.arange(len(words)), lengths)[labels < 0]] = True
    possible = ~impossible & (lengths > 0)
    possible[:1] = False
    alive = np.flatnonzero(possible)  # words that reach the next level
    node_of = np.zeros(len(words), np.int64)
    tokens, num_children, size = [np.zeros(1, np.int64)], [], 1
    depth = 0
    while len(alive):
        first = size - len(tokens[-1])  # of the level above
        keys = (node_of[alive] - first) * len(classes) + labels[starts[alive] + depth]
        distinct, numbers = np.unique(keys, return_inverse=True)
        num_children.append(np.bincount(distinct // len(classes), minlength=len(tokens[-1])))
        tokens.append(distinct % len(classes))
        node_of[alive] = size + numbers
        size += len(distinct)
        depth += 1
        alive = alive[lengths[alive] > depth]
    num_children.append(np.zeros(len(tokens[-1]), np.int64))

    trie = np.zeros(size + 1, SPELLING)
    trie["token"][:-1] = np.concatenate(tokens)
    trie["first_child"][0] = 1
    trie["first_child"][1:] = 1 + np.cumsum(np.concatenate(num_children))
    trie["word"][node_of[possible]] = np.flatnonzero(possible)
    return trie


def is_letter(character: str) -> bool:
    """Whether a word is looked up by this character: letters and combining marks, of any script."""
    return unicodedata.category(character)[0] in "LM"


def bare_word(word: str) -> str:
    """A word from its first to its last letter, as it is looked up: "(l'eau," gives "l'eau", "1914." nothing."""
    letters = [place for place, character in enumerate(word) if is_letter(character)]
    return word[letters[0] : letters[-1] + 1] if letters else ""


class BoundLexicon(NamedTuple):
    """A lexicon in terms of the classes of one network, for the compiled search."""

    trie: np.ndarray  # (N,) SPELLING, of bare words; `word` is the node of the last letter up to here
    word_scores: np.ndarray  # (N,) float64, what a word that ends at this letter gets; at 0, what unknown words get


class Lexicon:
    """The words that beam_search may write, or should prefer.

    A word of a line is what stands between white space. It is looked up without what precedes its first letter and
    follows its last, so that "Paris" is found in "Paris," and "(Paris)": handwriting is transcribed with punctuation
    attached to words. What has no letter at all (numbers, dashes) is always allowed, for free. Letters within a word
    must agree exactly, also in case; a lexicon for the beginnings of sentences holds their capitalised forms too.

    Args:
        words: known words, with or without punctuation around them.
        unknown_price: nats that each word outside the lexicon costs; infinity forbids them, and then every part of a
            word that the search follows is the beginning of a known one.
        hot_words: words, which thereby are known, with the nats that each of their occurrences gains; negative weights
            make a word less likely. Lexicon(unknown_price=0, hot_words=...) prefers words and restricts nothing.

    Raises:
        ValueError: a word has white space or no letter, a hot word is given twice, or a number is out of range.
    """

    def __init__(
        self,
        words: Iterable[str] = (),
        *,
        unknown_price: float = math.inf,
        hot_words: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        if isinstance(words, str):
            raise ValueError("words is one string: expected a list of words.")
        if not isinstance(unknown_price, numbers.Real) or not unknown_price >= 0:
            raise ValueError(f"unknown_price = {unknown_price}: expected nats of at least 0; math.inf forbids.")
        self.unknown_price: float = float(unknown_price)
        self._weights: dict[str, float] = {}
        for word in words:
            self._weights[self._checked(word)] = 0.0
        hot: dict[str, str] = {}
        if not isinstance(hot_words, Mapping):
            raise ValueError(f"hot_words is {hot_words!r}: expected words with their nats, such as {{'Verdun': 3.0}}.")
        for word, weight in hot_words.items():
            if not isinstance(weight, numbers.Real) or not abs(weight) <= _LARGEST_WEIGHT:
                raise ValueError(
                    f"hot word {word!r} has weight {weight}: expected nats from {-_LARGEST_WEIGHT:g} to "
                    f"{_LARGEST_WEIGHT:g}."
                )
            bare = self._checked(word)
            if bare in hot:
                raise ValueError(f"hot words {hot[bare]!r} and {word!r} are looked up as one word: give it one weight.")
            hot[bare] = word
            self._weights[bare] = float(weight)
        self._bound: tuple[tuple[str, ...], BoundLexicon] | None = None

    @staticmethod
    def _checked(word: str) -> str:
        if not isinstance(word, str):
            raise ValueError(f"Among the words there is {word!r}: expected str.")
        bare = bare_word(word)
        if not bare or len(word.split()) != 1:
            raise ValueError(
                f"{word!r} is no word of a lexicon: expected at least one letter and no white space. Give the words of "
                "an expression one by one; what has no letter needs no lexicon."
            )
        return bare

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, word: str) -> bool:
        return bare_word(word) in self._weights

    def score(self, text: str) -> float:
        """Nats that a text gains by its words: the lexicon_score of a hypothesis; -inf if it is forbidden."""
        bare_words = filter(None, map(bare_word, text.split()))
        return sum((self._weights.get(word, -self.unknown_price) for word in bare_words), 0.0)

    def max_score(self) -> float:
        """The most that a single word can gain, at least 0."""
        return max([0.0, *self._weights.values()])

    def for_classes(self, classes: tuple[str, ...]) -> BoundLexicon:
        """The lexicon in terms of a network's classes; the last answer is kept.

        Args:
            classes: the character of each class, "" for the blank. Words with other characters are left out.
        """
        bound = self._bound
        if bound is None or bound[0] != classes:
            bound = self._bound = (classes, self._compile(classes))
        return bound[1]

    def _compile(self, classes: tuple[str, ...]) -> BoundLexicon:
        words = ["", *sorted(self._weights)]
        trie = spelling_trie(words, classes)
        word_scores = np.array([-self.unknown_price, *(self._weights[word] for word in words[1:])])[trie["word"][:-1]]
        # From here on `word` leads back to the last letter, where the end of the word is looked up.
        ends_in_letter = np.array([bool(character) and is_letter(character) for character in classes])
        is_bare = ends_in_letter[trie["token"][1:-1]].tolist()
        parents = np.repeat(np.arange(len(trie) - 1), np.diff(trie["first_child"])).tolist()
        last_letter = [0]
        for node, (bare, parent) in enumerate(zip(is_bare, parents, strict=True), 1):
            last_letter.append(node if bare else last_letter[parent])
        trie["word"][:-1] = last_letter
        return BoundLexicon(trie, word_scores)
