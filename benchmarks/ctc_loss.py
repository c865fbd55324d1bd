"""Time, error and memory of our CTC loss beside others on the same data: `python benchmarks/ctc_loss.py`.

Needs the project's own dependencies. PyTorch, optax and tf-seq2seq-losses join where they are installed:
`pip install -r benchmarks/requirements.lock` brings them. A figure is the median time of a loss with its gradient in
float32, ending as a NumPy array. The losses take turns, so that a busy machine slows them all, and each may use all
cores. "error" is the largest absolute error of a gradient against a float64 recursion in logarithms, "memory" by
how much the peak of a process with 32 lines of 2,048 frames, 100 classes and 400 labels exceeds that of one with next
to nothing; logits and gradient are 25 MiB each. The last table shows how our time grows with the size of the batch.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not take the cores of the next in turn

import argparse
import importlib.util
import pathlib
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

from htr_pipeline.core.ctc.loss import ctc_loss

SHAPES = [(32, 128, 80, 32), (16, 256, 100, 80), (64, 64, 80, 20), (8, 512, 200, 120)]  # B, T, K, N
MEMORY_SHAPE = (32, 2048, 100, 400)
GROWTH = [
    *[(4, frames, 80, 30) for frames in (128, 256, 512, 1024, 2048)],
    *[(lines, 128, 80, 30) for lines in (16, 64, 256)],
    *[(4, 128, classes, 30) for classes in (1_000, 10_000)],
]


def reference_gradient(labels, logits):
    """(B, T, K) float64: softmax minus posterior, alpha and beta in logarithms; blank last, full lengths."""
    log_probs = logits.astype(np.float64)
    log_probs -= np.logaddexp.reduce(log_probs, axis=2, keepdims=True)
    batch, _, num_classes = logits.shape
    states = np.full((batch, 2 * labels.shape[1] + 1), num_classes - 1)
    states[:, 1::2] = labels

    def forward(log_y, states):
        skips = np.zeros(states.shape, bool)
        skips[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
        row = np.full(states.shape, -np.inf)
        row[:, :2] = 0
        rows = [row + log_y[:, 0]]
        for y in log_y.swapaxes(0, 1)[1:]:
            one, two = np.full((2, *row.shape), -np.inf)
            one[:, 1:], two[:, 2:] = rows[-1][:, :-1], rows[-1][:, :-2]
            rows.append(np.logaddexp(np.logaddexp(rows[-1], one), np.where(skips, two, -np.inf)) + y)
        return np.stack(rows, axis=1)

    log_y = np.take_along_axis(log_probs, states[:, np.newaxis], axis=2)
    alpha, beta = forward(log_y, states), forward(log_y[:, ::-1, ::-1], states[:, ::-1])[:, ::-1, ::-1]
    log_p = np.logaddexp.reduce(alpha[:, -1, -2:], axis=1)[:, np.newaxis, np.newaxis]
    posterior = np.exp(alpha + beta - log_y - log_p)
    return np.exp(log_probs) - np.einsum("bts,bsk->btk", posterior, np.eye(num_classes)[states])


def tensorflow_step(loss, labels, logits, **options):
    """A loss of (labels, logits, label_length, logit_length) and its gradient."""

    @tf.function(**options)
    def step(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = loss(labels, logits, label_length, logit_length)
        return tape.gradient(losses, logits)

    label_length, logit_length = tf.fill([len(labels)], labels.shape[1]), tf.fill([len(labels)], logits.shape[1])
    labels, logits = tf.constant(labels), tf.constant(logits)
    return lambda: step(logits).numpy()


def tf_dense(labels, logits, label_length, logit_length):
    return tf.nn.ctc_loss(labels, logits, label_length, logit_length, logits_time_major=False, blank_index=-1)


def tf_sparse(labels, logits, _, logit_length):
    labels = tf.sparse.from_dense(labels + 1)  # from_dense drops zeros, and class 0 is a label
    labels = labels.with_values(labels.values - 1)
    return tf.nn.ctc_loss(labels, logits, None, logit_length, logits_time_major=False, blank_index=-1)


def seq2seq(labels, logits, label_length, logit_length):
    return tf_seq2seq_losses.classic_ctc_loss(
        labels, logits, label_length, logit_length, blank_index=logits.shape[2] - 1
    )


def torch_step(labels, logits):
    import torch

    batch, num_frames, num_classes = logits.shape
    targets, x = torch.tensor(labels, dtype=torch.long), torch.tensor(logits, requires_grad=True)
    lengths = torch.full((batch,), num_frames), torch.full((batch,), labels.shape[1])

    def step():
        log_probs = torch.log_softmax(x, dim=2).transpose(0, 1)
        loss = torch.nn.functional.ctc_loss(log_probs, targets, *lengths, blank=num_classes - 1, reduction="sum")
        return torch.autograd.grad(loss, x)[0].numpy()

    return step


def optax_step(labels, logits):
    import jax
    import optax

    batch, num_frames, num_classes = logits.shape
    padding = np.zeros((batch, num_frames), np.float32), np.zeros(labels.shape, np.float32)

    def total(x):
        return optax.ctc_loss(x, padding[0], labels, padding[1], blank_id=num_classes - 1).sum()

    gradient, x = jax.jit(jax.grad(total)), jax.device_put(logits)
    return lambda: np.asarray(gradient(x))


# Name -> function of labels (B, N) and logits (B, T, K) that returns a function that computes the gradient.
LOSSES = {
    "ours": lambda labels, logits: tensorflow_step(ctc_loss, labels, logits),
    "ours, jit_compile=True": lambda labels, logits: tensorflow_step(ctc_loss, labels, logits, jit_compile=True),
    "tf dense": lambda labels, logits: tensorflow_step(tf_dense, labels, logits),
    "tf dense, jit_compile=True": lambda labels, logits: tensorflow_step(tf_dense, labels, logits, jit_compile=True),
    "tf sparse (C++)": lambda labels, logits: tensorflow_step(tf_sparse, labels, logits),
}
if importlib.util.find_spec("torch"):
    LOSSES["torch"] = torch_step
if importlib.util.find_spec("optax"):
    LOSSES["optax, jit"] = optax_step
if importlib.util.find_spec("tf_seq2seq_losses"):
    import tf_seq2seq_losses  # inside a tf.function it would leave tensors of that graph behind

    LOSSES["tf-seq2seq-losses"] = lambda labels, logits: tensorflow_step(seq2seq, labels, logits)


def lines(shape):
    """Labels (B, N) and logits (B, T, K), blank last."""
    batch, num_frames, num_classes, num_labels = shape
    random = np.random.default_rng(0)
    logits = random.normal(size=(batch, num_frames, num_classes)).astype(np.float32)
    return random.integers(0, num_classes - 1, (batch, num_labels)).astype(np.int32), logits


def median_milliseconds(steps, repeats):
    """Name -> median time of each step, the steps taking turns."""
    seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def compare(repeats):
    print("| B, T, K, N | loss | ms | ours is faster by | error |\n| --- | --- | ---: | ---: | ---: |")
    for shape in SHAPES:
        labels, logits = lines(shape)
        steps = {name: make(labels, logits) for name, make in LOSSES.items()}
        expected = reference_gradient(labels, logits)
        errors = {name: abs(step() - expected).max() for name, step in steps.items()}
        medians = median_milliseconds(steps, repeats)
        for name, milliseconds in medians.items():
            ratio = milliseconds / medians["ours"]
            print(f"| {shape} | {name} | {milliseconds:.2f} | {ratio:.1f} x | {errors[name]:.0e} |", flush=True)


def peak_with(name, shape):
    """Peak memory of a process that computes this loss once, in MiB."""
    command = [sys.executable, __file__, "--once", name, *map(str, shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def once(name, shape):
    LOSSES[name](*lines(shape))()
    # Not ru_maxrss: it begins with the parent's.
    print(int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024)


def compare_memory():
    print("\n| loss | memory, MiB |\n| --- | ---: |")
    for name in LOSSES:
        print(f"| {name} | {peak_with(name, MEMORY_SHAPE) - peak_with(name, (2, 8, 5, 2)):.0f} |", flush=True)


def growth(repeats):
    print("\n| B, T, K, N | ours, ms |\n| --- | ---: |")
    for shape in GROWTH:
        step = LOSSES["ours"](*lines(shape))
        step()
        print(f"| {shape} | {median_milliseconds({'ours': step}, repeats)['ours']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="how often each loss is computed")
    parser.add_argument("--once", nargs=5, metavar=("LOSS", "B", "T", "K", "N"), help="print one's peak memory, in MiB")
    arguments = parser.parse_args()
    if arguments.once:
        once(arguments.once[0], tuple(map(int, arguments.once[1:])))
    else:
        compare(arguments.repeats)
        if sys.platform == "linux":
            compare_memory()
        growth(arguments.repeats)


if __name__ == "__main__":
    main()
