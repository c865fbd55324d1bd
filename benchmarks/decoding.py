"""Time and scores of our beam search beside others on the same matrices: `python benchmarks/decoding.py`.

Needs the project's own dependencies. fast-ctc-decode, flashlight-text, ctc-beam-decoder and pyctcdecode (with kenlm)
join where they are installed; pyctcdecode asks for NumPy 1, but runs after `pip install --no-deps pyctcdecode pygtrie`.
The matrices spell lines of the demo's prose: "peaky" as a trained network does it, with wrong readings beside the right
ones, "flat" as an untrained one. Models of characters (order 6) and words (order 3) are trained on that prose and given
to all as the same ARPA file, with the same weight; those who prune further do so by their own defaults. The decoders
take turns, so that a busy machine slows them all, and may use all cores; figures are median milliseconds, a decoder
that takes longer than ten seconds runs once. "score" is the mean over the lines of what
the search is after, log P(text | matrix) + alpha log P(text), of the texts found, computed by us.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import collections
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import htr_pipeline
from htr_pipeline.core.ctc.decoding import beam_search
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram

PROSE = Path(htr_pipeline.__file__).parent / "io" / "importers" / "demo_prose.txt"
SHAPES = [(32, 128, 80), (32, 256, 110)]  # B, T, K
ALPHA = 0.5


def log_softmax(logits):
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).astype(np.float32)


def flat_log_probs(random, shape, _):
    return log_softmax(random.normal(size=shape))


def peaky_log_probs(random, shape, characters):
    """Blanks, with a character of the prose and up to two other readings in every third frame."""
    prose = [character for character in PROSE.read_text(encoding="utf-8").replace("\n", " ") if character in characters]
    logits = random.normal(scale=1.5, size=shape)
    logits[:, :, -1] += 10
    for line in logits:
        start = random.integers(len(prose) - len(line))
        for place, frame in enumerate(np.arange(0, len(line) - 2, 3) + random.integers(0, 2)):
            wrong = random.choice(len(characters), size=random.integers(0, 3), replace=False)
            line[frame, [characters.index(prose[start + place]), *wrong]] += random.uniform(9, 15, size=1 + len(wrong))
    return log_softmax(logits)


def real_log_probs(folder):
    """The 100 x 80 matrix of a line, 32 times, and its characters."""
    rows = (folder / "line" / "rnnOutput.csv").read_text().split()
    logits = np.array([[float(cell) for cell in row.split(";")[:-1]] for row in rows])
    return log_softmax(np.repeat(logits[np.newaxis], 32, axis=0)), (folder / "chars.txt").read_text(encoding="utf-8")


def prose_characters(number):
    """The most common characters of the prose, filled up with others."""
    common = [c for c, _ in collections.Counter(PROSE.read_text(encoding="utf-8").replace("\n", " ")).most_common()]
    return "".join([*common, *(chr(0x3B1 + n) for n in range(number))][:number])


# Each of these returns a search: a function of log_probs (B, T, K) that returns texts.


def ours(characters, beam_width, model, _):
    def search(log_probs):
        found = beam_search(
            log_probs,
            beam_width=beam_width,
            characters=characters,
            language_model=model,
            alpha=ALPHA,
        )
        return ["".join(characters[label] for label in line[0].labels) for line in found]

    return search


def tensorflow(characters, beam_width, *_):
    def search(log_probs):
        lengths = np.full(len(log_probs), log_probs.shape[1], np.int32)
        (found,), _ = tf.nn.ctc_beam_search_decoder(log_probs.swapaxes(0, 1), lengths, beam_width=beam_width)
        texts = [""] * len(log_probs)
        for (line, _), label in zip(found.indices.numpy(), found.values.numpy(), strict=True):
            texts[line] += characters[label]
        return texts

    return search


def fast_ctc_decode(characters, beam_width, *_):
    import fast_ctc_decode

    def search(log_probs):
        blank_first = np.ascontiguousarray(np.roll(np.exp(log_probs), 1, axis=2))
        return [fast_ctc_decode.beam_search(frames, "\0" + characters, beam_width)[0] for frames in blank_first]

    return search


def flashlight(characters, beam_width, model, arpa):
    from flashlight.lib.text import decoder, dictionary

    blank = len(characters)
    options = decoder.LexiconFreeDecoderOptions(
        beam_size=beam_width,
        beam_size_token=blank + 1,
        beam_threshold=50,  # the default of torchaudio
        lm_weight=ALPHA * np.log(10) if model else 0.0,  # KenLM speaks in log10
        sil_score=0.0,
        log_add=True,
        criterion_type=decoder.CriterionType.CTC,
    )
    if model:
        tokens = dictionary.Dictionary()
        for character in [*characters, "\0"]:
            tokens.add_entry("<space>" if character == " " else character)
        language = decoder.KenLM(str(arpa), tokens)
    else:
        language = decoder.ZeroLM()
    search_line = decoder.LexiconFreeDecoder(options, language, -1, blank, [])

    def search(log_probs):
        texts = []
        for frames in np.ascontiguousarray(log_probs):
            path = np.array(search_line.decode(frames.ctypes.data, *frames.shape)[0].tokens)
            path = path[np.flatnonzero(np.diff(path, prepend=-2))]
            texts.append("".join(characters[label] for label in path if 0 <= label < blank))
        return texts

    return search


def ctc_beam_decoder(characters, beam_width, model, arpa):
    from ctc_beam_decoder import BeamSearchDecoder

    options = {"kenlm_model_path": arpa, "alpha": ALPHA, "beta": 0.0} if model else {}
    decoder = BeamSearchDecoder([*characters, ""], **options)
    return lambda log_probs: [decoder.decode_beams(frames, beam_width=beam_width)[0][0] for frames in log_probs]


def pyctcdecode(characters, beam_width, model, arpa):
    from pyctcdecode import build_ctcdecoder

    decoder = build_ctcdecoder([*characters, ""], str(arpa) if model else None, alpha=ALPHA, beta=0.0)
    return lambda log_probs: [decoder.decode_beams(frames, beam_width=beam_width)[0][0] for frames in log_probs]


# Name, function, module, kinds of models that it can use.
DECODERS = [
    ("ours", ours, "htr_pipeline", ("character", "word")),
    ("TensorFlow", tensorflow, "tensorflow", ()),
    ("fast-ctc-decode", fast_ctc_decode, "fast_ctc_decode", ()),
    ("flashlight-text", flashlight, "flashlight", ("character",)),
    ("ctc-beam-decoder", ctc_beam_decoder, "ctc_beam_decoder", ("word",)),
    ("pyctcdecode", pyctcdecode, "pyctcdecode", ("word",)),
]


def mean_score(log_probs, texts, characters, model):
    """What the texts are worth, on average."""
    lines, num_frames, num_classes = log_probs.shape
    labels = np.zeros((lines, num_frames), np.int32)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = [characters.index(character) for character in text]
    lengths = np.array([len(text) for text in texts], np.int32)
    losses = tf.nn.ctc_loss(
        labels, log_probs, lengths, [num_frames] * lines, logits_time_major=False, blank_index=num_classes - 1
    )
    prior = [ALPHA * model.score(text) for text in texts] if model else 0.0
    return float(np.mean(prior - losses.numpy().astype(np.float64)))


def compare(title, log_probs, characters, beam_width, model, arpa, repeats):
    searches = {
        name: build(characters, beam_width, model, arpa)
        for name, build, module, kinds in DECODERS
        if importlib.util.find_spec(module) and (model is None or model.kind in kinds)
    }
    times, texts = collections.defaultdict(list), {}
    searches["ours"](log_probs[:1])  # compiles
    for _ in range(repeats):
        for name, search in searches.items():
            if times[name] and max(times[name]) > 10_000:
                continue
            start = time.perf_counter()
            texts[name] = search(log_probs)
            times[name].append(1000 * (time.perf_counter() - start))
    fastest = statistics.median(times["ours"])
    for name in searches:
        median = statistics.median(times[name])
        score = mean_score(log_probs, texts[name], characters, model)
        print(f"| {title} | {name} | {median:.1f} | {median / fastest:.0f} | {score:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each decoder")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1], choices=[0, 1], help=f"of {SHAPES}")
    parser.add_argument("--matrices", type=Path, help="a folder with chars.txt and line/rnnOutput.csv, to use besides")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    start = time.perf_counter()
    beam_search(np.zeros((1, 1, 1)))
    print(f"first call, compiling or reading the cache: {time.perf_counter() - start:.2f} s; {os.cpu_count()} cores")
    missing = [name for name, _, module, _ in DECODERS if not importlib.util.find_spec(module)]
    print(f"not installed: {', '.join(missing) or 'none'}\n")

    cases = []  # name, log_probs, characters
    for shape in (SHAPES[index] for index in arguments.shapes):
        characters = prose_characters(shape[2] - 1)
        for name, log_probs in (("peaky", peaky_log_probs), ("flat", flat_log_probs)):
            cases.append((f"{name} {shape}", log_probs(random, shape, characters), characters))
    if arguments.matrices:
        log_probs, characters = real_log_probs(arguments.matrices)
        cases.append((f"real {log_probs.shape}", log_probs, characters))

    prose = PROSE.read_text(encoding="utf-8").splitlines()
    models = [None, CharacterNGram.train(prose, 6), WordNGram.train(prose, 3)]
    print("| matrices, width, model | decoder | ms | times ours | score |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        arpas = [None, Path(folder) / "characters.arpa", Path(folder) / "words.arpa"]
        for model, arpa in zip(models[1:], arpas[1:], strict=True):
            model.to_arpa(arpa)
        for name, log_probs, characters in cases:
            for beam_width in arguments.widths:
                for model, arpa in zip(models, arpas, strict=True):
                    title = f"{name}, {beam_width}, {model.kind if model else 'none'}"
                    compare(title, log_probs, characters, beam_width, model, arpa, arguments.repeats)


if __name__ == "__main__":
    main()
