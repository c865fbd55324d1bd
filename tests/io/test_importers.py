import hashlib
import io
import os
import re
import resource
import shutil
import time
import tracemalloc
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers import SourceConfig, import_lines, source_root
from htr_pipeline.io.importers.table import read_table
from htr_pipeline.io.manifest import MANIFEST
from tests.io.samples import REAL_DATA, by_line, import_rows, png_bomb

RESOURCES = Path(__file__).parents[1] / "resources"


@pytest.fixture
def lines(tmp_path):
    """The folder of good lines, by three writers."""
    return shutil.copytree(RESOURCES / "lines", tmp_path / "lines", ignore=shutil.ignore_patterns("invalid"))


@pytest.fixture
def table(tmp_path):
    """The folder of a good table."""
    return shutil.copytree(RESOURCES / "table", tmp_path / "table", ignore=shutil.ignore_patterns("invalid"))


def write_line(folder, name, text="Wort", size=(60, 20)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 255).save(path)
    path.with_suffix(".gt.txt").write_text(text, encoding="utf-8")


# --- lines -----------------------------------------------------------------------------------------------------------


def test_line_folder_gives_records_of_the_manifest(lines):
    records, rejected = import_rows(lines)
    assert rejected == []
    assert [record["line_id"] for record in records] == ["anna/p1_01", "anna/p1_02", "bert/p1_01", "carl/p1_01"]
    first = records[0]
    assert first.keys() == set(MANIFEST.names)
    assert (first["text"], first["writer_id"], first["split"], first["format"]) == ("Ein Wort", "anna", None, "lines")
    assert (first["width_pixels"], first["height_pixels"]) == (96, 24)
    assert re.fullmatch("[0-9a-f]{64}", first["content_hash"])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".PNG", ".TIF"])
def test_line_images_may_have_any_of_the_usual_endings(tmp_path, suffix):
    write_line(tmp_path, f"x{suffix}")
    assert len(import_rows(tmp_path)[0]) == 1


def test_plain_txt_is_the_text_where_no_gt_txt_is(tmp_path):
    for name in ("anna/1.png", "bert/1.tif", "bert/2.jpg"):
        write_line(tmp_path, name)
        (tmp_path / name).with_suffix(".gt.txt").rename((tmp_path / name).with_suffix(".txt"))
    (tmp_path / "README.txt").write_text("not a line")
    records, rejected = import_rows(tmp_path)
    assert [record["line_id"] for record in records] == ["anna/1", "bert/1", "bert/2"]
    assert [(row["file"], row["reason"]) for row in rejected] == [("README.txt", "missing_image")]


def test_each_folder_has_its_own_ending_of_texts(tmp_path):
    write_line(tmp_path / "a", "1.png", "eins")
    write_line(tmp_path / "b", "2.png", "zwei")
    (tmp_path / "b" / "2.gt.txt").rename(tmp_path / "b" / "2.txt")
    (tmp_path / "b" / "3.txt").write_text("no image", encoding="utf-8")
    records, rejected = import_rows(tmp_path)
    assert {line_id: record["text"] for line_id, record in by_line(records).items()} == {"a/1": "eins", "b/2": "zwei"}
    assert [(row["line_id"], row["reason"]) for row in rejected] == [("b/3", "missing_image")]


@pytest.mark.parametrize(("image", "text"), [("1.PNG", "1.txt"), ("1.Png", "1.GT.TXT"), ("1.png", "1.TXT")])
def test_endings_may_be_in_capitals(tmp_path, image, text):
    write_line(tmp_path, "1.png", "eins")
    (tmp_path / "1.png").rename(tmp_path / image)
    (tmp_path / "1.gt.txt").rename(tmp_path / text)
    records, rejected = import_rows(tmp_path)
    assert [record["text"] for record in records] == ["eins"]
    assert rejected == []


def test_a_folder_whose_name_is_a_number_is_told_how_to_be_written():
    with pytest.raises(UserError, match=r"source\.path = 1914: expected text, got a number.*of that name is \./1914"):
        SourceConfig(path=1914)


