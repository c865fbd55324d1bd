"""The loss against every alignment written out, a float64 recursion, TensorFlow's own loss, and sums on paper."""

import collections
import concurrent.futures
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import tensorflow as tf

from htr_pipeline.core.ctc.loss import ctc_loss, required_frames

# float32: rounding of a few dozen operations on numbers near 1; float64: XLA's kernel stores 35 bits behind the point.
LOSS_TOLERANCE = {"float32": 2e-6, "float64": 1e-10}
GRADIENT_TOLERANCE = {"float32": 5e-6, "float64": 1e-9}

GRAPH_LOSS = tf.function(ctc_loss)
COMPILED_LOSS = tf.function(ctc_loss, jit_compile=True)


def _loss_and_gradient(labels, logits, label_length=None, logit_length=None, **options):
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = ctc_loss(labels, logits, label_length, logit_length, **options)
    return loss, tape.gradient(loss, logits)


# The kernel for CPUs runs in the first two, that of XLA in the last.
RUNS = {
    "eager": _loss_and_gradient,
    "graph": tf.function(_loss_and_gradient, reduce_retracing=True),
    "xla": tf.function(_loss_and_gradient, jit_compile=True),
}
KERNELS = pytest.mark.parametrize("run", ["eager", "xla"])


def loss_and_gradient(labels, logits, label_length=None, logit_length=None, run="eager", **options):
    lengths = [length if length is None else tf.convert_to_tensor(length) for length in (label_length, logit_length)]
    if not isinstance(labels, tf.RaggedTensor | tf.SparseTensor):
        labels = tf.convert_to_tensor(labels)
    loss, gradient = RUNS[run](labels, tf.convert_to_tensor(logits), *lengths, **options)
    return loss.numpy(), gradient.numpy()


@functools.cache
def all_paths(num_frames, num_classes, blank, merge):
    """Every path of classes through the frames, (K**T, T), and for each label the numbers of those that read as it."""
    paths = np.array(list(itertools.product(range(num_classes), repeat=num_frames)), int)
    labels = collections.defaultdict(list)
    for number, path in enumerate(paths.tolist()):
        merged = [c for i, c in enumerate(path) if not (merge and i and c == path[i - 1])]
        labels[tuple(c for c in merged if c != blank)].append(number)
    return paths, labels


def enumerate_alignments(logits, label, blank, merge, collapse):
    """Loss and gradient of one line from the sum over all K**T frame paths."""
    num_frames, num_classes = logits.shape
    label = tuple(c for i, c in enumerate(label) if not (collapse and i and c == label[i - 1]))
    paths, labels = all_paths(num_frames, num_classes, blank, merge)
    paths = paths[labels.get(label, [])]
    log_sums = np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_probs = logits - np.where(log_sums == -np.inf, 0.0, log_sums)  # a frame may forbid every class
    scores = log_probs[np.arange(num_frames), paths].sum(axis=1)
    total = np.logaddexp.reduce(scores, initial=-np.inf)
    if total == -np.inf:
        return np.inf, np.zeros_like(logits)
    visits = (paths[:, :, np.newaxis] == np.arange(num_classes)) * np.exp(scores - total)[:, np.newaxis, np.newaxis]
    return -total, np.exp(log_probs) - visits.sum(axis=0)


def log_space_reference(logits, label, blank):
    """Loss and gradient of one line in float64: the plain recursions in logarithms, one frame at a time."""
    logits = logits.astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    states = np.full(2 * len(label) + 1, blank)
    states[1::2] = label
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]

    def forward(log_y, skips):
        alpha = np.full(log_y.shape, -np.inf)
        row = np.full(log_y.shape[1], -np.inf)
        row[:2] = 0
        row = row + log_y[0]
        alpha[0] = row
        for t in range(1, len(log_y)):
            one, two = np.full((2, len(row)), -np.inf)
            one[1:], two[2:] = row[:-1], row[:-2]
            row = np.logaddexp(np.logaddexp(row, one), np.where(skips, two, -np.inf)) + log_y[t]
            alpha[t] = row
        return alpha

    log_y = log_probs[:, states]
    skips_back = np.roll(skips, -2)[::-1]
    alpha, beta = forward(log_y, skips), forward(log_y[::-1, ::-1], skips_back)[::-1, ::-1]
    log_p = np.logaddexp.reduce(alpha[-1, -2:])
    with np.errstate(invalid="ignore"):
        gamma = np.nan_to_num(np.exp(alpha + beta - log_y - log_p))
    gradient = np.exp(log_probs)
    np.add.at(gradient.T, states, -gamma.T)
    return -log_p, gradient


