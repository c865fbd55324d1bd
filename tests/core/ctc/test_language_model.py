import gzip
import io
import itertools
import json
import math
import random
import tracemalloc
import zipfile
from collections import Counter, defaultdict

import numba
import numpy as np
import pytest

from htr_pipeline.core.ctc.language_model import (
    END,
    START,
    UNKNOWN,
    CharacterNGram,
    WordNGram,
    advance,
    load_language_model,
)
from htr_pipeline.core.text import Charset

FLOAT32 = 2e-6  # a natural log of some units, rounded to float32


def random_texts(seed, count, alphabet="ab cé", length=12):
    generator = random.Random(seed)
    return ["".join(generator.choices(alphabet, k=generator.randrange(length))) for _ in range(count)]


def predictable(model):
    return [token for token in range(len(model.vocabulary)) if token != START]


def states_of(model):
    return sorted(set(model.trie["next_state"][:-1].tolist()) | {0, model.start_state})


def arpa_of(model, **options):
    stream = io.StringIO()
    model.to_arpa(stream, **options)
    return stream.getvalue()


def bytes_of(model):
    stream = io.BytesIO()
    model.save(stream)
    return stream.getvalue()


class PlainKneserNey:
    """The same estimator after the textbook: dictionaries, float64, probabilities by recursion."""

    def __init__(self, sentences, order):
        self.order = order
        self.size = len({token for sentence in sentences for token in sentence} | {"<unk>", "</s>"})
        raw = [Counter() for _ in range(order + 1)]
        for sentence in sentences:
            padded = ("<s>", *sentence, "</s>")
            for n in range(1, order + 1):
                raw[n].update(padded[i : i + n] for i in range(len(padded) - n + 1))
        self.counts = [Counter()] * (order + 1)
        for n in range(1, order + 1):
            if n == order:
                self.counts[n] = raw[n]
            else:
                preceding = defaultdict(set)
                for gram in raw[n + 1]:
                    preceding[gram[1:]].add(gram[0])
                self.counts[n] = Counter(
                    {gram: raw[n][gram] if gram[0] == "<s>" else len(preceding[gram]) for gram in raw[n]}
                )
        self.counts[1] = Counter({gram: count for gram, count in self.counts[1].items() if gram != ("<s>",)})
        self.discounts = [self.discounts_of(Counter(counts.values())) for counts in self.counts]
        self.followers = defaultdict(dict)
        for counts in self.counts:
            for gram, count in counts.items():
                self.followers[gram[:-1]][gram[-1]] = count

    @staticmethod
    def discounts_of(n):
        if n[1] and n[2] and n[3] and n[4]:
            y = n[1] / (n[1] + 2 * n[2])
            found = (0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
            if min(found[1:]) > 0:
                return found
        return (0.0, 0.5, 1.0, 1.5)

    def probability(self, token, context):
        shorter = self.probability(token, context[1:]) if context else 1 / self.size
        followers = self.followers.get(context)
        if not followers:
            return shorter
        total = sum(followers.values())
        discounts = self.discounts[len(context) + 1]
        count = followers.get(token, 0)
        held_back = sum(discounts[min(other, 3)] for other in followers.values())
        return (count - discounts[min(count, 3)]) / total + held_back / total * shorter

    def score(self, sentence):
        padded = ("<s>", *sentence, "</s>")
        return sum(
            math.log(self.probability(padded[i], padded[max(0, i - self.order + 1) : i])) for i in range(1, len(padded))
        )


# --- Estimation


def test_kneser_ney_by_hand():
    """Order 2 from "aa" and "ab": <s> a a </s> and <s> a b </s>. Discounts are 0.5, 1, 1.5: too small a corpus.

    Single tokens count the different tokens before them: a 2 (<s>, a), b 1 (a), </s> 2 (a, b), in all 5.
    Held back of them: 1 + 0.5 + 1 = 2.5, spread evenly over a, b, </s>, <unk>: 2.5 / 5 / 4 = 0.125 each.
        P(a) = (2 - 1) / 5 + 0.125 = 0.325     P(b) = (1 - 0.5) / 5 + 0.125 = 0.225
        P(</s>) = 0.325                        P(<unk>) = 0.125                       sum 1
    After <s>: a 2 times of 2, held back 1 / 2.     P(a | <s>) = (2 - 1) / 2 + 0.5 x 0.325 = 0.6625
    After a: a 1, b 1, </s> 1 of 3, held back 1.5 / 3.
        P(b | a) = (1 - 0.5) / 3 + 0.5 x 0.225 = 0.1666... + 0.1125
        P(<unk> | a) = 0.5 x 0.125
    After b: </s> 1 of 1, held back 0.5.            P(</s> | b) = 0.5 + 0.5 x 0.325 = 0.6625
    """
    model = CharacterNGram.train(["aa", "ab"], 2)
    a, b = 3, 4
    after_start = model.start_state
    log_prob_a, after_a = advance(model.trie, after_start, a)
    log_prob_b, after_b = advance(model.trie, after_a, b)
    assert math.exp(log_prob_a) == pytest.approx(0.6625)
    assert math.exp(log_prob_b) == pytest.approx(1 / 6 + 0.1125)
    assert math.exp(advance(model.trie, after_a, UNKNOWN)[0]) == pytest.approx(0.0625)
    assert math.exp(advance(model.trie, after_b, END)[0]) == pytest.approx(0.6625)
    assert math.exp(model.score("ab")) == pytest.approx(0.6625 * (1 / 6 + 0.1125) * 0.6625)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 3), (2, 40), (3, 400)])
