"""Exports of readings; PAGE and ALTO samples of this file hold what a naive writer would lose."""

import json
import os
import re
import time
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.io import exporters
from htr_pipeline.io.exporters.pages import NewText, edit_alto, edit_page
from htr_pipeline.io.manifest import MANIFEST, PREDICTIONS, to_table
from tests.io.samples import REAL_DATA, import_rows

PAGES = REAL_DATA / "raw_pages"

# Line ends, quotes, blanks within tags, comments, CDATA and a prefix as no writer of XML would leave them.
PAGE_XML, ALTO_XML = (
    (Path(__file__).parents[1] / "resources" / "export" / name).read_bytes().decode()
    for name in ("page.xml", "alto.xml")
)


def without(data, *patterns):
    text = data.decode()
    for pattern in patterns:
        text = re.sub(pattern, "", text)
    return text


def local(root):
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def page_line(data, line_id):
    return local(ElementTree.fromstring(data)).find(f".//TextLine[@id='{line_id}']")


def alto_line(data, line_id):
    return local(ElementTree.fromstring(data)).find(f".//TextLine[@ID='{line_id}']")


# --- the files that lines came from -----------------------------------------------------------------------------------


def test_page_keeps_words_that_are_as_many_and_loses_what_contradicts_the_reading():
    line = page_line(edit_page(PAGE_XML.encode(), {"l1": NewText("new <words>", 0.9)}), "l1")
    assert [child.tag for child in line] == ["Coords", "Word", "Word", "TextEquiv", "TextStyle"]
    assert [word.findtext("TextEquiv/Unicode") for word in line.findall("Word")] == ["new", "<words>"]
    assert line.find(".//Glyph") is None
    equiv = line.find("TextEquiv")
    assert equiv.attrib == {"index": "0", "conf": "0.9000", "comments": "conf='0.2'"}
    assert [(child.tag, child.text) for child in equiv] == [("Unicode", "new <words>")]


def test_page_loses_words_that_are_not_as_many():
    line = page_line(edit_page(PAGE_XML.encode(), {"l1": NewText("three new words", 0.9)}), "l1")
    assert [child.tag for child in line] == ["Coords", "TextEquiv", "TextStyle"]


def test_page_line_without_text_gets_it_where_the_schema_wants_it():
    line = page_line(edit_page(PAGE_XML.encode(), {"l2": NewText("new", 0.25)}), "l2")
    assert [child.tag for child in line] == ["Coords", "Baseline", "TextEquiv", "TextStyle"]
    assert line.find("TextEquiv").get("conf") == "0.2500"


def test_words_of_a_page_line_are_replaced_in_their_order_of_reading():
    words = "".join(
        f"<Word id='{name}' custom='readingOrder {{index:{place};}}'><Coords points='0,0'/></Word>"
        for name, place in {"second": 1, "first": 0}.items()
    )
    page = f"<PcGts><Page><TextRegion><TextLine id='l'>{words}</TextLine></TextRegion></Page></PcGts>"
    line = page_line(edit_page(page.encode(), {"l": NewText("a b", 0.9)}), "l")
    texts = {word.get("id"): word.findtext("TextEquiv/Unicode") for word in line.findall("Word")}
    assert texts == {"first": "a", "second": "b"}


def test_text_of_a_page_region_is_made_of_its_lines():
    root = local(ElementTree.fromstring(edit_page(PAGE_XML.encode(), {"l1": NewText("one", 0.9)})))
    assert root.findtext(".//TextRegion/TextEquiv/Unicode") == "one\n\nuntouched"


