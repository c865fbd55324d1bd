"""Where in the line each label stands: the best alignment of a known label, and the posteriors of all of them."""

import functools
import math
import operator
from typing import Any, NamedTuple

import tensorflow as tf

from htr_pipeline.core.ctc.inputs import Lines, checked_lines, checked_rows, report
from htr_pipeline.core.ctc.kernel_xla import Trellis, make_trellis
from htr_pipeline.core.ctc.loss import ctc_loss
from htr_pipeline.core.ctc.problems import FINE, INFEASIBLE


class Alignment(NamedTuple):
    """The likeliest alignment of each line to its label.

    Attributes:
        path: (B, T) int32. Class of every frame, the blank included; -1 behind the end of the line.
        frame_spans: (B, N, 2) int32. First frame of each label and the frame after its last; 0, 0 behind label_length.
            Frames between two spans are blank.
        label_scores: (B, N). Mean log-probability of each label over the frames of its span; 0 behind label_length.
        score: (B,). Log-probability of the path, at most minus the CTC loss.
    """

    path: tf.Tensor
    frame_spans: tf.Tensor
    label_scores: tf.Tensor
    score: tf.Tensor


@tf.autograph.experimental.do_not_convert
def forced_align(
    labels: Any,
    logits: Any,
    label_length: Any = None,
    logit_length: Any = None,
    *,
    blank_index: int = -1,
    logits_time_major: bool = False,
    ctc_merge_repeated: bool = True,
    infeasible: str = "inf",
) -> Alignment:
    """The likeliest of all alignments that read as the label, by the Viterbi algorithm.

    Of equally likely paths it takes the one that, followed from the last frame backwards, stays in its label or blank
    wherever it can, and leaves it for the nearest: a line ends in a blank, labels begin early. So does beam_search.

    Args:
        labels: as for ctc_loss, in any of its forms.
        logits: (B, T, K) as for ctc_loss; log-probabilities will do too. Frames past logit_length may hold NaN.
        label_length: as for ctc_loss.
        logit_length: as for ctc_loss.
        blank_index: as for ctc_loss.
        logits_time_major: True where the logits are (T, B, K). The result is (B, T) all the same.
        ctc_merge_repeated: False: each label fills exactly one frame and equal neighbours need no blank between them.
        infeasible: what a row gives that no alignment fits: "inf": score and label_scores -inf, path -1, spans 0, 0;
            "raise": an error that names the rows.

    Returns:
        An Alignment. Scores are float64 for float64 logits, else float32, and have no gradient. A row with NaN in a
        frame of the line has score NaN, path -1 and spans 0, 0.

    Raises:
        ValueError: as for ctc_loss. In a caller compiled with jit_compile=True, which has no assertions, a wrong row
            looks like one with NaN.

    Source: label_scores as in torchaudio.functional.merge_tokens.
    """
    blank_index = operator.index(blank_index)
    if infeasible not in ("inf", "raise"):
        raise ValueError(f"infeasible={infeasible!r}: expected 'inf' or 'raise'.")
    lines = checked_lines(labels, logits, label_length, logit_length, blank_index, logits_time_major)
    alignment, status = _viterbi(lines, blank_index, logits_time_major, ctc_merge_repeated)
    worst_allowed = FINE if infeasible == "raise" else INFEASIBLE
    with tf.control_dependencies(report(status, worst_allowed, lines, logits_time_major, False, ctc_merge_repeated)):
        return Alignment(*map(tf.identity, alignment))