@pytest.mark.parametrize(("image_form", "text_form"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_composed_and_decomposed_are_the_same(tmp_path, image_form, text_form):
    image, text = (unicodedata.normalize(form, "é1") for form in (image_form, text_form))
    write_line(tmp_path / "lines", "x.png", "eins")
    (tmp_path / "lines" / "x.png").rename(tmp_path / "lines" / f"{image}.png")
    (tmp_path / "lines" / "x.gt.txt").rename(tmp_path / "lines" / f"{text}.gt.txt")
    (tmp_path / "table.tsv").write_text(f"image\ttext\nlines/{text}.png\tzwei\n", encoding="utf-8")
    for source, read in (("lines", "eins"), ("table.tsv", "zwei")):
        records, rejected = import_rows(tmp_path / source)
        assert [record["text"] for record in records] == [read]
        assert rejected == []


@pytest.mark.parametrize("path", ["data/01_raw/demo", "./data/01_raw/demo/"])
def test_the_default_path_is_the_demo_however_it_is_written(path):
    assert SourceConfig(path=path).format == "demo"
    assert SourceConfig(path=path + "x").format == "auto"
    assert SourceConfig(path=path, format="table").format == "table"


def test_txt_beside_gt_txt_is_not_the_ground_truth(lines):
    (lines / "anna" / "p1_01.txt").write_text("what an engine has read")
    records, rejected = import_rows(lines)
    assert (records[0]["text"], rejected) == ("Ein Wort", [])


@pytest.mark.parametrize("split", ["by_writer", "train", "validation", "test"])
def test_split_rule_of_a_source_overrides_its_splits(table, split):
    (table / "lines.tsv").write_text((table / "lines.tsv").read_text().replace("train", "not the name of a split"))
    records, _ = import_rows(table, config=SourceConfig(split=split))
    assert {record["split"] for record in records} == {None if split == "by_writer" else split}


def test_writer_pattern_finds_the_writer_in_the_path(lines):
    records, _ = import_rows(lines, config=SourceConfig(writer_pattern=r"/(p\d+)_"))
    assert {record["writer_id"] for record in records} == {"p1"}


def test_path_without_the_writer_pattern_is_rejected_with_the_pattern(lines):
    records, rejected = import_rows(lines, config=SourceConfig(writer_pattern=r"(anna|bert)"))
    assert len(records) == 3
    assert rejected[0]["reason"] == "no_writer"
    assert "(anna|bert)" in rejected[0]["detail"]


@pytest.mark.parametrize(("pattern", "message"), [("([a-z", "not a regular expression"), ("[a-z]+", "one group")])
def test_wrong_writer_pattern_is_named(pattern, message):
    with pytest.raises(UserError, match=rf"(?s)source\.writer_pattern = .*{message}"):
        SourceConfig(writer_pattern=pattern)


def test_flat_folder_makes_each_line_its_own_writer(tmp_path):
    for name in ("a.png", "b.png"):
        write_line(tmp_path, name, size=(60, 20))
    assert [record["writer_id"] for record in import_rows(tmp_path)[0]] == ["a", "b"]


def test_folders_named_like_splits_are_the_splits(tmp_path):
    for name in ("train/anna/1.png", "val/bert/1.png", "test/1.png"):
        write_line(tmp_path, name)
    found = by_line(import_rows(tmp_path)[0])
    assert {line_id: record["split"] for line_id, record in found.items()} == {
        "test/1": "test",
        "train/anna/1": "train",
        "val/bert/1": "validation",
    }
    assert found["train/anna/1"]["writer_id"] == "anna"


def test_images_of_ocropus_belong_to_the_text_of_their_line(tmp_path):
    for name in ("0001.bin.png", "0002.nrm.png", "0003.bin.png"):
        write_line(tmp_path, name)
    for name in ("0001", "0002"):
        (tmp_path / f"{name}.gt.txt").write_text(name, encoding="utf-8")
    for name in ("0001.bin", "0002.nrm"):
        (tmp_path / f"{name}.gt.txt").unlink()
    (tmp_path / "0003.bin.gt.txt").write_text("its own", encoding="utf-8")
    records, rejected = import_rows(tmp_path)
    assert rejected == []
    assert [(r["line_id"], r["text"], r["image_path"]) for r in records] == [
        ("0001", "0001", "0001.bin.png"),
        ("0002", "0002", "0002.nrm.png"),
        ("0003.bin", "its own", "0003.bin.png"),
    ]


def test_splits_may_lie_below_a_folder_of_their_own_and_beside_others(tmp_path, caplog):
    for name in ("set/Training/anna/1.png", "set/Test/bert/1.png"):
        write_line(tmp_path, name)
    found = by_line(import_rows(tmp_path)[0])
    assert [(record["split"], record["writer_id"]) for _, record in sorted(found.items())] == [
        ("test", "bert"),
        ("train", "anna"),
    ]
    assert "beside them" not in caplog.text
    write_line(tmp_path, "set/Samples/1.png")
    found = by_line(import_rows(tmp_path)[0])
    assert {name: (record["split"], record["writer_id"]) for name, record in found.items()} == {
        "set/Samples/1": (None, "Samples"),
        "set/Test/bert/1": ("test", "bert"),
        "set/Training/anna/1": ("train", "anna"),
    }
    assert re.search("beside them lies 'Samples', whose lines go .* set source.split=by_writer", caplog.text)


@pytest.mark.parametrize("names", [("train", "samples"), ("train", "val", "x"), ("anna", "test"), ("train",)])
def test_a_name_of_a_split_among_others_may_be_a_writers(tmp_path, names):
    for name in names:
        write_line(tmp_path, f"{name}/1.png")
    records = import_rows(tmp_path)[0]
    assert {(record["split"], record["writer_id"]) for record in records} == {(None, name) for name in names}


def test_text_in_visual_order_is_turned_into_the_order_of_reading(tmp_path):
    as_read, as_it_stands = "אב" + " 1914 " + "גד", "דג" + " 1914 " + "בא"
    write_line(tmp_path, "x.png", as_it_stands)
    for text_order, text in (("visual", as_read), ("logical", as_it_stands)):
        assert import_rows(tmp_path, config=SourceConfig(text_order=text_order))[0][0]["text"] == text


def test_text_is_brought_to_the_unicode_form_and_its_blanks_collapsed(tmp_path):
    write_line(tmp_path, "x.png", "\ufeff e\u0301te\u0301 \t la\n")
    assert import_rows(tmp_path)[0][0]["text"] == "été la"
    assert import_rows(tmp_path, config=SourceConfig(unicode_form="NFD"))[0][0]["text"] == "e\u0301te\u0301 la"


@pytest.mark.parametrize(
    ("line_id", "reason", "detail"),
    [
        ("empty_text", "empty_text", r"there is no text\. Transcribe the line or remove it"),
        ("no_text", "missing_text", r"no no_text\.gt\.txt beside the image\. Transcribe"),
        ("no_image", "missing_image", r"there is no image no_image ending in \.png.*remove the text"),
        ("not_an_image", "unreadable_image", r"not_an_image\.png: not an image"),
        ("cut_short", "unreadable_image", r"cut_short\.png: .*cannot be decoded"),
        ("latin1", "unreadable_text", r"latin1\.gt\.txt is not UTF-8 \(byte 1\)\. Save it again as UTF-8"),
    ],
)
def test_broken_line_is_rejected_with_what_to_do(line_id, reason, detail):
    records, rejected = import_rows(RESOURCES / "lines" / "invalid")
    assert records == []
    row = by_line(rejected)[line_id]
    assert (row["stage"], row["reason"]) == ("import", reason)
    assert re.search(detail, row["detail"])


def test_two_images_of_one_name_are_not_two_lines(tmp_path):
    write_line(tmp_path, "x.png")
    write_line(tmp_path, "x.jpg")
    records, rejected = import_rows(tmp_path)
    assert [record["image_path"] for record in records] == ["x.jpg"]
    assert (rejected[0]["file"], rejected[0]["reason"]) == ("x.png", "duplicate_id")
    assert "already belongs to x.jpg" in rejected[0]["detail"]


def test_link_out_of_the_folder_is_not_followed(tmp_path, lines):
    outside = tmp_path / "secret.png"
    Image.new("L", (60, 20)).save(outside)
    (lines / "link.png").symlink_to(outside)
    (lines / "link.gt.txt").write_text("secret")
    assert [row["reason"] for row in import_rows(lines)[1]] == ["outside_folder"]


def test_text_that_is_a_link_out_of_the_folder_is_not_read(tmp_path, lines):
    (tmp_path / "secret.txt").write_text("secret")
    (lines / "anna" / "p1_01.gt.txt").unlink()
    (lines / "anna" / "p1_01.gt.txt").symlink_to(tmp_path / "secret.txt")
    records, rejected = import_rows(lines)
    assert [(row["file"], row["reason"]) for row in rejected] == [("anna/p1_01.png", "outside_folder")]
    assert "secret" not in str(records) + rejected[0]["detail"]


def test_text_that_is_no_file_or_too_long_is_rejected(lines):
    (lines / "anna" / "p1_01.gt.txt").unlink()
    os.mkfifo(lines / "anna" / "p1_01.gt.txt")
    (lines / "anna" / "p1_02.gt.txt").write_text("x" * 10_001)
    records, rejected = import_rows(lines)
    assert [record["line_id"] for record in records] == ["bert/p1_01", "carl/p1_01"]
    assert [row["reason"] for row in rejected] == ["unreadable_text", "long_text"]
    assert "not a regular file" in rejected[0]["detail"]
    assert "10001 characters; at most 10000" in rejected[1]["detail"]


@pytest.mark.parametrize("kind", ["folder", "broken link", "pipe"])
def test_what_is_named_like_a_form_of_iam_is_looked_at_with_care(lines, kind):
    (lines / "xml").mkdir()
    odd = lines / "xml" / "x.xml"
    {"folder": odd.mkdir, "broken link": lambda: odd.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(odd)}[kind]()
    assert {record["format"] for record in import_rows(lines)[0]} == {"lines"}


def test_decompression_bomb_is_rejected_by_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_bomb())
    (tmp_path / "bomb.gt.txt").write_text("boom")
    _, rejected = import_rows(tmp_path)
    assert rejected[0]["reason"] == "unreadable_image"
    assert "more than 100000000 pixels, which is the most that is read. Cut the page" in rejected[0]["detail"]


def test_file_name_that_is_not_utf8_is_rejected_and_shown(tmp_path):
    write_line(tmp_path, "good.png")
    name = str(tmp_path).encode() + b"/d\xe9j\xe0"
    shutil.copy(tmp_path / "good.png", name + b".png")
    shutil.copy(tmp_path / "good.gt.txt", name + b".gt.txt")
    records, rejected = import_rows(tmp_path)
    assert len(records) == 1
    assert (rejected[0]["reason"], rejected[0]["file"]) == ("bad_name", r"d\xe9j\xe0.png")


# --- table -----------------------------------------------------------------------------------------------------------


def test_table_without_image_column_finds_images_by_id_and_maps_split_names(table):
    records, rejected = import_rows(table)
    assert rejected == []
    assert [record["split"] for record in records] == ["train", "train", "validation", "test"]
    assert records[0]["image_path"] == "lines/l0.png"
    assert (records[0]["writer_id"], records[0]["page_id"]) == ("d1", "d1-p0")
    assert records == import_rows(table / "lines.tsv")[0]


def test_quotation_marks_of_a_tsv_belong_to_the_text(table, caplog):
    assert import_rows(table)[0][1]["text"] == '"Wort"'
    assert "quotation marks" not in caplog.text
    frame = pd.read_csv(table / "lines.tsv", sep="\t", quoting=3, dtype=str)
    frame.assign(text=frame["text"].map('"{}"'.format)).to_csv(table / "lines.tsv", sep="\t", index=False, quoting=3)
    import_rows(table)
    assert "lines.tsv: 4 of 4 texts stand in quotation marks, which" in caplog.text
    frame.loc[:1, "text"] = ['"""ja"" er"', '"ja"']
    frame.to_csv(table / "lines.tsv", sep="\t", index=False, quoting=3)
    import_rows(table)
    assert "lines.tsv: 1 of 4 texts stand in quotation marks and have each of theirs twice, which" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "semicolons", "parquet", "json lines"])