def test_text_of_a_page_region_has_kept_lines_too_in_the_order_of_reading():
    old = {"words": "<Word><TextEquiv><Unicode>of</Unicode></TextEquiv></Word>" * 2}
    old["plain"] = "<TextEquiv><PlainText>plain</PlainText></TextEquiv>"
    order = {"read": 2, "words": 0, "plain": 1}
    lines = "".join(
        f"<TextLine id='{name}' custom='readingOrder {{index:{place};}} abbrev {{offset:3; length:9;}}'>"
        f"<Coords points='0,0'/>{old.get(name, '')}</TextLine>"
        for name, place in order.items()
    )
    region = f"<TextRegion>{lines}<TextEquiv><Unicode>old</Unicode></TextEquiv></TextRegion>"
    root = ElementTree.fromstring(
        edit_page(f"<PcGts><Page>{region}</Page></PcGts>".encode(), {"read": NewText("new", 0.9)})
    )
    assert root.findtext(".//TextRegion/TextEquiv/Unicode") == "of of\nplain\nnew"
    tags = [line.get("custom") for line in root.iter("TextLine")]
    assert tags[0] == "readingOrder {index:2;}"  # a tag of a part of the old text says nothing of the new one
    assert all("offset:3" in tag for tag in tags[1:])


def test_all_bytes_of_a_page_outside_the_readings_stay():
    new = edit_page(PAGE_XML.encode(), {"l2": NewText("new", 0.25)})
    inserted = r'<pc:TextEquiv conf="0.2500"><pc:Unicode>new</pc:Unicode></pc:TextEquiv>'
    assert inserted in new.decode()
    region = r"(?<=<pc:TextEquiv><pc:Unicode>)(the whole region|[^<]*\nnew\nuntouched)"
    assert without(new, inserted, region) == without(PAGE_XML.encode(), region)


def test_alto_keeps_strings_that_are_as_many():
    line = alto_line(edit_alto(ALTO_XML.encode(), {"l1": NewText('new "words"', 0.9)}), "l1")
    assert [child.tag for child in line] == ["String", "SP", "String"]
    assert [string.get("CONTENT") for string in line.findall("String")] == ["new", '"words"']
    assert line[0].attrib.keys() == {"CONTENT", "HPOS", "VPOS", "WIDTH", "HEIGHT", "WC"}
    assert line[2].attrib.keys() == {"ID", "CONTENT", "HPOS", "VPOS", "WIDTH", "HEIGHT", "WC"}
    assert list(line[0]) == []


def test_alto_puts_one_string_in_the_place_of_strings_that_are_not_as_many():
    line = alto_line(edit_alto(ALTO_XML.encode(), {"l1": NewText("three new words", 0.9)}), "l1")
    assert [(child.tag, child.get("CONTENT"), child.get("WC")) for child in line] == [
        ("String", "three new words", "0.9000")
    ]
    assert line[0].get("WIDTH") == "180"


def test_alto_string_of_a_whole_line_stays_one():
    line = alto_line(edit_alto(ALTO_XML.encode(), {"l3": NewText("three new words", 0.9)}), "l3")
    assert [child.attrib for child in line] == [{"CONTENT": "three new words", "WC": "0.9000"}]


def test_all_bytes_of_an_alto_file_outside_the_readings_stay():
    new = edit_alto(ALTO_XML.encode(), {"l3": NewText("new", 0.25)})
    assert new.decode() == ALTO_XML.replace('CONTENT="un touched"/>', 'CONTENT="new" WC="0.2500"/>')
    new = edit_alto(ALTO_XML.encode(), {"l2": NewText("new", 0.25)})
    tag = 'VPOS="40" WIDTH="180" HEIGHT="20"'
    string = f'<String CONTENT="new" WC="0.2500" HPOS="10" {tag}/>'
    assert new.decode() == ALTO_XML.replace(f"{tag}/>", f"{tag}>{string}</TextLine>")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "iso-8859-1", "utf-16"])
def test_file_keeps_its_encoding(encoding):
    text = ALTO_XML.replace("UTF-8", encoding.removesuffix("-sig")).replace("un touched", "un touché")
    new = edit_alto(text.encode(encoding), {"l3": NewText("tōrné", 0.5)})
    assert alto_line(new, "l3")[0].get("CONTENT") == "tōrné"
    kept = text.replace('CONTENT="un touché"/>', 'CONTENT="tōrné" WC="0.5000"/>')
    assert new == kept.encode(encoding, "xmlcharrefreplace")


