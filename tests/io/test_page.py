import csv
import functools
import os
import re
import shutil
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.core.cutting import cut_line
from htr_pipeline.core.image import read_image
from htr_pipeline.io.importers import SourceConfig
from htr_pipeline.io.importers import xml as pages
from tests.io import samples
from tests.io.samples import import_rows, png_bomb

RESOURCES = samples.RESOURCES / "page"
RAW_PAGES = Path(__file__).parents[3] / "shared" / "data" / "raw_pages"
add = functools.partial(samples.add, RESOURCES)
read = functools.partial(samples.import_rows, format="page")


def texts(source):
    return [record["text"] for record in read(source)[0]]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_second_file_of_a_page_is_rejected_line_by_line(source):
    add(source, "escriptorium_2019.xml", "p.xml")
    add(source, "escriptorium_2019.xml", "page/p.xml", change={'id="l2"': 'id="other"'})
    records, rejected = read(source)
    assert [record["line_id"] for record in records] == ["p/l1", "p/l2"]
    assert [(row["line_id"], row["reason"]) for row in rejected] == [
        ("p/l1", "duplicate_id"),
        ("p/other", "duplicate_id"),
    ]
    assert "page/p.xml: p.xml is the file of the page 'p' already. Keep one of them" in rejected[1]["detail"]


def test_pages_without_lines_and_images_without_a_page_are_named(source, caplog):
    add(source, "escriptorium_2019.xml")
    (source / "empty.xml").write_text("<PcGts><Page imageFilename='page.png'/></PcGts>")
    for name in ("thumbs/page.jpg", "alone.png"):  # a smaller copy is no page
        (source / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 3)).save(source / name)
    assert len(read(source)[0]) == 2
    assert "no lines were found, so that there is nothing to read: 1 (empty.xml)" in caplog.text
    assert "Page images without a PAGE file, which are not read: 1 (alone.png)" in caplog.text


def test_escriptorium_page_gives_records_with_geometry(source):
    add(source, "escriptorium_2019.xml")
    records, rejected = read(source)
    assert rejected == []
    first = records[0]
    assert (first["line_id"], first["page_id"]) == ("escriptorium_2019/l1", "escriptorium_2019")
    assert (first["image_path"], first["text"]) == ("page.png", "first line")
    assert first["polygon"] == [[35, 50], [250, 50], [250, 95], [35, 95]]
    assert first["baseline"] == [[40, 80], [240, 80]]
    assert (first["height_pixels"], first["width_pixels"]) == (49, 219)
    assert records[1]["text"] == "second line"
    assert len({record["content_hash"] for record in records}) == 2


def test_transkribus_page_is_read_in_reading_order(source):
    add(source, "transkribus_2013.xml")
    assert texts(source) == ["first line", "second & line", "third line"]


def test_line_without_text_is_rejected_as_empty(source):
    add(source, "transkribus_2013.xml")
    _, rejected = read(source)
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("transkribus_2013/empty", "empty_text")]


def test_line_without_text_is_only_that_also_where_its_points_are_broken(source):
    add(source, "escriptorium_2019.xml", change={"first line": " ", "35,50 250,50": "35,fifty"})
    _, rejected = read(source)
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("escriptorium_2019/l1", "empty_text")]


def test_coords_without_an_area_become_a_band_around_the_baseline(source):
    add(source, "transkribus_2013.xml")
    first = read(source)[0][0]
    ys = [y for _, y in first["polygon"]]
    assert min(ys) < 80 < max(ys)
    assert 30 <= max(ys) - min(ys) <= 80  # the baselines of the page are 30 to 70 pixels apart
    assert first["baseline"] == [[40, 80], [240, 80]]


def test_coords_without_an_area_and_no_baseline_are_no_geometry(source):
    add(source, "transkribus_2013.xml", change={'<Baseline points="40,80 240,80"/>': ""})
    (rejected,) = [row for row in read(source)[1] if row["reason"] == "bad_geometry"]
    assert rejected["line_id"].endswith("/l1")
    assert "it has neither polygon, box nor baseline. Draw the line again" in rejected["detail"]


def test_first_of_several_texts_is_that_of_the_lowest_index_or_highest_confidence(source):
    add(source, "larex_2017.xml")
    assert texts(source)[1:] == ["corrected text", "certain text"]


def test_words_and_glyphs_make_the_text_of_a_line_without_one(source):
    add(source, "larex_2017.xml")
    assert texts(source)[0] == "word by word"