def random_lines(rng, batch, frames, classes, width, blank, scale, forbidden=0.0):
    logits = rng.normal(size=(batch, frames, classes)) * scale
    logits[rng.random(logits.shape) < forbidden] = -np.inf
    labels = rng.choice([c for c in range(classes) if c != blank % classes], size=(batch, width))
    return labels, logits, rng.integers(0, width + 1, batch), rng.integers(0, frames + 1, batch)


@KERNELS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("blank", "merge", "collapse"), itertools.product([0, 1, -1], [True, False], [True, False]))
def test_agrees_with_the_sum_over_all_alignments(run, dtype, blank, merge, collapse):
    # 300 lines each: labels of 0 to 3 with repeats, 0 to 5 frames (many too few), -inf logits, NaN behind the end
    rng = np.random.default_rng(7)
    scale = rng.choice([0.5, 3.0, 60.0], size=(300, 1, 1))
    labels, logits, label_length, logit_length = random_lines(rng, 300, 5, 3, 3, blank, scale, forbidden=0.05)
    padded = logits.astype(dtype)
    logits = padded.astype(np.float64)
    padded[np.arange(5) >= logit_length[:, np.newaxis]] = np.nan
    options = {"blank_index": blank, "ctc_merge_repeated": merge, "preprocess_collapse_repeated": collapse}
    loss, gradient = loss_and_gradient(labels, padded, label_length, logit_length, run, **options)
    for row in range(300):
        frames, label = logit_length[row], labels[row, : label_length[row]]
        expected_loss, expected_gradient = enumerate_alignments(logits[row, :frames], label, blank % 3, merge, collapse)
        np.testing.assert_allclose(loss[row], expected_loss, rtol=LOSS_TOLERANCE[dtype], atol=LOSS_TOLERANCE[dtype])
        np.testing.assert_allclose(gradient[row, :frames], expected_gradient, atol=GRADIENT_TOLERANCE[dtype])
        assert not gradient[row, frames:].any()
    assert np.isinf(loss).any()
    assert np.isfinite(loss).any()
    assert loss.min() >= 0


def test_probabilities_of_all_labels_sum_to_one():
    logits = np.random.default_rng(1).normal(size=(1, 4, 3)).astype("float32")
    labels = [label for length in range(5) for label in itertools.product((0, 1), repeat=length)]
    loss = ctc_loss(tf.ragged.constant(labels, dtype=tf.int32), np.repeat(logits, len(labels), axis=0))
    assert np.exp(-loss.numpy()).sum() == pytest.approx(1, abs=1e-6)


def test_ca_where_the_truth_is_cat():
    # Classes A C T blank. Two frames say C, A with probability 0.97 each. CAT does not fit into 2 frames. With a third
    # frame of A (0.97; T, as every other class, 0.01) the only alignment is C A T: 0.97 * 0.97 * 0.01.
    ca = np.log([[[0.01, 0.97, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]]]).astype("float32")
    cat = np.array([[1, 0, 2]])
    loss, gradient = loss_and_gradient(np.repeat(cat, 2, axis=0), np.repeat(ca, 2, axis=0), [3, 3], [2, 3])
    assert loss[0] == np.inf
    assert loss[1] == pytest.approx(-math.log(0.97 * 0.97 * 0.01), rel=1e-6)
    # softmax minus posterior: the third frame must become T, whose posterior is 1
    np.testing.assert_allclose(gradient[1, 2], [0.97, 0.01, 0.01 - 1, 0.01], atol=1e-6)
    # CA itself in three frames: CCA, CAA, _CA, C_A, CA_ = 0.97 (0.01 0.97 + 0.97 0.97 + ...), the frames being C, A, A
    paths = [(1, 1, 0), (1, 0, 0), (3, 1, 0), (1, 3, 0), (1, 0, 3)]
    expected = -math.log(sum(math.prod(np.exp(ca[0, t, c]) for t, c in enumerate(path)) for path in paths))
    assert loss_and_gradient([[1, 0]], ca, [2])[0][0] == pytest.approx(expected, abs=5e-7)  # ln 0.01 is off by 2e-7