def test_other_kinds_of_tables_give_the_same_lines_as_tsv(table, kind):
    expected, _ = import_rows(table)
    frame = pd.read_csv(table / "lines.tsv", sep="\t", quoting=3, dtype=str)
    (table / "lines.tsv").unlink()
    if kind == "parquet":
        frame.to_parquet(table / "lines.parquet")
    elif kind == "json lines":
        frame.to_json(table / "lines.jsonl", orient="records", lines=True)
    else:
        frame.to_csv(table / "lines.csv", index=False, sep=";" if kind == "semicolons" else ",")
    assert import_rows(table)[0] == expected


def test_folders_of_images_named_like_splits_are_the_splits_of_a_table_without_any(tmp_path, caplog):
    names = ("./train/1.png", "validation//2.png", "test/3.png")
    for name in names:
        write_line(tmp_path, name)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n" + "".join(f"{name},a\n" for name in names), encoding="utf-8")
    splits = [record["split"] for record in import_rows(table)[0]]
    assert splits == ["train", "validation", "test"]
    write_line(tmp_path, "letters/4.png")
    with table.open("a", encoding="utf-8") as file:
        file.write("letters/4.png,a\n")
    assert [record["split"] for record in import_rows(table)[0]] == ["train", "validation", "test", None]
    assert "beside them lies 'letters'" in caplog.text