@tf.autograph.experimental.do_not_convert
def class_posteriors(
    labels: Any,
    logits: Any,
    label_length: Any = None,
    logit_length: Any = None,
    *,
    blank_index: int = -1,
    logits_time_major: bool = False,
    preprocess_collapse_repeated: bool = False,
    ctc_merge_repeated: bool = True,
) -> tf.Tensor:
    """Probability of each class in each frame, given the label: softmax minus the derivative of the CTC loss.

    Args:
        labels: as for ctc_loss, in any of its forms.
        logits: as for ctc_loss.
        label_length: as for ctc_loss.
        logit_length: as for ctc_loss.
        blank_index: as for ctc_loss.
        logits_time_major: True where the logits are (T, B, K). The result is (B, T, K) all the same.
        preprocess_collapse_repeated: as for ctc_loss.
        ctc_merge_repeated: as for ctc_loss.

    Returns:
        (B, T, K), float64 for float64 logits, else float32, without a gradient. The classes of a frame sum to 1; 0
        behind the end of a line and in lines that no alignment fits; NaN where the loss is.

    Raises:
        ValueError: as for ctc_loss.

    Source: Graves et al., ICML 2006, equations 14 and 15.
    """
    lines = checked_lines(labels, logits, label_length, logit_length, blank_index, logits_time_major)
    logits = tf.stop_gradient(_batch_major(lines.logits, logits_time_major))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = ctc_loss(
            *lines._replace(logits=logits),
            blank_index=blank_index,
            preprocess_collapse_repeated=preprocess_collapse_repeated,
            ctc_merge_repeated=ctc_merge_repeated,
        )
    posteriors = tf.maximum(tf.nn.softmax(logits) - tape.gradient(loss, logits), 0.0)
    loss, in_line = loss[:, tf.newaxis, tf.newaxis], tf.sequence_mask(lines.logit_length, tf.shape(logits)[1])
    posteriors = tf.where(tf.math.is_nan(loss), loss, posteriors)
    return tf.where(in_line[:, :, tf.newaxis] & (loss != math.inf), posteriors, tf.zeros([], logits.dtype))


def _batch_major(logits: tf.Tensor, time_major: bool) -> tf.Tensor:
    logits = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
    return tf.transpose(logits, [1, 0, 2]) if time_major else logits


@functools.partial(tf.function, jit_compile=True, autograph=False, reduce_retracing=True)
def _viterbi(lines: Lines, blank_index: int, time_major: bool, merge: bool) -> tuple[Alignment, tf.Tensor]:
    """What forced_align returns, and the (B,) status of each row."""
    rows = checked_rows(lines, blank_index, time_major, collapse=False)
    labels, label_length, _, status = rows
    trellis = make_trellis(rows, tf.stop_gradient(lines.logits), blank_index, time_major, merge)
    logits, in_line, states = trellis.logits, trellis.in_line, trellis.states
    real, frames_given = logits.dtype, tf.shape(lines.logits)[0 if time_major else 1]
    in_label = tf.sequence_mask(label_length, tf.shape(labels)[1])  # (B, N)

    visited, feasible = _best_states(trellis, label_length)
    path = tf.gather(states, visited, batch_dims=1)  # (B, T)
    frame_scores = tf.cast(tf.gather(logits, path, batch_dims=2) - trellis.largest[:, :, 0], tf.float64)
    frame_scores = tf.where(in_line, frame_scores - trellis.log_sums, 0.0)  # (B, T)
    feasible |= tf.reduce_any(tf.math.is_nan(logits), axis=[1, 2])  # NaN logits stay visible
    score = tf.where(feasible, tf.reduce_sum(frame_scores, axis=1), -math.inf)
    score = tf.where(tf.equal(status, FINE), score, math.nan)
    score = tf.cast(tf.cast(score, real), tf.float64)  # -inf is also what float32 cannot hold
    is_aligned = tf.math.is_finite(score)

    # (B, T, N), which XLA never stores: states only grow, so that counting frames finds a label's first and last.
    label_state = 2 * tf.range(tf.shape(labels)[1]) + 1
    is_before = (visited[:, :, tf.newaxis] < label_state) & in_line[:, :, tf.newaxis]
    is_within = (visited[:, :, tf.newaxis] == label_state) & in_line[:, :, tf.newaxis]
    starts, counts = (tf.reduce_sum(tf.cast(found, tf.int32), axis=1) for found in (is_before, is_within))
    spans = tf.stack([starts, starts + counts], axis=2)
    spans = tf.where((in_label & is_aligned[:, tf.newaxis])[:, :, tf.newaxis], spans, 0)
    sums = tf.reduce_sum(tf.where(is_within, frame_scores[:, :, tf.newaxis], 0.0), axis=1)
    label_scores = tf.where(is_aligned[:, tf.newaxis], sums / tf.cast(counts, tf.float64), score[:, tf.newaxis])
    label_scores = tf.where(in_label, label_scores, 0.0)

    path = tf.where(in_line & is_aligned[:, tf.newaxis], path, -1)[:, :frames_given]
    status = tf.where(tf.equal(score, -math.inf), INFEASIBLE, status)
    return Alignment(path, spans, tf.cast(label_scores, real), tf.cast(score, real)), status