def test_repeated_label_needs_a_blank_between():
    # AA in two frames of two classes: no path. In three frames: A _ A only, 0.5 ** 3. In four: the blank or an A
    # doubled, or a blank outside: A_A_ _A_A A__A AA_A A_AA, 5 / 16.
    logits = np.zeros((3, 4, 2), "float32")
    loss, gradient = loss_and_gradient([[0, 0]] * 3, logits, [2] * 3, [2, 3, 4])
    np.testing.assert_allclose(loss, [np.inf, 3 * math.log(2), math.log(16 / 5)], rtol=1e-6)
    assert not gradient[0].any()
    np.testing.assert_array_equal(required_frames([[0, 0]] * 3, [2, 1, 0]), [3, 1, 0])
    # without merging each A is one frame: AA, then 3 choose 2 and 4 choose 2 placements
    unmerged = ctc_loss([[0, 0]] * 3, logits, [2] * 3, [2, 3, 4], ctc_merge_repeated=False)
    np.testing.assert_allclose(unmerged, [math.log(4), math.log(8 / 3), math.log(16 / 6)], rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "label_length", "message"),
    [
        ([[1, 1]], [3], "row 0 has label_length 3.*2 wide"),
        ([[1, 1]], [-1], "label_length -1"),
        ([[1], [2]], [1], "2 rows"),
    ],
)
def test_required_frames_of_lengths_that_do_not_fit_are_refused(labels, label_length, message):
    with pytest.raises(ValueError, match=message):
        required_frames(labels, label_length)


@pytest.mark.parametrize(("frames", "length"), [(12, 5), (100, 30), (2000, 600)])
def test_uniform_logits_count_the_alignments(frames, length):
    # Without repeats there are (T + N choose 2 N) alignments: each of N labels begins and ends somewhere.
    labels = np.arange(length)[np.newaxis] % 7
    loss = ctc_loss(labels, np.full((1, frames, 9), 3.5, "float32"), [length])
    ways = math.lgamma(frames + length + 1) - math.lgamma(2 * length + 1) - math.lgamma(frames - length + 1)
    assert float(loss[0]) == pytest.approx(frames * math.log(9) - ways, rel=2e-6)


def test_empty_labels_and_zero_frames():
    logits = np.log([[[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]] * 3).astype("float32")
    loss, gradient = loss_and_gradient(np.zeros((3, 0), "int32"), logits, [0, 0, 0], [2, 1, 0])
    np.testing.assert_allclose(loss, [-math.log(0.3 * 0.8), -math.log(0.3), 0], rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], [0.5, 0.2, 0.3 - 1], atol=1e-6)
    assert not gradient[2].any()
    np.testing.assert_array_equal(ctc_loss([[1]], np.zeros((1, 0, 3), "float32"), [1]), [np.inf])
    assert ctc_loss(np.zeros((0, 4), "int32"), np.zeros((0, 5, 3), "float32"), []).shape == (0,)
    np.testing.assert_allclose(ctc_loss([[]], np.zeros((1, 2, 1), "float32"), [0]), [0])


def test_certain_and_right_is_zero_and_never_below():
    logits = np.full((1, 5, 4), -40.0, "float32")
    logits[0, range(5), [0, 3, 1, 1, 3]] = 40
    loss, gradient = loss_and_gradient([[0, 1]], logits, [2])
    assert 0 <= loss[0] < 1e-6
    assert abs(gradient).max() < 1e-6