@pytest.mark.parametrize("place", ["", "data/"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_in_each_folder_of_a_split_is_that_split(tmp_path, name, place):
    header = "file_name,text\n" if name.endswith("csv") else ""
    for folder, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        write_line(tmp_path, f"{place}{folder}/images/1.png")
        (tmp_path / place / folder / "images/1.gt.txt").unlink()
        cells = f"images/1.png,{split}\n" if header else f'{{"file_name": "images/1.png", "text": "{split}"}}\n'
        (tmp_path / place / folder / name).write_text(header + cells, encoding="utf-8")
    records, rejected = import_rows(tmp_path)
    assert rejected == []
    assert [record["split"] for record in records] == [record["text"] for record in records]
    assert sorted(record["line_id"] for record in records) == [f"{place}{s}/images/1" for s in ("test", "train", "val")]


def test_images_of_a_table_in_the_folder_data_lie_beside_it_or_beside_the_folder(tmp_path):
    write_line(tmp_path, "data/beside/1.png")
    write_line(tmp_path, "above/2.png")
    (tmp_path / "data" / "lines.csv").write_text("image,text\nbeside/1.png,a\nabove/2.png,b\nno/3.png,c\n")
    records, rejected = import_rows(tmp_path, format="table")
    assert [record["image_path"] for record in records] == ["data/beside/1.png", "above/2.png"]
    assert [row["reason"] for row in rejected] == ["missing_image"]


def test_bad_rows_of_json_lines_are_rejected_and_the_others_read(tmp_path):
    write_line(tmp_path, "1.png")
    good = '{"image": "1.png", "text": "a", "writer": null}'
    rows = ["", "{", "[1]", "[" * 100_000, good, '{"image": "1.png"}', '{"image": "1.png", "text": NaN, "id": "b"}']
    table = tmp_path / "lines.jsonl"
    table.write_text("\n".join(rows), encoding="utf-8")
    records, rejected = import_rows(table)
    assert [record["line_id"] for record in records] == ["1"]
    assert [(row["file"], row["reason"]) for row in rejected] == [
        ("lines.jsonl:2", "bad_row"),
        ("lines.jsonl:3", "bad_row"),
        ("lines.jsonl:4", "bad_row"),
        ("lines.jsonl:6", "empty_text"),
        ("lines.jsonl:7", "empty_text"),
    ]
    table.write_bytes(b'{"image": "1.png", "text": "\xe9"}')
    with pytest.raises(UserError, match=r"not UTF-8 .*Save the table again as UTF-8"):
        import_rows(table)


def test_time_is_linear_in_the_keys_of_json_lines(tmp_path):
    table = tmp_path / "lines.jsonl"
    table.write_text("".join(f'{{"image": "1.png", "text": "a", "key {i}": 1}}\n' for i in range(30_000)))
    start = time.process_time()
    assert len(list(read_table(table, SourceConfig(path=str(table))))) == 30_000
    assert time.process_time() - start < 5


def test_half_a_character_in_json_lines_is_rejected_and_shown(tmp_path):
    Image.new("L", (60, 20), 255).save(tmp_path / "a.png")
    (tmp_path / "lines.jsonl").write_text(
        '{"image": "a.png", "text": "good"}\n{"image": "a.png", "id": "b", "text": "half \\ud83d of one"}\n'
    )
    lines, rejected = import_lines(tmp_path / "lines.jsonl")
    assert lines["text"].to_pylist() == ["good"]
    assert rejected["reason"].to_pylist() == ["bad_name"]
    assert r"'half \\ud83d of one' is not valid UTF-8" in rejected["detail"][0].as_py()


def test_a_writer_in_two_unicode_forms_is_one(tmp_path):
    rows = ["image\ttext\twriter\tpage"]
    for index, form in enumerate(("NFC", "NFD")):
        Image.new("L", (60 + index, 20), 255).save(tmp_path / f"{index}.png")
        rows.append(unicodedata.normalize(form, f"{index}.png\ttext\tZoé\tCahier éé"))
    (tmp_path / "lines.tsv").write_text("\n".join(rows), encoding="utf-8")
    lines, _ = import_lines(tmp_path / "lines.tsv")
    assert (set(lines["writer_id"].to_pylist()), set(lines["page_id"].to_pylist())) == ({"Zoé"}, {"Cahier éé"})


def test_columns_can_be_named_and_an_empty_name_means_none(table):
    text = (table / "lines.tsv").read_text().replace("id\tset\tdocument\tpage\ttext", "key\tset\thand\tscribe\twords")
    (table / "lines.tsv").write_text(text)
    config = SourceConfig(id_column="key", text_column="words", writer_column="scribe", split_column="")
    records, _ = import_rows(table, config=config)
    assert [(record["writer_id"], record["split"]) for record in records][:1] == [("d1-p0", None)]


def test_whole_numbers_that_pandas_made_floats_are_ids(table):
    frame = pd.DataFrame({"image": ["lines/l0.png", "lines/l1.png"], "text": ["a", "b"], "writer": [7.0, None]})
    (table / "lines.tsv").unlink()
    frame.to_parquet(table / "lines.parquet")
    assert [record["writer_id"] for record in import_rows(table)[0]] == ["7", "lines/l1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_text_column.tsv", r"has the columns 'id', 'split'\. None is the text .*source\.text_column"),
        ("no_image_column.csv", r"has the columns 'text', 'split'\. None is the image path .*source\.image_column"),
        ("unknown_split.tsv", r":2: split = 'holdout' is not a split\. Allowed: train .*validation"),
        ("same_column_twice.tsv", r"columns with the same name: 'text'\. Rename"),
        ("latin1.tsv", r"not UTF-8 .*Save the table again as UTF-8"),
        ("broken.parquet", r"cannot be read as Parquet"),
        ("header_only.tsv", r"has no line\. The table has only its header"),
    ],
)
def test_broken_table_is_an_error_that_says_what_to_do(name, message):
    with pytest.raises(UserError, match=f"(?s){re.escape(name)}.*{message}"):
        import_rows(RESOURCES / "table" / "invalid" / name)