def test_coordinates_are_scaled_to_the_image_and_kept_within_it(source):
    add(source, "larex_2017.xml")  # 800 x 600 for an image of 400 x 300
    records, _ = read(source)
    assert records[0]["polygon"] == [[0, 50], [399, 50], [399, 95], [0, 95]]
    assert records[1]["polygon"] == [[35, 120], [250, 120], [250, 165], [35, 165]]


@pytest.mark.parametrize("date", ["2010-03-19", "2013-07-15", "2016-07-15", "2017-07-15", "2018-07-15", "2019-07-15"])
def test_every_version_of_the_namespace_is_read(source, date):
    add(source, "escriptorium_2019.xml", change={"2019-07-15": date})
    assert len(texts(source)) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_keeps_its_letters_in_every_encoding(source, encoding):
    declared = encoding.removesuffix("-sig")
    path = add(source, "escriptorium_2019.xml", change={"first line": "früh à l’aube"[:10], "UTF-8": declared})
    path.write_bytes(path.read_text(encoding="utf-8").replace("’", "'").encode(encoding))
    assert texts(source)[0].startswith("früh à l")


def test_custom_order_counts_only_where_every_line_has_it(source):
    add(
        source,
        "transkribus_2013.xml",
        change={
            ' custom="readingOrder {index:1;}">\n        <Coords points="35,190': '>\n        <Coords points="35,190'
        },
    )
    assert texts(source) == ["first line", "third line", "second & line"]


def test_lines_without_an_id_are_numbered(source):
    add(source, "escriptorium_2019.xml", change={' id="l1"': "", ' id="l2"': ""})
    assert [record["line_id"] for record in read(source)[0]] == ["escriptorium_2019/line1", "escriptorium_2019/line2"]


def test_folders_name_writers_but_for_those_of_the_layout(source):
    add(source, "escriptorium_2019.xml", "data/anna/page/0001.xml")
    shutil.copy(source / "page.png", source / "data" / "anna" / "0001.png")
    add(source, "escriptorium_2019.xml", "page/0002.xml")
    records, _ = read(source)
    assert [(r["writer_id"], r["page_id"], r["image_path"]) for r in records[::2]] == [
        ("anna", "anna/0001", "data/anna/0001.png"),
        ("0002", "0002", "page.png"),
    ]


def test_folders_named_like_splits_are_splits(source):
    for split in ("train", "val"):
        add(source, "escriptorium_2019.xml", f"{split}/anna/p.xml")
        shutil.copy(source / "page.png", source / split / "anna")
    assert [(r["split"], r["writer_id"]) for r in read(source)[0][::2]] == [("train", "anna"), ("validation", "anna")]


def test_writer_pattern_looks_at_the_image(source):
    add(source, "escriptorium_2019.xml")
    records, _ = import_rows(source, "page", SourceConfig(writer_pattern=r"^(\w+)\."))
    assert {record["writer_id"] for record in records} == {"page"}


def test_single_file_is_a_source(source):
    path = add(source, "escriptorium_2019.xml")
    assert len(import_rows(path)[0]) == 2


# --- where the image is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xml", "named", "image"),
    [
        ("a.xml", "page.png", "page.png"),
        ("a.xml", "PAGE.PNG", "page.png"),
        ("a.xml", "page.jpg", "page.png"),
        ("a.xml", "page.png", "Page.tif"),
        ("a.xml", "C:\\scans 1743\\page.png", "page.png"),
        ("a.xml", "file:///home/anna/page.png", "page.png"),
        ("a.xml", "", "A.png"),
        ("a.xml", "0815.tif", "a.png"),
        ("page/a.xml", "page.png", "page.png"),
        ("page/a.xml", "page.png", "images/page.png"),
        ("a.xml", "images/page.png", "images/page.png"),
        ("x/y/page/a 1.xml", "f. 12 r.png", "x/y/f. 12 r.jpeg"),
        ("a.xml", unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        ("a.xml", "page.v1.png", "page.v1.png"),
    ],
)
def test_image_is_found(source, xml, named, image):
    page = Image.open(source / "page.png")
    page.load()
    (source / "page.png").unlink()
    (source / image).parent.mkdir(parents=True, exist_ok=True)
    page.save(source / image)
    add(source, "escriptorium_2019.xml", xml, {"page.png": named})
    assert {record["image_path"] for record in read(source)[0]} == {image}