@KERNELS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("frames", "length", "classes", "scale"),
    [(2048, 500, 60, 1.0), (512, 200, 100, 30.0), (2048, 60, 20, 1e4), (20, 8, 10_000, 5.0)],
)
def test_long_lines_and_large_logits_keep_their_precision(run, dtype, frames, length, classes, scale):
    rng = np.random.default_rng(3)
    logits = np.clip(rng.normal(size=(2, frames, classes)), -1, 1) * scale
    labels = rng.integers(0, classes - 1, (2, length))
    loss, gradient = loss_and_gradient(labels, logits.astype(dtype), [length, length // 3], run=run)
    for row, valid in enumerate([length, length // 3]):
        expected_loss, expected_gradient = log_space_reference(
            logits[row].astype(dtype), labels[row, :valid], classes - 1
        )
        assert loss[row] == pytest.approx(expected_loss, rel=2e-6 if dtype == "float32" else 1e-10)
        # the logarithms of the reference lose digits as they grow
        tolerance = 1e-5 if dtype == "float32" else 1e-9 + 1e-14 * expected_loss
        np.testing.assert_allclose(gradient[row], expected_gradient, atol=tolerance)


@KERNELS
def test_confidently_wrong_in_every_frame(run):
    # The label's only class has a logit 800 below the blank: one frame of 30 pays exp(-800), any of them.
    logits = np.zeros((1, 30, 3), "float32")
    logits[..., 0] = -800
    logits[..., 1] = -900
    loss, gradient = loss_and_gradient([[0]], logits, [1], run=run)
    assert loss[0] == pytest.approx(800 - math.log(30), rel=1e-6)
    np.testing.assert_allclose(gradient[0, :, 0], -1 / 30, atol=1e-6)
    np.testing.assert_allclose(gradient[0, :, 2], 1 / 30, atol=1e-6)


def test_infeasible_row_leaves_its_neighbours_untouched():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(3, 6, 4)).astype("float32")
    labels, lengths = [[0, 1, 2, 0, 1], [1, 1, 1, 1, 1], [2, 2, 0, 0, 1]], [4, 5, 3]
    loss, gradient = loss_and_gradient(labels, logits, lengths)
    assert loss[1] == np.inf
    assert not gradient[1].any()
    for row in (0, 2):
        alone, gradient_alone = loss_and_gradient(labels[row : row + 1], logits[row : row + 1], lengths[row : row + 1])
        np.testing.assert_array_equal(loss[row], alone[0])
        np.testing.assert_array_equal(gradient[row], gradient_alone[0])
    zero_loss, zero_gradient = loss_and_gradient(labels, logits, lengths, infeasible="zero")
    np.testing.assert_array_equal(zero_loss, [loss[0], 0, loss[2]])
    np.testing.assert_array_equal(zero_gradient, gradient)
    with pytest.raises(ValueError, match=r"Too few frames .* row 1 has 5 labels that need 9 frames, and 6 frames"):
        ctc_loss(labels, logits, lengths, infeasible="raise")
    weighted = tf.Variable(logits)
    with tf.GradientTape() as tape:
        kept = tf.boolean_mask(ctc_loss(labels, weighted, lengths), [True, False, True])
    np.testing.assert_array_equal(tape.gradient(kept, weighted), gradient)


@KERNELS
def test_nan_logits_leave_no_gradient_of_their_line_that_looks_like_one(run):
    logits = np.random.default_rng(2).normal(size=(2, 4, 3)).astype(np.float32)
    logits[0, 1, 2] = np.nan
    _, gradient = loss_and_gradient([[0, 1], [0, 1]], logits, [2, 2], [3, 4], run=run)
    assert np.isnan(gradient).all(axis=2).tolist() == [[True, True, True, False], [False] * 4]


@KERNELS
def test_loss_that_its_type_cannot_hold_is_one_that_no_alignment_fits(run):
    logits = np.zeros((1, 3, 3), np.float32)
    logits[..., 0] = tf.float32.min
    for infeasible, expected in (("inf", np.inf), ("zero", 0.0)):
        loss, gradient = loss_and_gradient([[0, 0]], logits, [2], [3], run=run, blank_index=1, infeasible=infeasible)
        assert (loss.tolist(), gradient.any()) == ([expected], False)


def test_entries_of_a_sparse_tensor_in_any_order_are_the_same_label():
    logits = np.random.default_rng(3).normal(size=(3, 6, 5)).astype(np.float32)
    mixed = tf.SparseTensor([[2, 0], [0, 1], [0, 0], [1, 0], [1, 1]], [2, 3, 0, 1, 2], [3, 3])
    assert ctc_loss(mixed, logits).numpy().tolist() == ctc_loss(tf.sparse.reorder(mixed), logits).numpy().tolist()
    assert required_frames(tf.SparseTensor([[0, 1], [0, 2], [0, 0]], [1, 2, 1], [1, 3])).numpy() == [4]


def test_lengths_of_concatenated_labels_that_wrap_around_are_refused():
    with pytest.raises(ValueError, match="Concatenated labels are 2, label_length adds up to 4294967298"):
        ctc_loss([0, 1], np.zeros((3, 4, 5), np.float32), [2**31 - 1, 2**31 - 1, 4])


def test_one_length_is_not_that_of_all_rows():
    shapes = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
    in_graph = tf.function(required_frames, input_signature=shapes)
    with pytest.raises(tf.errors.InvalidArgumentError):
        in_graph(tf.zeros([3, 3], tf.int32), tf.constant([2]))


def test_nan_logits_inside_a_line_stay_visible():
    logits = np.zeros((2, 3, 3), "float32")
    logits[0, 1, 2] = np.nan
    loss, _ = loss_and_gradient([[0], [0]], logits, [1, 1])
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])


def test_padding_batch_order_and_constants_change_nothing():
    rng = np.random.default_rng(11)
    labels, logits, label_length, _ = random_lines(rng, 6, 9, 5, 4, -1, 2.0)
    logits, logit_length = logits.astype("float32"), np.array([9, 8, 9, 7, 9, 8])
    loss, gradient = loss_and_gradient(labels, logits, label_length, logit_length)
    np.testing.assert_allclose(gradient.sum(axis=2), 0, atol=1e-6)
    wide = np.full((6, 13, 5), np.nan, "float32")
    wide[:, :9] = logits
    wide_labels = np.full((6, 7), 99)
    wide_labels[:, :4] = labels
    wide_labels[np.arange(7) >= label_length[:, np.newaxis]] = -1
    order = np.array([3, 1, 5, 0, 2, 4])
    padded_loss, padded_gradient = loss_and_gradient(
        wide_labels[order], wide[order], label_length[order], logit_length[order]
    )
    np.testing.assert_array_equal(padded_loss, loss[order])
    np.testing.assert_allclose(padded_gradient[:, :9], gradient[order], atol=1e-7)
    shifted = logits + rng.normal(size=(6, 9, 1)).astype("float32")
    np.testing.assert_allclose(ctc_loss(labels, shifted, label_length, logit_length), loss, rtol=2e-6)


def test_forms_of_labels_and_layouts_agree():
    rng = np.random.default_rng(2)
    labels, logits, label_length, _ = random_lines(rng, 5, 9, 6, 4, -1, 1.0)
    logits = logits.astype("float32")
    loss, gradient = loss_and_gradient(labels.astype("int32"), logits, label_length)
    ragged = tf.RaggedTensor.from_tensor(labels, lengths=label_length)
    concatenated = ragged.flat_values
    for form, lengths in [
        (labels.astype("int64"), label_length.astype("int64")),
        (ragged, None),
        (ragged.to_sparse(), None),
        (concatenated, label_length),
        (tf.cast(concatenated, tf.int32), label_length),
    ]:
        other_loss, other_gradient = loss_and_gradient(form, logits, lengths)
        np.testing.assert_array_equal(other_loss, loss)
        np.testing.assert_array_equal(other_gradient, gradient)
        np.testing.assert_array_equal(required_frames(form, lengths), required_frames(labels, label_length))
    time_loss, time_gradient = loss_and_gradient(labels, logits.swapaxes(0, 1), label_length, logits_time_major=True)
    np.testing.assert_array_equal(time_loss, loss)
    np.testing.assert_array_equal(time_gradient.swapaxes(0, 1), gradient)
    blank_first = np.roll(logits, 1, axis=2)
    first_loss, first_gradient = loss_and_gradient(labels + 1, blank_first, label_length, blank_index=0)
    np.testing.assert_allclose(first_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(first_gradient, np.roll(gradient, 1, axis=2), atol=1e-6)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = tf.cast(np.random.default_rng(0).normal(size=(2, 7, 5)), dtype)
    half_loss, half_gradient = loss_and_gradient([[0, 1], [2, 2]], logits, [2, 2])
    loss, gradient = loss_and_gradient([[0, 1], [2, 2]], tf.cast(logits, tf.float32), [2, 2])
    np.testing.assert_array_equal(half_loss, loss)
    assert half_gradient.dtype == dtype.as_numpy_dtype
    np.testing.assert_array_equal(half_gradient, tf.cast(gradient, dtype).numpy())


def test_repeats_bit_for_bit_and_agrees_in_graphs_and_compiled_callers():
    rng = np.random.default_rng(4)
    labels, logits, label_length, logit_length = random_lines(rng, 6, 9, 5, 4, -1, 2.0)
    arguments = [tf.constant(labels), tf.constant(logits, tf.float32), label_length, logit_length]
    eager = loss_and_gradient(*arguments)
    for once, again in zip(eager, loss_and_gradient(*arguments), strict=True):
        np.testing.assert_array_equal(once, again)

    def step(labels, logits, label_length, logit_length):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = ctc_loss(labels, logits, label_length, logit_length)
        return loss, tape.gradient(loss, logits)

    for compiled in (False, True):
        loss, gradient = tf.function(step, jit_compile=compiled)(*arguments)
        np.testing.assert_allclose(loss, eager[0], rtol=1e-6)
        np.testing.assert_allclose(gradient, eager[1], atol=1e-6)


def test_unknown_sizes_need_one_trace():
    traces = []

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None, None, None], tf.float32),
            tf.TensorSpec([None], tf.int32),
        ]
    )
    def step(labels, logits, label_length):
        traces.append(1)
        return ctc_loss(labels, logits, label_length)

    for batch, frames in [(1, 4), (2, 6), (3, 5)]:
        logits = np.random.default_rng(batch).normal(size=(batch, frames, 3)).astype("float32")
        labels, lengths = np.tile([[0, 1]], (batch, 1)), [2] * batch
        np.testing.assert_array_equal(step(labels, logits, lengths), ctc_loss(labels, logits, lengths))
    assert len(traces) == 1