def test_column_that_does_not_exist_is_named_with_those_that_do(table):
    with pytest.raises(
        UserError, match=r"source\.text_column = 'words': there is no such column.*'id', 'set', 'document'"
    ):
        import_rows(table, config=SourceConfig(text_column="words"))


def test_quotation_mark_that_is_not_closed_is_an_error_with_the_line(tmp_path):
    rows = ["id,text", "l0,Wort", 'l1,"offen', "l2,Wort"]
    for rest in ([], ['l3,"noch eins', "l4,Wort"], ["x" * 140_000]):
        (tmp_path / "lines.csv").write_text("\n".join([*rows, *rest, ""]))
        with pytest.raises(UserError, match=r"lines\.csv, in the row that begins on line 3: .*that is not closed"):
            import_rows(tmp_path)


def test_tables_as_spreadsheets_write_them(table):
    expected, _ = import_rows(table)
    frame = pd.read_csv(table / "lines.tsv", sep="\t", quoting=3, dtype=str)
    (table / "lines.tsv").unlink()
    for declared, delimiter, more in (("sep=;\r\n", ";", ""), ("", "\t", ""), ("", ";", ";;"), ("", ", ", "")):
        rows = frame.map(lambda cell: '"{}"'.format(cell.replace('"', '""'))).fillna("").agg(delimiter.join, axis=1)
        lines = [delimiter.join(frame.columns), *rows]
        (table / "lines.csv").write_text(
            declared + "".join(f"{line}{more}\r\n" for line in lines), encoding="utf-8", newline=""
        )
        found, rejected = import_rows(table)
        assert (found, rejected) == (expected, [])