@pytest.mark.parametrize(
    ("images", "named", "found"),
    [
        (["page/p.png", "p.png"], "p.png", "page/p.png"),
        (["page/P.png", "page/p.png"], "p.png", "page/p.png"),
        (["page/p.tif", "p.png"], "p.png", "p.png"),
        (["p.png", "thumbs/p.png"], "p.png", "p.png"),
    ],
)
def test_nearest_image_with_the_exact_name_counts(source, images, named, found):
    for image in images:
        (source / image).parent.mkdir(exist_ok=True)
        Image.open(source / "page.png").save(source / image)
    (source / "page.png").unlink()
    add(source, "escriptorium_2019.xml", "page/a.xml", {"page.png": named})
    assert {record["image_path"] for record in read(source)[0]} == {found}


def test_images_that_fit_equally_well_are_named(source):
    for image in ("scans/p.png", "thumbs/p.png"):
        (source / image).parent.mkdir()
        shutil.copy(source / "page.png", source / image)
    add(source, "escriptorium_2019.xml", "page/a.xml", {"page.png": "p.png"})
    _, rejected = read(source)
    assert [row["reason"] for row in rejected] == ["missing_image"] * 2
    assert "its image may be scans/p.png, thumbs/p.png" in rejected[0]["detail"]


def test_image_of_a_kind_that_is_not_read_is_told_so(source):
    (source / "page.png").rename(source / "page.webp")
    add(source, "escriptorium_2019.xml", "a.xml", {"page.png": "page.webp"})
    _, rejected = read(source)
    assert {row["reason"] for row in rejected} == {"missing_image"}
    assert "its image is 'page.webp', and no image of that name ends in .png" in rejected[0]["detail"]


def test_image_above_the_source_is_not_read_but_the_way_out_is_told(source):
    add(source, "escriptorium_2019.xml", "page/a.xml")
    _, rejected = read(source / "page")
    assert {row["reason"] for row in rejected} == {"missing_image"}
    assert "if it lies above source.path, give that folder as source.path" in rejected[0]["detail"]


@pytest.mark.parametrize("num_bytes", [None, 1000])
def test_image_is_decoded_once_for_all_lines_of_its_page_also_if_that_fails(source, monkeypatch, num_bytes):
    from htr_pipeline.io import importers

    decoded = []
    original = importers.read_image
    monkeypatch.setattr(importers, "read_image", lambda image: decoded.append(image) or original(image))
    (source / "page.png").write_bytes((source / "page.png").read_bytes()[:num_bytes])
    add(source, "escriptorium_2019.xml")
    records, rejected = read(source)
    assert len(records if num_bytes is None else rejected) == 2
    assert len(decoded) == 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "reason", "detail"),
    [
        ("broken", "unreadable_xml", r"broken.xml: not well-formed XML .*line 1\d.*Export the page again"),
        ("empty", "unreadable_xml", "empty.xml: not well-formed XML .no element found"),
        ("not_xml", "unreadable_xml", "not well-formed XML .syntax error"),
        ("unknown_encoding", "unreadable_xml", "Save it again as UTF-8|not well-formed"),
        ("billion_laughs", "unreadable_xml", "it has a DOCTYPE, which could declare entities"),
        ("external_entity", "unreadable_xml", "it has a DOCTYPE"),
        ("external_dtd", "unreadable_xml", "it has a DOCTYPE"),
        ("wrong_namespace", "unreadable_xml", "the namespace 'http://example.org/PAGE' is not one of PAGE"),
        ("two_pages", "unreadable_xml", "2 elements Page; expected one"),
        ("path_traversal", "missing_image", "there is no image 'outside.png'"),
        ("absolute_path", "missing_image", "there is no image 'outside.png'"),
        ("missing_image", "missing_image", "there is no image 'none.png' in its folder, one folder up"),
        ("negative_page", "missing_image", "a page of -400.0 x 300.0"),
        ("no_geometry", "bad_geometry", "neither polygon, box nor baseline"),
        ("bad_points", "bad_geometry", "'35,50 250,fifty 250,95': expected pairs of numbers"),
        ("odd_points", "bad_geometry", "expected pairs of numbers"),
        ("endless_number", "bad_geometry", "expected pairs of numbers up to 1000000"),
        ("off_the_page", "bad_geometry", "nothing of its polygon lies on page.png of 400 x 300 pixels"),
        ("apart", "bad_geometry", "the baseline lies 193 pixels from the polygon"),
        ("turned_page", "bad_geometry", "a page of 300 x 400, page.png has 400 x 300 pixels, or .* its EXIF"),
    ],
)
def test_each_invalid_file_is_rejected_with_a_sentence(source, sample, reason, detail):
    shutil.copy(source / "page.png", source.parent / "outside.png")
    add(source, "escriptorium_2019.xml")
    add(source, f"invalid/{sample}.xml")
    records, rejected = read(source)
    assert len(records) == 2
    assert [row["reason"] for row in rejected] == [reason]
    assert rejected[0]["file"] == f"{sample}.xml"
    assert re.search(detail, rejected[0]["detail"])


