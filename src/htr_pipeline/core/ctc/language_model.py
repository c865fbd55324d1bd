"""N-gram language models of characters and of words: trained, scored, saved, exchanged as ARPA.

A model is one array of records, a trie of all n-grams, which compiled code walks without Python objects:

    log_prob, state = advance(model.trie, state, token)

A state is a node of the trie: the longest ending of the history that the model knows and that can still matter. It
starts as model.start_state; the end of the line is the token END. Tokens are numbered UNKNOWN, START, END, then the
characters or words in code point order. All logarithms are natural, except in ARPA files.
"""

import abc
import contextlib
import functools
import gzip
import io
import json
import math
import os
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from htr_pipeline.core.ctc.compilation import WITHOUT_COUNTS, compiled
from htr_pipeline.core.ctc.lexicon import spelling_trie

UNKNOWN, START, END = 0, 1, 2
_SPECIAL = ("<unk>", "<s>", "</s>")
_MAX_ORDER = 32
_FORMAT = "htr_pipeline n-gram 1"
_ARRAYS = ("token", "num_children", "log_prob", "backoff")
_LN_10 = math.log(10)
_LONGEST_LINE = 1 << 20  # of an ARPA file, in characters; an n-gram takes some dozens
_NOT_UTF_8 = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of such bytes
_ARPA_ZERO = -99.0  # what ARPA files write for log10 of zero
_ARPA_LEAST = -1e6  # much below what backing off comes to, and float32 holds sums of it
_ARPA_ONE = 1e-3  # what they may have by rounding for log10 of one
_LARGEST_LOG = -_ARPA_ZERO * _LN_10
# Used where a corpus is too small to estimate discounts, as lmplz --discount_fallback does.
_FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)

# Breadth first: node 0 is the empty context, nodes 1 to V the single tokens in order, then the pairs, and so on; the
# children of a node stand together, by token. One more record at the end closes the last node's children.
NODE = np.dtype(
    [
        ("token", np.int32),  # last token of the n-gram
        ("first_child", np.int32),  # children are first_child up to first_child of the next node
        ("suffix", np.int32),  # node of the longest proper ending of the n-gram, where backing off leads
        ("next_state", np.int32),  # the state once this n-gram was read
        ("log_prob", np.float32),  # of the last token after the others
        ("backoff", np.float32),  # log weight of the shorter context for tokens that are no children
    ]
)

_compiled = compiled()
_search_helper = compiled(**WITHOUT_COUNTS)

File = str | os.PathLike[str] | IO[Any]


@_search_helper
def child_of(trie, node, token):
    """The child of a node by its token, or 0."""
    low, high = trie[node].first_child, trie[node + 1].first_child
    while low < high:
        middle = (low + high) >> 1
        found = trie[middle].token
        if found == token:
            return middle
        if found < token:
            low = middle + 1
        else:
            high = middle
    return 0


@_search_helper
def advance(trie, state, token):
    """Log-probability of a token after a state, and the state after the token; for compiled callers.

    Args:
        trie: (N,) NODE, the trie of a model.
        state: a state of that model: its start_state or what advance returned.
        token: 0..V-1 and not START; not checked.

    Returns:
        float64 natural log, int32 state. The log-probability of the end of the line is advance(trie, state, END)[0].
    """
    log_prob = 0.0
    while state != 0:
        child = child_of(trie, state, token)
        if child != 0:
            return log_prob + trie[child].log_prob, trie[child].next_state
        log_prob += trie[state].backoff
        state = trie[state].suffix
    return log_prob + trie[1 + token].log_prob, trie[1 + token].next_state