def test_table_whose_cells_are_parted_otherwise_is_told_so(table):
    (table / "lines.tsv").write_text((table / "lines.tsv").read_text("utf-8").replace("\t", ","), "utf-8")
    with pytest.raises(UserError, match=r"Are its cells parted as its name says\?"):
        import_rows(table)
    (table / "lines.tsv").unlink()
    (table / "lines.jsonl").write_text('[{"image": "l0.png", "text": "Wort"}]')
    with pytest.raises(UserError, match="It should have a JSON object on each line"):
        import_rows(table)


def test_pages_of_documents_that_count_from_one_are_apart(table):
    frame = pd.read_csv(table / "lines.tsv", sep="\t", quoting=3, dtype=str)
    frame.assign(document=["a", "a", "b", "b"], page=["1", "2", "1", "b-2"]).to_csv(
        table / "lines.tsv", sep="\t", index=False, quoting=3
    )
    assert [record["page_id"] for record in import_rows(table)[0]] == ["a/1", "a/2", "b/1", "b-2"]


def test_bad_rows_are_rejected_with_their_line_in_the_table():
    records, rejected = import_rows(RESOURCES / "table" / "invalid" / "bad_rows.tsv")
    assert [record["text"] for record in records] == ["good"]
    assert [(row["file"], row["reason"]) for row in rejected] == [
        ("bad_rows.tsv:2", "outside_folder"),
        ("bad_rows.tsv:3", "outside_folder"),
        ("bad_rows.tsv:4", "missing_image"),
        ("bad_rows.tsv:5", "bad_row"),
        ("bad_rows.tsv:6", "bad_row"),
        ("bad_rows.tsv:8", "duplicate_id"),
    ]
    assert "3 cells where the header has 2" in rejected[3]["detail"]
    assert "lies outside" in rejected[0]["detail"]


@pytest.mark.parametrize("name", ["x" * 5000 + ".png", "a\0b.png", "folder"])
def test_impossible_image_name_is_rejected(tmp_path, name):
    (tmp_path / "folder").mkdir()
    pd.DataFrame({"image": [name], "text": ["x"]}).to_parquet(tmp_path / "lines.parquet")
    assert [row["reason"] for row in import_rows(tmp_path)[1]] == ["missing_image"]


# --- images within a table -------------------------------------------------------------------------------------------


def encoded(number=0, kind="PNG"):
    stream = io.BytesIO()
    Image.new("L", (60, 20 + number), 255).save(stream, kind)
    return stream.getvalue()


def write_shard(path, images, texts=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": images, "text": texts or [f"Wort {i}" for i in range(len(images))], **columns}
    pq.write_table(pa.table(table), path)


@pytest.fixture
def unpacking(tmp_path):
    return SourceConfig(unpack_path=str(tmp_path / "unpacked"))


def test_hugging_face_shards_are_one_source_with_splits_from_their_names(tmp_path, unpacking):
    names = ["train-00000-of-00002", "train-00001-of-00002-3f0c9a", "validation-00000-of-00001", "test-00000-of-00001"]
    for number, name in enumerate(names):
        image = {"bytes": encoded(number, ("PNG", "JPEG", "TIFF", "PNG")[number]), "path": f"a01-{number}.png"}
        write_shard(tmp_path / "set" / "data" / f"{name}.parquet", [image])
    (tmp_path / "set" / "README.md").touch()
    records, rejected = import_rows(tmp_path / "set", config=unpacking)
    assert rejected == []
    assert [(row["line_id"], row["split"]) for row in records] == [
        ("a01-3", "test"),
        ("a01-0", "train"),
        ("a01-1", "train"),
        ("a01-2", "validation"),
    ]
    root = source_root(tmp_path / "set", "auto", unpacking)
    assert root == tmp_path / "unpacked"
    for row in records:
        assert Path(row["image_path"]).stem == row["content_hash"]
        assert hashlib.sha256((root / row["image_path"]).read_bytes()).hexdigest() == row["content_hash"]
    assert {row["source"] for row in records} == {"set"}


def test_tables_of_one_name_in_folders_of_splits_are_told_apart(tmp_path, unpacking):
    for number, split in enumerate(("train", "test")):
        write_shard(tmp_path / "set" / split / "0000.parquet", [encoded(2 * number), encoded(2 * number + 1)])
    records, rejected = import_rows(tmp_path / "set", config=unpacking)
    assert rejected == []
    assert [(row["line_id"], row["split"]) for row in records] == [
        ("test/0000/000001", "test"),
        ("test/0000/000002", "test"),
        ("train/0000/000001", "train"),
        ("train/0000/000002", "train"),
    ]


def test_unpacking_again_writes_nothing_anew(tmp_path, unpacking):
    write_shard(tmp_path / "t.parquet", [encoded(), encoded(1)])
    first, _ = import_rows(tmp_path / "t.parquet", config=unpacking)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").rglob("*.png")}
    second, _ = import_rows(tmp_path / "t.parquet", config=unpacking)
    assert first == second
    assert len(times) == 2
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "unpacked").rglob("*") if path.is_file()}