def test_every_invalid_sample_is_tested():
    marks = test_each_invalid_file_is_rejected_with_a_sentence.pytestmark
    assert {sample for sample, *_ in marks[0].args[1]} == {path.stem for path in (RESOURCES / "invalid").iterdir()}


def test_billion_laughs_are_refused_at_once_wherever_the_file_hides_them(source):
    start = time.process_time()
    text = (RESOURCES / "invalid" / "billion_laughs.xml").read_text(encoding="utf-8")
    (source / "late.xml").write_text(text.replace("<!DOCTYPE", f"<!--{' ' * 10**6}--><!DOCTYPE"), encoding="utf-8")
    _, rejected = read(source)
    assert "DOCTYPE" in rejected[0]["detail"]
    assert time.process_time() - start < 2


def test_polygon_of_a_million_points_is_refused(source):
    add(source, "escriptorium_2019.xml", change={"35,50 250,50": "35,50 " * 10**6})
    records, rejected = read(source)
    assert len(records) == 1
    assert "1000002 points; at most 5000 are read. Simplify" in rejected[0]["detail"]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_XML_BYTES", 500, "larger than 500 bytes"),
        ("MAX_ELEMENTS", 10, "more than 10 elements"),
        ("MAX_DEPTH", 4, "or 4 levels"),
        ("MAX_LINES", 1, "2 lines on one page; at most 1"),
    ],
)
def test_limits_of_a_file_hold(source, monkeypatch, limit, value, message):
    monkeypatch.setattr(pages, limit, value)
    add(source, "escriptorium_2019.xml")
    _, rejected = read(source)
    assert [row["reason"] for row in rejected] == ["unreadable_xml"]
    assert message in rejected[0]["detail"]


def test_names_and_texts_of_megabytes_are_not_passed_on(source):
    long = "x" * 10**6
    add(source, "escriptorium_2019.xml", "a.xml", {'id="l1"': f'id="{long}"'})
    add(source, "escriptorium_2019.xml", "b.xml", {"second line": long})
    add(source, "escriptorium_2019.xml", "c.xml", {"page.png": f"{long}.png"})
    records, rejected = read(source)
    assert [record["line_id"] for record in records] == ["a/line1", "a/l2", "b/l1"]
    assert [row["reason"] for row in rejected] == ["long_text", "missing_image", "missing_image"]
    assert max(len(row["detail"]) for row in rejected) < 600


def test_custom_attribute_of_megabytes_takes_no_time(source):
    start = time.process_time()
    add(source, "escriptorium_2019.xml", change={"structure {": "readingOrder{index " * 10**5 + "structure {"})
    assert len(texts(source)) == 2
    assert time.process_time() - start < 3


def test_deeply_nested_elements_are_refused(source):
    (source / "deep.xml").write_text("<PcGts>" + "<TextRegion>" * 10**6, encoding="utf-8")
    _, rejected = read(source)
    assert "64 levels" in rejected[0]["detail"]


def test_page_image_that_would_unpack_to_gigabytes_is_refused(source):
    (source / "page.png").write_bytes(png_bomb())
    add(source, "escriptorium_2019.xml", change={'"400"': '"60000"', '"300"': '"60000"'})
    _, rejected = read(source)
    assert [row["reason"] for row in rejected] == ["unreadable_image"] * 2
    assert "pixels" in rejected[0]["detail"]