def test_scores_are_those_of_a_plain_implementation(seed, count, order):
    texts = random_texts(seed, count)
    model, plain = CharacterNGram.train(texts, order), PlainKneserNey([tuple(text) for text in texts], order)
    for text in ["", "a", *texts[:20], *random_texts(seed + 9, 20)]:
        known = [character if character in model.vocabulary else "<unk>" for character in text]
        assert model.score(text) == pytest.approx(plain.score(tuple(known)), abs=FLOAT32 * (len(text) + 1))


def test_words_are_scored_like_characters():
    texts = random_texts(5, 100, "abc   ", 30)
    model, plain = WordNGram.train(texts, 3), PlainKneserNey([tuple(text.split()) for text in texts], 3)
    for text in texts[:20]:
        assert model.score(text) == pytest.approx(plain.score(tuple(text.split())), abs=FLOAT32 * 20)


def test_large_counts_use_estimated_discounts():
    plain = PlainKneserNey([tuple(text) for text in random_texts(3, 400)], 4)
    assert plain.discounts[4] != (0.0, 0.5, 1.0, 1.5)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("texts", [[""], ["a"], random_texts(7, 200)])
def test_every_distribution_sums_to_one(texts, order):
    model = CharacterNGram.train(texts, order)
    for state in states_of(model):
        total = math.fsum(math.exp(advance(model.trie, state, token)[0]) for token in predictable(model))
        assert total == pytest.approx(1, abs=1e-6)


def test_distributions_after_every_possible_history_sum_to_one():
    model = CharacterNGram.train(["abba", "ab", "b"], 3)
    for history in itertools.product(predictable(model), repeat=3):
        state = model.start_state
        for token in history:
            _, state = advance(model.trie, state, token)
        total = math.fsum(math.exp(advance(model.trie, state, token)[0]) for token in predictable(model))
        assert total == pytest.approx(1, abs=1e-6)


def test_order_of_the_texts_does_not_matter():
    texts = random_texts(11, 60)
    assert bytes_of(CharacterNGram.train(texts, 4)) == bytes_of(CharacterNGram.train(texts[::-1], 4))


def test_longer_context_predicts_repeating_text_better():
    texts = ["le chat est sur le toit"] * 3 + ["le chien est sous le toit"] * 3
    perplexities = [CharacterNGram.train(texts, order).perplexity(texts) for order in (1, 2, 3, 5)]
    assert perplexities == sorted(perplexities, reverse=True)


def test_perplexity_of_a_uniform_model_is_the_number_of_tokens():
    # One empty text: P(</s>) = (1 - 0.5) / 1 + 0.5 / 2 = 0.75, P(<unk>) = 0.25.
    model = CharacterNGram.train([""], 1)
    assert model.perplexity([""]) == pytest.approx(4 / 3)
    assert model.perplexity(["x"]) == pytest.approx(math.sqrt(4 * 4 / 3))


def test_special_words_in_a_text_are_unknown_words():
    model = WordNGram.train(["a <s> b </s> <unk>"], 2)
    assert model.vocabulary == ("<unk>", "<s>", "</s>", "a", "b")
    assert model.encode("a <s> b </s> x").tolist() == [3, UNKNOWN, 4, UNKNOWN, UNKNOWN]


def test_words_are_what_white_space_separates():
    model = WordNGram.train(["L'eau, dit-il :  oui"])
    assert model.vocabulary[3:] == (":", "L'eau,", "dit-il", "oui")


@pytest.mark.parametrize("order", [0, 33, 2.5, "3"])
def test_order_out_of_range_is_refused(order):
    with pytest.raises(ValueError, match="order = "):
        CharacterNGram.train(["a"], order)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="at least one text"):
        CharacterNGram.train([])
    with pytest.raises(ValueError, match="one string"):
        CharacterNGram.train("abc")
    with pytest.raises(ValueError, match="at least one text"):
        CharacterNGram.train(["a"]).perplexity([])
    with pytest.raises(ValueError, match="one string"):
        CharacterNGram.train(["a"]).perplexity("abc")