@pytest.mark.parametrize("paths", [("image.png", "image.png"), ("image.png", "image.jpg"), ("image.png", None)])
def test_images_without_distinct_names_are_numbered(tmp_path, unpacking, paths):
    images = [{"bytes": encoded(i), "path": name} for i, name in enumerate(paths)]
    write_shard(tmp_path / "t.parquet", images)
    assert list(by_line(import_rows(tmp_path / "t.parquet", config=unpacking)[0])) == ["t/000001", "t/000002"]


def test_writer_pattern_is_searched_in_the_name_that_the_table_has(tmp_path, unpacking):
    write_shard(tmp_path / "t.parquet", [{"bytes": encoded(), "path": "ms12_f003.png"}])
    config = replace(unpacking, writer_pattern="^([^_]+)_")
    assert import_rows(tmp_path / "t.parquet", config=config)[0][0]["writer_id"] == "ms12"


def test_memory_stays_flat_in_the_number_of_images(tmp_path, unpacking):
    noise = np.random.default_rng(0).integers(0, 255, (60, 100, 400), dtype=np.uint8)
    images = [cv2.imencode(".png", picture)[1].tobytes() for picture in noise]
    write_shard(tmp_path / "t.parquet", images)
    tracemalloc.start()
    rows = read_table(tmp_path / "t.parquet", unpacking)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 60
    assert peak < sum(map(len, images)) / 2


@pytest.mark.parametrize(
    ("image", "detail"),
    [
        (b"", "there is no image in the table"),
        (None, "there is no image in the table"),
        (b"#!/bin/sh", "neither PNG nor JPEG nor TIFF"),
        (b"\x89PNG" + bytes(2000), "at most 1000 are read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded|not an image"),
    ],
)
def test_bytes_that_are_no_image_are_rejected(tmp_path, unpacking, monkeypatch, image, detail):
    monkeypatch.setattr("htr_pipeline.io.importers.table.MAX_IMAGE_BYTES", 1000)
    images = [{"bytes": encoded(), "path": None}, {"bytes": image, "path": "../../evil.png"}]
    write_shard(tmp_path / "t.parquet", images)
    records, rejected = import_rows(tmp_path / "t.parquet", config=unpacking)
    assert len(records) == 1
    assert rejected[0]["reason"] == "unreadable_image"
    assert re.search(detail, rejected[0]["detail"])
    assert not list(tmp_path.rglob("*evil*"))


def test_decompression_bomb_within_a_table_is_rejected_by_its_header(tmp_path, unpacking):
    write_shard(tmp_path / "t.parquet", [png_bomb()])
    _, rejected = import_rows(tmp_path / "t.parquet", config=unpacking)
    assert rejected[0]["reason"] == "unreadable_image"
    assert "pixels" in rejected[0]["detail"]


def test_table_that_unpacks_to_far_more_than_it_holds_is_not_read(tmp_path, unpacking, monkeypatch):
    monkeypatch.setattr("htr_pipeline.io.importers.table._EXPANSION_FROM_BYTES", 1000)
    images = [encoded() + bytes(1_000_000) + bytes([number]) for number in range(3)]
    table = pa.table({"image": images, "text": list("abc")})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"t\.parquet: \d+ bytes that unpack to \d+.*not read"):
        import_rows(tmp_path / "t.parquet", config=unpacking)
    assert not (tmp_path / "unpacked").exists()