def test_characters_that_xml_cannot_hold_are_replaced():
    line = alto_line(edit_alto(ALTO_XML.encode(), {"l3": NewText("a\x07b\x00]]>", 0.5)}), "l3")
    assert line[0].get("CONTENT") == "a\ufffdb\ufffd]]>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<PcGts>", "not well-formed"),
        (b"<alto/>", "expected <PcGts>, got <alto>"),
        (b"<PcGts/>", "there is no line with the id l1"),
        (b'<PcGts><TextLine id="l1"/><TextLine id="l1"/></PcGts>', "several lines have the id l1"),
        (b'<!DOCTYPE PcGts [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><PcGts>&b;</PcGts>', "DOCTYPE"),
        (b'<!DOCTYPE PcGts SYSTEM "file:///etc/passwd"><PcGts/>', "DOCTYPE"),
        (b'<?xml version="1.0" encoding="nonsense"?><PcGts/>', "not well-formed"),
    ],
)
def test_file_that_has_changed_or_is_hostile_is_an_error(data, message):
    with pytest.raises(UserError, match=message):
        edit_page(data, {"l1": NewText("new", 0.5)})


# --- whole exports ----------------------------------------------------------------------------------------------------


def tables(rows, roots, prefixes=None):
    """A manifest of the rows and predictions that read every line in capitals."""
    metadata = {"image_roots": json.dumps({name: str(root) for name, root in roots.items()})}
    metadata["id_prefixes"] = json.dumps(prefixes or dict.fromkeys(roots, ""))
    predictions = [
        {
            "line_id": row["line_id"],
            "split": row["split"],
            "writer_id": row["writer_id"],
            "decoder": decoder,
            "reference": row["text"],
            "hypothesis": row["text"].upper() if decoder == "greedy" else row["text"].lower(),
            "confidence": 0.5,
            "hits": 0,
            "substitutions": 0,
            "insertions": 0,
            "deletions": 0,
            "characters": [],
        }
        for row in rows
        for decoder in ("greedy", "beam")
        if row["split"] != "train"
    ]
    return to_table(rows, MANIFEST, metadata), to_table(predictions, PREDICTIONS)


@pytest.fixture
def pages(tmp_path):
    """A source with one PAGE file, its lines as rows of a manifest."""
    source = tmp_path / "source"
    (source / "page").mkdir(parents=True)
    second = "<pc:TextEquiv><pc:Unicode>second</pc:Unicode></pc:TextEquiv>"
    page = PAGE_XML.replace("<pc:TextStyle fontFamily='Arial' />", second)
    (source / "page" / "p.xml").write_text(page, newline="")
    Image.new("L", (200, 100), 255).save(source / "p.png")
    records, rejected = import_rows(source)
    assert rejected == []
    return [record | {"split": "test"} for record in records], source


@pytest.fixture
def line_images(tmp_path):
    """Rows of line images on two pages."""
    rows = [
        {
            "line_id": f"{page}/{number}",
            "page_id": page,
            "writer_id": page,
            "split": "train" if number == 0 else "test",
            "text": f"line {number} & more",
            "image_path": f"{page}/{number}.png",
            "source": "source",
            "format": "lines",
            "width_pixels": 100,
            "height_pixels": 20,
            "content_hash": "0" * 64,
        }
        for page in ("a", "b")
        for number in (0, 2, 1)
    ]
    return rows, tmp_path / "source"


def export(format, manifest, predictions, folder, decoder="greedy", **options):
    return exporters.export_lines(format, manifest, predictions, folder, decoder=decoder, **options)


def test_page_export_reads_back_as_the_readings(pages, tmp_path):
    rows, source = pages
    before = (source / "page" / "p.xml").read_bytes()
    files = export("page", *tables(rows, {"source": source}), tmp_path / "out")
    assert files == [tmp_path / "out" / "page" / "p.xml"]
    assert (source / "page" / "p.xml").read_bytes() == before
    Image.new("L", (200, 100), 255).save(tmp_path / "out" / "p.png")
    again, _ = import_rows(tmp_path / "out")
    assert [(row["line_id"], row["text"]) for row in again] == [(row["line_id"], row["text"].upper()) for row in rows]