# --- Walking the trie


def test_advance_from_compiled_code_gives_the_score():
    @numba.njit
    def walk(trie, state, tokens):
        total = 0.0
        for token in tokens:
            log_prob, state = advance(trie, state, token)
            total += log_prob
        return total + advance(trie, state, END)[0]

    texts = random_texts(13, 50)
    model = CharacterNGram.train(texts, 4)
    for text in [*texts[:10], "zz a"]:
        assert walk(model.trie, model.start_state, model.encode(text)) == model.score(text)


def test_histories_that_predict_alike_share_a_state():
    model = CharacterNGram.train(["abc", "xbc"], 3)
    ends = set()
    for text in ("abc", "xbc"):
        state = model.start_state
        for token in model.encode(text):
            _, state = advance(model.trie, state, token)
        ends.add(state)
    assert len(ends) == 1
    assert len(states_of(CharacterNGram.train(["abc"], 1))) == 1


def test_classes_of_a_charset_become_tokens():
    charset = Charset(["b", " ", "ß", "a"])
    model = CharacterNGram.train(["a b"], 2)
    tokens = model.token_of_class(charset.characters)
    assert tokens.dtype == np.int32
    assert [model.vocabulary[token] for token in tokens] == ["b", " ", "<unk>", "a"]


# --- Saving


@pytest.mark.parametrize("model", [CharacterNGram.train(random_texts(19, 60), 4), WordNGram.train(["a b", "b c a"])])
def test_saved_model_is_the_same_model(model, tmp_path):
    model.save(tmp_path / "model.npz")
    loaded = type(model).load(tmp_path / "model.npz")
    assert (loaded.order, loaded.vocabulary, loaded.start_state) == (model.order, model.vocabulary, model.start_state)
    assert loaded.trie.tobytes() == model.trie.tobytes()
    assert (tmp_path / "model.npz").read_bytes() == bytes_of(model)
    assert type(model).load(io.BytesIO(bytes_of(model))).score("a b") == model.score("a b")
    either = load_language_model(tmp_path / "model.npz")
    assert type(either) is type(model)
    assert either.trie.tobytes() == model.trie.tobytes()


def test_model_of_the_other_kind_is_refused(tmp_path):
    CharacterNGram.train(["ab"]).save(tmp_path / "model.npz")
    with pytest.raises(ValueError, match=r"model\.npz: holds a character model, expected a word model"):
        WordNGram.load(tmp_path / "model.npz")


