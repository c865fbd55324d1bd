"""Time of our beam search beside TensorFlow's on the same matrices: `python benchmarks/decoding.py`.

Needs nothing but the project's own dependencies. The decoders take turns, so that a busy machine slows both; the
figures are medians. "likelier" counts the lines where one decoder's best text is more probable, by its CTC loss.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import statistics
import time

import numpy as np
import tensorflow as tf

from htr_pipeline.core.ctc.decoding import beam_search

NUM_LINES, NUM_FRAMES, NUM_CLASSES = 32, 128, 80


def flat_log_probs(random):
    """An untrained network: every class about as likely as any other, in every frame."""
    return log_softmax(random.normal(size=(NUM_LINES, NUM_FRAMES, NUM_CLASSES)))


def peaky_log_probs(random):
    """A trained network: blanks, with a character of some 1 to 3 likely readings in about every third frame."""
    logits = random.normal(scale=1.5, size=(NUM_LINES, NUM_FRAMES, NUM_CLASSES))
    logits[:, :, -1] += 10
    for line in logits:
        for frame in random.choice(NUM_FRAMES, size=NUM_FRAMES // 3, replace=False):
            readings = random.choice(NUM_CLASSES - 1, size=random.integers(1, 4), replace=False)
            line[frame, readings] += random.uniform(9, 15, size=len(readings))
    return log_softmax(logits)


def log_softmax(logits):
    return (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)).astype(np.float32)


def tensorflow_search(log_probs, beam_width):
    lengths = np.full(len(log_probs), NUM_FRAMES, np.int32)
    (decoded,), _ = tf.nn.ctc_beam_search_decoder(log_probs.swapaxes(0, 1), lengths, beam_width=beam_width)
    rows = tf.RaggedTensor.from_sparse(decoded) if len(decoded.values) else tf.ragged.constant([[]] * len(log_probs))
    return [np.array(row, np.int32) for row in rows.to_list()]


def our_search(log_probs, beam_width):
    return [line[0].labels for line in beam_search(log_probs, beam_width=beam_width)]


def log_probabilities(log_probs, texts):
    """(B,) exact log-probability of each text, as float64."""
    losses = tf.nn.ctc_loss(
        labels=np.stack([np.pad(text, (0, NUM_FRAMES - len(text))) for text in texts]).astype(np.int32),
        logits=log_probs,
        label_length=[len(text) for text in texts],
        logit_length=[NUM_FRAMES] * len(texts),
        logits_time_major=False,
        blank_index=NUM_CLASSES - 1,
    )
    return -losses.numpy().astype(np.float64)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each decoder")
    repetitions = parser.parse_args().repetitions
    random = np.random.default_rng(0)

    start = time.perf_counter()
    beam_search(flat_log_probs(random)[:1], beam_width=10)
    print(f"first call, compiling or reading the cache: {time.perf_counter() - start:.2f} s")
    print(
        f"{NUM_LINES} lines of {NUM_FRAMES} frames, {NUM_CLASSES} classes, {os.cpu_count()} cores; median milliseconds"
    )
    print(
        f"{'matrices':10}{'width':>6}{'TensorFlow':>12}{'ours':>8}{'ratio':>8}{'TF likelier':>13}{'ours likelier':>15}"
    )
    for name, log_probs in (("peaky", peaky_log_probs(random)), ("flat", flat_log_probs(random))):
        for beam_width in (10, 100):
            milliseconds = {tensorflow_search: [], our_search: []}
            texts = {}
            for _ in range(repetitions):
                for search, times in milliseconds.items():
                    start = time.perf_counter()
                    texts[search] = search(log_probs, beam_width)
                    times.append(1000 * (time.perf_counter() - start))
            theirs, ours = (statistics.median(times) for times in milliseconds.values())
            gain = np.subtract(*(log_probabilities(log_probs, texts[s]) for s in (our_search, tensorflow_search)))
            print(
                f"{name:10}{beam_width:6}{theirs:12.0f}{ours:8.1f}{theirs / ours:8.0f}"
                f"{(gain < -1e-3).sum():13}{(gain > 1e-3).sum():15}"
            )


if __name__ == "__main__":
    main()
