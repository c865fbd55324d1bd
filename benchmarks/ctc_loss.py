"""Time and error of our CTC loss beside others on the same data: `python benchmarks/ctc_loss.py`.

Needs the project's own dependencies; PyTorch and optax join where they are installed. Each figure is the median time of
a loss with its gradient in float32. The losses take turns, so that a busy machine slows them all. "error" is the
largest absolute error of a gradient against a float64 recursion in logarithms.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import importlib.util
import statistics
import time

import numpy as np
import tensorflow as tf

from htr_pipeline.core.ctc.loss import ctc_loss

SHAPES = [(32, 128, 80, 32), (16, 256, 100, 80), (64, 64, 80, 20), (8, 512, 200, 120)]  # B, T, K, N


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


def tensorflow_step(loss):
    @tf.function
    def step(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = loss(logits)
        return tape.gradient(losses, logits)

    return step


def contestants(labels, logits):
    """Name -> function without arguments that returns the gradient as an array."""
    batch, num_frames, _ = logits.shape
    num_labels = labels.shape[1]
    label_length, logit_length = tf.fill([batch], num_labels), tf.fill([batch], num_frames)
    dense, x = tf.constant(labels), tf.constant(logits)
    sparse = tf.sparse.from_dense(dense + 1)  # from_dense drops zeros, and class 0 is a label
    sparse = sparse.with_values(sparse.values - 1)
    options = {"logit_length": logit_length, "blank_index": -1, "logits_time_major": False}

    ours = tensorflow_step(lambda x: ctc_loss(dense, x, label_length, logit_length))
    tf_dense = tensorflow_step(lambda x: tf.nn.ctc_loss(dense, x, label_length, **options))
    tf_sparse = tensorflow_step(lambda x: tf.nn.ctc_loss(sparse, x, None, **options))
    found = {
        "ours": lambda: ours(x).numpy(),
        "tf dense": lambda: tf_dense(x).numpy(),
        "tf sparse": lambda: tf_sparse(x).numpy(),
    }
    if importlib.util.find_spec("torch"):
        found["torch"] = torch_step(labels, logits)
    if importlib.util.find_spec("optax"):
        found["optax"] = optax_step(labels, logits)
    return found


def torch_step(labels, logits):
    import torch

    torch.set_num_threads(2)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="how often each loss is computed")
    repeats = parser.parse_args().repeats
    print("| B, T, K, N | loss | ms | ours is faster by | error |\n| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        batch, num_frames, num_classes, num_labels = shape
        random = np.random.default_rng(0)
        logits = random.normal(size=(batch, num_frames, num_classes)).astype(np.float32)
        labels = random.integers(0, num_classes - 1, (batch, num_labels)).astype(np.int32)
        steps = contestants(labels, logits)
        expected = reference_gradient(labels, logits)
        errors = {name: abs(step() - expected).max() for name, step in steps.items()}
        seconds = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        for name, milliseconds in medians.items():
            ratio = milliseconds / medians["ours"]
            print(f"| {shape} | {name} | {milliseconds:.2f} | {ratio:.1f} x | {errors[name]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