def test_runs_in_a_graph_and_session_of_tensorflow_1():
    rng = np.random.default_rng(6)
    labels, logits, label_length, logit_length = random_lines(rng, 5, 9, 5, 4, -1, 2.0)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        placed = tf.compat.v1.placeholder(tf.float32, [None, None, 5])
        sparse = tf.RaggedTensor.from_tensor(tf.constant(labels), lengths=tf.constant(label_length)).to_sparse()
        loss = ctc_loss(sparse, placed, logit_length=tf.constant(logit_length))
        found = session.run([loss, tf.gradients(loss, placed)[0]], {placed: logits})
    for values, expected in zip(
        found, loss_and_gradient(labels, logits.astype("float32"), label_length, logit_length), strict=True
    ):
        np.testing.assert_array_equal(values, expected)


def test_unknown_sizes_are_checked_when_they_are_known():
    unknown = [tf.TensorSpec(shape, dtype) for shape, dtype in [([None, None], tf.int32), ([None] * 3, tf.float32)]]
    signature = [*unknown, tf.TensorSpec([None], tf.int32)]
    graph = tf.function(lambda *a: ctc_loss(*a), input_signature=signature)
    compiled = tf.function(lambda *a: ctc_loss(*a), input_signature=signature, jit_compile=True)
    arguments = [[0, 1, 0]], np.zeros((2, 6, 5), "float32"), [3]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Batch sizes differ: labels 1, .* logits 2"):
        graph(*arguments)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        compiled(*arguments)
    for blank_index in (5, -6):
        graph = tf.function(lambda *a, blank=blank_index: ctc_loss(*a, blank_index=blank), input_signature=signature)
        with pytest.raises(tf.errors.InvalidArgumentError, match="blank_index is not a class"):
            graph([[0, 1, 0]], np.zeros((1, 6, 5), "float32"), [3])


