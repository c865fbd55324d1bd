"""New lines read by the network of the package: pages, line images and tables that nobody has transcribed."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from xml.etree import ElementTree

import fontpkg
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from htr_pipeline import transcription
from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.core.synthesis import Font, draw_style, render_line
from htr_pipeline.io.importers import NewLinesConfig
from htr_pipeline.io.starting_point import StartingPoint
from htr_pipeline.transcription import REJECTED, transcribe

TEXTS = ["la maison de ma mère", "est dans la rue du marché", "nous avons vu le village", "il fait beau ce matin"]
PAGE_XML = '<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15"><Page imageFilename="{}" '
PAGE_XML += 'imageWidth="{}" imageHeight="{}"><TextRegion id="r">{}</TextRegion></Page></PcGts>'


@pytest.fixture(scope="module")
def starter():
    return StartingPoint.find("starter")


@pytest.fixture(scope="module")
def images():
    font = Font("kalam", (fontpkg.path("kalam", 400),))
    rngs = [np.random.default_rng(seed) for seed in range(len(TEXTS))]
    return [render_line(text, draw_style(rng, font), rng) for text, rng in zip(TEXTS, rngs, strict=True)]


@pytest.fixture
def lines(images, tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"line_{number}.png")
    return folder


@pytest.fixture
def page(images, tmp_path):
    """A page of these lines, one of them transcribed, and below them a line without a place."""
    folder = tmp_path / "pages"
    folder.mkdir()
    width, heights = max(image.shape[1] for image in images), [image.shape[0] for image in images]
    sheet, elements, top = np.full((sum(heights), width), 255, np.uint8), [], 0
    for number, image in enumerate(images):
        bottom, right = top + image.shape[0], image.shape[1]
        sheet[top:bottom, :right] = image
        text = "<TextEquiv><Unicode>as a human wrote</Unicode></TextEquiv>" if number == 0 else ""
        points = f"0,{top} {right - 1},{top} {right - 1},{bottom - 1} 0,{bottom - 1}"
        elements.append(f'<TextLine id="l{number}"><Coords points="{points}"/>{text}</TextLine>')
        top = bottom
    elements.append('<TextLine id="nowhere"/>')
    Image.fromarray(sheet).save(folder / "sheet.png")
    xml = PAGE_XML.format("sheet.png", width, sum(heights), "".join(elements))
    (folder / "sheet.xml").write_text(xml, encoding="utf-8")
    return folder


def texts_of(file):
    lines = ElementTree.parse(file).getroot().iterfind(".//{*}TextLine")
    return {line.get("id"): line.findtext("{*}TextEquiv/{*}Unicode") for line in lines}


def error_rate(hypotheses):
    return score_lines(TEXTS[-len(hypotheses) :], hypotheses).cer


def run(source, output, starter, **options):
    return transcribe(NewLinesConfig(path=str(source)), output, starter, output.parent / "store.sqlite", **options)


def test_lines_of_a_page_are_written_into_a_copy_of_it(page, starter, tmp_path):
    before = (page / "sheet.xml").read_bytes()
    done = run(page, tmp_path / "out", starter)
    assert done.files == [tmp_path / "out/sheet.xml"]
    texts = texts_of(done.files[0])
    assert error_rate([texts[f"l{number}"] for number in range(4)]) < 0.2
    assert texts["nowhere"] is None
    assert (page / "sheet.xml").read_bytes() == before
    rejected = pd.read_csv(tmp_path / "out" / REJECTED, sep="\t")
    assert rejected[["line_id", "reason"]].to_numpy().tolist() == [["sheet/nowhere", "bad_geometry"]]
    assert (done.num_lines, done.num_rejected, done.decoder, done.num_right) == (4, 1, "greedy", None)


def test_transcribed_lines_can_be_left_as_they_are(page, starter, tmp_path):
    done = run(page, tmp_path / "out", starter, only_empty=True)
    texts = texts_of(done.files[0])
    assert (done.num_lines, done.num_kept) == (3, 1)
    assert texts["l0"] == "as a human wrote"
    assert error_rate([texts[f"l{number}"] for number in (1, 2, 3)]) < 0.2
    run(page, tmp_path / "out", starter, only_empty=True, format="tsv")
    table = pd.read_csv(tmp_path / "out/lines.tsv", sep="\t")
    assert table["text"].tolist() == [texts[f"l{number}"] for number in range(4)]
    assert table["confidence"].isna().tolist() == [True, False, False, False]
    (hocr,) = run(page, tmp_path / "out", starter, only_empty=True, format="hocr").files
    assert hocr.read_text("utf-8").count("x_wconf") == sum(len(texts[f"l{n}"].split()) + 1 for n in (1, 2, 3))


def test_page_that_is_transcribed_already_is_copied_and_a_region_takes_the_text_that_counts(page, starter, tmp_path):
    done = (page / "sheet.xml").read_text("utf-8").replace('<TextLine id="nowhere"/>', "")
    texts = '<TextEquiv index="1"><Unicode>second</Unicode></TextEquiv><TextEquiv index="0"><Unicode>best'
    for number in (1, 2, 3):
        done = done.replace(
            "/></TextLine>", f"/><TextEquiv><Unicode>known {number}</Unicode></TextEquiv></TextLine>", 1
        )
    (page / "done.xml").write_text(done, encoding="utf-8")
    sheet = (page / "sheet.xml").read_text("utf-8").replace("<TextEquiv><Unicode>as a human wrote", texts)
    region = "<TextEquiv><Unicode>of the region</Unicode></TextEquiv></TextRegion>"
    (page / "sheet.xml").write_text(sheet.replace("</TextRegion>", region), encoding="utf-8")
    files = run(page, tmp_path / "out", starter, only_empty=True).files
    assert [file.name for file in files] == ["done.xml", "sheet.xml"]
    assert files[0].read_text("utf-8") == done
    of_region = ElementTree.parse(files[1]).find(".//{*}TextRegion/{*}TextEquiv/{*}Unicode").text
    assert of_region.splitlines()[0] == "best"


def test_images_alone_give_a_table_and_nothing_is_read_twice(lines, starter, tmp_path):
    first = run(lines, tmp_path / "out", starter)
    table = pd.read_csv(tmp_path / "out/lines.tsv", sep="\t")
    assert table["line_id"].tolist() == [f"line_{number}" for number in range(4)]
    assert error_rate(table["text"].tolist()) < 0.2
    again = run(lines, tmp_path / "again", starter, format="text")
    assert (first.num_known, again.num_known) == (0, 4)
    assert [file.read_text("utf-8").strip() for file in again.files] == table["text"].tolist()
    assert run(lines, tmp_path / "beam", starter, decoder="beam").num_known == 0
    assert run(lines, tmp_path / "looks", starter, looks=1).num_known == 0


def test_one_image_is_a_source_of_one_line(lines, starter, tmp_path):
    image = lines / "line_1.png"
    done = run(image, tmp_path / "out", starter)
    table = pd.read_csv(tmp_path / "out/lines.tsv", sep="\t")
    assert (done.num_lines, table["line_id"].tolist()) == (1, ["line_1"])
    assert score_lines(TEXTS[1:2], table["text"].tolist()).cer < 0.2
    (lines / "line_1.gt.txt").write_text("as a human wrote", encoding="utf-8")
    with pytest.raises(UserError, match="no line is without a text"):
        run(image, tmp_path / "out", starter, only_empty=True)
    with pytest.raises(UserError, match="Export to a folder outside"):
        run(image, lines, starter)


def test_table_needs_no_column_of_texts(lines, starter, tmp_path):
    table = pd.DataFrame({"image": [f"line_{number}.png" for number in range(4)], "text": ["known", None, "", None]})
    table[["image"]].to_csv(lines / "without.csv", index=False)
    assert run(lines / "without.csv", tmp_path / "out", starter).num_lines == 4
    table.to_csv(lines / "partly.csv", index=False)
    assert run(lines / "partly.csv", tmp_path / "out", starter, only_empty=True).num_lines == 3


def test_output_may_lie_beside_a_table_but_not_among_its_images(lines, starter, tmp_path):
    (tmp_path / "table.csv").write_text(
        "image\n" + "".join(f"lines/line_{n}.png\n" for n in range(4)), encoding="utf-8"
    )
    assert run(tmp_path / "table.csv", tmp_path / "out", starter).num_lines == 4
    for output in (tmp_path, lines):
        with pytest.raises(UserError, match="which is a source"):
            run(tmp_path / "table.csv", output, starter)
    images = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in sorted(lines.iterdir())]
    (tmp_path / "parquet").mkdir()
    pd.DataFrame(images).to_parquet(tmp_path / "parquet/table.parquet")
    source = NewLinesConfig(path=str(tmp_path / "parquet/table.parquet"), unpack_path=str(tmp_path / "unpacked"))
    for output in (tmp_path / "parquet", tmp_path / "unpacked/out"):
        with pytest.raises(UserError, match="which is a source"):
            transcribe(source, output, starter, tmp_path / "store.sqlite")
    assert transcribe(source, tmp_path / "parquet/out", starter, tmp_path / "store.sqlite").num_known == 4


def test_page_that_cannot_be_written_does_not_keep_the_others_from_it(page, starter, tmp_path):
    xml = (page / "sheet.xml").read_text("utf-8")
    (page / "other.xml").write_text(xml.replace('<TextLine id="l2">', "<TextLine>"), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"other.xml: there is no line with the id line3(.|\n)*The others are written all the same: 1 in ",
    ):
        run(page, tmp_path / "out", starter)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [REJECTED, "sheet.xml"]


def test_folder_of_a_network_is_checked_and_its_own_settings_count(lines, starter, tmp_path):
    folder = tmp_path / "network"
    shutil.copytree(starter.model_path.parent, folder)
    provenance = json.loads((folder / "provenance.json").read_text("utf-8"))
    provenance["feature_settings"] |= {"pillow": "12.0.0", "normalisation": "3"}  # as training writes them
    (folder / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    expected = run(lines, tmp_path / "a/out", starter).files[0].read_bytes()
    assert run(lines, tmp_path / "b/out", StartingPoint.find(str(folder))).files[0].read_bytes() == expected
    (folder / "settings.json").write_text("{", encoding="utf-8")
    for name, message in {
        "settings.json": r"has settings.json, but not language_model.npz and lexicon.txt",
        "charset.json": "this is no charset",
        "model.keras": "no network can be read from it",
    }.items():
        (folder / name).write_text("{", encoding="utf-8")
        with pytest.raises(UserError, match=message):
            run(lines, tmp_path / "c/out", StartingPoint.find(str(folder)))
        shutil.copytree(starter.model_path.parent, folder, dirs_exist_ok=True)
        (folder / "settings.json").unlink(missing_ok=True)


def test_readings_of_lines_that_were_normalised_otherwise_are_not_taken(starter):
    configs = ImageConfig(), ImageConfig(deslant=False), ImageConfig()
    hashes = [transcription._reading_hash(starter.files().values(), config, DecodingConfig()) for config in configs]
    assert hashes[0] == hashes[2] != hashes[1]


def test_killed_process_loses_only_the_lines_in_hand(lines, starter, tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from htr_pipeline import transcription
from htr_pipeline.io.importers import NewLinesConfig
from htr_pipeline.io.starting_point import StartingPoint

transcription._LINES_AT_A_TIME = 1
add, steps = transcription._Readings.add, []
def add_and_die(*arguments):
    add(*arguments)
    steps.append(1)
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
transcription._Readings.add = add_and_die
source, folder = NewLinesConfig(path={str(lines)!r}), Path({str(tmp_path)!r})
transcription.transcribe(source, folder / "out", StartingPoint.find("starter"), folder / "store.sqlite")
"""
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not list((tmp_path / "out").iterdir())
    assert run(lines, tmp_path / "out", starter).num_known == 3
    whole = run(lines, tmp_path / "fresh/out", starter)
    assert whole.num_known == 0
    assert (tmp_path / "out/lines.tsv").read_bytes() == whole.files[0].read_bytes()