def test_value_that_a_table_holds_once_and_shows_everywhere_is_not_unpacked(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * 200_000])
    pq.write_table(pa.table({"image": ["l.png"] * 20_000, "text": text}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"t\.parquet: \d+ bytes that unpack to \d+.*not read"):
        import_rows(tmp_path / "t.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; the texts are 4 GB


def test_columns_with_the_same_name_are_refused_in_every_kind_of_table(tmp_path):
    pq.write_table(pa.table([["l.png"], ["a"], ["b"]], names=["image", "text", "text"]), tmp_path / "t.parquet")
    (tmp_path / "t.tsv").write_text("image\ttext\ttext\nl.png\ta\tb\n")
    for name in ("t.parquet", "t.tsv"):
        with pytest.raises(UserError, match=rf"{name}: columns with the same name: 'text'"):
            import_rows(tmp_path / name)


def test_names_within_a_table_cannot_lead_out_of_the_folder(tmp_path, unpacking):
    images = [{"bytes": encoded(i), "path": name} for i, name in enumerate(["../../a.png", "/etc/b.png"])]
    write_shard(tmp_path / "set" / "t.parquet", images)
    before = {path for path in tmp_path.rglob("*") if "unpacked" not in path.parts}
    records, _ = import_rows(tmp_path / "set", config=unpacking)
    assert all(re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{64}\.png", row["image_path"]) for row in records)
    assert before == {path for path in tmp_path.rglob("*") if "unpacked" not in path.parts}


def test_rows_of_a_long_table_are_not_in_memory_together(tmp_path):
    num_lines = 10_000
    Image.new("L", (60, 20), 255).save(tmp_path / "line.png")
    rows = (
        f"writer-{number // 50}/line-{number}\tline.png\tthe text of the line {number}\n" for number in range(num_lines)
    )
    (tmp_path / "lines.tsv").write_text("id\timage\ttext\n" + "".join(rows))
    tracemalloc.start()
    lines, _ = import_lines(tmp_path / "lines.tsv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lines) == num_lines
    assert peak / num_lines < 1000  # bytes of Python's; as mappings, all rows would take 1,700


def test_tables_named_for_their_splits_are_one_source(table):
    header, *rows = (table / "lines.tsv").read_text().splitlines()
    header = header.replace("set", "old_set")
    (table / "lines.tsv").unlink()
    (table / "train.tsv").write_text("\n".join([header, *rows[:2]]) + "\n")
    (table / "dev.tsv").write_text("\n".join([header, rows[2]]) + "\n")
    records, _ = import_rows(table)
    assert [row["split"] for row in records] == ["validation", "train", "train"]
    assert {row["split"] for row in import_rows(table / "train.tsv")[0]} == {None}  # alone it says nothing of splits


# --- any source ------------------------------------------------------------------------------------------------------


def test_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"source\.path = '.*nowhere': there is no such file or folder"):
        import_rows(tmp_path / "nowhere")


@pytest.mark.parametrize("format", ["auto", "lines", "table"])
def test_empty_folder_is_an_error(tmp_path, format):
    message = "expected one table" if format == "table" else "The folder is empty"
    with pytest.raises(UserError, match=message):
        import_rows(tmp_path, format)


def test_folder_of_something_else_is_an_error_that_lists_it(tmp_path):
    (tmp_path / "notes.docx").touch()
    with pytest.raises(UserError, match=r"The folder has notes\.docx\. Expected images"):
        import_rows(tmp_path)


def test_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match=r"got a file ending in '\.zip'"):
        import_rows(tmp_path / "x.zip")


def test_line_format_of_a_file_is_an_error(table):
    with pytest.raises(UserError, match=r"expected a folder"):
        import_rows(table / "lines.tsv", "lines")


def test_unknown_format_is_an_error_with_those_that_exist(lines):
    with pytest.raises(UserError, match=r"source\.format = 'docx'.*Allowed: auto, lines, table, page, alto, iam, demo"):
        import_rows(lines, "docx")


def test_two_tables_in_a_folder_are_an_error_that_lists_them(table):
    shutil.copy(table / "lines.tsv", table / "more.tsv")
    with pytest.raises(UserError, match=r"found 2: lines\.tsv, more\.tsv\. Give the path"):
        import_rows(table)


def test_folder_with_table_and_texts_asks_which_counts(table):
    (table / "lines" / "l0.gt.txt").write_text("x")
    with pytest.raises(UserError, match=r"source\.format=lines or source\.format=table"):
        import_rows(table)
    assert len(import_rows(table, "table")[0]) == 4


def test_sixteen_bit_and_transparent_images_are_read(tmp_path):
    write_line(tmp_path, "deep.png")
    Image.fromarray(np.full((20, 60), 40000, np.uint16)).save(tmp_path / "deep.png")
    write_line(tmp_path, "clear.png")
    Image.new("RGBA", (60, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert len(import_rows(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("copiste_fr", {"train": 3459, "validation": 466, "test": 517}),
        ("poilus_fr", {"train": 1822, "validation": 224, "test": 301}),
    ],
)
def test_real_lines_are_all_read_with_their_splits(name, counts):
    if not (REAL_DATA / name).exists():
        pytest.skip(f"{REAL_DATA / name} is not here")
    records, rejected = import_rows(REAL_DATA / name)
    assert rejected == []
    assert Counter(record["split"] for record in records) == counts