def test_trains_a_network_inside_an_ordinary_tf_function():
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(4, 12, 6)), tf.float32)
    labels, lengths = tf.constant(rng.integers(0, 4, (4, 3))), tf.constant([3, 2, 3, 1])
    weights = tf.Variable(rng.normal(size=(6, 5)).astype("float32"))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(ctc_loss(labels, tf.einsum("btf,fk->btk", images, weights), lengths))
        weights.assign_sub(0.5 * tape.gradient(loss, weights))
        return loss

    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("sparse", [False, True])
def test_agrees_with_tensorflow_where_that_is_right(sparse):
    # Only rows that TensorFlow gets right: feasible, label not empty, zeros as padding, lengths within the tensors.
    rng = np.random.default_rng(9)
    batch, frames, classes, width = 8, 40, 12, 9
    labels = rng.integers(0, classes - 1, (batch, width)).astype("int32")
    labels[:, 3] = labels[:, 2]
    label_length = rng.integers(1, width + 1, batch)
    logit_length = rng.integers(2 * width, frames + 1, batch)
    logits = tf.constant(rng.normal(size=(batch, frames, classes)), tf.float32)
    loss, gradient = loss_and_gradient(labels, logits, label_length, logit_length)
    labels = tf.where(tf.sequence_mask(label_length, width), labels, 0)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        expected = tf.nn.ctc_loss(
            tf.RaggedTensor.from_tensor(labels, lengths=label_length).to_sparse() if sparse else labels,
            logits,
            None if sparse else label_length,
            logit_length,
            blank_index=-1,
            logits_time_major=False,
        )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, tape.gradient(expected, logits), atol=1e-4 if sparse else 2e-5)


@pytest.mark.parametrize(("merge", "collapse"), itertools.product([True, False], repeat=2))
def test_options_mean_what_they_mean_in_tensorflow_1(merge, collapse):
    rng = np.random.default_rng(10)
    labels = rng.integers(0, 3, (6, 5)).astype("int32")
    logits = rng.normal(size=(6, 14, 4)).astype("float32")
    options = {"preprocess_collapse_repeated": collapse, "ctc_merge_repeated": merge}
    expected = tf.compat.v1.nn.ctc_loss(
        tf.RaggedTensor.from_tensor(labels).to_sparse(), logits, [14] * 6, time_major=False, **options
    )
    np.testing.assert_allclose(ctc_loss(labels, logits, [5] * 6, **options), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "label_length", "logit_length", "message"),
    [
        ([[0, 3]], [2], [4], "The blank occurs inside a label"),
        ([[0, 7]], [2], [4], "not a class of the logits"),
        ([[0, -2]], [2], [4], "not a class of the logits"),
        ([[0, 1]], [3], [4], "label_length is negative or exceeds"),
        ([[0, 1]], [-1], [4], "label_length is negative or exceeds"),
        ([[0, 1]], [2], [5], "logit_length is negative or exceeds"),
        ([[0, 1]], [2], [-1], "logit_length is negative or exceeds"),
    ],
)
def test_wrong_values_are_named_eagerly_and_in_a_graph_and_nan_when_compiled(
    labels, label_length, logit_length, message
):
    arguments = [tf.constant(labels), tf.zeros([1, 4, 4]), tf.constant(label_length), tf.constant(logit_length)]
    with pytest.raises(ValueError, match=message):
        ctc_loss(*arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        GRAPH_LOSS(*arguments)
    assert np.isnan(COMPILED_LOSS(*arguments).numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[0]], np.zeros((1, 2, 3), "float32")), {}, "label_length is missing"),
        (([[0.5]], np.zeros((1, 2, 3), "float32"), [1]), {}, "labels are float32"),
        (([[0]], np.zeros((1, 2, 3), "int32"), [1]), {}, "logits are int32"),
        (([[0]], np.zeros((2, 3), "float32"), [1]), {}, "expected 3 axes"),
        (([[0]], np.zeros((4, 1, 3), "float32"), [1]), {}, "logits 4.* logits_time_major=False right"),
        (([[0]], np.zeros((1, 2, 3), "float32"), [1, 1]), {}, "label_length 2"),
        (([[0]], np.zeros((1, 2, 3), "float32"), [1]), {"blank_index": 3}, "the logits have 3 classes"),
        (([[0]], np.zeros((1, 2, 3), "float32"), [1]), {"infeasible": "nan"}, "expected 'inf', 'zero' or 'raise'"),
        (([0, 1], np.zeros((1, 2, 3), "float32"), [1]), {}, "Concatenated labels are 2, label_length adds up to 1"),
        ((tf.ragged.constant([[0]]), np.zeros((1, 2, 3), "float32"), [1]), {}, "carry their own"),
    ],
)
def test_wrong_types_and_shapes_are_named(arguments, options, message):
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        ctc_loss(*arguments, **options)