def test_text_has_one_file_a_page_with_its_lines_in_the_order_of_the_manifest(line_images, tmp_path):
    rows, root = line_images
    files = export("text", *tables(rows, {"source": root}), tmp_path / "out")
    assert files == [tmp_path / "out" / "a.txt", tmp_path / "out" / "b.txt"]
    assert files[0].read_text() == "LINE 2 & MORE\nLINE 1 & MORE\n"
    files = export("text", *tables(rows, {"source": root}), tmp_path / "out", decoder="beam")
    assert files[0].read_text() == "line 2 & more\nline 1 & more\n"


def test_tsv_has_a_line_each_and_no_cell_breaks_it(line_images, tmp_path):
    rows, root = line_images
    rows[1]["line_id"] = "a\tb\nc"
    (file,) = export("tsv", *tables(rows, {"source": root}), tmp_path / "out")
    cells = [line.split("\t") for line in file.read_text().splitlines()]
    assert cells[:2] == [["line_id", "text", "confidence"], ["a b c", "LINE 2 & MORE", "0.5000"]]
    assert len(cells) == 1 + 4


def test_hocr_of_a_page_has_boxes_on_the_page_and_is_well_formed(pages, tmp_path):
    rows, source = pages
    (file,) = export("hocr", *tables(rows, {"source": source}), tmp_path / "out")
    root = local(ElementTree.parse(file).getroot())
    (page,) = root.findall(".//*[@class='ocr_page']")
    assert page.get("title") == 'image "p.png"; bbox 0 0 200 100; ppageno 0'
    lines = page.findall("*[@class='ocr_line']")
    assert [line.get("title") for line in lines] == [
        "bbox 10 10 190 30; x_wconf 50",
        "bbox 10 40 190 60; x_wconf 50",
        "bbox 10 70 190 90; x_wconf 50",
    ]
    assert ["".join(line.itertext()) for line in lines] == [row["text"].upper() for row in rows]
    words = lines[0].findall("*[@class='ocrx_word']")
    assert [word.text for word in words] == ["OLD", "TÉXT"]
    assert words[0].get("title").startswith("bbox 10 10 78 30")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_hocr_of_line_images_has_a_page_for_each(line_images, tmp_path):
    rows, root = line_images
    files = export("hocr", *tables(rows, {"source": root}), tmp_path / "out")
    page = local(ElementTree.parse(files[0]).getroot()).findall(".//*[@class='ocr_page']")
    assert [element.get("title") for element in page] == [
        'image "a/2.png"; bbox 0 0 100 20; ppageno 0',
        'image "a/1.png"; bbox 0 0 100 20; ppageno 1',
    ]


def test_names_of_several_sources_are_folders_of_the_export(pages, tmp_path):
    rows, source = pages
    named = [
        row | {"source": "mine"} | {key: f"mine/{row[key]}" for key in ("line_id", "page_id", "writer_id")}
        for row in rows
    ]
    manifest, predictions = tables(named, {"mine": source}, {"mine": "mine/"})
    assert export("page", manifest, predictions, tmp_path / "out") == [tmp_path / "out/mine/page/p.xml"]
    assert export("text", manifest, predictions, tmp_path / "out") == [tmp_path / "out/mine/p.txt"]


@pytest.mark.parametrize("format", ["page", "text", "tsv", "hocr"])
def test_no_export_writes_into_a_source(pages, tmp_path, format):
    rows, source = pages
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for folder in (source, source / "out"):
        with pytest.raises(UserError, match="which is a source"):
            export(format, *tables(rows, {"source": source}), folder)
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