class _NGram(abc.ABC):
    """What character and word models share; use CharacterNGram or WordNGram.

    Attributes:
        order: longest n-gram, 1 or more.
        vocabulary: the V tokens: <unk>, <s>, </s>, then the others in code point order.
        trie: (N,) NODE, for advance.
        start_state: state at the beginning of a line.
    """

    kind: str

    def __init__(self, order: int, vocabulary: Sequence[str], trie: np.ndarray) -> None:
        self.order = order
        self.vocabulary = tuple(vocabulary)
        self.trie = trie
        self.start_state = int(trie[1 + START]["next_state"])
        self._index = {token: index for index, token in enumerate(self.vocabulary) if index > END}

    @classmethod
    def train(cls, texts: Iterable[str], order: int) -> Self:
        """The interpolated modified Kneser-Ney model of the texts; their order does not matter.

        Each order has its own three discounts; where a corpus is too small to estimate them they are 0.5, 1 and 1.5.
        Single tokens are interpolated with the uniform distribution over the vocabulary without <s>, whose share
        <unk> gets. Nothing is pruned. Memory peaks at 70 to 90 bytes a token of the texts.

        Args:
            texts: lines; each is a sentence between <s> and </s>.
            order: longest n-gram, 1 to 32.

        Raises:
            ValueError: there are no texts, or the order is out of range.

        Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1998, section 3;
            as in Heafield et al., ACL 2013 (lmplz), n-grams that begin with <s> keep their counts in lower orders.
            Compared with a plain version in tests/core/ctc/test_language_model.py.
        """
        if not isinstance(order, int | np.integer) or not 1 <= order <= _MAX_ORDER:
            raise ValueError(f"order = {order!r}: expected a whole number from 1 to {_MAX_ORDER}.")
        lines = _checked_texts(texts)
        if not lines:
            raise ValueError("A language model needs at least one text to be trained on, got none.")
        vocabulary = (*_SPECIAL, *sorted(set[str]().union(*map(cls._split, lines)).difference(_SPECIAL)))
        index = {token: number for number, token in enumerate(vocabulary) if number > END}

        def tokens() -> Iterator[int]:
            for line in lines:
                yield START
                for token in cls._split(line):
                    yield index.get(token, UNKNOWN)
                yield END

        levels = _estimated(np.fromiter(tokens(), np.int32), len(vocabulary), int(order))
        return cls(int(order), vocabulary, _trie(*_flattened(levels)))

    @functools.cached_property
    def max_log_prob(self) -> float:
        """A natural log that no token of any state exceeds, for search that wants to know before it asks."""
        largest_backoff = max(0.0, float(self.trie["backoff"].max()))  # models of others may have weights above 1
        return float(self.trie["log_prob"][1:-1].max()) + (self.order - 1) * largest_backoff

    def encode(self, text: str) -> np.ndarray:
        """(number of tokens,) int32: the tokens of a text, without <s> and </s>; UNKNOWN where the model lacks one."""
        return self._encoded(self._split(text))

    def _encoded(self, tokens: Iterable[str]) -> np.ndarray:
        return np.array([self._index.get(token, UNKNOWN) for token in tokens], dtype=np.int32)

    def score(self, text: str) -> float:
        """Natural log of the probability of the text and its end, given its beginning."""
        return _score(self.trie, self.start_state, self.encode(text))

    def perplexity(self, texts: Iterable[str]) -> float:
        """Perplexity: exp of the mean of -log P over all tokens, unknown ones and each text's </s> included.

        Raises:
            ValueError: there are no texts.
        """
        total, count = 0.0, 0
        for text in _checked_texts(texts):
            tokens = self.encode(text)
            total += _score(self.trie, self.start_state, tokens)
            count += len(tokens) + 1
        if not count:
            raise ValueError("Perplexity needs at least one text, got none.")
        return math.exp(-total / count)

    def save(self, file: File) -> None:
        """Writes the model as .npz, the same bytes for the same model.

        Args:
            file: a path, or a binary file open for writing. A path is written in place: for a write that is all or
                nothing give the file of io.atomic.
        """
        header = {"format": _FORMAT, "kind": self.kind, "order": self.order, "vocabulary": self.vocabulary}
        nodes = self.trie[:-1]
        arrays = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "token": _narrowed(nodes["token"]),
            "num_children": _narrowed(np.diff(self.trie["first_child"])),
            "log_prob": nodes["log_prob"],
            "backoff": nodes["backoff"],
        }
        with _opened(file, "wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: File, *, size_limit: int = 2 << 30) -> Self:
        """Reads what save wrote; files from strangers too: everything is checked before compiled code sees it.

        Args:
            file: a path, or a binary file open for reading.
            size_limit: bytes that the arrays may have uncompressed.

        Raises:
            ValueError: the file is damaged, too large, or holds a model of the other kind.
        """
        return cls._restored(*_read_saved(file, size_limit))

    @classmethod
    def _restored(cls, name: str, header: Any, arrays: dict[str, np.ndarray]) -> Self:
        try:
            order, vocabulary = _checked_header(header, cls.kind)
            if not all(map(cls._is_token, vocabulary[len(_SPECIAL) :])):
                raise ValueError(f"the vocabulary of a {cls.kind} model has something that is no {cls.kind}")
            return cls(order, vocabulary, _checked_trie(arrays, len(vocabulary), order))
        except ValueError as exc:
            raise ValueError(f"{name}: {exc}. Train the model again, or fetch the file again.") from exc

    @classmethod
    def from_arpa(cls, source: File | Iterable[str], *, space_token: str = "<space>") -> Self:
        """Reads an ARPA file of KenLM, SRILM and others.

        A probability of zero counts as 10^-99. <UNK> is read as <unk>. Special tokens that the file lacks get 10^-99,
        so a model without <unk> all but forbids unknown tokens. Prefixes of n-grams that the file lacks, as pruning
        leaves them, are put in with the probability that backing off gives them, which changes no score. Backoff
        weights of n-grams of the highest order, as cutting a longer model leaves them, say nothing and are left out.

        Args:
            source: a path (.gz is unpacked), an open text file, or lines.
            space_token: how the file writes the blank: <space> as PyLaia does, ▁ and | are other habits.

        Raises:
            ValueError: the file is malformed; says where. Its header is only compared, never used to reserve memory. Or
                its model is of the other kind, or space_token is one of <unk>, <s> and </s>.
        """
        _check_space_token(space_token)
        with contextlib.ExitStack() as stack:
            lines: Iterable[str] = source  # type: ignore[assignment]
            if isinstance(source, str | os.PathLike):
                stream = stack.enter_context(_opened(source, "rt"))
                # Some kilobytes of .gz could unpack to one line that no memory holds.
                lines = iter(lambda: stream.readline(_LONGEST_LINE), "")
            name = _name(source)
            arpa = _ArpaParser(name)
            try:
                arpa.read(lines)
            except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
                raise ValueError(
                    f"{name}: what ends in .gz is unpacked, and this cannot be ({exc}). Fetch the file again, or "
                    "rename it if it is not packed."
                ) from exc
        names = [cls._token_of_name(token, space_token) for token in arpa.names]
        wrong = [name for name, token in zip(arpa.names, names, strict=True) if token is None]
        if cls is WordNGram and all(len(token or "") == 1 or token in _SPECIAL for token in names):
            wrong = [name for name, token in zip(arpa.names, names, strict=True) if token == " "]
        if wrong:
            raise ValueError(
                f"{name}: {wrong[:5]} among the 1-grams cannot be tokens of a {cls.kind} model. A character model "
                f"has single characters, and space_token = {space_token!r} for the blank. A word model has what stands "
                "between blanks, punctuation included, and perhaps the blank: not single characters alone."
            )
        vocabulary = (*_SPECIAL, *sorted(set(filter(None, names)).difference(_SPECIAL)))
        index = {token: number for number, token in enumerate(vocabulary)}
        token_of = np.array([index[str(token)] for token in names], dtype=np.int32)
        if len(set(token_of.tolist())) < len(token_of):
            doubled = [a for a, count in zip(arpa.names, np.bincount(token_of)[token_of], strict=True) if count > 1]
            raise ValueError(f"{name}: among the 1-grams, {doubled} mean the same token; expected each token once.")
        levels = arpa.levels(token_of, len(vocabulary))
        return cls(len(arpa.sections), vocabulary, _trie(*_flattened(levels)))

    def to_arpa(self, file: File, *, space_token: str = "<space>") -> None:
        """Writes the model as ARPA, which SRILM, PyLaia's decoder and, from order 2 on, KenLM read.

        Args:
            file: a path (.gz is packed), or a text file open for writing.
            space_token: what to write for the blank, where it is a token.

        Raises:
            ValueError: a token cannot be written: it has white space, is no UTF-8, or would be read as another one. Or
                the model, read from a file, has probabilities above 1.
        """
        _check_space_token(space_token)
        tokens = self.vocabulary[len(_SPECIAL) :]
        names = [space_token if token == " " else token for token in tokens]
        wrong = [
            token
            for token, name in zip(tokens, names, strict=True)
            if not name
            or set(name) & set(" \t\r\n")
            or _NOT_UTF_8.search(name)
            or self._token_of_name(name, space_token) != token
        ]
        if wrong:
            raise ValueError(
                f"ARPA has tokens of UTF-8, separated by blanks, each of them once: cannot write {wrong[:5]} with "
                f"space_token = {space_token!r}. Choose a space_token that is no token of the model; train on texts "
                "without tabs, line ends and <UNK>."
            )
        names = [*_SPECIAL, *names]
        log_probs, backoffs = (self.trie[field].astype(np.float64) / _LN_10 for field in ("log_prob", "backoff"))
        log_probs[1 + START] = _ARPA_ZERO  # never predicted
        if (largest := log_probs[1:-1].max()) > _ARPA_ONE:
            raise ValueError(
                f"The model has a probability of 10^{largest:.3g}, which ARPA cannot hold. The file that it was read "
                "from lacks beginnings of n-grams, whose backoff weights come to more than 1: make it again."
            )
        first_child = self.trie["first_child"]
        bounds = _level_bounds(first_child)
        bounds += [bounds[-1]] * (self.order + 2 - len(bounds))  # orders that the texts were too short for
        with _opened(file, "wt") as stream:
            stream.write("\\data\\\n")
            for order in range(1, self.order + 1):
                stream.write(f"ngram {order}={bounds[order + 1] - bounds[order]}\n")
            grams = [""]  # of the level above
            for order in range(1, self.order + 1):
                above, begin, end = bounds[order - 1], bounds[order], bounds[order + 1]
                parents = np.repeat(np.arange(begin - above), np.diff(first_child[above : begin + 1]))
                tokens = self.trie["token"][begin:end].tolist()
                grams = [
                    f"{grams[parent]} {names[token]}" if order > 1 else names[token]
                    for parent, token in zip(parents.tolist(), tokens, strict=True)
                ]
                stream.write(f"\n\\{order}-grams:\n")
                for node, gram in enumerate(grams, begin):
                    has_backoff = first_child[node] < first_child[node + 1] or backoffs[node] != 0
                    backoff = f"\t{backoffs[node]:.9g}" if has_backoff else ""
                    stream.write(f"{log_probs[node]:.9g}\t{gram}{backoff}\n")
            stream.write("\n\\end\\\n")

    @staticmethod
    @abc.abstractmethod
    def _split(text: str) -> Sequence[str]:
        """The tokens of a text."""

    @staticmethod
    @abc.abstractmethod
    def _is_token(token: str) -> bool:
        """Whether that can be a token of this kind of model."""

    @classmethod
    def _token_of_name(cls, name: str, space_token: str) -> str | None:
        """The token that an ARPA file means, or None."""
        name = {"<UNK>": "<unk>", space_token: " "}.get(name, name)
        return name if name in _SPECIAL or cls._is_token(name) else None


class CharacterNGram(_NGram):
    """A model of the characters (code points) of a line, the blank among them."""

    kind = "character"

    @classmethod
    def train(cls, texts: Iterable[str], order: int = 6) -> Self:  # noqa: D102
        return super().train(texts, order)

    def token_of_class(self, characters: Sequence[str]) -> np.ndarray:
        """(len(characters),) int32: the token of each class of a network, UNKNOWN where the model lacks the character.

        Args:
            characters: Charset.characters; the blank of CTC has no token.
        """
        return np.array([self._index.get(character, UNKNOWN) for character in characters], dtype=np.int32)

    @staticmethod
    def _split(text: str) -> Sequence[str]:
        return text

    @staticmethod
    def _is_token(token: str) -> bool:
        return len(token) == 1


class WordNGram(_NGram):
    """A model of the words of a line: what stands between white space, with its case and punctuation.

    Punctuation stays attached because the blank is the only sign at which a beam search knows that a word is complete;
    so the score of a line is the probability of exactly that line, and models made by others from texts that were only
    split at white space, of any kind, fit as they are. The price is that "word" and "word," are learnt apart.

    In models that PyLaia's users make, the blank between two words is a token too. A model read from such a file has
    the token " ", which stands for the white space behind a word.

    Attributes:
        space_token: the number of that token, or -1.
    """

    kind = "word"
    _spelling: tuple[tuple[str, ...], np.ndarray] | None = None

    @property
    def space_token(self) -> int:  # noqa: D102
        return self._index.get(" ", -1)

    @classmethod
    def train(cls, texts: Iterable[str], order: int = 3) -> Self:  # noqa: D102
        return super().train(texts, order)

    def spelling(self, classes: tuple[str, ...]) -> np.ndarray:
        """(N,) lexicon.SPELLING: the words as sequences of a network's classes; the last answer is kept.

        Args:
            classes: the character of each class, "" for the blank of CTC. Words with other characters are left out.
        """
        if self._spelling is None or self._spelling[0] != classes:
            unwritten = {*_SPECIAL, " "}
            words = ["" if token in unwritten else token for token in self.vocabulary]
            self._spelling = (classes, spelling_trie(words, classes))
        return self._spelling[1]

    def encode(self, text: str) -> np.ndarray:  # noqa: D102
        if self.space_token < 0:
            return super().encode(text)
        words = re.findall(r"(\S+)(\s*)", text)
        return self._encoded([token for word, space in words for token in ([word, " "] if space else [word])])

    @staticmethod
    def _split(text: str) -> Sequence[str]:
        return text.split()

    @staticmethod
    def _is_token(token: str) -> bool:
        return len(token) > 0 and token not in _SPECIAL


def load_language_model(file: File, *, size_limit: int = 2 << 30) -> CharacterNGram | WordNGram:
    """Reads a model of either kind: what load of its class does, where it is not known which.

    Args:
        file: as for load.
        size_limit: as for load.

    Raises:
        ValueError: as load.
    """
    name, header, arrays = _read_saved(file, size_limit)
    kind = header.get("kind") if isinstance(header, dict) else None
    return (WordNGram if kind == WordNGram.kind else CharacterNGram)._restored(name, header, arrays)


class _Level(NamedTuple):
    """All n-grams of one length, by parent and then token."""

    parent: np.ndarray  # place of the n-gram without its last token in the level above
    token: np.ndarray  # last token
    log_prob: np.ndarray  # NaN: what backing off gives
    backoff: np.ndarray  # natural log


def _estimated(tokens: np.ndarray, vocabulary_size: int, order: int) -> list[_Level]:
    """The levels of the modified Kneser-Ney model of a sequence of sentences, each from START to END."""
    # First all n-grams with their counts, by length: each is its prefix, already numbered, and one more token.
    parents = [np.zeros(vocabulary_size, np.int64)]
    last_tokens = [np.arange(vocabulary_size)]
    suffixes = [np.zeros(vocabulary_size, np.int64)]
    counts = [np.bincount(tokens, minlength=vocabulary_size)]
    starts = np.arange(len(tokens))  # where n-grams begin
    gram_at = tokens.astype(np.int64)  # number of the n-gram that begins at each position
    for length in range(2, order + 1):
        starts = starts[tokens[starts + length - 2] != END]  # the others would reach into the next sentence
        keys = gram_at[starts] * vocabulary_size + tokens[starts + length - 1]
        distinct, numbers = np.unique(keys, return_inverse=True)
        suffix = np.empty(len(distinct), np.int64)
        suffix[numbers] = gram_at[starts + 1]
        gram_at[starts] = numbers
        parents.append(distinct // vocabulary_size)
        last_tokens.append(distinct % vocabulary_size)
        suffixes.append(suffix)
        counts.append(np.bincount(numbers, minlength=len(distinct)))

    # A shorter n-gram counts once for each token seen before it, unless nothing can stand before it.
    is_first = np.arange(vocabulary_size) == START
    for shorter in range(order - 1):
        if shorter:
            is_first = is_first[parents[shorter]]
        preceding = np.bincount(suffixes[shorter + 1], minlength=len(counts[shorter]))
        counts[shorter] = np.where(is_first, counts[shorter], preceding)
    counts[0][START] = 0  # never predicted

    levels: list[_Level] = []
    shorter_probs = np.array([1 / (vocabulary_size - 1)])
    for parent, token, suffix, count in zip(parents, last_tokens, suffixes, counts, strict=True):
        discounts = _discounts(count)[np.minimum(count, 3)]
        total = np.bincount(parent, count, minlength=len(shorter_probs) if not levels else len(levels[-1].token))
        held_back = np.bincount(parent, discounts, minlength=len(total))
        weight = np.divide(held_back, total, out=np.ones(len(total)), where=total > 0)
        if levels:
            levels[-1] = levels[-1]._replace(backoff=np.log(weight))
        probs = (count - discounts) / total[parent] + weight[parent] * shorter_probs[suffix]
        levels.append(_Level(parent, token, np.log(probs), np.zeros(len(token))))
        shorter_probs = probs
    levels[0].log_prob[START] = -_LARGEST_LOG
    return levels


def _discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) float64: what is taken off a count of 0, 1, 2, 3 or more."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == value) for value in (1, 2, 3, 4))
    if n1 and n2 and n3:
        ratio = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, ratio, 2 - 3 * ratio * n3 / n2, 3 - 4 * ratio * n4 / n3])
        if n4 and discounts[1:].min() > 0:  # the formulas never exceed 1, 2 and 3
            return discounts
    return np.array(_FALLBACK_DISCOUNTS)