def hessian_vector_product(labels, logits, weights, direction, label_length, logit_length, **options):
    """Derivative of the gradient of the weighted losses along a direction, with respect to logits and weights."""
    with tf.GradientTape() as outer:
        outer.watch([logits, weights])
        with tf.GradientTape() as inner:
            inner.watch(logits)
            total = tf.reduce_sum(weights * ctc_loss(labels, logits, label_length, logit_length, **options))
        along = tf.reduce_sum(inner.gradient(total, logits) * direction)
    return outer.gradient(along, [logits, weights])


@pytest.mark.parametrize("run", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blank_index": 1, "ctc_merge_repeated": False, "infeasible": "zero"},
        {"blank_index": 0, "preprocess_collapse_repeated": True, "logits_time_major": True, "infeasible": "zero"},
    ],
)
def test_second_derivative_agrees_with_finite_differences(run, options):
    rng = np.random.default_rng(12)
    labels, logits, label_length, logit_length = random_lines(rng, 8, 9, 5, 4, options.get("blank_index", -1), 2.0)
    label_length[0], logit_length[:2] = 0, [6, 9]
    label_length[2], logit_length[2] = 4, 2  # does not fit
    weights, direction = rng.normal(size=8), rng.normal(size=logits.shape)
    logits[5, logit_length[5] :] = np.nan
    if options.get("logits_time_major"):
        logits, direction = logits.swapaxes(0, 1), direction.swapaxes(0, 1)
    lengths = tf.constant(label_length), tf.constant(logit_length)
    arguments = [tf.constant(values) for values in (labels, logits, weights, direction)]
    if "infeasible" not in options:
        arguments[2] = tf.where(np.isinf(ctc_loss(labels, logits, *lengths)), tf.zeros([], tf.float64), arguments[2])
        weights = arguments[2].numpy()
    product = {
        "eager": hessian_vector_product,
        "graph": tf.function(hessian_vector_product),
        "xla": tf.function(hessian_vector_product, jit_compile=True),
    }[run]
    along_logits, along_weights = product(*arguments, *lengths, **options)
    step, (_, gradient) = 1e-5, loss_and_gradient(labels, logits, *lengths, **options)
    _, behind = loss_and_gradient(labels, logits - step * direction, *lengths, **options)
    _, ahead = loss_and_gradient(labels, logits + step * direction, *lengths, **options)
    weights = weights[:, np.newaxis] if options.get("logits_time_major") else weights[:, np.newaxis, np.newaxis]
    weights = weights if weights.ndim == 3 else weights[np.newaxis]
    np.testing.assert_allclose(along_logits, weights * (ahead - behind) / (2 * step), atol=1e-8)
    axes = (0, 2) if options.get("logits_time_major") else (1, 2)
    np.testing.assert_allclose(along_weights, (gradient * direction).sum(axis=axes), atol=1e-9)


