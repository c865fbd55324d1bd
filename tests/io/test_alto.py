import functools
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from htr_pipeline.core.cutting import cut_line
from htr_pipeline.core.image import read_image
from tests.io import samples
from tests.io.samples import import_rows as read

RESOURCES = samples.RESOURCES / "alto"
add = functools.partial(samples.add, RESOURCES)


def test_escriptorium_file_gives_records_with_geometry(source):
    add(source, "escriptorium_v4.xml")
    records, rejected = read(source)
    first = records[0]
    assert (first["line_id"], first["text"], first["format"]) == ("escriptorium_v4/l1", "first line", "alto")
    assert first["polygon"] == [[35, 50], [250, 50], [250, 95], [35, 95]]
    assert first["baseline"] == [[40, 80], [240, 80]]
    assert records[1]["text"] == "second & line"
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("escriptorium_v4/empty", "empty_text")]


def test_points_with_and_without_commas_are_the_same(source):
    add(source, "escriptorium_v4.xml")
    before = read(source)[0]
    add(
        source,
        "escriptorium_v4.xml",
        change={"35 50 250 50 250 95 35 95": "35,50 250,50 250,95 35,95", "40 80 240 80": "40,80 240,80"},
    )
    assert read(source)[0] == before


def test_baseline_of_one_number_is_level_and_as_long_as_the_box(source):
    add(source, "boxes_v3.xml")
    (record,), _ = read(source)
    assert record["baseline"] == [[35, 80], [250, 80]]
    assert record["polygon"] == [[35, 50], [250, 50], [250, 95], [35, 95]]
    assert record["text"] == "first line"


def test_tenths_of_millimetres_become_pixels_of_the_image(source):
    add(source, "words_v2.xml")  # 1600 x 1200 for an image of 400 x 300
    first = read(source)[0][0]
    assert first["polygon"] == [[35, 50], [250, 50], [250, 95], [35, 95]]
    assert first["baseline"] == [[35, 80], [250, 80]]


def test_line_without_a_box_gets_that_of_its_strings(source):
    add(source, "words_v2.xml")
    assert read(source)[0][1]["polygon"] == [[35, 118], [250, 118], [250, 165], [35, 165]]


def test_parted_word_keeps_its_hyphen_and_words_their_blanks(source):
    add(source, "words_v2.xml")
    assert [record["text"] for record in read(source)[0]] == ["exam-", "ple of words"]


def test_hyphen_that_the_string_has_already_is_not_doubled(source):
    add(source, "words_v2.xml", change={'CONTENT="exam"': 'CONTENT="exam-"'})
    assert read(source)[0][0]["text"] == "exam-"


@pytest.mark.parametrize(
    "namespace",
    [
        "http://www.loc.gov/standards/alto/ns-v2#",
        "http://www.loc.gov/standards/alto/ns-v3#",
        "http://schema.ccs-gmbh.com/ALTO",
        "http://bibnum.bnf.fr/ns/alto_prod",
        "",
    ],
)
def test_every_version_of_the_namespace_is_read(source, namespace):
    add(source, "escriptorium_v4.xml", change={"http://www.loc.gov/standards/alto/ns-v4#": namespace})
    assert len(read(source)[0]) == 2


def test_file_without_an_image_name_takes_the_image_that_is_called_like_it(source):
    add(
        source,
        "escriptorium_v4.xml",
        change={"<sourceImageInformation><fileName>page.png</fileName></sourceImageInformation>": ""},
    )
    (source / "page.png").rename(source / "ESCRIPTORIUM_v4.PNG")
    assert {record["image_path"] for record in read(source)[0]} == {"ESCRIPTORIUM_v4.PNG"}


@pytest.mark.parametrize(
    ("sample", "reason", "detail"),
    [
        ("broken", "unreadable_xml", "not well-formed XML"),
        ("empty", "unreadable_xml", "no element found"),
        ("billion_laughs", "unreadable_xml", "it has a DOCTYPE"),
        ("external_entity", "unreadable_xml", "it has a DOCTYPE"),
        ("wrong_namespace", "unreadable_xml", "the namespace 'http://example.org/alto' is not one of ALTO"),
        ("unknown_unit", "unreadable_xml", "MeasurementUnit 'furlong'; expected one of pixel, mm10, inch1200"),
        ("mm10_without_size", "unreadable_xml", "'mm10' needs WIDTH and HEIGHT of the Page"),
        ("path_traversal", "missing_image", "there is no image 'outside.png'"),
        ("missing_image", "missing_image", "there is no image 'none.png'"),
        ("no_geometry", "bad_geometry", "neither polygon, box nor baseline"),
        ("odd_points", "bad_geometry", "'35 50 250': expected pairs of numbers"),
        ("endless_box", "bad_geometry", r"1e\+30"),
    ],
)
def test_each_invalid_file_is_rejected_with_a_sentence(source, sample, reason, detail):
    shutil.copy(source / "page.png", source.parent / "outside.png")
    add(source, "boxes_v3.xml")
    add(source, f"invalid/{sample}.xml")
    records, rejected = read(source)
    assert len(records) == 1
    assert [(row["file"], row["reason"]) for row in rejected] == [(f"{sample}.xml", reason)]
    assert re.search(detail, rejected[0]["detail"])


def test_every_invalid_sample_is_tested():
    marks = test_each_invalid_file_is_rejected_with_a_sentence.pytestmark
    assert {sample for sample, *_ in marks[0].args[1]} == {path.stem for path in (RESOURCES / "invalid").iterdir()}


def test_damaged_files_are_read_or_rejected_and_every_line_can_be_cut(source):
    rng = np.random.default_rng(1)
    for sample in ("escriptorium_v4", "words_v2", "boxes_v3"):
        data = (RESOURCES / f"{sample}.xml").read_bytes()
        for number in range(50):
            (source / f"{sample}{number}.xml").write_bytes(samples.damaged(data, rng))
    records, rejected = read(source)
    assert Counter(row["reason"] for row in rejected).keys() >= {"unreadable_xml", "bad_geometry"}
    page = read_image(source / "page.png")
    for record in records:
        line = cut_line(page, record["polygon"], record["baseline"])
        assert line.shape == (record["height_pixels"], record["width_pixels"])
