import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers import SourceConfig
from htr_pipeline.io.manifest import LEFT_OUT
from tests.io.samples import by_line, import_rows

RESOURCES = Path(__file__).parents[1] / "resources" / "iam"


@pytest.fixture
def iam(tmp_path):
    """A folder as IAM's archives unpack, of four forms by four writers, with the task's split files."""
    return shutil.copytree(RESOURCES, tmp_path / "iam", ignore=shutil.ignore_patterns("invalid"))


def texts(records):
    return {record["line_id"]: record["text"] for record in records}


def test_lines_txt_gives_texts_writers_forms_and_official_splits(iam):
    records, rejected = import_rows(iam)
    found = by_line(records)
    assert {line_id: (row["split"], row["writer_id"], row["page_id"]) for line_id, row in found.items()} == {
        "a01-000u-00": ("train", "000", "a01-000u"),
        "a01-000u-01": ("train", "000", "a01-000u"),
        "a01-000x-00": ("validation", "001", "a01-000x"),
        "b02-013-00": ("test", "002", "b02-013"),
    }
    assert found["a01-000u-01"]["text"] == '" Why ? " he asked .'
    assert found["b02-013-00"]["text"] == "# 4 and a half"  # not a comment
    assert found["a01-000u-00"]["image_path"] == "lines/a01/a01-000u/a01-000u-00.png"
    assert {row["format"] for row in records} == {"iam"}
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("c03-021a-00", LEFT_OUT)]


def test_lines_with_a_wrong_segmentation_are_kept_and_marked(iam):
    assert {line_id: row["group"] for line_id, row in by_line(import_rows(iam)[0]).items()} == {
        "a01-000u-00": "segmentation ok",
        "a01-000u-01": "segmentation err",
        "a01-000x-00": "segmentation ok",
        "b02-013-00": "segmentation ok",
    }


def test_without_the_outer_folders_the_same_lines_are_found(iam, tmp_path):
    expected = texts(import_rows(iam)[0])
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (*iam.glob("ascii/*.txt"), *iam.glob("task/*.txt"), *iam.rglob("*.png")):
        shutil.copy(file, flat)
    assert texts(import_rows(flat)[0]) == expected


def test_words_are_joined_to_lines(iam):
    records, _ = import_rows(iam, config=SourceConfig(iam_text="words"))
    assert texts(records)["a01-000u-00"] == "A line of ink"
    assert by_line(records)["a01-000u-00"]["group"] == "segmentation err"  # one word of it
    assert texts(records)["b02-013-00"] == "# 4"


def test_forms_give_the_line_as_it_is_spaced_with_both_escapes_undone(iam):
    (iam / "ascii" / "forms.txt").unlink()
    records, rejected = import_rows(iam, config=SourceConfig(iam_text="xml"))
    assert texts(records)["a01-000u-01"] == '"Why?" he asked.'
    assert by_line(records)["b02-013-00"]["writer_id"] == "002"
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("a01-000x-00", "unknown_id")]  # has no form here


def test_forms_alone_are_recognised(iam):
    shutil.rmtree(iam / "ascii")
    assert {record["format"] for record in import_rows(iam)[0]} == {"iam"}


def test_aachen_lists_name_forms_and_both_validation_lists_are_validation(iam):
    shutil.rmtree(iam / "task")
    (iam / "tr.lst").write_text("a01-000u\n")
    (iam / "va1.lst").write_text("a01-000x\n")
    (iam / "va2.lst").write_text("b02-013\n")
    (iam / "te.lst").write_text("c03-021a\n")
    records, rejected = import_rows(iam)
    assert rejected == []
    assert Counter(record["split"] for record in records) == {"train": 2, "validation": 2, "test": 1}


def test_without_split_files_or_by_writer_no_line_has_a_split(iam):
    records, rejected = import_rows(iam, config=SourceConfig(split="by_writer"))
    assert (len(records), rejected) == (5, [])
    shutil.rmtree(iam / "task")
    again, _ = import_rows(iam)
    assert {record["split"] for record in (*records, *again)} == {None}


def test_a_line_in_two_splits_is_an_error_that_names_the_lists(iam):
    (iam / "te.lst").write_text("a01-000u-00\n")
    with pytest.raises(UserError, match=r"a01-000u-00 is for train in task/trainset\.txt, for test in te\.lst"):
        import_rows(iam)


def test_broken_entries_are_rejected_with_their_place():
    records, rejected = import_rows(RESOURCES / "invalid", "iam")
    assert texts(records) == {"a01-000u-00": "good"}
    assert [(row["file"], row["reason"]) for row in rejected] == [
        ("ascii/lines.txt:3", "missing_image"),
        ("ascii/lines.txt:4", "bad_row"),  # an id that leads out of the folder
        ("ascii/lines.txt:5", "bad_row"),
        ("ascii/lines.txt:6", "duplicate_id"),
        ("task/tr.lst", "unknown_id"),
    ]


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("a01-001", "unreadable_xml", "DOCTYPE"),  # entities within entities
        ("a01-002", "unreadable_xml", "DOCTYPE"),  # an external entity
        ("a01-003", "unreadable_xml", "DOCTYPE"),  # an external document type
        ("a01-004", "unreadable_xml", "levels"),
        ("a01-005", "unreadable_xml", "not well-formed"),
        ("../../../etc/x-00", "bad_row", "is not the id of a line"),
        ("a01-007", "unreadable_xml", r"expected <form>.*got <alto>"),
    ],
)
def test_hostile_form_is_rejected(name, reason, detail):
    records, rejected = import_rows(RESOURCES / "invalid" / "hostile", "iam")
    row = by_line(rejected)[name]
    assert records == []
    assert row["reason"] == reason
    assert re.search(detail, row["detail"])


def test_form_that_is_a_link_out_of_the_folder_is_not_read(iam, tmp_path):
    outside = shutil.copy(iam / "xml" / "b02-013.xml", tmp_path)
    (iam / "xml" / "b02-013.xml").unlink()
    (iam / "xml" / "b02-013.xml").symlink_to(outside)
    _, rejected = import_rows(iam, config=SourceConfig(iam_text="xml", split="by_writer"))
    assert [(row["file"], row["reason"]) for row in rejected] == [("xml/b02-013.xml", "unreadable_xml")]
    assert "link" in rejected[0]["detail"]


@pytest.mark.parametrize("name", ["ascii/lines.txt", "ascii/forms.txt", "task/testset.txt"])
def test_list_that_is_a_link_out_of_the_folder_is_not_read(iam, tmp_path, name):
    (iam / name).rename(tmp_path / "outside.txt")
    (iam / name).symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match=rf"{name} is a link out of"):
        import_rows(iam)


@pytest.mark.parametrize("choice", ["lines", "words", "xml"])
def test_missing_transcriptions_are_named(tmp_path, choice):
    with pytest.raises(UserError, match=rf"source\.iam_text = '{choice}'\. Expected"):
        import_rows(tmp_path, "iam", SourceConfig(iam_text=choice))