def test_links_out_of_the_source_are_not_followed(source):
    outside = source.parent / "outside"
    outside.mkdir()
    shutil.copy(source / "page.png", outside / "secret.png")
    shutil.copy(RESOURCES / "escriptorium_2019.xml", outside / "secret.xml")
    (source / "linked.xml").symlink_to(outside / "secret.xml")
    (source / "secret.png").symlink_to(outside / "secret.png")
    (source / "folder").symlink_to(outside)
    add(source, "escriptorium_2019.xml", "own.xml", {"page.png": "secret.png"})
    records, rejected = read(source)
    assert records == []
    assert Counter((row["file"], row["reason"]) for row in rejected) == {
        ("linked.xml", "unreadable_xml"): 1,
        ("own.xml", "outside_folder"): 2,
    }


def test_pipe_named_like_an_xml_file_does_not_block(source):
    os.mkfifo(source / "pipe.xml")
    add(source, "escriptorium_2019.xml")
    records, rejected = read(source)
    assert len(records) == 2
    assert "not a regular file" in rejected[0]["detail"]


def test_same_line_twice_is_rejected_once(source):
    add(source, "escriptorium_2019.xml", "page/a.xml")
    add(source, "escriptorium_2019.xml", "xml/a.xml")
    records, rejected = read(source)
    assert len(records) == 2
    assert {row["reason"] for row in rejected} == {"duplicate_id"}


# --- format=auto -----------------------------------------------------------------------------------------------------


def test_auto_recognises_page(source):
    add(source, "escriptorium_2019.xml")
    (source / "mets.xml").write_text("<mets xmlns='http://www.loc.gov/METS/'/>", encoding="utf-8")
    records, rejected = read(source, format="auto")
    assert {record["format"] for record in records} == {"page"}
    assert rejected == []


def test_auto_asks_where_the_same_pages_lie_in_two_formats(source):
    add(source, "escriptorium_2019.xml", "page/a.xml")
    (source / "alto").mkdir()
    shutil.copy(RESOURCES.parent / "alto" / "boxes_v3.xml", source / "alto" / "a.xml")
    with pytest.raises(
        UserError, match=r"1 PAGE files and 1 ALTO files\. Say which one counts: source\.format=page or sou"
    ):
        import_rows(source)
    assert len(read(source)[0]) == 2
    assert len(read(source, format="alto")[0]) == 1


# --- everything at once ----------------------------------------------------------------------------------------------


def test_two_reads_give_the_same_bytes(source):
    for name in ("escriptorium_2019.xml", "larex_2017.xml", "transkribus_2013.xml"):
        add(source, name)
    first, second = read(source), read(source)
    assert first == second


@pytest.mark.parametrize("sample", ["escriptorium_2019", "larex_2017", "transkribus_2013"])
def test_damaged_files_are_read_or_rejected_and_every_line_can_be_cut(source, sample):
    data = (RESOURCES / f"{sample}.xml").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(80):
        (source / f"{number}.xml").write_bytes(samples.damaged(data, rng))
    records, rejected = import_rows(source, "page")
    assert records
    assert rejected
    page = read_image(source / "page.png")
    for record in records:
        line = cut_line(page, record["polygon"], record["baseline"])
        assert line.shape == (record["height_pixels"], record["width_pixels"])


@pytest.mark.skipif(not RAW_PAGES.is_dir(), reason=f"{RAW_PAGES} is not there")
def test_real_pages_have_the_lines_that_are_expected():
    with (RAW_PAGES / "expected.tsv").open(encoding="utf-8") as stream:
        expected = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    for folder in sorted({row["xml"].split("/")[0] for row in expected}):
        for format in sorted(
            {"page" if "PAGE" in row["namespace"] else "alto" for row in expected if row["xml"].startswith(folder)}
        ):
            records, rejected = import_rows(RAW_PAGES / folder, format)
            assert {row["reason"] for row in rejected} <= {"empty_text"}
            empty = Counter(row["file"] for row in rejected)
            for row in expected:
                name = row["xml"].removeprefix(f"{folder}/")
                if not row["xml"].startswith(f"{folder}/") or ("PAGE" in row["namespace"]) != (format == "page"):
                    continue
                of_page = [record for record in records if record["page_id"] == Path(name).stem]
                assert len(of_page) == int(row["lines_with_text"])
                assert len(of_page) + empty[name] == int(row["lines"])
                assert {f"{folder}/{record['image_path']}" for record in of_page} == {row["image"]}
                assert sum(record["baseline"] is not None for record in of_page) == len(of_page)
                shown = [record["text"] for record in of_page]
                for text in (row["first_text"], row["last_text"]):
                    assert unicodedata.normalize("NFC", text) in (shown[0], shown[-1])