@pytest.mark.parametrize("page_id", ["../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:evil", "..", ""])
def test_page_ids_of_strangers_stay_within_the_folder(line_images, tmp_path, page_id):
    rows, root = line_images
    rows = [row | {"page_id": page_id} for row in rows]
    (file,) = export("text", *tables(rows, {"source": root}), tmp_path / "x" / "out")
    assert file.resolve().is_relative_to((tmp_path / "x" / "out").resolve())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_page_that_cannot_be_written_does_not_keep_the_others_from_it(line_images, tmp_path):
    rows, root = line_images
    (tmp_path / "out/a.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a\.txt: it cannot be written.*\nThe others are written all the same: 1"):
        export("text", *tables(rows, {"source": root}), tmp_path / "out")
    assert (tmp_path / "out/b.txt").is_file()


def test_single_file_is_exported_though_a_folder_beside_it_has_another_of_its_name(pages, tmp_path):
    rows, source = pages
    rows = [row | {"page_id": "p"} for row in rows]
    single = source / "p.xml"
    single.write_text(PAGE_XML, newline="")
    manifest, predictions = tables(rows, {"source": source})
    metadata = manifest.schema.metadata | {b"source_paths": json.dumps({"source": str(single)}).encode()}
    (file,) = export("page", manifest.replace_schema_metadata(metadata), predictions, tmp_path / "out")
    assert file == tmp_path / "out/p.xml"


