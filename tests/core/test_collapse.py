"""The monitor on figures of runs; that real networks which fail show them is tested in test_training.py."""

import dataclasses
import json
import math

import pytest

from htr_pipeline.core.collapse import ADVICE, CollapseMonitor, StepFigures, judge_epoch

TEXT = "a line of text, with 31 letters"
GOOD = StepFigures(
    lines=1,
    loss=100.0,
    gradient_norm=100.0,
    edits=3,
    frames=150,
    blanks=100,
    num_classes=81,
    references=[TEXT],
    hypotheses=[TEXT],
    unfit=[],
    probabilities=False,
)
BLANK = GOOD._replace(edits=31, blanks=150, hypotheses=[""])


def watch(steps, monitor=None):
    """Verdicts of a monitor whose windows are one step long."""
    monitor = monitor or CollapseMonitor(plateau_steps=20)
    return [monitor.observe(step) for step in steps]


def falling(step, factor, count):
    return [step._replace(loss=step.loss * factor**index) for index in range(count)]


def test_a_verdict_comes_once_a_window_with_its_figures():
    monitor = CollapseMonitor(plateau_steps=60)
    first, second, third = watch([GOOD, GOOD, GOOD._replace(hypotheses=["a line"], edits=25, blanks=140)], monitor)
    assert (first, second) == (None, None)
    assert third.kind == "learning"
    assert "CER 33%, 76% of the frames blank, output 73% as long as the texts" in third.sentence


# Blank share, output over label length, CER and nats a character of the demo's first windows of 20 steps of 16 lines.
HEALTHY = [
    (0.30, 1.10, 1.22, 6.50),
    (1.00, 0.00, 1.00, 3.18),
    (0.95, 0.09, 0.92, 2.93),
    (0.86, 0.19, 0.82, 2.46),
    (0.75, 0.38, 0.66, 1.96),
    (0.66, 0.57, 0.52, 1.65),
]


def test_the_plateau_of_a_healthy_run_is_no_collapse():
    steps = [
        GOOD._replace(
            blanks=round(150 * blanks),
            hypotheses=[(2 * TEXT)[: round(31 * ratio)]],
            edits=round(31 * cer),
            loss=31 * loss,
        )
        for blanks, ratio, cer, loss in HEALTHY
    ]
    assert [verdict.kind for verdict in watch(steps)] == ["plateau"] * 4 + ["learning"] * 2
    assert not any(verdict.failed for verdict in watch(steps))


def test_blanks_are_a_plateau_while_the_loss_falls_and_a_collapse_when_it_stands_still():
    assert {verdict.kind for verdict in watch(falling(BLANK, 0.99, 60))} == {"plateau"}
    kinds = [verdict.kind for verdict in watch([BLANK] * 25)]
    assert kinds == ["plateau"] * 19 + ["blank"] * 6


@pytest.mark.parametrize(
    ("hypothesis", "kind", "words"),
    [
        ("", "blank", "writes hardly anything but blanks"),
        ("a", "blank", "writes a character or so and then blanks"),
        ("aX", "blank", "writes a character or so and then blanks"),
        ("e e e e e", "few_characters", "the same few characters"),
        ("quick brown fox, 4 jumps over", "not_learning", "not what stands in the lines"),
    ],
)
def test_what_the_network_writes_names_the_collapse(hypothesis, kind, words):
    verdict = watch([BLANK._replace(hypotheses=[hypothesis])] * 20)[-1]
    assert verdict.kind == kind
    assert verdict.failed
    assert verdict.rate_may_help
    assert words in verdict.sentence
    assert verdict.sentence.endswith(ADVICE[kind])


def test_a_network_that_could_read_and_falls_silent_has_collapsed_after_two_windows():
    monitor = CollapseMonitor(plateau_steps=20)
    kinds = [verdict.kind for verdict in watch([GOOD, GOOD, BLANK, BLANK], monitor)]
    assert kinds == ["learning", "learning", "plateau", "blank"]


@pytest.mark.parametrize(
    ("hypothesis", "kind"), [("e e e e e e e e", "few_characters"), ("xenil fo txet, htiw 31 srettel", "not_learning")]
)
def test_a_network_that_could_read_and_writes_something_else_has_collapsed_after_three_windows(hypothesis, kind):
    lost = GOOD._replace(loss=160.0, edits=29, hypotheses=[hypothesis])
    verdicts = watch([GOOD, GOOD, lost, lost, lost], CollapseMonitor(plateau_steps=20))
    assert [verdict.kind for verdict in verdicts] == ["learning", "learning", "plateau", "plateau", kind]
    assert "The network hardly reads, and the loss moves" in verdicts[2].sentence
    assert "after it had read" in verdicts[4].sentence


def test_a_network_that_has_just_begun_to_read_may_waver():
    wavering = GOOD._replace(loss=110.0, edits=23)
    steps = [GOOD._replace(edits=21), *[wavering] * 4, GOOD]
    assert [verdict.kind for verdict in watch(steps)] == ["learning", *["plateau"] * 4, "learning"]