def test_file_that_is_no_model_is_refused_where_the_kind_is_not_known(tmp_path):
    (tmp_path / "model.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"model\.npz: cannot be read as a language model"):
        load_language_model(tmp_path / "model.npz")
    np.savez(
        tmp_path / "other.npz",
        header=np.frombuffer(b'["list"]', np.uint8),
        **dict.fromkeys(("token", "num_children", "log_prob", "backoff"), np.zeros(1, np.float32)),
    )
    with pytest.raises(ValueError, match=r"other\.npz: the header says nothing of the format"):
        load_language_model(tmp_path / "other.npz")


def test_file_that_unpacks_to_too_much_is_refused():
    with pytest.raises(ValueError, match="more than size_limit = 1000"):
        CharacterNGram.load(io.BytesIO(bytes_of(CharacterNGram.train(["ab" * 500]))), size_limit=1000)


def rewritten(data, **changes):
    """The same file with some arrays replaced."""
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    stream = io.BytesIO()
    np.savez_compressed(stream, **{name: array for name, array in arrays.items() if array is not None})
    return stream.getvalue()


def header(**changes):
    fields = {"format": "htr_pipeline n-gram 1", "kind": "character", "order": 2, "vocabulary": SMALL.vocabulary}
    return np.frombuffer(json.dumps(fields | changes).encode(), np.uint8)


# Nodes: the root, <unk> <s> </s> a b, then <s>a aa ab a</s> b</s>.
SMALL = CharacterNGram.train(["aa", "ab"], 2)
TOKEN = SMALL.trie["token"][:-1].astype(np.uint8)
CHILDREN = np.diff(SMALL.trie["first_child"]).astype(np.uint8)
LOGS = SMALL.trie["log_prob"][:-1].copy()


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


HOSTILE = {
    "array missing": {"token": None},
    "pickled objects": {"token": np.array([{}, []], dtype=object)},
    "floats as tokens": {"token": TOKEN.astype(np.float32)},
    "signed tokens": {"token": TOKEN.astype(np.int8)},
    "double precision": {"log_prob": LOGS.astype(np.float64)},
    "two dimensions": {"token": TOKEN[None]},
    "arrays of different length": {"token": TOKEN[:-1]},
    "no n-grams": {"token": TOKEN[:0], "num_children": CHILDREN[:0], "log_prob": LOGS[:0], "backoff": LOGS[:0]},
    "token past the vocabulary": {"token": with_value(TOKEN, 7, 5)},
    "huge token": {"token": with_value(TOKEN.astype(np.uint64), 7, 2**63)},
    "tokens out of order": {"token": with_value(TOKEN, slice(7, 9), [4, 3])},
    "token twice": {"token": with_value(TOKEN, 8, TOKEN[7])},
    "single tokens out of order": {"token": with_value(TOKEN, slice(1, 3), [1, 0])},
    "more children than nodes": {"num_children": with_value(CHILDREN, 5, 9)},
    "fewer children than nodes": {"num_children": with_value(CHILDREN, 5, 0)},
    "children that wrap around": {"num_children": with_value(CHILDREN.astype(np.uint64), 5, 2**64 - 1)},
    "node that is its own parent": {"num_children": with_value(CHILDREN, [2, 5, 10], [0, 0, 2])},
    "single tokens missing": {"num_children": with_value(CHILDREN, [0, 5], [4, 2])},
    "NaN": {"log_prob": with_value(LOGS, 6, np.nan)},
    "weight of the longest n-grams": {"backoff": with_value(LOGS, -1, -0.5)},
    "infinite": {"backoff": with_value(LOGS, 6, -np.inf)},
    "header that is no JSON": {"header": np.frombuffer(b"{", np.uint8)},
    "header nested too deep": {"header": np.frombuffer(b"[" * 100_000, np.uint8)},
    "header of another kind": {"header": np.frombuffer(b"[1]", np.uint8)},
    "newer format": {"header": header(format="htr_pipeline n-gram 2")},
    "order not a number": {"header": header(order="2")},
    "order too large": {"header": header(order=10**9)},
    "order below the longest n-gram": {"header": header(order=1)},
    "vocabulary too short": {"header": header(vocabulary=SMALL.vocabulary[:-1])},
    "vocabulary unsorted": {"header": header(vocabulary=[*SMALL.vocabulary[:3], "b", "a"])},
    "vocabulary of numbers": {"header": header(vocabulary=[*SMALL.vocabulary[:3], 1, 2])},
    "vocabulary of words": {"header": header(vocabulary=[*SMALL.vocabulary[:3], "a", "bb"])},
    "vocabulary without specials": {"header": header(vocabulary=["a", "b", "c", "d", "e"])},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_arrays_are_refused(changes):
    with pytest.raises(ValueError, match="the language model: "):
        CharacterNGram.load(io.BytesIO(rewritten(bytes_of(SMALL), **changes)))


def test_unchanged_arrays_are_accepted():
    data = rewritten(bytes_of(SMALL), token=TOKEN, num_children=CHILDREN, header=header())
    assert CharacterNGram.load(io.BytesIO(data)).trie.tobytes() == SMALL.trie.tobytes()


def test_array_header_that_claims_more_than_the_file_holds_reserves_no_memory():
    with zipfile.ZipFile(io.BytesIO(bytes_of(SMALL))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    shape = f"({len(TOKEN)},)".encode()
    members["token.npy"] = members["token.npy"].replace(shape + b", }" + b" " * 11, b"(%d,), }" % 10**12 + b" ")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="1000000000000"):
        CharacterNGram.load(stream)


def test_no_damaged_file_crashes_or_leads_outside_the_trie():
    generator = random.Random(23)
    model = CharacterNGram.train(random_texts(29, 20), 3)
    with np.load(io.BytesIO(bytes_of(model))) as archive:
        arrays = {name: archive[name] for name in archive.files}
    accepted = 0
    for _ in range(600):
        if generator.random() < 0.4:  # bytes of the file itself
            data = bytearray(bytes_of(model))
            for _ in range(generator.randrange(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            data = bytes(data[: generator.randrange(len(data))] if generator.random() < 0.2 else data)
        else:  # bytes inside the arrays, where no checksum protects
            changed = {name: bytearray(array.tobytes()) for name, array in arrays.items()}
            for _ in range(generator.randrange(1, 4)):
                name = generator.choice(["token", "num_children", "num_children", "log_prob", "backoff", "header"])
                changed[name][generator.randrange(len(changed[name]))] = generator.randrange(256)
            data = rewritten(
                bytes_of(model),
                **{name: np.frombuffer(content, arrays[name].dtype) for name, content in changed.items()},
            )
        try:
            loaded = CharacterNGram.load(io.BytesIO(data))
        except ValueError:
            continue
        accepted += 1
        trie, size = loaded.trie, len(loaded.trie) - 1
        assert ((trie["suffix"][1:-1] >= 0) & (trie["suffix"][1:-1] < np.arange(1, size))).all()
        assert ((trie["next_state"][:-1] >= 0) & (trie["next_state"][:-1] < size)).all()
        assert (np.diff(trie["first_child"]) >= 0).all()
        assert trie["first_child"][-1] == size
        assert ((trie["token"][:-1] >= 0) & (trie["token"][:-1] < len(loaded.vocabulary))).all()
        assert math.isfinite(loaded.score("ab cé x"))
    assert accepted > 20


# --- ARPA


@pytest.mark.parametrize("order", [1, 2, 4, 7])
def test_arpa_round_trip_keeps_the_scores(order, tmp_path):
    texts = random_texts(31, 100)
    model = CharacterNGram.train(texts, order)
    model.to_arpa(tmp_path / "model.arpa")
    (tmp_path / "model.arpa.gz").write_bytes(gzip.compress((tmp_path / "model.arpa").read_bytes()))
    for name in ("model.arpa", "model.arpa.gz"):
        read = CharacterNGram.from_arpa(tmp_path / name)
        assert (read.order, read.vocabulary) == (model.order, model.vocabulary)
        for text in [*texts[:20], "", "x a"]:
            assert read.score(text) == pytest.approx(model.score(text), abs=1e-5)


def test_arpa_round_trip_keeps_every_bit():
    model = CharacterNGram.train(random_texts(33, 300), 5)
    assert (CharacterNGram.from_arpa(arpa_of(model).splitlines()).trie == model.trie).all()


def test_byte_order_mark_is_a_mark_before_the_file_and_a_character_within():
    model = CharacterNGram.train(["\ufeffa", "a\ufeff"], 2)
    read = CharacterNGram.from_arpa(("\ufeff" + arpa_of(model)).splitlines())
    assert read.vocabulary == model.vocabulary
    assert read.score("a\ufeffa") == pytest.approx(model.score("a\ufeffa"), abs=1e-5)


def test_arpa_round_trip_of_words():
    model = WordNGram.train(["a b c", "a b", "c, a\u00a0b"])
    read = WordNGram.from_arpa(arpa_of(model).split("\n"))
    assert read.vocabulary == model.vocabulary
    assert read.score("a b d") == pytest.approx(model.score("a b d"), abs=1e-5)


def test_texts_shorter_than_the_order_survive_saving_and_arpa():
    model = CharacterNGram.train(["a"], 6)
    assert CharacterNGram.load(io.BytesIO(bytes_of(model))).order == 6
    assert CharacterNGram.from_arpa(arpa_of(model).splitlines()).score("a") == pytest.approx(model.score("a"), abs=1e-5)


@pytest.mark.parametrize("space_token", ["<unk>", "<UNK>", "<s>", "</s>"])
def test_blank_cannot_have_the_name_of_something_else(tmp_path, space_token):
    model = CharacterNGram.train(["a b"], 2)
    with pytest.raises(ValueError, match=f"space_token = '{space_token}' is what ARPA calls something else"):
        model.to_arpa(tmp_path / "model.arpa", space_token=space_token)
    assert not (tmp_path / "model.arpa").exists()
    with pytest.raises(ValueError, match="is what ARPA calls something else"):
        CharacterNGram.from_arpa(arpa_of(model).splitlines(), space_token=space_token)


@pytest.mark.parametrize("space_token", ["<space>", "▁", "|"])
def test_blank_of_a_character_model_has_a_name_in_arpa(space_token):
    model = CharacterNGram.train(["a b", "b a"], 2)
    text = arpa_of(model, space_token=space_token)
    assert f"\ta {space_token}\n" in text
    assert "\n-99\t<s>\t" in text
    assert CharacterNGram.from_arpa(text.splitlines(), space_token=space_token).vocabulary == model.vocabulary


@pytest.mark.parametrize(
    ("kind", "text", "token"),
    [
        (CharacterNGram, "a|b c", r"'\|'"),
        (CharacterNGram, "a|b", r"'\|'"),
        (CharacterNGram, "a\tb", r"'\\t'"),
        (CharacterNGram, "a\udc80", r"'\\udc80'"),
        (WordNGram, "le | chat", r"'\|'"),
        (WordNGram, "le <UNK> chat", "'<UNK>'"),
    ],
)
def test_tokens_that_arpa_cannot_hold_are_refused(kind, text, token, tmp_path):
    with pytest.raises(ValueError, match=rf"cannot write \[{token}\] with space_token = '\|'"):
        kind.train([text], 2).to_arpa(tmp_path / "model.arpa", space_token="|")
    assert not (tmp_path / "model.arpa").exists()


def test_probability_above_one_that_a_foreign_file_implies_is_not_written():
    grams = ["-1 <s>", "-1 </s>", "-0.3 a 0.6", "-0.2 b"]  # "a b" is missing: 10^(0.6 - 0.2)
    header = ["\\data\\", "ngram 1=4", "ngram 2=0", "ngram 3=1"]
    model = CharacterNGram.from_arpa(
        [*header, "\\1-grams:", *grams, "\\2-grams:", "\\3-grams:", "-0.5 a b a", "\\end\\"]
    )
    with pytest.raises(ValueError, match=r"probability of 10\^0\.4, which ARPA cannot hold"):
        arpa_of(model)


# As lmplz writes: tabs, <unk> first, 0 for <s>, no backoff for </s> and the longest.
KENLM = r"""\data\
ngram 1=5
ngram 2=4

\1-grams:
-1.0	<unk>	0
0	<s>	-0.3
-0.5	</s>	0
-0.4	a	-0.2
-0.7	<space>	-0.1

\2-grams:
-0.15	<s> a
-0.25	a <space>
-0.35	<space> a
-0.45	a </s>

\end\
"""

# As ngram-count writes: a first blank line, counts with blanks, -99 for <s>, no <unk>, and after pruning "b a b" whose
# prefix "b a" is missing.
SRILM = r"""
\data\
ngram  1=4
ngram  2=2
ngram  3=2

\1-grams:
-0.6 </s>
-99 <s> -0.5
-0.5 a -0.3
-0.4 b -0.2

\2-grams:
-0.1 <s> a -0.05
-0.2 a b

\3-grams:
-0.01 <s> a b
-0.02 b a b

\end\
"""


def log10_score(model, text):
    return model.score(text) / math.log(10)


def test_kenlm_file_by_hand():
    model = CharacterNGram.from_arpa(KENLM.splitlines())
    assert model.vocabulary == ("<unk>", "<s>", "</s>", " ", "a")
    # <s> a, a blank, blank a, a </s>
    assert log10_score(model, "a a") == pytest.approx(-0.15 - 0.25 - 0.35 - 0.45)
    # <s> backs off to the blank, which backs off to </s>
    assert log10_score(model, " ") == pytest.approx(-0.3 - 0.7 - 0.1 - 0.5)
    # <s> backs off to <unk>, which leaves no context
    assert log10_score(model, "x") == pytest.approx(-0.3 - 1.0 - 0.5)


def test_srilm_file_by_hand():
    model = CharacterNGram.from_arpa(SRILM.splitlines())
    assert model.order == 3
    # P(a | <s>), P(b | <s> a), then "a b" has no backoff weight and b has -0.2
    assert log10_score(model, "ab") == pytest.approx(-0.1 - 0.01 - 0.2 - 0.6)
    # P(b | <s>) and P(a | b) by backing off, then the trigram whose prefix the file lacks
    assert log10_score(model, "bab") == pytest.approx(-0.5 - 0.4 - 0.2 - 0.5 - 0.02 - 0.2 - 0.6)
    assert log10_score(model, "x") == pytest.approx(-0.5 - 99 - 0.6)
    assert log10_score(WordNGram.from_arpa(SRILM.splitlines()), "b a b") == pytest.approx(log10_score(model, "bab"))


def test_prefixes_put_in_may_be_less_likely_than_what_files_write_for_zero():
    text = SRILM.replace("ngram  2=2", "ngram  2=1").replace("-0.2 a b\n", "").replace("-0.3", "-2")
    text = text.replace("-0.4 b", "-99 b").replace("b a b", "a b b")
    model = CharacterNGram.from_arpa(text.splitlines())
    expected = -0.1 - 0.05 - 2 - 0.5 - 2 - 99 - 0.2 - 0.6  # "a b" is put in with 10^-101
    assert log10_score(model, "aab") == pytest.approx(expected)
    assert log10_score(CharacterNGram.from_arpa(arpa_of(model).splitlines()), "aab") == pytest.approx(expected)


@pytest.mark.parametrize(("num_trigrams", "weight_of_pair"), [(None, 0), (0, -0.125)])
def test_unknown_in_capitals_special_tokens_missing_and_backoff_without_followers(num_trigrams, weight_of_pair):
    lines = ["\\data\\", "ngram 1=2", "ngram 2=1", r"\1-grams:", "-1 <UNK>", "-0.5 a -0.25", r"\2-grams:"]
    if num_trigrams is not None:
        lines.insert(3, f"ngram 3={num_trigrams}")
    lines.append("-0.1 a a -0.125")
    if num_trigrams is not None:
        lines.append(r"\3-grams:")
    model = WordNGram.from_arpa([*lines, "\\end\\", "ignored"])
    assert model.vocabulary == ("<unk>", "<s>", "</s>", "a")
    # A model of pairs looks one token back, whatever weight a pair has; one of three has the weight of "a a" count,
    # although nothing follows it.
    assert log10_score(model, "a a x") == pytest.approx(-0.5 - 0.1 + weight_of_pair - 0.25 - 1 - 99)


def test_weights_of_single_tokens_that_nothing_follows_are_left_out():
    lines = ["\\data\\", "ngram 1=4", r"\1-grams:", "-1 <unk>", "-99 <s> -0.4", "-0.5 </s>", "-0.3 a -0.25", "\\end\\"]
    assert log10_score(CharacterNGram.from_arpa(lines), "a?") == pytest.approx(-0.3 - 1 - 0.5)


def test_character_model_is_no_word_model():
    lines = ["\\data\\", "ngram 1=2", r"\1-grams:", "-1 <space>", "-0.5 a", "\\end\\"]
    with pytest.raises(ValueError, match=r"\['<space>'\] among the 1-grams.*not single characters alone"):
        WordNGram.from_arpa(lines)


def test_word_model_with_the_blank_as_a_word_scores_it_behind_each_word_but_the_last(tmp_path):
    texts = ["the cat sat", "the cat", "a cat sat on the mat", "sat"]
    spaced = WordNGram.train([text.replace(" ", " ▁ ") for text in texts], 3)
    spaced.to_arpa(tmp_path / "spaced.arpa")
    model = WordNGram.from_arpa(tmp_path / "spaced.arpa", space_token="▁")
    assert model.vocabulary[3] == " "
    for text in (*texts, "cat the unknown", ""):
        assert model.score(text) == pytest.approx(spaced.score(text.replace(" ", " ▁ ")), rel=1e-6)
    model.to_arpa(tmp_path / "again.arpa", space_token="▁")
    assert WordNGram.from_arpa(tmp_path / "again.arpa", space_token="▁").score("the mat") == model.score("the mat")
    model.save(tmp_path / "model.npz")
    restored = WordNGram.load(tmp_path / "model.npz")
    assert (restored.space_token, restored.score("the mat")) == (3, model.score("the mat"))


def test_packed_arpa_is_written_as_it_is_read(tmp_path):
    model = WordNGram.train(["a b é", "b d"], 2)
    for name in ("a.arpa.gz", "b.ARPA.GZ"):
        model.to_arpa(tmp_path / name)
        assert gzip.decompress((tmp_path / name).read_bytes()).decode() == arpa_of(model)
        assert WordNGram.from_arpa(tmp_path / name).vocabulary == model.vocabulary
    assert (tmp_path / "a.arpa.gz").read_bytes() == (tmp_path / "b.ARPA.GZ").read_bytes()


def test_bytes_are_no_text(tmp_path):
    (tmp_path / "model.arpa").write_text(KENLM)
    with (
        (tmp_path / "model.arpa").open("rb") as file,
        pytest.raises(ValueError, match=r"line 1: .*expected text; open"),
    ):
        WordNGram.from_arpa(file)
    with pytest.raises(ValueError, match=r"Among the texts there is b'ab': expected str"):
        CharacterNGram.train(["ab", b"ab"], 2)


def test_pruned_prefixes_of_several_lengths_change_no_score():
    model = WordNGram.from_arpa(
        r"""\data\
ngram 1=4
ngram 2=0
ngram 3=0
ngram 4=1

\1-grams:
-1 <unk>
-0.5 a -0.1
-0.6 b -0.2
-0.7 </s>
\2-grams:
\3-grams:
\4-grams:
-0.01 a b a b
\end\
""".splitlines()
    )
    assert log10_score(model, "a b a b") == pytest.approx(-0.5 - 0.1 - 0.6 - 0.2 - 0.5 - 0.01 - 0.2 - 0.7)


MALFORMED = {
    "no header": ("", "line 0: found 'the end of the file', expected .*data"),
    "no end": (KENLM.replace("\\end\\", ""), "line 18: found 'the end of the file', expected .*end"),
    "cut in the header": ("\\data\\\nngram 1=5\n", "expected .*1-grams"),
    "header without counts": ("\\data\\\n\\1-grams:\n", "expected 'ngram 1=COUNT'|expected ngram 1=COUNT"),
    "count too high": (KENLM.replace("ngram 1=5", "ngram 1=6"), "line 12: found .*expected 6 1-grams"),
    "count too low": (KENLM.replace("ngram 2=4", "ngram 2=3"), "line 18: .*expected 3 2-grams"),
    "enormous count": (KENLM.replace("ngram 2=4", "ngram 2=999999999999999"), "expected 999999999999999 2-grams"),
    "count that is none": (KENLM.replace("ngram 2=4", "ngram 2=x"), "line 3: found 'ngram 2=x'"),
    "order left out": (KENLM.replace("ngram 2=4", "ngram 3=4"), "line 3: found 'ngram 3=4'"),
    "section left out": (KENLM.replace("\\1-grams:", "\\2-grams:"), "line 5: found .*expected .*1-grams"),
    "section too many": (KENLM.replace("ngram 2=4\n", ""), "expected .*end"),
    "probability that is none": (KENLM.replace("-0.35", "-0.3.5"), "line 15: found '-0.3.5', expected a number"),
    "NaN": (KENLM.replace("-0.35", "nan"), "line 15: found 'nan', expected a number"),
    "probability above 1": (KENLM.replace("-0.35", "0.35"), "line 15: .*expected log10 of a probability"),
    "infinite backoff": (KENLM.replace("\t-0.2\n", "\tinf\n"), "line 9: .*backoff weight of at most 99"),
    "too few tokens": (KENLM.replace("a </s>", "a"), "line 16: .*2 tokens"),
    "too many tokens": (KENLM.replace("a </s>", "a a a a"), "line 16: .*2 tokens"),
    "token not among the 1-grams": (KENLM.replace("a </s>", "a b"), "line 16: .*'b' is not"),
    "1-gram twice": (KENLM.replace("-0.7\t<space>", "-0.7\ta"), "line 10: .*each 1-gram once"),
    "2-gram twice": (KENLM.replace("a </s>", "<s> a"), "line 16: .*also on line 13"),
    "two names of one token": (KENLM.replace("-0.7\t<space>", "-0.7\t<UNK>").replace("<space>", "a"), "same token"),
    "words in a character model": (KENLM.replace("<space>", "word"), r"\['word'\] among the 1-grams"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_arpa_is_refused_with_its_place(text, message, tmp_path):
    (tmp_path / "model.arpa").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        CharacterNGram.from_arpa(tmp_path / "model.arpa")
    assert "model.arpa" in str(error.value)


def test_arpa_that_is_not_text_is_refused(tmp_path):
    packed = gzip.compress(KENLM.encode())
    contents = {
        "latin.arpa": ("%%%" * 50_000 + "\n\\data\\\n-1\té").encode("latin-1"),
        "utf-16.arpa": KENLM.encode("utf-16"),
        "packed.arpa": packed,
        "damaged.gz": packed[:-20],
        "plain.gz": KENLM.encode(),
    }
    messages = {
        "latin.arpa": r"line 3: found '-1\\t\\udce9', expected UTF-8: save it so",
        "utf-16.arpa": "line 1: .*expected UTF-8: save it so",
        "packed.arpa": r"line 1: .*let its name end in \.gz",
        "damaged.gz": r"what ends in \.gz is unpacked, and this cannot be .*Fetch the file again",
        "plain.gz": "rename it if it is not packed",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{messages[name]}"):
            CharacterNGram.from_arpa(tmp_path / name)


def test_line_that_unpacks_to_more_than_memory_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "model.arpa.gz").write_bytes(gzip.compress(b"a" * (64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"line 1: found .*expected lines of less than"):
            CharacterNGram.from_arpa(tmp_path / "model.arpa.gz")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_damaged_arpa_is_read_or_refused_but_never_crashes():
    generator = random.Random(37)
    lines = arpa_of(CharacterNGram.train(random_texts(41, 10), 3)).splitlines()
    for _ in range(300):
        damaged = list(lines)
        for _ in range(generator.randrange(1, 3)):
            place = generator.randrange(len(damaged))
            change = generator.choice(["delete", "repeat", "swap", "character"])
            if change == "delete":
                del damaged[place]
            elif change == "repeat":
                damaged.insert(place, damaged[place])
            elif change == "swap":
                other = generator.randrange(len(damaged))
                damaged[place], damaged[other] = damaged[other], damaged[place]
            elif damaged[place]:
                at = generator.randrange(len(damaged[place]))
                damaged[place] = damaged[place][:at] + generator.choice("0-9a\\ \t=") + damaged[place][at + 1 :]
        try:
            model = CharacterNGram.from_arpa(damaged)
        except ValueError:
            continue
        assert math.isfinite(model.score("ab cé x"))


# --- For the search


def test_spelling_has_the_words_that_the_classes_can_write_and_is_kept():
    model = WordNGram.train(["le lé", "la"], 1)
    classes = ("l", "", "e", "a", " ")
    trie = model.spelling(classes)
    assert model.spelling(classes) is trie
    assert sorted(model.vocabulary[word] for word in trie["word"] if word) == ["la", "le"]
    assert len(model.spelling(("e", ""))) == 2


def test_no_token_exceeds_max_log_prob():
    models = [CharacterNGram.train(random_texts(seed, 20), order) for seed in range(5) for order in (1, 2, 4)]
    raised = ["\\data\\", "ngram 1=4", "ngram 2=1", "\\1-grams:", "-9 <s> 2", "-2 </s> 0", "-2 a 3", "-2 b 0"]
    models.append(CharacterNGram.from_arpa([*raised, "\\2-grams:", "-1 a b", "\\end\\"]))
    for model in models:
        best = max(advance(model.trie, state, token)[0] for state in states_of(model) for token in predictable(model))
        assert best <= model.max_log_prob