def test_second_derivative_of_a_long_line_and_no_third():
    rng = np.random.default_rng(13)
    labels, lengths = rng.integers(0, 19, (1, 60)), (tf.constant([60]), tf.constant([400]))
    logits, direction = rng.normal(size=(2, 1, 400, 20)) * 5
    arguments = [tf.constant(values) for values in (labels, logits, np.ones(1), direction)]
    found, _ = hessian_vector_product(*arguments, *lengths)
    step = 1e-5
    ahead = log_space_reference((logits + step * direction)[0], labels[0], 19)[1]
    behind = log_space_reference((logits - step * direction)[0], labels[0], 19)[1]
    np.testing.assert_allclose(found[0], (ahead - behind) / (2 * step), atol=1e-6)
    single, _ = hessian_vector_product(
        arguments[0], *(tf.cast(values, tf.float32) for values in arguments[1:]), *lengths
    )
    np.testing.assert_allclose(single, found, atol=1e-4)
    with tf.GradientTape() as tape:
        tape.watch(arguments[1])
        product, _ = hessian_vector_product(*arguments, *lengths)
    with pytest.raises(LookupError, match="no third derivative"):
        tape.gradient(product, arguments[1])


@KERNELS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nearly_certain_lines_keep_the_digits_of_a_small_loss(run, dtype):
    # One line of 8 frames for each height of the right class over the 3 others; losses from 1 down to 1e-12.
    heights = np.arange(1.0, 31.0)
    path = np.array([3, 0, 0, 3, 1, 1, 2, 3])
    logits = (heights[:, np.newaxis, np.newaxis] * np.eye(4)[path]).astype(dtype)
    labels = np.tile([[0, 1, 2]], (30, 1))
    loss, _ = loss_and_gradient(labels, logits, [3] * 30, run=run)
    # Of the paths, those that read otherwise: counted, with their probability, so that nothing is taken from 1.
    paths, readings = all_paths(8, 4, 3, True)
    others = np.ones(len(paths), bool)
    others[readings[0, 1, 2]] = False
    for row, height in enumerate(heights):
        hits = (paths == path).sum(axis=1)
        scores = height * hits - 8 * (height + np.log1p(3 * np.exp(-height)))
        expected = -np.log1p(-np.exp(scores[others]).sum())
        assert loss[row] == pytest.approx(expected, rel=2e-6 if dtype == "float32" else 1e-10, abs=5e-15)


@KERNELS
@pytest.mark.parametrize("mask", [1e9, 1e15, 1e30, 3e38])
def test_a_needed_class_may_be_masked_with_any_finite_number(run, mask):
    logits = np.zeros((1, 4, 3), "float32")
    logits[..., 1] = -mask
    loss, gradient = loss_and_gradient([[1]], logits, [1], blank_index=0, run=run)
    assert loss[0] == pytest.approx(mask, rel=1e-6)
    if mask <= 1e15:  # beyond, a sum of logits has no digit left that could tell one path from another
        np.testing.assert_allclose(gradient[0], [[-1 / 4, -1 / 4, 1 / 2]] * 4, atol=1e-6)
    assert np.isfinite(gradient).all()


def test_weights_of_zero_and_infinite_losses_leave_no_nan():
    # The first row does not fit, the second holds NaN.
    logits = np.zeros((3, 2, 3), "float32")
    logits[1] = np.nan
    logits = tf.constant(logits)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        loss = ctc_loss([[0, 0], [0, 1], [0, 1]], logits, [2, 2, 2])
        weighted = tf.math.multiply_no_nan(loss, [0.0, 0.0, 2.0])
        square = tf.square(loss)
    alone = tape.gradient(loss, logits).numpy()
    gradient = tape.gradient(weighted, logits).numpy()
    assert not gradient[:2].any()
    np.testing.assert_allclose(gradient[2], 2 * alone[2])
    assert not tape.gradient(square, logits).numpy()[0].any()


def test_logits_after_a_softmax_draw_a_warning():
    probabilities = tf.nn.softmax(np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32"))
    arguments = [tf.constant([[0], [1], [2]]), probabilities, tf.constant([1, 1, 1])]
    with pytest.warns(UserWarning, match="look like probabilities"):
        ctc_loss(*arguments)
    with pytest.warns(UserWarning, match="look like probabilities"):
        GRAPH_LOSS(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COMPILED_LOSS(*arguments)  # XLA cannot call back
        ctc_loss(arguments[0], tf.math.log(probabilities), arguments[2])
        GRAPH_LOSS(arguments[0], tf.math.log(probabilities), arguments[2])


def test_a_line_does_not_depend_on_its_batch_or_on_other_threads():
    rng = np.random.default_rng(14)
    labels, logits, label_length, logit_length = random_lines(rng, 40, 30, 7, 9, -1, 2.0)
    expected = loss_and_gradient(labels, logits, label_length, logit_length)

    def some(rows):
        return rows, loss_and_gradient(labels[rows], logits[rows], label_length[rows], logit_length[rows])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for rows, found in pool.map(some, [slice(i, i + n) for i in range(0, 40, 5) for n in (1, 3, 40)]):
            for found_values, values in zip(found, expected, strict=True):
                np.testing.assert_array_equal(found_values, values[rows])