def test_a_loss_above_guessing_or_far_above_the_lowest_has_exploded():
    guessing = 150 * math.log(81)
    assert watch([BLANK._replace(loss=guessing + 1.0)])[0].kind == "exploded"
    assert watch([BLANK._replace(loss=guessing - 1.0)])[0].kind == "plateau"
    assert [verdict.kind for verdict in watch([GOOD, GOOD._replace(loss=301.0)])] == ["learning", "exploded"]


def test_lines_known_by_heart_may_lose_ten_times_as_much_again():
    low = [GOOD._replace(loss=31 * loss) for loss in (0.03, 0.3, 1.4)]
    assert {verdict.kind for verdict in watch(low)} == {"learning"}
    assert watch([low[0], GOOD._replace(loss=31 * 1.6)])[1].kind == "exploded"


def test_steep_gradients_have_exploded_but_one_steep_batch_has_not():
    steep = BLANK._replace(gradient_norm=1e5)
    assert watch([BLANK] * 29 + [steep], CollapseMonitor(plateau_steps=600))[-1].kind == "plateau"
    assert watch([BLANK] * 26 + [steep] * 4, CollapseMonitor(plateau_steps=600))[-1].kind == "exploded"


def test_gradients_that_are_not_finite_explode_where_they_are_most():
    monitor = CollapseMonitor(plateau_steps=1000)
    assert watch([None, GOOD] * 20 + [None, None, GOOD, None], monitor) == [None] * 44
    assert watch([None], monitor)[0].kind == "exploded"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"unfit": ["page-7"]}, "labels_do_not_fit", "'page-7'"),
        ({"probabilities": True}, "softmax_twice", "probabilities, not logits"),
        ({"loss": 31 * 0.1, "edits": 30}, "other_labels", "The loss is nearly nil and the readings are wrong"),
    ],
)
def test_faults_of_the_data_are_named_at_once_and_no_rate_helps(change, kind, words):
    verdict = watch([BLANK._replace(**change)])[0]
    assert verdict.kind == kind
    assert words in verdict.sentence
    assert verdict.failed
    assert not verdict.rate_may_help


def test_wide_lines_are_the_fault_only_once_the_loss_stands_still():
    verdicts = watch([BLANK._replace(frames=2000, blanks=2000)] * 20)
    assert {verdict.kind for verdict in verdicts[:-1]} == {"plateau"}
    assert "65 frames for each character instead of 3 to 10, which may be why" in verdicts[0].sentence
    assert verdicts[-1].kind == "padded_widths"
    assert verdicts[-1].failed
    assert not verdicts[-1].rate_may_help


def test_a_low_loss_is_that_of_other_labels_only_where_readings_are_wrong_and_all_lines_fit():
    low = GOOD._replace(loss=31 * 0.1)
    assert watch([low])[0].kind == "learning"
    assert watch([low._replace(lines=16, edits=10, unfit=["page-7"])])[0].kind == "learning"


def test_a_few_lines_that_do_not_fit_are_no_failure():
    assert watch([GOOD._replace(lines=16, unfit=["page-7"])])[0].kind == "learning"


def test_a_stray_character_does_not_hide_a_collapse():
    steps = [BLANK._replace(hypotheses=["e" * 99 + "x"], references=[TEXT * 4], edits=124)] * 20
    assert watch(steps)[-1].kind == "few_characters"


def test_a_monitor_goes_on_from_what_a_checkpoint_holds():
    steps = [*falling(BLANK, 0.97, 13), None, *[BLANK] * 30, GOOD, BLANK, BLANK]
    whole, half = CollapseMonitor(plateau_steps=60), CollapseMonitor(plateau_steps=60)
    verdicts = watch(steps, whole)
    first = watch(steps[:20], half)
    again = CollapseMonitor(**json.loads(json.dumps(dataclasses.asdict(half))))
    assert first + watch(steps[20:], again) == verdicts
    assert again == whole


@pytest.mark.parametrize(
    ("train_cer", "validation_cer", "losses", "named"),
    [
        (0.01, 0.86, [101.0, 95.0, 189.0], True),
        (0.30, 0.80, [83.0, 126.0], True),
        (0.01, 0.50, [101.0, 95.0, 189.0], False),  # it reads others too
        (0.60, 0.86, [101.0, 95.0, 189.0], False),  # nothing is known by heart yet
        (0.30, 0.86, [101.0, 95.0, 99.0], False),  # the loss of others does not rise
        (math.nan, 0.86, [101.0, 95.0, 189.0], False),  # all batches were skipped
        (0.01, 0.86, [math.nan, 95.0, 189.0], True),
        (0.01, 0.86, [101.0, 95.0, math.nan], False),
    ],
)
def test_lines_learnt_by_heart_are_told_from_reading(train_cer, validation_cer, losses, named):
    verdict = judge_epoch(train_cer, validation_cer, losses)
    assert bool(verdict) == named
    if verdict:
        assert (verdict.kind, verdict.failed, verdict.rate_may_help) == ("by_heart", True, False)
        assert verdict.sentence.endswith(ADVICE["by_heart"])