def test_pages_that_would_share_a_file_are_an_error(line_images, tmp_path):
    rows, root = line_images
    rows = [row | {"page_id": {"a": "x:y", "b": "x*y"}[row["page_id"]]} for row in rows]
    with pytest.raises(UserError, match=r"'x:y' and 'x\*y' would both be .*Rename"):
        export("text", *tables(rows, {"source": root}), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "docx"}, r"format 'docx': expected one of page, alto, text, tsv, hocr"),
        ({"decoder": "beem"}, r"decoder 'beem': .*Those there are: beam, greedy"),
        ({"split": "train"}, r"split 'train': none of its lines was read\. Splits with readings: test"),
        ({"format": "page"}, r"None of the lines came from PAGE files, but from: lines\. Export them as"),
    ],
)
def test_export_of_nothing_is_an_error(line_images, tmp_path, arguments, message):
    rows, root = line_images
    manifest, predictions = tables(rows, {"source": root})
    with pytest.raises(UserError, match=message):
        export(arguments.pop("format", "text"), manifest, predictions, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_predictions_of_another_manifest_are_an_error(line_images, tmp_path):
    rows, root = line_images
    manifest, predictions = tables(rows, {"source": root})
    with pytest.raises(UserError, match=r"2 lines that were read are not in the manifest, for instance 'b/2'"):
        export("text", manifest.slice(0, 3), predictions, tmp_path / "out")


def test_pages_with_decomposed_names_are_found_again(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    name = unicodedata.normalize("NFD", "Lettre_éa")
    (source / f"{name}.xml").write_text(PAGE_XML, encoding="utf-8")
    Image.new("L", (200, 100), 255).save(source / "p.png")
    records, _ = import_rows(source, "page")
    assert {record["page_id"] for record in records} == {"Lettre_éa"}
    assert all(record["line_id"].startswith("Lettre_éa/") for record in records)
    rows = [record | {"split": "test"} for record in records]
    assert len(export("page", *tables(rows, {"source": source}), tmp_path / "out")) == 1


def test_file_that_is_gone_is_an_error_that_names_the_page(pages, tmp_path):
    rows, source = pages
    (source / "page" / "p.xml").unlink()
    with pytest.raises(UserError, match=r"page 'p': .*has no PAGE file of it any more"):
        export("page", *tables(rows, {"source": source}), tmp_path / "out")


def test_of_two_files_of_one_page_the_one_that_was_imported_is_written(tmp_path):
    source = tmp_path / "source"
    for folder, page in {"alto": PAGE_XML[:-20], "page": PAGE_XML}.items():
        (source / folder).mkdir(parents=True)
        (source / folder / "p.xml").write_text(page, encoding="utf-8")
    Image.new("L", (200, 100), 255).save(source / "p.png")
    records, rejected = import_rows(source, "page")
    assert [row["reason"] for row in rejected if row["line_id"] == "p"] == ["unreadable_xml"]
    rows = [record | {"split": "test"} for record in records]
    assert export("page", *tables(rows, {"source": source}), tmp_path / "out") == [tmp_path / "out/page/p.xml"]


def test_pipe_that_was_put_in_the_place_of_a_page_does_not_block(pages, tmp_path, monkeypatch):
    rows, source = pages
    (source / "page" / "p.xml").unlink()
    os.mkfifo(source / "page" / "p.xml")
    with pytest.raises(UserError, match=r"page 'p': .*has no PAGE file of it any more"):
        export("page", *tables(rows, {"source": source}), tmp_path / "out")
    monkeypatch.setattr(exporters, "root_tag", lambda _: "PcGts")  # as of one that is put there a moment later
    with pytest.raises(UserError, match=r"p\.xml: not a regular file"):
        export("page", *tables(rows, {"source": source}), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "format"),
    [("bronod_alto_and_page", "page"), ("bronod_alto_and_page", "alto"), ("timeus_alto_and_page", "page")],
)
def test_real_pages_change_in_the_texts_only(tmp_path, name, format):
    if not PAGES.exists():
        pytest.skip(f"{PAGES} is not here")
    records, _ = import_rows(PAGES / name, format)
    rows = [record | {"split": "test"} for record in records]
    changed = {"page": r' conf="0.5000"|<Unicode>[^<]*', "alto": r' WC="0.5000"|CONTENT="[^"]*"'}[format]
    for file in export(format, *tables(rows, {name: PAGES / name}), tmp_path):
        old = (PAGES / name / file.relative_to(tmp_path)).read_bytes()
        assert file.read_bytes() != old
        assert without(file.read_bytes(), changed) == without(old, changed)


def test_time_is_linear_in_the_white_space_of_a_tag():
    blank = " " * 300_000  # minutes, if it were quadratic
    page = f'<PcGts><Page><TextRegion><TextLine id="a"><TextEquiv{blank}index="0"{blank}><Unicode{blank}a=""{blank}/>'
    page += "</TextEquiv></TextLine></TextRegion></Page></PcGts>"
    alto = f'<alto><TextLine ID="a"><String{blank}CONTENT="x"{blank}VPOS="1"/></TextLine></alto>'
    start = time.process_time()
    readings = {"a": NewText("new", 0.5)}
    assert f'<Unicode{blank}a="">new</Unicode>'.encode() in edit_page(page.encode(), readings)
    assert f'{blank}CONTENT="new"{blank}VPOS="1" WC="0.5000"/>'.encode() in edit_alto(alto.encode(), readings)
    assert time.process_time() - start < 10


def test_time_is_linear_in_the_line_ends_of_a_text():
    text = "x\n" * 300_000  # the parser gives each line end on its own
    page = '<PcGts><TextRegion><TextEquiv><Unicode/></TextEquiv><TextLine id="a"/><TextLine id="b">'
    page += f"<TextEquiv><Unicode>{text}</Unicode></TextEquiv></TextLine></TextRegion></PcGts>"
    start = time.process_time()
    assert f"<Unicode>new\n{text}</Unicode>".encode() in edit_page(page.encode(), {"a": NewText("new", 0.5)})
    assert time.process_time() - start < 1


def test_words_of_an_hocr_line_from_right_to_left_stand_there():
    from htr_pipeline.io.exporters.hocr import _word_boxes

    boxes = dict(_word_boxes("אבג 12 דה", (0, 5, 90, 9)))
    assert boxes == {"אבג": (60, 5, 90, 9), "12": (30, 5, 50, 9), "דה": (0, 5, 20, 9)}
    assert dict(_word_boxes("abc 12 de", (0, 5, 90, 9))) == {
        "abc": (0, 5, 30, 9),
        "12": (40, 5, 60, 9),
        "de": (70, 5, 90, 9),
    }