def _best_states(trellis: Trellis, label_length: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """State of the best path in each frame, behind the end of a line the one it ended in; whether there is a path.

    Logits are added up without their softmax: what it takes off them is the same for all paths. But for the largest of
    the frame, which they may have in common, the sums of float32 logits are nearly always exact in float64, and so is
    the choice between paths.

    Args:
        trellis: the batch.
        label_length: (B,).

    Returns:
        (B, T) int32; (B,) bool.
    """
    states, stays, skipped_into = trellis.states, trellis.stays, trellis.skipped_into
    relative = tf.cast(trellis.logits, tf.float64) - tf.cast(trellis.largest, tf.float64)
    emissions = tf.transpose(tf.gather(relative, states, axis=2, batch_dims=1), [1, 0, 2])  # (T, B, S)
    forbidden = tf.constant(-math.inf, tf.float64)
    num_frames, num_states = tf.shape(emissions)[0], tf.shape(states)[1]
    in_line = tf.transpose(trellis.in_line)[:, :, tf.newaxis]  # (T, B, 1)
    position = tf.range(num_states)

    def forwards(t: tf.Tensor, score: tf.Tensor, moves: tf.TensorArray) -> tuple[tf.Tensor, tf.Tensor, tf.TensorArray]:
        before = tf.pad(score, [[0, 0], [2, 0]], constant_values=-math.inf)
        stay, step = tf.where(stays, score, forbidden), before[:, 1:-1]
        skip = tf.where(skipped_into, before[:, :-2], forbidden)
        best = tf.maximum(stay, step)
        move = tf.where(skip > best, 2, tf.where(step > stay, 1, 0))
        moves = moves.write(t, tf.cast(tf.where(in_line[t], move, 0), tf.int8))
        arrived = tf.maximum(best, skip) + emissions[t]
        return t + 1, tf.ensure_shape(tf.where(in_line[t], arrived, score), score.shape), moves

    # Before the first frame: as if a blank had been there.
    score = tf.broadcast_to(tf.where(position == 0, tf.zeros([], tf.float64), forbidden), tf.shape(states))
    moves = tf.TensorArray(tf.int8, size=num_frames)
    _, score, moves = tf.while_loop(lambda t, *_: t < num_frames, forwards, (0, score, moves))
    moves = tf.reshape(moves.stack(), [num_frames, -1, num_states])

    last = 2 * label_length
    ends = tf.gather(score, tf.stack([tf.maximum(last - 1, 0), last], axis=1), batch_dims=1)
    last -= tf.cast(ends[:, 0] > ends[:, 1], tf.int32)

    def backwards(t: tf.Tensor, state: tf.Tensor, visited: tf.TensorArray) -> tuple:
        visited = visited.write(t, state)
        move = tf.cast(tf.gather(moves[t], state, batch_dims=1), tf.int32)
        return t - 1, tf.ensure_shape(state - move, state.shape), visited

    visited = tf.TensorArray(tf.int32, size=num_frames)
    _, _, visited = tf.while_loop(lambda t, *_: t >= 0, backwards, (num_frames - 1, last, visited))
    return tf.transpose(tf.reshape(visited.stack(), [num_frames, -1])), tf.reduce_max(ends, axis=1) != -math.inf