def _flattened(levels: list[_Level]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """token, num_children, log_prob and backoff of all nodes, breadth first."""
    sizes = [1, *(len(level.token) for level in levels)]
    num_children = [np.bincount(level.parent, minlength=size) for level, size in zip(levels, sizes, strict=False)]
    return (
        np.concatenate([[0], *(level.token for level in levels)]),
        np.concatenate([*num_children, np.zeros(sizes[-1], np.int64)]),
        np.concatenate([[0.0], *(level.log_prob for level in levels)]),
        np.concatenate([[0.0], *(level.backoff for level in levels)]),
    )


def _trie(token: np.ndarray, num_children: np.ndarray, log_prob: np.ndarray, backoff: np.ndarray) -> np.ndarray:
    if len(token) >= np.iinfo(np.int32).max:
        raise ValueError(f"The model has {len(token)} n-grams, more than states can number. Lower the order.")
    trie = np.zeros(len(token) + 1, NODE)
    trie["first_child"][0] = 1
    trie["first_child"][1:] = 1 + np.cumsum(num_children)
    trie["token"][:-1] = token
    trie["log_prob"][:-1] = log_prob
    trie["backoff"][:-1] = backoff
    _link(trie)
    return trie


@_compiled
def _link(trie):
    """Fills suffix and next_state of all nodes, and log_prob where it is NaN; parents come before their children."""
    for parent in range(len(trie) - 1):
        for node in range(trie[parent].first_child, trie[parent + 1].first_child):
            token = trie[node].token
            suffix, log_prob = 0, float(trie[parent].backoff)
            if parent > 0:
                context = trie[parent].suffix
                while suffix == 0:
                    if context == 0:
                        suffix = 1 + token
                    else:
                        suffix = child_of(trie, context, token)
                        if suffix == 0:
                            log_prob += trie[context].backoff
                            context = trie[context].suffix
            trie[node].suffix = suffix
            if math.isnan(trie[node].log_prob):
                trie[node].log_prob = log_prob + trie[suffix].log_prob
            # A context that nothing follows and that weighs nothing is as good as its ending.
            has_children = trie[node].first_child < trie[node + 1].first_child
            trie[node].next_state = node if has_children or trie[node].backoff != 0 else trie[suffix].next_state


@_compiled
def _score(trie, state, tokens):
    total = 0.0
    for token in tokens:
        log_prob, state = advance(trie, state, token)
        total += log_prob
    return total + advance(trie, state, END)[0]


def _level_bounds(first_child: np.ndarray) -> list[int]:
    """Where each level begins, from the root's to one past the last; ends with the number of nodes."""
    bounds = [0, 1]
    while first_child[bounds[-1]] > bounds[-1]:
        bounds.append(int(first_child[bounds[-1]]))
    return bounds


def _narrowed(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest unsigned type."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _read_saved(file: File, size_limit: int) -> tuple[str, Any, dict[str, np.ndarray]]:
    """What errors call the file, its header and its arrays, none of them checked yet."""
    with _opened(file, "rb") as stream:
        name = _name(stream)
        # A damaged zip or array header raises a dozen types, SyntaxError and RecursionError among them.
        try:
            arrays = _read_npz(stream, size_limit)
            return name, json.loads(arrays["header"].tobytes()), arrays
        except Exception as exc:
            raise ValueError(f"{name}: cannot be read as a language model written by save: {exc}") from exc


def _read_npz(stream: IO[bytes], size_limit: int) -> dict[str, np.ndarray]:
    """The arrays of a file written by save, of at most size_limit bytes, as one-dimensional arrays of plain numbers.

    np.load would reserve memory for whatever shape an array's header claims; here the shape must fit the bytes.
    """
    names = ("header", *_ARRAYS)
    arrays = {}
    with zipfile.ZipFile(stream) as archive:
        sizes = [archive.getinfo(f"{name}.npy").file_size for name in names]  # no member yields more than that
        if sum(sizes) > size_limit:
            raise ValueError(f"{sum(sizes)} bytes uncompressed, more than size_limit = {size_limit}")
        for name in names:
            with archive.open(f"{name}.npy") as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError(f"{name} has an unknown version of the .npy format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                data = member.read()
            if dtype.kind not in "uf" or len(shape) != 1 or len(data) != shape[0] * dtype.itemsize:
                raise ValueError(f"{name} has shape {shape}, dtype {dtype} and {len(data)} bytes")
            arrays[name] = np.frombuffer(data, dtype)
    return arrays


def _checked_header(header: Any, kind: str) -> tuple[int, list[str]]:
    """Order and vocabulary."""
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"the header says nothing of the format {_FORMAT!r}; is the file from another version?")
    if header.get("kind") != kind:
        raise ValueError(f"holds a {header.get('kind')} model, expected a {kind} model")
    order, vocabulary = header.get("order"), header.get("vocabulary")
    if type(order) is not int or not 1 <= order <= _MAX_ORDER:
        raise ValueError(f"order = {order!r}, expected 1 to {_MAX_ORDER}")
    if not isinstance(vocabulary, list) or not all(isinstance(token, str) for token in vocabulary):
        raise ValueError("the vocabulary is no list of strings")
    names = vocabulary[len(_SPECIAL) :]
    if tuple(vocabulary[: len(_SPECIAL)]) != _SPECIAL or names != sorted(set(names).difference(_SPECIAL)):
        raise ValueError(f"the vocabulary is not {', '.join(_SPECIAL)} and distinct sorted tokens")
    return order, vocabulary


def _checked_trie(arrays: dict[str, np.ndarray], vocabulary_size: int, order: int) -> np.ndarray:
    """The trie of arrays that a stranger may have written, so that advance stays inside it and comes to an end."""
    token, num_children, log_prob, backoff = (arrays[name] for name in _ARRAYS)
    size = len(token)
    if not size == len(num_children) == len(log_prob) == len(backoff) or size <= vocabulary_size:
        raise ValueError(f"arrays of {size}, {len(num_children)}, {len(log_prob)} and {len(backoff)} n-grams")
    if {token.dtype.kind, num_children.dtype.kind} != {"u"} or {log_prob.dtype, backoff.dtype} != {np.dtype("<f4")}:
        raise ValueError("arrays of other types than save writes")
    if token.max() >= vocabulary_size or num_children.max() >= size:
        raise ValueError("a token or number of children is out of range")
    if not np.isfinite(log_prob).all() or not np.isfinite(backoff).all():
        raise ValueError("a probability or backoff weight is not finite")
    num_children = num_children.astype(np.int64)
    first_child = 1 + np.cumsum(num_children) - num_children  # cannot overflow: below size^2
    if first_child[-1] + num_children[-1] != size or (first_child <= np.arange(size)).any():
        raise ValueError("the n-grams are no tree")
    is_first = np.zeros(size, bool)  # among its parent's children
    is_first[first_child[num_children > 0]] = True
    if (~is_first[1:] & (np.diff(token.astype(np.int64)) <= 0))[1:].any():
        raise ValueError("n-grams are out of order")
    if num_children[0] != vocabulary_size:
        raise ValueError(f"{num_children[0]} single tokens for a vocabulary of {vocabulary_size}")
    trie = _trie(token, num_children, log_prob, backoff)
    bounds = _level_bounds(trie["first_child"])
    depth = len(bounds) - 2
    if depth > order:
        raise ValueError(f"n-grams of {depth} tokens in a model of order {order}")
    if depth == order and backoff[bounds[order] :].any():
        raise ValueError("backoff weights of the longest n-grams")
    return trie


class _Section(NamedTuple):
    """The n-grams of one length as they stand in an ARPA file, each at the same place of all four."""

    tokens: array  # all tokens of all n-grams, as places in _ArpaParser.names
    log_probs: array  # base 10
    backoffs: array  # base 10
    line_numbers: array


class _ArpaParser:
    """Takes the lines of an ARPA file one by one."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.line_number = 0
        self.names: dict[str, int] = {}  # of the single tokens, to their places in the file
        self.sections: list[_Section] = []
        self.is_complete = False
        self._counts: list[int] | None = None  # those of the header, by length

    def read(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.line_number += 1
            if not isinstance(line, str):
                raise self._failure(repr(line), "text; open the file with encoding='utf-8'")
            if len(line) >= _LONGEST_LINE:
                raise self._failure(line, f"lines of less than {_LONGEST_LINE} characters")
            if self.line_number == 1:
                line = line.removeprefix("\ufeff")  # the mark that some editors put before UTF-8
            if not line.isascii() and _NOT_UTF_8.search(line):
                raise self._failure(line, "UTF-8: save it so; if it was packed with gzip, let its name end in .gz")
            self._take(line.strip(" \t\r\n"))
            if self.is_complete:
                return
        raise self._failure("the end of the file", self._expected_heading())

    def _take(self, line: str) -> None:
        if self._counts is None:  # what stands before \data\ is comment
            if line == "\\data\\":
                self._counts = []
        elif not line:
            return
        elif line.startswith("\\"):
            self._take_heading(line)
        elif not self.sections:
            self._take_count(line)
        else:
            self._take_ngram(line)

    def _take_count(self, line: str) -> None:
        counts = self._counts or []
        match = re.fullmatch(r"ngram[ \t]+([0-9]{1,4})[ \t]*=[ \t]*([0-9]{1,18})", line)
        if not match or int(match[1]) != len(counts) + 1 or len(counts) == _MAX_ORDER:
            raise self._failure(line, f"'ngram {len(counts) + 1}=COUNT', up to order {_MAX_ORDER}, or '\\1-grams:'")
        self._counts = [*counts, int(match[2])]

    def _take_heading(self, line: str) -> None:
        counts, length = self._counts or [], len(self.sections)
        if self.sections and len(self.sections[-1].log_probs) != counts[length - 1]:
            expected = f"{counts[length - 1]} {length}-grams before it as the header says"
            raise self._failure(f"{line} after {len(self.sections[-1].log_probs)} {length}-grams", expected)
        if line != self._expected_heading():
            raise self._failure(line, self._expected_heading())
        if line == "\\end\\":
            self.is_complete = True
        else:
            self.sections.append(_Section(array("i"), array("d"), array("d"), array("q")))

    def _expected_heading(self) -> str:
        if self._counts is None:
            return "\\data\\"
        if not self._counts:
            return "ngram 1=COUNT"
        return "\\end\\" if len(self.sections) == len(self._counts) else f"\\{len(self.sections) + 1}-grams:"

    def _take_ngram(self, line: str) -> None:
        length, section = len(self.sections), self.sections[-1]
        fields = list(filter(None, line.replace("\t", " ").split(" ")))
        if not length + 1 <= len(fields) <= length + 2:
            raise self._failure(line, f"a log10 probability, {length} tokens and perhaps a log10 backoff weight")
        log_prob = self._number(fields[0])
        backoff = self._number(fields[length + 1]) if len(fields) == length + 2 else 0.0
        if log_prob > _ARPA_ONE or backoff > -_ARPA_ZERO:
            raise self._failure(line, f"log10 of a probability, and a backoff weight of at most {-_ARPA_ZERO:g}")
        tokens = fields[1 : length + 1]
        if length == 1:
            if tokens[0] in self.names:
                raise self._failure(line, "each 1-gram once")
            self.names[tokens[0]] = len(self.names)
        try:
            section.tokens.extend([self.names[token] for token in tokens])
        except KeyError as exc:
            raise self._failure(line, f"tokens that are among the 1-grams: {exc} is not") from None
        section.log_probs.append(min(log_prob, 0.0))
        section.backoffs.append(backoff if length < len(self._counts or []) else 0.0)
        section.line_numbers.append(self.line_number)

    def _number(self, field: str) -> float:
        try:
            value = float(field)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise self._failure(field, "a number")
        return _ARPA_ZERO if value == -math.inf else max(value, _ARPA_LEAST)

    def _failure(self, found: str, expected: str) -> ValueError:
        shown = found if len(found) <= 100 else found[:97] + "..."
        return ValueError(f"{self.file}, line {self.line_number}: found {shown!r}, expected {expected}.")

    def levels(self, token_of: np.ndarray, vocabulary_size: int) -> list[_Level]:
        """The n-grams as levels of a trie, with those put in that others need as prefixes."""
        grams = [
            token_of[np.frombuffer(section.tokens, np.int32).reshape(-1, length)]
            for length, section in enumerate(self.sections, 1)
        ]
        # For each length, the places of the prefixes of its n-grams in the level reached so far.
        places = [gram[:, 0].astype(np.int64) for gram in grams]
        keys = np.arange(vocabulary_size)
        levels: list[_Level] = []
        for depth, section in enumerate(self.sections):
            if depth:
                longer = [
                    place * vocabulary_size + gram[:, depth]
                    for place, gram in zip(places[depth:], grams[depth:], strict=True)
                ]
                keys, numbers = np.unique(np.concatenate(longer), return_inverse=True)
                places[depth:] = np.split(numbers, np.cumsum([len(gram) for gram in longer])[:-1])
            given = places[depth]
            first_at = np.full(len(keys), -1)
            first_at[given[::-1]] = np.arange(len(given))[::-1]
            doubled = np.flatnonzero(first_at[given] != np.arange(len(given)))
            if len(doubled):
                self.line_number = section.line_numbers[doubled[0]]
                earlier = section.line_numbers[first_at[given[doubled[0]]]]
                raise self._failure("an n-gram once more", f"each once; it is also on line {earlier}")
            log_prob = np.full(len(keys), np.nan if depth else _ARPA_ZERO)
            backoff = np.zeros(len(keys))
            log_prob[given] = np.frombuffer(section.log_probs)
            backoff[given] = np.frombuffer(section.backoffs)
            levels.append(_Level(keys // vocabulary_size, keys % vocabulary_size, log_prob * _LN_10, backoff * _LN_10))
        return levels


@contextlib.contextmanager
def _opened(file: File, mode: str) -> Iterator[IO[Any]]:
    """Text has line ends of one character, read as it is; a path that ends in .gz is that of a packed text."""
    errors = "surrogateescape" if mode == "rt" else "strict"
    if not isinstance(file, str | os.PathLike):
        yield file
    elif "b" in mode:
        with Path(file).open(mode) as stream:
            yield stream
    elif Path(file).suffix.lower() != ".gz":
        with Path(file).open(mode, encoding="utf-8", errors=errors, newline="\n") as stream:
            yield stream
    else:  # without name and time, so that equal models are equal files
        with (
            Path(file).open(mode.replace("t", "b")) as packed,
            gzip.GzipFile("", mode.replace("t", "b"), fileobj=packed, mtime=0) as unpacked,
            io.TextIOWrapper(unpacked, encoding="utf-8", errors=errors, newline="\n") as stream,
        ):
            yield stream


def _check_space_token(space_token: str) -> None:
    if space_token in (*_SPECIAL, "<UNK>"):
        raise ValueError(f"space_token = {space_token!r} is what ARPA calls something else: expected another name.")


def _checked_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one string: expected a list of lines.")
    lines = list(texts)
    for line in lines:
        if not isinstance(line, str):
            raise ValueError(f"Among the texts there is {line!r}: expected str.")
    return lines


def _name(source: object) -> str:
    """What an error calls a file."""
    return str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "the language model"))
