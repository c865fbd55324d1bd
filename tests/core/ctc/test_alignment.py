"""Alignments and posteriors against every path written out, the decoder's alignment, and real network outputs."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from htr_pipeline.core.ctc.alignment import class_posteriors, forced_align
from htr_pipeline.core.ctc.decoding import beam_search, greedy_search
from htr_pipeline.core.ctc.loss import ctc_loss

# float32: rounding of a few dozen operations on numbers near 1; the loss keeps 36 bits behind the point for float64.
TOLERANCE = {"float32": 5e-6, "float64": 1e-9}

MATRICES = Path(__file__).parents[4] / "shared" / "data" / "ctc_matrices"
real_matrices = pytest.mark.skipif(not MATRICES.is_dir(), reason=f"needs the network outputs in {MATRICES}")
TRUTHS = {
    "line/rnnOutput.csv": "gt.txt",
    "word/rnnOutput.csv": "gt.txt",
    "wbs_bentham/mat_0.csv": "gt_0.txt",
    "wbs_bentham/mat_1.csv": "gt_1.txt",
    "wbs_bentham/mat_2.csv": "gt_2.txt",
    "wbs_iam/mat_0.csv": "gt_0.txt",
}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def collapsed(path, blank, merge=True):
    return [c for i, c in enumerate(path) if c != blank and not (merge and i and c == path[i - 1])]


def state_path(path, blank, merge):
    """Place of each frame in the label with blanks between: even for a blank, odd for a label."""
    begun, states = 0, []
    for i, c in enumerate(path):
        begun += c != blank and not (merge and i and c == path[i - 1])
        states.append(2 * begun - (c != blank))
    return states


def enumerate_alignments(logits, label, blank, merge):
    """Best score, best path by the documented rule on ties, and posteriors of one line, over all K**T paths."""
    log_probs = log_softmax(logits)
    found = []
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        score = sum(log_probs[t, c] for t, c in enumerate(path))
        if collapsed(path, blank, merge) == list(label) and score > -np.inf:
            # Sums of the logits themselves: exact, hence equal for equally likely paths, where these are integers.
            logit_sum = sum(float(logits[t, c]) for t, c in enumerate(path))
            found.append((logit_sum, state_path(path, blank, merge)[::-1], path, score))
    posteriors = np.zeros(logits.shape)
    if not found:
        return -np.inf, [-1] * len(logits), posteriors
    scores = np.array([score for *_, score in found])
    for (*_, path, _), weight in zip(found, np.exp(scores - np.logaddexp.reduce(scores)), strict=True):
        posteriors[range(len(path)), path] += weight
    _, _, path, score = max(found)
    return score, list(path), posteriors


def spans_of(path, blank, merge, width):
    states = np.array(state_path(path, blank, merge))
    frames = [np.flatnonzero(states == 2 * place + 1) for place in range(width)]
    return [(found[0], found[-1] + 1) if len(found) else (0, 0) for found in frames]


def random_lines(rng, batch, frames, classes, width, blank):
    labels = rng.choice([c for c in range(classes) if c != blank % classes], size=(batch, width))
    return labels, rng.integers(0, width + 1, batch), rng.integers(0, frames + 1, batch)


def assert_is_alignment(alignment, labels, logits, label_length, logit_length, blank, merge=True):
    """What must hold of every aligned row, whatever path was chosen."""
    log_probs, real = log_softmax(logits), alignment.score.dtype.name
    path, spans, scores, score = (values.numpy() for values in alignment)
    for row in range(len(path)):
        frames, length = logit_length[row], label_length[row]
        assert collapsed(path[row, :frames].tolist(), blank, merge) == list(labels[row, :length])
        assert (path[row, frames:] == -1).all()
        frame_scores = log_probs[row, range(frames), path[row, :frames]]
        np.testing.assert_allclose(score[row], frame_scores.sum(), rtol=TOLERANCE[real], atol=TOLERANCE[real])
        np.testing.assert_array_equal(spans[row], spans_of(path[row, :frames].tolist(), blank, merge, spans.shape[1]))
        expected = [frame_scores[start:end].mean() for start, end in spans[row, :length]]
        np.testing.assert_allclose(scores[row, :length], expected, rtol=TOLERANCE[real], atol=TOLERANCE[real])
        assert not scores[row, length:].any()


@pytest.mark.parametrize(
    ("dtype", "blank", "merge"),
    [*itertools.product(["float32"], [0, 1, -1], [True, False]), ("float64", -2, True), ("float64", 0, False)],
)
def test_is_the_best_of_all_alignments(dtype, blank, merge):
    # 60 lines: labels of 0 to 3 with repeats, 0 to 5 frames (many too few), -inf logits, NaN behind the end; ties
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=(60, 5, 3)) * rng.choice([0.5, 60], (60, 1, 1))).astype(dtype)
    logits[:30] = rng.integers(0, 2, (30, 5, 3))
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    labels, label_length, logit_length = random_lines(rng, 60, 5, 3, 3, blank)
    padded = np.where(np.arange(5)[:, np.newaxis] < logit_length[:, np.newaxis, np.newaxis], logits, np.nan)
    options = {"blank_index": blank, "ctc_merge_repeated": merge}
    alignment = forced_align(labels, padded.astype(dtype), label_length, logit_length, **options)
    posteriors = class_posteriors(labels, padded.astype(dtype), label_length, logit_length, **options).numpy()
    assert alignment.score.dtype == alignment.label_scores.dtype == posteriors.dtype == dtype
    for row in range(60):
        frames, label = logit_length[row], labels[row, : label_length[row]]
        score, path, expected = enumerate_alignments(logits[row, :frames], label, blank % 3, merge)
        np.testing.assert_allclose(alignment.score[row], score, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert alignment.path[row].numpy().tolist() == path + [-1] * (5 - frames)
        np.testing.assert_allclose(posteriors[row, :frames], expected, atol=TOLERANCE[dtype])
        assert not posteriors[row, frames:].any()
    fits = np.isfinite(alignment.score)
    assert 0 < fits.sum() < 60
    rows = [values[fits] for values in (labels, logits, label_length, logit_length)]
    assert_is_alignment(type(alignment)(*(values[fits] for values in alignment)), *rows, blank % 3, merge)
    assert not alignment.frame_spans[~fits].numpy().any()


def test_ties_by_hand():
    # Every path of A B in four frames is equally likely: the line ends in a blank, and the labels begin at once.
    alignment = forced_align([[0, 1], [0, 0]], np.zeros((2, 4, 3), "float32"), [2, 2])
    np.testing.assert_array_equal(alignment.path, [[0, 1, 2, 2], [0, 2, 0, 2]])
    np.testing.assert_array_equal(alignment.frame_spans, [[[0, 1], [1, 2]], [[0, 1], [2, 3]]])
    np.testing.assert_allclose(alignment.label_scores, np.full((2, 2), -math.log(3)), rtol=1e-6)
    np.testing.assert_allclose(alignment.score, [-4 * math.log(3)] * 2, rtol=1e-6)


@pytest.mark.parametrize("common", [1e9, 1e17, -1e30])
def test_what_all_classes_of_a_frame_have_in_common_changes_no_path(common):
    logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
    logits[0, 3] = 0.0
    expected = forced_align([[0, 1, 0]], logits, [3]).path.numpy().tolist()
    logits[0, 3] = common
    assert forced_align([[0, 1, 0]], logits, [3]).path.numpy().tolist() == expected


def test_line_whose_score_float32_cannot_hold_has_no_alignment():
    logits = np.zeros((1, 3, 3), np.float32)
    logits[..., 0] = tf.float32.min
    found = forced_align([[0, 0]], logits, [2], blank_index=1)
    assert found.score.numpy().tolist() == [-math.inf]
    assert found.path.numpy().tolist() == [[-1, -1, -1]]
    assert not found.frame_spans.numpy().any()


def test_label_score_is_the_mean_over_the_span():
    # Blank last. A with 0.5 and 0.8 in the first two frames, blank, B with 0.6: the path A A _ B.
    probabilities = [[0.5, 0.1, 0.4], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]]
    alignment = forced_align([[0, 1, 77]], np.log([probabilities]), [2])
    assert alignment.path.numpy().tolist() == [[0, 0, 2, 1]]
    assert alignment.frame_spans.numpy().tolist() == [[[0, 2], [3, 4], [0, 0]]]
    np.testing.assert_allclose(alignment.label_scores, [[math.log(0.5 * 0.8) / 2, math.log(0.6), 0]], rtol=1e-12)
    np.testing.assert_allclose(alignment.score, [math.log(0.5 * 0.8 * 0.8 * 0.6)], rtol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_the_alignment_of_the_decoders(ties):
    rng = np.random.default_rng(3)
    log_probs = -rng.integers(1, 4, (6, 12, 5)).astype(float) if ties else log_softmax(rng.normal(size=(6, 12, 5)) * 2)
    logit_length = rng.integers(6, 13, 6)
    for blank in (0, -1):
        for row, beam in enumerate(beam_search(log_probs, logit_length, blank_index=blank, top_paths=20)):
            (greedy,) = greedy_search(log_probs, logit_length, blank_index=blank)[row]
            hypotheses = beam if ties else [greedy, *beam]  # of ties greedy_search takes another
            labels = np.zeros((21, 12), int)
            for label, found in zip(labels, hypotheses, strict=False):
                label[: len(found.labels)] = found.labels
            label_length = [len(found.labels) for found in hypotheses] + [0] * (21 - len(hypotheses))
            logits = np.repeat(log_probs[row : row + 1], 21, axis=0)
            alignment = forced_align(labels, logits, label_length, np.full(21, logit_length[row]), blank_index=blank)
            for spans, found in zip(alignment.frame_spans, hypotheses, strict=False):
                np.testing.assert_array_equal(spans[: len(found.labels)], found.frame_spans)
            if not ties:
                assert alignment.score[0].numpy() == pytest.approx(greedy.ctc_score, rel=1e-9)


def plain_viterbi(log_probs, label, blank):
    """Best score and path of one line, one frame at a time."""
    states = np.full(2 * len(label) + 1, blank)
    states[1::2] = label
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    score, moves = np.where(np.arange(len(states)) == 0, 0.0, -np.inf), []
    for frame in log_probs:
        one, two = np.full((2, len(states)), -np.inf)
        one[1:], two[2:] = score[:-1], score[:-2]
        arrivals = np.stack([score, one, np.where(skips, two, -np.inf)])
        moves.append(arrivals.argmax(axis=0))
        score = arrivals.max(axis=0) + frame[states]
    state = len(states) - 1 - int(len(states) > 1 and score[-2] > score[-1])
    best, path = score[state], []
    for move in reversed(moves):
        path.append(states[state])
        state -= move[state]
    return best, path[::-1]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_long_lines_and_large_logits(scale):
    rng = np.random.default_rng(5)
    logits = (rng.uniform(-1, 1, (2, 2048, 20)) * scale).astype("float32")
    labels, label_length, logit_length = rng.integers(0, 19, (2, 500)), np.array([500, 300]), np.array([2048, 1500])
    alignment = forced_align(labels, logits, label_length, logit_length)
    for row in range(2):
        label, frames = labels[row, : label_length[row]], logit_length[row]
        score, path = plain_viterbi(log_softmax(logits[row, :frames]), label, 19)
        assert alignment.score[row].numpy() == pytest.approx(score, rel=1e-6)
        np.testing.assert_array_equal(alignment.path[row, :frames], path)
    loss = ctc_loss(labels, logits, label_length, logit_length).numpy()
    assert (alignment.score.numpy() <= -loss + 1e-6 * loss).all()
    posteriors = class_posteriors(labels, logits, label_length, logit_length).numpy()
    np.testing.assert_allclose(posteriors.sum(axis=2), np.arange(2048) < logit_length[:, np.newaxis], atol=1e-5)


def test_score_is_at_most_the_likelihood_and_posteriors_sum_to_one():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(50, 30, 12)).astype("float32") * rng.choice([0.1, 1, 10, 100], (50, 1, 1)).astype(
        "float32"
    )
    labels, label_length, logit_length = random_lines(rng, 50, 30, 12, 12, 4)
    score = forced_align(labels, logits, label_length, logit_length, blank_index=4).score.numpy()
    loss = ctc_loss(labels, logits, label_length, logit_length, blank_index=4).numpy()
    fits = np.isfinite(loss)
    np.testing.assert_array_equal(np.isfinite(score), fits)
    assert (score[fits] <= -loss[fits] + 1e-5 * (1 + loss[fits])).all()
    posteriors = class_posteriors(labels, logits, label_length, logit_length, blank_index=4).numpy()
    assert posteriors.min() >= 0
    expected = (np.arange(30) < logit_length[:, np.newaxis]) & fits[:, np.newaxis]
    np.testing.assert_allclose(posteriors.sum(axis=2), expected, atol=1e-5)


@pytest.fixture
def batch():
    rng = np.random.default_rng(11)
    labels, label_length, _ = random_lines(rng, 4, 9, 6, 4, -1)
    return labels, rng.normal(size=(4, 9, 6)).astype("float32"), label_length, np.array([9, 7, 8, 9])


def assert_same(found, expected):
    for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("function", [forced_align, class_posteriors])
def test_forms_of_labels_agree(function, batch):
    labels, logits, label_length, logit_length = batch
    expected = function(labels, logits, label_length, logit_length)
    width = max(label_length)
    as_lists = [row[:length].tolist() for row, length in zip(labels, label_length, strict=True)]
    ragged = tf.ragged.constant(as_lists, dtype=tf.int32)
    for form in (ragged, ragged.to_sparse()):
        found = function(form, logits, None, logit_length)
        if function is forced_align:
            expected = expected._replace(
                frame_spans=expected.frame_spans[:, :width], label_scores=expected.label_scores[:, :width]
            )
        assert_same(found, expected)
    assert_same(function(ragged.flat_values, logits, label_length, logit_length), expected)
    time_major = function(
        labels[:, :width], logits.transpose(1, 0, 2), label_length, logit_length, logits_time_major=True
    )
    assert_same(time_major, expected)


@pytest.mark.parametrize("function", [forced_align, class_posteriors])
def test_eager_graph_and_compiled_agree(function, batch):
    expected = function(*batch)
    assert_same(tf.function(function)(*batch), expected)
    signature = [tf.TensorSpec([None] * array.ndim, array.dtype) for array in batch]
    assert_same(tf.function(function, input_signature=signature)(*batch), expected)
    compiled = tf.function(function, jit_compile=True)(*batch)
    for one, other in zip(tf.nest.flatten(compiled), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unknown", range(4))
def test_one_line_of_which_not_all_batch_sizes_are_known(unknown, batch):
    one_line = [array[:1] for array in batch]
    signature = [
        tf.TensorSpec([None if i == unknown else 1] + [None] * (a.ndim - 1), a.dtype) for i, a in enumerate(one_line)
    ]
    for function in (forced_align, class_posteriors):
        assert_same(tf.function(function, input_signature=signature)(*one_line), function(*one_line))


@pytest.mark.parametrize("function", [forced_align, class_posteriors])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_that_of_the_rounded_logits(function, dtype, batch):
    labels, logits, *lengths = batch
    rounded = tf.cast(logits, dtype)
    assert_same(function(labels, rounded, *lengths), function(labels, tf.cast(rounded, tf.float32), *lengths))


@pytest.mark.parametrize("blank", [0, 2, 5, -3, -6])
def test_moving_the_blank_moves_nothing_else(blank, batch):
    labels, logits, *lengths = batch
    order = np.insert(np.arange(5), blank % 6, 5)  # the class that each column now holds
    moved = forced_align(np.argsort(order)[labels], logits[:, :, order], *lengths, blank_index=blank)
    expected = forced_align(labels, logits, *lengths)
    np.testing.assert_array_equal(np.where(moved.path < 0, -1, order[moved.path]), expected.path)
    np.testing.assert_allclose(moved.score, expected.score, rtol=1e-6)


def test_posteriors_of_a_collapsed_label(batch):
    _, logits, _, logit_length = batch
    repeated = class_posteriors([[1, 1, 2]] * 4, logits, [3] * 4, logit_length, preprocess_collapse_repeated=True)
    assert_same(repeated, class_posteriors([[1, 2, 0]] * 4, logits, [2] * 4, logit_length))


def test_empty_labels_and_lines():
    logits = np.random.default_rng(1).normal(size=(3, 4, 3))
    for labels in (np.zeros((3, 0), int), np.zeros((3, 2), int)):
        alignment = forced_align(labels, logits, [0, 0, 0], [4, 1, 0])
        np.testing.assert_array_equal(alignment.path, [[2, 2, 2, 2], [2, -1, -1, -1], [-1] * 4])
        log_probs = log_softmax(logits)[:, :, 2]
        np.testing.assert_allclose(alignment.score, [log_probs[0].sum(), log_probs[1, 0], 0])
        assert not np.any(alignment.frame_spans)
        posteriors = class_posteriors(labels, logits, [0, 0, 0], [4, 1, 0]).numpy()
        np.testing.assert_allclose(posteriors[:, :, 2], [[1, 1, 1, 1], [1, 0, 0, 0], [0] * 4])
    without_frames = forced_align([[0], [0]], np.zeros((2, 0, 3), "float32"), [0, 1])
    assert without_frames.path.shape == (2, 0)
    np.testing.assert_array_equal(without_frames.score, [0, -np.inf])
    assert class_posteriors([[0], [0]], np.zeros((2, 0, 3), "float32"), [0, 1]).shape == (2, 0, 3)
    without_lines = forced_align(np.zeros((0, 2), int), np.zeros((0, 4, 3), "float32"), np.zeros(0, int))
    assert [values.shape for values in without_lines] == [(0, 4), (0, 2, 2), (0, 2), (0,)]


def test_lines_that_no_alignment_fits():
    logits = np.zeros((3, 3, 3), "float32")
    logits[1, :, 1] = -np.inf  # label 1 needs this class
    labels, label_length = [[0, 0], [1, 0], [0, 1]], [2, 2, 2]
    alignment = forced_align(labels, logits, label_length, [2, 3, 3])  # A A needs 3 frames
    np.testing.assert_array_equal(alignment.score[:2], [-np.inf] * 2)
    np.testing.assert_array_equal(alignment.label_scores[:2], np.full((2, 2), -np.inf))
    np.testing.assert_array_equal(alignment.path[:2], np.full((2, 3), -1))
    assert not np.any(alignment.frame_spans[:2])
    assert np.isfinite(alignment.score[2])
    posteriors = class_posteriors(labels, logits, label_length, [2, 3, 3]).numpy()
    assert not posteriors[:2].any()
    np.testing.assert_allclose(posteriors[2].sum(axis=1), [1, 1, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="2 of 3 rows: row 0 has 2 labels that need 3 frames, and 2 frames; row 1"):
        forced_align(labels, logits, label_length, [2, 3, 3], infeasible="raise")
    forced_align(labels[2:], logits[2:], label_length[2:], infeasible="raise")
    with pytest.raises(ValueError, match="infeasible='zero': expected"):
        forced_align(labels, logits, label_length, infeasible="zero")


def test_nan_inside_a_line_stays_visible():
    logits = np.zeros((2, 3, 3), "float32")
    logits[0, 1, 0] = np.nan
    alignment = forced_align([[1], [1]], logits, [1, 1])
    np.testing.assert_array_equal(np.isnan(alignment.score), [True, False])
    np.testing.assert_array_equal(alignment.path[0], [-1, -1, -1])
    assert np.isnan(class_posteriors([[1], [1]], logits, [1, 1])[0]).all()


WRONG = {
    "blank": ([[2, 0]], [2], [3], "blank occurs inside a label"),
    "class": ([[0, 7]], [2], [3], "not a class of the logits"),
    "label_length": ([[0, 1]], [3], [3], "exceeds the width of labels"),
    "logit_length": ([[0, 1]], [2], [4], "exceeds the number of frames"),
}


@pytest.mark.parametrize("problem", WRONG)
def test_wrong_rows(problem):
    labels, label_length, logit_length, message = WRONG[problem]
    arguments = (labels, np.zeros((1, 3, 3), "float32"), label_length, logit_length)
    with pytest.raises(ValueError, match=message):
        forced_align(*arguments)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        tf.function(lambda: forced_align(*arguments))()
    compiled = tf.function(lambda: forced_align(*arguments), jit_compile=True)()
    assert np.isnan(compiled.score[0])
    np.testing.assert_array_equal(compiled.path, [[-1, -1, -1]])
    assert not np.any(compiled.frame_spans)


@real_matrices
@pytest.mark.parametrize("name", TRUTHS)
def test_truth_of_a_real_matrix(name):
    file = MATRICES / name
    logits = np.array([[float(cell) for cell in row.split(";")[:-1]] for row in file.read_text().split()])
    local = file.parent / "chars.txt"
    characters = (local if local.exists() else MATRICES / "chars.txt").read_text(encoding="utf-8")
    truth = (file.parent / TRUTHS[name]).read_text(encoding="utf-8")
    labels = np.array([[characters.index(character) for character in truth]])
    alignment = forced_align(labels, logits[np.newaxis], [len(truth)])
    assert_is_alignment(alignment, labels, logits[np.newaxis], [len(truth)], [len(logits)], len(characters))
    score, path = plain_viterbi(log_softmax(logits), labels[0], len(characters))
    assert alignment.path[0].numpy().tolist() == path
    assert alignment.score[0].numpy() == pytest.approx(score, rel=1e-9)
    loss = ctc_loss(labels, logits[np.newaxis], [len(truth)])[0].numpy()
    assert loss <= -score < loss + 10  # few alignments hold most of the probability
    np.testing.assert_allclose(class_posteriors(labels, logits[np.newaxis], [len(truth)])[0].numpy().sum(axis=1), 1)
