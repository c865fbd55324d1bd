from collections import Counter

import pytest

from htr_pipeline.core.splits import assign_splits, parse_split, with_validation

SPLITS = {"train", "validation", "test"}


def lines_of(writers):
    """Ids and writers of lines, one for each entry."""
    return [f"line{index}" for index in range(len(writers))], writers


def test_lines_of_a_writer_are_never_in_two_splits():
    line_ids, writer_ids = lines_of([f"w{index % 60}" for index in range(600)])
    splits, warnings = assign_splits(line_ids, writer_ids, [None] * 600)
    assert len(set(zip(writer_ids, splits, strict=True))) == 60
    assert set(splits) == SPLITS
    assert warnings == []


def test_shares_are_those_asked_for():
    line_ids, writer_ids = lines_of([f"writer {index}" for index in range(20000)])
    counts = Counter(assign_splits(line_ids, writer_ids, [None] * 20000, validation_share=0.2, test_share=0.1)[0])
    assert counts["test"] / 20000 == pytest.approx(0.1, abs=0.01)
    assert counts["validation"] / 20000 == pytest.approx(0.2, abs=0.01)


def test_lines_that_arrive_later_move_nothing():
    line_ids, writer_ids = lines_of([f"w{index % 80}" for index in range(800)])
    before = dict(zip(line_ids[:600], assign_splits(line_ids[:600], writer_ids[:600], [None] * 600)[0], strict=True))
    after = dict(zip(line_ids, assign_splits(line_ids, writer_ids, [None] * 800)[0], strict=True))
    assert before.items() <= after.items()


def test_the_order_of_the_lines_changes_nothing():
    line_ids, writer_ids = lines_of([f"w{index}" for index in range(5)] * 2)
    forwards = assign_splits(line_ids, writer_ids, [None] * 10)[0]
    backwards = assign_splits(line_ids[::-1], writer_ids[::-1], [None] * 10)[0]
    assert forwards == backwards[::-1]


def test_the_hash_does_not_depend_on_the_python_process():
    splits, _ = assign_splits(*lines_of([f"w{index}" for index in range(12)]), [None] * 12)
    assert " ".join(split[:2] for split in splits) == "tr tr te tr tr tr tr tr tr tr va tr"


def test_given_splits_stay_and_other_lines_of_the_writer_follow():
    line_ids, writer_ids = lines_of(["a", "a", "b", "c", "d"])
    splits, _ = assign_splits(line_ids, writer_ids, ["test", None, "train", "validation", None])
    assert splits[:4] == ["test", "test", "train", "validation"]


@pytest.mark.parametrize("num_writers", range(3, 12))
def test_three_writers_or_more_fill_every_split(num_writers):
    line_ids, writer_ids = lines_of([f"writer{index % num_writers}" for index in range(num_writers * 4)])
    splits, _ = assign_splits(line_ids, writer_ids, [None] * len(line_ids))
    assert set(splits) == SPLITS
    assert len(set(zip(writer_ids, splits, strict=True))) == num_writers
    assert Counter(splits).most_common(1)[0][0] == "train" or num_writers == 3


def test_large_shares_leave_a_writer_to_train_with():
    for number in range(50):
        line_ids, writer_ids = lines_of([f"{number}-{index % 4}" for index in range(16)])
        splits, _ = assign_splits(line_ids, writer_ids, [None] * 16, validation_share=0.4, test_share=0.4)
        assert set(splits) == SPLITS


@pytest.mark.parametrize("num_writers", [1, 2])
def test_fewer_than_three_writers_are_split_by_line_with_a_warning(num_writers):
    line_ids, writer_ids = lines_of([f"w{index % num_writers}" for index in range(40)])
    splits, warnings = assign_splits(line_ids, writer_ids, [None] * 40)
    assert set(splits) == SPLITS
    assert len(warnings) == 1
    assert "hands seen in training" in warnings[0]


@pytest.mark.parametrize(("num_pages", "kind"), [(24, "page"), (19, "line")])
def test_pages_of_one_writer_stay_whole_where_there_are_enough(num_pages, kind):
    line_ids, writer_ids = lines_of(["anna"] * 120)
    page_ids = [f"p{index % num_pages}" for index in range(120)]
    splits, warnings = assign_splits(line_ids, writer_ids, [None] * 120, page_ids=page_ids)
    assert set(splits) == SPLITS
    assert f"split by {kind}" in warnings[0]
    assert (len(set(zip(page_ids, splits, strict=True))) == num_pages) == (kind == "page")
    dealt, _ = with_validation(line_ids, writer_ids, ["train"] * 119 + ["test"], page_ids=page_ids)
    of_training = set(zip(page_ids[:119], dealt[:119], strict=True))
    assert (len(of_training) == num_pages) == (kind == "page")
    assert "validation" in dealt


def test_lines_without_a_writer_rule_are_warned_about():
    line_ids, _ = lines_of(range(50))
    _, warnings = assign_splits(line_ids, line_ids, [None] * 50)
    assert "Every line counts as a writer of its own" in warnings[0]
    assert "source.writer_pattern" in warnings[0]
    assert assign_splits(line_ids, line_ids, ["train"] * 50)[1] == []


@pytest.mark.parametrize(("num_writers", "kind"), [(12, "writers"), (2, "writers"), (1, "lines")])
def test_validation_lines_are_taken_out_of_the_training_lines_where_there_are_none(num_writers, kind):
    line_ids, writer_ids = lines_of([f"w{index % (num_writers + 3)}" for index in range(10 * (num_writers + 3))])
    splits = ["train" if int(writer_id[1:]) < num_writers else "test" for writer_id in writer_ids]
    dealt, warnings = with_validation(line_ids, writer_ids, splits)
    assert [(old, new) for old, new in zip(splits, dealt, strict=True) if old != new] == [
        ("train", "validation")
    ] * dealt.count("validation")
    assert set(dealt) == {"train", "validation", "test"}
    assert f"{dealt.count('validation')} of the {splits.count('train')} training lines" in warnings[0]
    assert ("all by one writer" if kind == "lines" else f" of {num_writers} writers.") in warnings[0]
    if kind == "writers":
        assert len(set(zip(writer_ids, dealt, strict=True))) == num_writers + 3


@pytest.mark.parametrize("splits", [["train", "validation", "test"], ["train"] * 2, ["test"] * 2, ["train", "test"]])
def test_other_splits_stay_as_they_are(splits):
    line_ids = [f"line{index}" for index in range(len(splits))]
    assert with_validation(line_ids, line_ids, splits) == (splits, [])


def test_no_lines_give_no_splits():
    assert assign_splits([], [], []) == ([], [])


@pytest.mark.parametrize(
    ("name", "split"),
    [("val", "validation"), ("Dev", "validation"), (" TRAIN ", "train"), ("testing", "test"), ("x", None)],
)
def test_usual_names_of_splits_are_known(name, split):
    assert parse_split(name) == split