def test_what_cannot_be_is_said_before_anything_is_read(lines, page, starter, tmp_path):
    store = tmp_path / "store.sqlite"
    with pytest.raises(UserError, match="None of the lines came from PAGE files, but from: lines"):
        run(lines, tmp_path / "out", starter, format="page")
    with pytest.raises(UserError, match=r"would lie in .*lines, which is a source"):
        run(lines, lines / "out", starter)
    with pytest.raises(UserError, match=r"beam_lm.*without a language model"):
        run(lines, tmp_path / "out", starter, decoder="beam_lm")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: nothing can be written there"):
        run(lines, tmp_path / "file/out", starter)
    assert not store.exists()
    (lines / "broken.png").write_bytes(b"no image")
    for image in lines.glob("line_*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"none of its lines can be read \(1 unreadable_image\), for instance: broken"):
        run(lines, tmp_path / "out", starter)
    store.write_text("no database" * 100)
    with pytest.raises(UserError, match=r"store.sqlite: what was read before .* cannot be used .* remove it"):
        run(page, tmp_path / "out", starter)
    store.unlink()
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE readings (other TEXT)")
    with pytest.raises(UserError, match=r"store.sqlite: what was read before .*\(no such column"):
        run(page, tmp_path / "out", starter)


def test_all_transcribed_is_said(lines, starter, tmp_path):
    for number, text in enumerate(TEXTS):
        (lines / f"line_{number}.gt.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"no line is without a text \(with one: 4\)\. Without --only-empty"):
        run(lines, tmp_path / "out", starter, only_empty=True)


def test_pages_that_nobody_has_cut_into_lines_are_noticed(lines, starter, tmp_path, caplog):
    for image in lines.iterdir():
        Image.open(image).rotate(90, expand=True).save(image)
    run(lines, tmp_path / "out", starter)
    assert "4 of 4 images are higher than wide, for instance line_0.png: are they pages?" in caplog.text


def test_table_of_what_was_left_out_goes_when_it_is_empty(lines, starter, tmp_path, caplog):
    (lines / "broken.png").write_bytes(b"no image")
    assert run(lines, tmp_path / "out", starter).num_rejected == 1
    (lines / "broken.png").unlink()
    (lines / "scan.webp").write_bytes(b"")
    assert run(lines, tmp_path / "out", starter).num_rejected == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lines.tsv"]
    assert "1 files are neither PNG, JPEG nor TIFF and are not read, for instance scan.webp" in caplog.text
    (tmp_path / "out" / REJECTED).write_text("my own", encoding="utf-8")
    run(lines, tmp_path / "out", starter)
    assert (tmp_path / "out" / REJECTED).read_text() == "my own"
