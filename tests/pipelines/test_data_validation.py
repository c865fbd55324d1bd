import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io import features
from htr_pipeline.io.datasets import ParquetTable
from htr_pipeline.io.importers import SourceConfig, SourcesConfig
from htr_pipeline.io.importers.demo import DemoConfig
from htr_pipeline.io.manifest import LEFT_OUT, MANIFEST, REJECTED_LINES, id_prefixes, image_roots, to_table
from htr_pipeline.pipelines.data_validation.expectations import (
    AT_IMPORT,
    LINE_LEVELS,
    SET_LEVELS,
    ValidationConfig,
    line_checks,
    run_checks,
    set_checks,
)
from htr_pipeline.pipelines.data_validation.facts import collect_facts
from htr_pipeline.pipelines.data_validation.nodes import check_manifest, import_sources, validate_lines
from tests.io.samples import REAL_DATA


def good_lines(num=12):
    """Manifest rows that pass every check: three writers, one a split."""
    return [
        {
            "line_id": f"line{index:02}",
            "page_id": f"page{index % 3}",
            "writer_id": f"writer{index % 3}",
            "split": ("train", "validation", "test")[index % 3],
            "text": f"Wort {'aber'[: index % 4 + 1]}",
            "image_path": f"line{index:02}.png",
            "source": "source",
            "format": "lines",
            "width_pixels": 400,
            "height_pixels": 50,
            "content_hash": f"{index:064x}",
            "image_hash": hashlib.sha256(str(index).encode()).hexdigest()[:32],
        }
        for index in range(num)
    ]


def settings_for(tmp_path, **settings):
    """A dozen lines have few characters often: what is rare is asked for where a test is about it."""
    return ValidationConfig(
        **({"docs_path": str(tmp_path / "docs"), "max_rejected_share": 0.5, "min_occurrences": 0} | settings)
    )


def imported(rows, folder):
    """imported_lines whose images lie in folder/source."""
    return to_table(rows, MANIFEST, {"image_roots": json.dumps({"source": str(folder / "source")})})


def validate_all(rows, tmp_path, **settings):
    """validated_lines, rejected_lines, warned_lines, summary and configuration for manifest rows."""
    config = settings_for(tmp_path, **settings)
    nothing = to_table([], REJECTED_LINES)
    return *validate_lines(imported(rows, tmp_path), nothing, [], config, ImageConfig(height_pixels=48)), config


def validate(rows, tmp_path, **settings):
    """The same without warned_lines."""
    validated, rejected, _, summary, config = validate_all(rows, tmp_path, **settings)
    return validated, rejected, summary, config


def test_good_lines_pass_unchanged(tmp_path):
    rows = good_lines()
    validated, rejected, summary, config = validate(rows, tmp_path)
    assert validated.equals(to_table(rows, MANIFEST))
    assert rejected.num_rows == 0
    assert summary["num_lines"] == {"train": 4, "validation": 4, "test": 4}
    assert summary["failures"] == summary["warnings"] == []
    assert check_manifest(validated, rejected, summary, config) is validated


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"text": ""}, "empty_text", "there is no text"),
        (
            {"text": "a\ue000b"},
            "unknown_character",
            "U\\+E000.*keep such lines by validation.levels.unknown_character=warn",
        ),
        ({"text": "a\x07b"}, "unknown_character", "U\\+0007"),
        ({"text": "a\ufffdb"}, "unknown_character", "U\\+FFFD REPLACEMENT CHARACTER"),
        ({"content_hash": ""}, "unreadable_image", "was not decoded"),
        ({"grey_range": 7}, "blank_image", "nothing can be seen on the image"),
        ({"height_pixels": 7}, "height", "7 pixels high, 8 to 1000.*validation.min_height_pixels"),
        ({"height_pixels": 1001, "width_pixels": 9000}, "height", "1001 pixels high"),
        ({"width_pixels": 7}, "width", "7 pixels wide, 8 to 20000"),
        ({"width_pixels": 5050}, "aspect", "101.0 times as wide as high, 100 is allowed"),
        (
            {"text": "x" * 97},
            "too_narrow",
            "97 characters need at least 193 frames, 400 x 50 pixels give 96, 144 at most if",
        ),
        ({"line_id": "line01"}, "duplicate_id", "the id 'line01' belongs to another line too"),
        ({"content_hash": f"{1:064x}"}, "same_image_two_texts", "under 2 different texts"),
    ],
)
def test_each_expectation_rejects_its_line_with_a_sentence(tmp_path, change, reason, detail):
    rows = good_lines()
    rows[6] |= change
    _, rejected, summary, _ = validate(rows, tmp_path)
    others = {"line01"} if reason in ("duplicate_id", "same_image_two_texts") else set()
    assert set(rejected["line_id"].to_pylist()) == {rows[6]["line_id"]} | others
    assert set(rejected["reason"].to_pylist()) == {reason}
    assert re.search(detail, rejected["detail"][-1].as_py())
    assert summary["reasons"] == {reason: rejected.num_rows}
    assert reason in {row["reason"] for row in summary["expectations"] if not row["success"]}


def test_a_line_that_fails_twice_is_rejected_once(tmp_path):
    rows = good_lines()
    rows[6] |= {"text": "", "height_pixels": 5}
    _, rejected, _, _ = validate(rows, tmp_path)
    assert rejected["reason"].to_pylist() == ["empty_text"]


def test_text_that_just_fits_its_frames_passes(tmp_path):
    rows = good_lines()
    rows[6]["text"] = "ab" * 48  # 96 characters without repeats; 400 x 50 pixels give 96 frames at height 48
    assert validate(rows, tmp_path)[1].num_rows == 0
    rows[6]["text"] = "ab" * 72  # as many frames as 96 become where small letters are enlarged
    assert validate(rows, tmp_path)[1].num_rows == 0
    rows[6]["text"] += "a"
    assert validate(rows, tmp_path)[1]["reason"].to_pylist() == ["too_narrow"]


def test_characters_outside_those_allowed_are_rejected_with_their_names(tmp_path):
    rows = good_lines()
    rows[6]["text"] = "Wört"
    _, rejected, _, _ = validate(rows, tmp_path, allowed_characters="Wortabe ")
    assert "U+00F6 LATIN SMALL LETTER O WITH DIAERESIS" in rejected["detail"][0].as_py()
    for allowed in ("Wortabeö", "Wortabeo\u0308"):  # composed and not, without the blank
        assert validate(rows, tmp_path, allowed_characters=allowed)[1].num_rows == 0


def test_writer_in_two_splits_stops_the_run(tmp_path):
    rows = good_lines()
    rows[6]["split"] = "test"
    validated, rejected, summary, config = validate(rows, tmp_path)
    with pytest.raises(UserError, match=r"more than one split.*'writer0' \(test and train\).*source\.split=by_writer"):
        check_manifest(validated, rejected, summary, config)


def test_page_in_two_splits_is_a_warning(tmp_path):
    rows = good_lines()
    for row in rows:
        row["page_id"] = f"page of {row['writer_id']}" if row["writer_id"] != "writer1" else "writer1"
    rows[0]["page_id"] = rows[2]["page_id"]
    validated, rejected, summary, config = validate(rows, tmp_path)
    assert summary["failures"] == []
    assert re.search(r"Pages in more than one split.*: 'page of writer2' \(test and train\)\.", summary["warnings"][0])
    assert check_manifest(validated, rejected, summary, config) is validated


def test_one_hand_is_split_by_page_where_there_are_enough(tmp_path):
    (tmp_path / "source").mkdir()
    rows = ["image\ttext\twriter\tpage"]
    for index in range(96):
        Image.effect_noise((300 + index, 40), 50).save(tmp_path / "source" / f"{index}.png")
        rows.append(f"{index}.png\tline {index}\tAnna\tfolio {index % 24}")
    (tmp_path / "source" / "lines.tsv").write_text("\n".join(rows), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "source"))
    manifest, rejections, notes = import_sources(source, SourcesConfig(), DemoConfig())
    assert "split by page" in notes[0]
    _, _, _, summary = validate_lines(
        manifest, rejections, notes, settings_for(tmp_path, docs_path=str(tmp_path / "docs")), ImageConfig()
    )
    assert (summary["warnings"], summary["failures"]) == (notes, [])
    assert set(manifest["split"].to_pylist()) == {"train", "validation", "test"}


def test_collections_of_one_or_two_hands_go_through_with_a_warning(tmp_path):
    for num_writers in (1, 2):
        folder = tmp_path / str(num_writers)
        for index in range(30):
            place = folder / "source" / f"writer{index % num_writers}"
            place.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((300 + index, 40), 50).save(place / f"{index}.png")
            (place / f"{index}.gt.txt").write_text(f"line {index}", encoding="utf-8")
        source = SourceConfig(path=str(folder / "source"))
        manifest, rejections, notes = import_sources(source, SourcesConfig(), DemoConfig())
        assert f"Only {num_writers} writer(s) for three splits" in notes[0]
        config = ValidationConfig(docs_path=str(folder / "docs"))
        validated, rejected, _, summary = validate_lines(manifest, rejections, notes, config, ImageConfig())
        check_manifest(validated, rejected, summary, config)
        assert set(validated["split"].to_pylist()) == {"train", "validation", "test"}


def test_one_hand_to_train_and_validate_with_and_others_in_the_test_go_through(tmp_path):
    rows = good_lines()
    for index, row in enumerate(rows):
        row["split"] = ("train", "validation")[index % 2] if index < 6 else "test"
        row["writer_id"] = "anna" if index < 6 else f"writer{index}"
    validated, rejected, summary, config = validate(rows, tmp_path)
    assert check_manifest(validated, rejected, summary, config) == validated
    assert summary["failures"] == []


def test_missing_split_stops_the_run(tmp_path):
    rows = [row for row in good_lines() if row["split"] != "validation"]
    validated, rejected, summary, config = validate(rows, tmp_path)
    with pytest.raises(UserError, match=r"Every split needs a line, got test 4, train 4\. Add lines"):
        check_manifest(validated, rejected, summary, config)


def test_too_many_rejected_lines_stop_the_run_and_the_first_ten_are_shown(tmp_path):
    rows = good_lines(36)
    for row in rows[:12]:
        row["height_pixels"] = 3
    validated, rejected, summary, config = validate(rows, tmp_path, max_rejected_share=0.3)
    with pytest.raises(UserError, match=r"12 of 36 lines were rejected \(33\.3%\).*max_rejected_share") as caught:
        check_manifest(validated, rejected, summary, config)
    assert str(caught.value).count(" | height | ") == 10
    assert "line00.png | height | line00.png: 3 pixels high" in str(caught.value)
    assert "summary.html" in str(caught.value)
    stopped = "The run stopped here: 33.3 % of the lines were rejected, and validation.max_rejected_share allows 30.0 %"
    assert stopped in (tmp_path / "docs" / "summary.html").read_text()
    validate(rows, tmp_path, max_rejected_share=0.4)
    assert "The run stopped here" not in (tmp_path / "docs" / "summary.html").read_text()


def test_lines_that_were_rejected_at_the_import_have_failed_the_check_too(tmp_path):
    rejection = {"line_id": "x", "file": "\u202ex.png", "stage": "import", "reason": "unreadable_image", "detail": "no"}
    rejections, config = to_table([rejection], REJECTED_LINES), settings_for(tmp_path)
    *_, summary = validate_lines(imported(good_lines(), tmp_path), rejections, [], config, ImageConfig())
    checks = {row["reason"]: row for row in summary["expectations"]}
    assert (
        checks["unreadable_image"] | {"num_checked": 13, "num_failed": 1, "success": False}
        == (checks["unreadable_image"])
    )
    assert checks["empty_text"]["success"]
    assert "U+202Ex.png" in (tmp_path / "docs" / "summary.html").read_text()


def test_lines_that_nobody_has_transcribed_do_not_stop_the_run(tmp_path):
    rows = good_lines(36)
    for row in rows[6:]:
        row["text"] = ""
    validated, rejected, summary, config = validate(rows, tmp_path, max_rejected_share=0.0)
    assert check_manifest(validated, rejected, summary, config).num_rows == 6
    assert summary["reasons"] == {"empty_text": 30}
    assert summary["rejected_share"] == 0.0


def test_source_without_any_text_stops_the_run(tmp_path):
    validated, rejected, summary, config = validate([row | {"text": ""} for row in good_lines()], tmp_path)
    with pytest.raises(UserError, match=r"besides 12 without text.*\n.*line00\.png \| empty_text"):
        check_manifest(validated, rejected, summary, config)


def test_no_line_left_stops_the_run_whatever_the_share(tmp_path):
    rejection = {"line_id": "x", "file": "x.png", "stage": "import", "reason": "unreadable_text", "detail": "no UTF-8"}
    config = ValidationConfig(docs_path=str(tmp_path / "docs"), max_rejected_share=1.0)
    validated, rejected, _, summary = validate_lines(
        imported([], tmp_path), to_table([rejection], REJECTED_LINES), [], config, ImageConfig()
    )
    with pytest.raises(UserError, match=r"1 of 1 lines were rejected.*\n.*x\.png \| unreadable_text \| no UTF-8"):
        check_manifest(validated, rejected, summary, config)


def test_sentence_that_holds_for_many_lines_is_shown_once(tmp_path):
    pages = [("b.xml", 30), ("c.xml", 1)]
    rejections = [
        {"line_id": f"{file}/{i:02}", "file": file, "stage": "import", "reason": "missing_image", "detail": "no image"}
        for file, num_lines in pages
        for i in range(num_lines)
    ]
    config = ValidationConfig(docs_path=str(tmp_path / "docs"))
    validated, rejected, _, summary = validate_lines(
        imported([], tmp_path), to_table(rejections, REJECTED_LINES), [], config, ImageConfig()
    )
    with pytest.raises(UserError, match="31 of 31 lines were rejected") as caught:
        check_manifest(validated, rejected, summary, config)
    assert "  b.xml | missing_image | no image (30 lines)\n  c.xml | missing_image | no image\n" in str(caught.value)


def change(number, **values):
    """The good lines with one of them changed."""
    rows = good_lines(36)
    rows[number] |= values
    return rows


def similar(image_hash):
    """The perceptual hash with three of its 128 bits turned round."""
    return f"{int(image_hash, 16) ^ (1 << 3 | 1 << 70 | 1 << 127):032x}"


PAGE_TEXT = ["ein langer Satz, der auf dieser", "Seite steht und weitergeht"]


def same_page_text():
    rows = good_lines(36)
    for index, text in zip((0, 3, 2, 5), (*PAGE_TEXT, *PAGE_TEXT), strict=True):
        rows[index] |= {"text": text, "page_id": f"two lines by {index % 3}"}
    return rows


@pytest.mark.parametrize(
    ("rows", "reason", "warned", "detail"),
    [
        (
            change(6, text="Wort ab", content_hash=f"{3:064x}"),
            "same_image",
            ["line06"],
            r"line06.png \(train\): the image is that of line03 \(train\)",
        ),
        (
            change(6, image_hash=similar(good_lines()[3]["image_hash"])),
            "near_duplicate_image",
            ["line06"],
            r"looks like line03 \(train\)",
        ),
        (same_page_text(), "same_page_text", ["line00", "line02", "line03", "line05"], r"two lines by 2 \(test\)"),
        (change(6, width_pixels=4000), "unusual_width", ["line06"], "wider than this hand writes, by"),
        (change(6, width_pixels=60), "unusual_width", ["line06"], "narrower than this hand writes, by"),
        (change(6, text="Wo\u00adrt ab"), "invisible_character", ["line06"], r"U\+00AD SOFT HYPHEN"),
        (
            [
                *change(6, text="Wort ’a"),
                good_lines(37)[36] | {"text": "Wort 'a"},
                good_lines(40)[39] | {"text": "o 'b"},
            ],
            "mixed_forms",
            ["line06"],
            r"'’' \(U\+2019\), which 2 lines write \"'\" \(U\+0027\)",
        ),
        (change(6, text="Wоrt ab"), "look_alike", ["line06"], "another script in Wоrt"),
        (change(2, text="Wört ab"), "untrained_character", ["line02"], "no training line has 'ö'"),
    ],
)
def test_each_doubt_is_a_row_of_warned_lines_and_the_line_stays(tmp_path, rows, reason, warned, detail):
    levels = dict.fromkeys(LINE_LEVELS.keys() - set(AT_IMPORT), "off") | {reason: "warn"}
    validated, rejected, table, summary, config = validate_all(rows, tmp_path, levels=levels)
    assert validated.num_rows == len(rows)
    assert rejected.num_rows == 0
    assert table["line_id"].to_pylist() == warned
    assert set(table["reason"].to_pylist()) == {reason}
    assert re.search(detail, table["detail"][0].as_py())
    assert (summary["num_warned"], summary["warned_reasons"]) == (len(warned), {reason: len(warned)})
    assert check_manifest(validated, rejected, summary, config) is validated


def test_rare_character_is_counted_in_training_only(tmp_path):
    rows = good_lines(36)
    rows[0]["text"] = rows[3]["text"] = "Wört"
    rows[1]["text"] = rows[2]["text"] = "öööö ab"
    for settings, expected in ((2, []), (3, ["line00", "line01", "line02", "line03"])):
        table = validate_all(rows, tmp_path, min_occurrences=settings)[2]
        rare = [row for row in table.to_pylist() if row["reason"] == "rare_character"]
        assert [row["line_id"] for row in rare] == expected
    assert "'ö' (2 in training)" in rare[0]["detail"]


def test_rejected_lines_do_not_count_for_what_is_rare_or_double(tmp_path):
    rows = good_lines(36)
    rows[0] |= {"text": "Wört", "height_pixels": 3, "image_hash": rows[4]["image_hash"]}
    rows[1]["text"] = "Wört"
    table = validate_all(rows, tmp_path)[2]
    assert [(row["line_id"], row["reason"]) for row in table.to_pylist()] == [("line01", "untrained_character")]


def test_off_of_yaml_and_of_the_command_line_is_off():
    assert ValidationConfig(levels={"height": False, "writer_in_two_splits": False}).levels == {
        "height": "off",
        "writer_in_two_splits": "off",
    }


@pytest.mark.parametrize("reason", AT_IMPORT)
def test_what_the_import_leaves_out_can_stop_the_run_but_not_stay(tmp_path, reason):
    for level in ("warn", "off"):
        with pytest.raises(UserError, match=rf"levels\.{reason} = '{level}': expected one of reject, stop"):
            ValidationConfig(levels={reason: level})
    left_out = {"line_id": "x", "file": "x", "stage": "import", "reason": reason, "detail": "It is bad."}
    config, left_out = settings_for(tmp_path, levels={reason: "stop"}), to_table([left_out], REJECTED_LINES)
    lines = imported(good_lines(36), tmp_path)
    validated, rejected, _, summary = validate_lines(lines, left_out, [], config, ImageConfig(height_pixels=48))
    with pytest.raises(UserError, match=rf"1 lines were left out at the import for '{reason}', and .* = stop"):
        check_manifest(validated, rejected, summary, config)
    described = next(entry for entry in summary["expectations"] if entry["reason"] == reason)
    assert (described["num_failed"], described["success"]) == (1, False)


@pytest.mark.parametrize("level", ["reject", "warn", "stop", "off"])
def test_level_says_what_happens_to_a_line(tmp_path, level):
    *tables, summary, config = validate_all(
        change(6, height_pixels=3, width_pixels=90), tmp_path, levels={"height": level}
    )
    validated, rejected, warned = tables
    assert validated.num_rows == (35 if level == "reject" else 36)
    assert rejected["reason"].to_pylist() == (["height"] if level == "reject" else [])
    assert ("height" in warned["reason"].to_pylist()) == (level in ("warn", "stop"))
    assert summary["checks_off"] == (["height"] if level == "off" else [])
    if level == "stop":
        with pytest.raises(UserError, match=r"1 lines fail 'height'.*levels\.height = stop.*\n  line06\.png: 3 pixels"):
            check_manifest(validated, rejected, summary, config)
    else:
        assert check_manifest(validated, rejected, summary, config) is validated


def test_check_of_the_set_can_be_a_warning(tmp_path):
    rows = good_lines()
    rows[6]["split"] = "test"
    validated, rejected, summary, config = validate(rows, tmp_path, levels={"writer_in_two_splits": "warn"})
    assert "'writer0' (test and train)" in summary["warnings"][0]
    assert check_manifest(validated, rejected, summary, config) is validated


def test_an_image_in_two_splits_is_named_with_them(tmp_path):
    rows = good_lines()
    test = next(row for row in rows if row["split"] == "test")
    test |= {name: rows[0][name] for name in ("content_hash", "text")}
    assert rows[0]["split"] == "train"
    validated, rejected, summary, config = validate(rows, tmp_path)
    assert [warning for warning in summary["warnings"] if "of which the test knows the answers" in warning] == [
        f"Images in more than one split, of which the test knows the answers: 'line00' (test and train), "
        f"'{test['line_id']}' (test and train). Remove those of training, or give them to one split in the source."
    ]
    assert check_manifest(validated, rejected, summary, config) is validated


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"hight": "warn"}, r"validation\.levels\.hight: there is no such check\. Did you mean height\?"),
        ({"height": "ignore"}, r"validation\.levels\.height = 'ignore': expected one of reject, warn, stop, off"),
        ({"missing_split": "reject"}, r"missing_split = 'reject': expected one of stop\."),
        ({"writer_in_two_splits": "reject"}, r"writer_in_two_splits = 'reject': expected one of warn, stop, off"),
    ],
)
def test_wrong_level_is_named(levels, message):
    with pytest.raises(UserError, match=message):
        ValidationConfig(levels=levels)


def test_levels_of_the_configuration_are_all_there_is():
    path = Path(__file__).parents[2] / "conf" / "base" / "parameters_data_validation.yml"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["validation"]["levels"] == LINE_LEVELS | SET_LEVELS


def test_log_ends_with_reasons_and_counts(tmp_path, caplog):
    rows = change(6, height_pixels=3)
    rows[2]["text"] = "Wört ab"
    *outputs, config = validate(rows, tmp_path)
    with caplog.at_level("INFO"):
        check_manifest(*outputs, config)
    table = r"rejected +1\n +height +1\n +lines with a warning +1\n +untrained_character +1\n"
    assert re.search(table, caplog.messages[-1])


def test_summary_page_needs_nothing_from_outside(tmp_path):
    rows = good_lines()
    rows[6]["text"] = "<script>alert(1)</script>\x07"
    validate(rows, tmp_path)
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|<script|<link|@import|src=(?!\"data:)", page)
    assert "&lt;script&gt;" in page
    assert "unknown_character" in page
    assert "every writer is in one split" in page


def draw(folder, name, shade):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((50, 400), shade, np.uint8)).save(path)


def shown_images(page):
    """Grey value in the middle of each image on the page, by the file that is named under it."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)">\s*<span class="file"><bdi>([^<]+)<', page)
    images = {file: Image.open(io.BytesIO(base64.b64decode(data))) for data, file in found}
    return {file: image.getpixel((image.width // 2, image.height // 2)) for file, image in images.items()}


def test_rejected_and_doubted_lines_are_on_the_page_with_their_images(tmp_path):
    rows = good_lines(36)
    rows[2]["text"] = "Wört ab"
    rows[6] |= {"text": "a\x07b"}
    rows[9] |= {"text": "a\x07b", "image_path": "not an image.png"}
    rows[12] |= {"text": "a\x07b", "image_path": "../outside.png"}
    source = tmp_path / "source"
    draw(source, "line02.png", 200)
    draw(source, "line06.png", 100)
    draw(source, "../outside.png", 50)
    (source / "not an image.png").write_text("no")
    validate_all(rows, tmp_path)
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert shown_images(page) == {"line02.png": pytest.approx(200, abs=3), "line06.png": pytest.approx(100, abs=3)}
    assert page.count("no image that could be shown") == 2
    assert all(file in page for file in ("not an image.png", "../outside.png"))


def test_page_shows_both_images_that_look_alike(tmp_path):
    rows = change(6, image_hash=similar(good_lines()[3]["image_hash"]))
    for index in (3, 6):
        draw(tmp_path / "source", f"line{index:02}.png", 20 * index)
    validate_all(rows, tmp_path)
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/jpeg') == 2
    assert "under it <bdi>line03</bdi>" in page


def test_line_of_a_page_is_cut_out_by_its_polygon(tmp_path):
    rows = change(6, text="a\x07b", image_path="page.png", polygon=[[300, 10], [390, 10], [390, 40], [300, 45]])
    page = np.full((50, 400), 255, np.uint8)
    page[5:48, 290:] = 90
    (tmp_path / "source").mkdir()
    Image.fromarray(page).save(tmp_path / "source" / "page.png")
    validate_all(rows, tmp_path)
    html = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert shown_images(html) == {"page.png": pytest.approx(90, abs=3)}


def test_page_image_is_decoded_once_for_all_lines_that_are_shown(tmp_path, monkeypatch):
    decoded = []
    original = features.read_image
    monkeypatch.setattr(features, "read_image", lambda image: decoded.append(image) or original(image))
    rows = good_lines()
    for row, reason in zip(rows, ({"text": "a\x07b"}, {"text": "a\x07b"}, {"height_pixels": 3}), strict=False):
        row |= {"image_path": "page.png", "polygon": [[10, 5], [390, 5], [390, 45], [10, 45]]} | reason
    draw(tmp_path / "source", "page.png", 90)
    validate_all(rows, tmp_path)
    assert (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8").count('src="data:image/jpeg') == 3
    assert len(decoded) == 1


def test_line_rejected_at_the_import_shows_its_own_file(tmp_path):
    rejection = {"line_id": "line02", "file": "also line02.png", "stage": "import", "reason": "duplicate_id"}
    lines = imported(good_lines(), tmp_path)
    lines = lines.replace_schema_metadata({**lines.schema.metadata, b"id_prefixes": json.dumps({"source": ""})})
    draw(tmp_path / "source", "line02.png", 200)
    draw(tmp_path / "source", "also line02.png", 100)
    rejections = to_table([rejection | {"detail": "The id already belongs to line02.png."}], REJECTED_LINES)
    validate_lines(lines, rejections, [], settings_for(tmp_path), ImageConfig())
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert shown_images(page) == {"also line02.png": pytest.approx(100, abs=3)}


def test_page_says_how_many_lines_it_does_not_show(tmp_path):
    rows = good_lines(36)
    for row in rows[:12]:
        row |= {"height_pixels": 3, "width_pixels": 90}
    validate_all(rows, tmp_path, shown_per_reason=5)
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert page.count("3 pixels high") == 5
    assert "And 7 more" in page


VALIDATE = """
import sys
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.datasets import JsonDocument, ParquetTable
from htr_pipeline.io.manifest import REJECTED_LINES, to_table
from htr_pipeline.pipelines.data_validation.expectations import ValidationConfig
from htr_pipeline.pipelines.data_validation.nodes import validate_lines
source, target = sys.argv[1:]
config = ValidationConfig(docs_path=f"{target}/docs")
lines = ParquetTable(f"{source}/lines.parquet").load()
*tables, summary = validate_lines(lines, to_table([], REJECTED_LINES), [], config, ImageConfig())
for name, table in zip(("validated", "rejected", "warned"), tables, strict=True):
    ParquetTable(f"{target}/{name}.parquet").save(table)
JsonDocument(f"{target}/summary.json").save(summary)
"""


def validation_process(source, target):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONHASHSEED": "random"}
    return subprocess.Popen(
        [sys.executable, "-c", VALIDATE, str(source), str(target)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def visible_files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_two_processes_give_the_same_bytes_also_after_sigkill(tmp_path):
    rows = good_lines(900)
    for index in range(0, 900, 7):
        rows[index]["text"] += "öäüß’"[index % 5]
    for index in range(0, 900, 11):
        rows[index] |= {"height_pixels": 3, "width_pixels": 90}
    ParquetTable(str(tmp_path / "lines.parquet")).save(imported(rows, tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    assert validation_process(tmp_path, first).wait(120) == 0
    expected = visible_files(first)
    assert len(expected) == 5

    process = validation_process(tmp_path, second)
    deadline = time.monotonic() + 120
    # The first file that is begun: the page, while no table is written yet.
    while not any(second.rglob("*.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = visible_files(second)
    assert left.items() <= expected.items()
    assert "summary.json" not in left
    assert validation_process(tmp_path, second).wait(120) == 0
    assert visible_files(second) == expected


def test_names_from_strangers_are_text_in_every_page(tmp_path):
    rows = good_lines()
    rows[1]["line_id"] = rows[6]["line_id"] = "<script>alert(1)</script>&amp;"
    _, rejected, _, _ = validate(rows, tmp_path)
    assert rejected["line_id"].to_pylist() == ["<script>alert(1)</script>&amp;"] * 2
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "docs").rglob("*.html")]
    assert not any("<script>alert" in page for page in pages)


def test_expectation_that_cannot_be_evaluated_is_not_taken_for_a_pass():
    facts = collect_facts(to_table(good_lines(), MANIFEST), ValidationConfig(), ImageConfig())
    with pytest.raises(RuntimeError, match="could not evaluate 'same_image_two_texts'"):
        run_checks(facts.assign(texts_of_image="many"), line_checks(ValidationConfig()))


def test_every_check_has_a_level():
    assert [check.reason for check in line_checks(ValidationConfig())] == list(LINE_LEVELS)
    assert [check.reason for check in set_checks()] == list(SET_LEVELS)


def test_limits_the_wrong_way_round_are_named():
    with pytest.raises(UserError, match=r"validation\.min_height_pixels = 90: expected at most .*now 80"):
        ValidationConfig(min_height_pixels=90, max_height_pixels=80)


def write_lines(folder, num_writers=5):
    rng = np.random.default_rng(0)
    for writer in range(num_writers):
        for line in range(3):
            path = folder / f"writer{writer}" / f"line{line}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 300), dtype=np.uint8)).save(path)
            path.with_suffix(".gt.txt").write_text(f"Zeile {line}")


def test_line_folder_becomes_a_manifest_split_by_writer_twice_the_same(tmp_path):
    write_lines(tmp_path / "source")
    (tmp_path / "source" / "writer0" / "line0.gt.txt").write_text("")
    source = SourceConfig(path=str(tmp_path / "source"), format="lines")
    config = ValidationConfig(docs_path=str(tmp_path / "docs"), max_rejected_share=0.1)
    runs = []
    for _ in range(2):
        imported = import_sources(source, SourcesConfig(), DemoConfig())
        *tables, summary = validate_lines(*imported, config, ImageConfig())
        page = (tmp_path / "docs" / "summary.html").read_bytes()
        runs.append((check_manifest(tables[0], tables[1], summary, config), *tables, summary, page))
    assert runs[0] == runs[1]
    manifest, _, rejected, *_ = runs[0]
    frame = manifest.to_pandas()
    assert frame["line_id"].is_monotonic_increasing  # the order of the source
    assert frame.groupby("writer_id")["split"].nunique().eq(1).all()
    assert set(frame["split"]) == {"train", "validation", "test"}
    assert image_roots(manifest) == {"source": tmp_path / "source"}
    assert rejected.to_pylist()[0]["file"] == "writer0/line0.png"


def two_sources(tmp_path):
    """Two archives that both have the writers writer0 … writer4."""
    for name in ("a", "b"):
        write_lines(tmp_path / name)
    return {"a": {"path": str(tmp_path / "a")}, "b": {"path": str(tmp_path / "b"), "split": "test"}}


def test_several_sources_keep_their_ids_apart_and_have_rules_of_their_own(tmp_path):
    entries = two_sources(tmp_path)
    (tmp_path / "b" / "writer0" / "line0.gt.txt").unlink()
    entries["b"]["writer_pattern"] = "(line.)"
    manifest, rejected, _ = import_sources(SourceConfig(), SourcesConfig(**entries), DemoConfig())
    frame = manifest.to_pandas()
    assert frame["line_id"].is_unique
    assert set(frame["source"]) == {"a", "b"}
    assert set(frame[frame["source"] == "a"]["writer_id"]) == {f"a/writer{index}" for index in range(5)}
    assert set(frame[frame["source"] == "b"]["writer_id"]) == {f"b/line{index}" for index in range(3)}
    assert set(frame[frame["source"] == "b"]["split"]) == {"test"}
    assert all(row.line_id.startswith(f"{row.source}/") for row in frame.itertuples())
    assert all(row.page_id.startswith(f"{row.source}/") for row in frame.itertuples())
    assert [(row["line_id"], row["file"]) for row in rejected.to_pylist()] == [
        ("b/writer0/line0", "b/writer0/line0.png")
    ]
    assert image_roots(manifest) == {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert id_prefixes(manifest) == {"a": "a/", "b": "b/"}


def test_validation_lines_come_out_of_the_training_lines_if_no_source_has_any(tmp_path):
    entries = two_sources(tmp_path)
    entries["a"]["split"] = "train"
    manifest, _, notes = import_sources(SourceConfig(), SourcesConfig(**entries), DemoConfig())
    frame = manifest.to_pandas()
    assert set(frame[frame["source"] == "a"]["split"]) == {"train", "validation"}
    assert set(frame[frame["source"] == "b"]["split"]) == {"test"}
    assert manifest.schema.equals(MANIFEST)
    assert "There are lines to train on and to test, none for validation" in notes[-1]


def test_finding_in_one_of_several_sources_names_it(tmp_path):
    manifest, rejections, notes = import_sources(SourceConfig(), SourcesConfig(**two_sources(tmp_path)), DemoConfig())
    config = ValidationConfig(docs_path=str(tmp_path / "docs"), max_width_pixels=20, min_width_pixels=1)
    _, rejected, _, _ = validate_lines(manifest, rejections, notes, config, ImageConfig())
    first = rejected.to_pylist()[0]
    assert (first["line_id"], first["file"]) == ("a/writer0/line0", "a/writer0/line0.png")
    assert first["detail"].startswith("a/writer0/line0.png: ")


def test_a_source_that_others_join_keeps_its_splits(tmp_path):
    entries = two_sources(tmp_path)
    alone, _, _ = import_sources(SourceConfig(**entries["a"]), SourcesConfig(), DemoConfig())
    joined, _, _ = import_sources(SourceConfig(), SourcesConfig(**entries), DemoConfig())
    before = dict(zip(alone["line_id"].to_pylist(), alone["split"].to_pylist(), strict=True))
    after = dict(zip(joined["line_id"].to_pylist(), joined["split"].to_pylist(), strict=True))
    assert {f"a/{line_id}": split for line_id, split in before.items()}.items() <= after.items()


def test_features_of_several_sources_are_made_of_their_own_images(tmp_path):
    from htr_pipeline.io.features import FeatureShards, ShardPlan

    entries = two_sources(tmp_path)
    Image.new("L", (300, 40), 255).save(tmp_path / "b" / "writer0" / "line0.png")
    manifest, _, _ = import_sources(SourceConfig(), SourcesConfig(**entries), DemoConfig())
    ShardPlan(manifest, ImageConfig(num_workers=1)).write(tmp_path / "features", tmp_path / "none")
    rows = FeatureShards(tmp_path / "features").rows_of(["a/writer0/line0", "b/writer0/line0"])
    assert rows["a/writer0/line0"]["ink_share"] > 0
    assert rows["b/writer0/line0"]["ink_share"] == 0


def test_source_that_lacks_its_folder_is_named(tmp_path):
    sources = SourcesConfig(mine={"path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"^sources\.mine: source\.path = '.*nowhere': there is no such file or folder"):
        import_sources(SourceConfig(), sources, DemoConfig())


def test_entry_takes_what_it_leaves_out_from_source_but_its_format_is_auto():
    source = SourceConfig(format="demo", unicode_form="NFD", writer_pattern="(x)")
    resolved = SourcesConfig(a={"path": "x", "writer_pattern": None}).resolve(source)
    assert resolved == {"a": SourceConfig(path="x", format="auto", unicode_form="NFD")}
    assert SourcesConfig().resolve(source) == {None: source}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"a": {"path": "x", "formt": "lines"}},
            r"In sources\.a: source\.formt = 'lines': .*Did you mean source\.format",
        ),
        ({"a": {"path": "x", "split": "tset"}}, r"In sources\.a: source\.split = 'tset': expected one of 'given'"),
        ({"a": {"format": "lines"}}, r"sources\.a = .*at least its path"),
        ({"a": "folder"}, r"sources\.a = 'folder': expected settings of a source"),
        ({"a/b": {"path": "x"}}, r"sources\.a/b: a name has letters"),
    ],
)
def test_wrong_entry_of_sources_is_named(entries, message):
    with pytest.raises(UserError, match=message):
        SourcesConfig(**entries)


@pytest.mark.parametrize("reason", [LEFT_OUT, "missing_text"])
def test_lines_that_official_splits_leave_out_or_nobody_has_transcribed_do_not_stop_the_run(tmp_path, reason):
    left_out = [
        {"line_id": f"x{i}", "file": "lines.txt", "stage": "import", "reason": reason, "detail": "in no split"}
        for i in range(100)
    ]
    config = ValidationConfig(docs_path=str(tmp_path / "docs"), max_rejected_share=0.0)
    rejections = to_table(left_out, REJECTED_LINES)
    lines = imported(good_lines(), tmp_path)
    validated, rejected, _, summary = validate_lines(lines, rejections, [], config, ImageConfig())
    assert check_manifest(validated, rejected, summary, config).num_rows == 12
    assert summary["reasons"] == {reason: 100}


def test_pipeline_saves_the_rejected_lines_before_it_stops(tmp_path):
    from kedro.io import DataCatalog, MemoryDataset
    from kedro.runner import SequentialRunner

    from htr_pipeline.pipelines.data_validation import create_pipeline

    write_lines(tmp_path / "source")
    (tmp_path / "source" / "writer0" / "line0.gt.txt").write_bytes(b"\xff")
    rejected_lines = MemoryDataset()
    catalog = DataCatalog(
        {
            "params:source": MemoryDataset(SourceConfig(path=str(tmp_path / "source"))),
            "params:sources": MemoryDataset(SourcesConfig()),
            "params:demo": MemoryDataset(DemoConfig()),
            "params:features": MemoryDataset(ImageConfig()),
            "params:validation": MemoryDataset(
                ValidationConfig(docs_path=str(tmp_path / "docs"), max_rejected_share=0.0)
            ),
            "rejected_lines": rejected_lines,
        }
    )
    with pytest.raises(UserError, match="1 of 15 lines were rejected"):
        SequentialRunner().run(create_pipeline(), catalog)
    assert rejected_lines.load()["reason"].to_pylist() == ["unreadable_text"]


def test_validation_of_real_lines_rejects_none_and_repeats_itself(tmp_path):
    if not (REAL_DATA / "copiste_fr").exists():
        pytest.skip(f"{REAL_DATA / 'copiste_fr'} is not here")
    config = ValidationConfig(docs_path=str(tmp_path / "docs"))
    arguments = (SourceConfig(path=str(REAL_DATA / "copiste_fr")), SourcesConfig(), DemoConfig())
    imported = import_sources(*arguments)
    assert imported[0].equals(import_sources(*arguments)[0])
    validated, rejected, _, summary = validate_lines(*imported, config, ImageConfig())
    manifest = check_manifest(validated, rejected, summary, config)
    assert (manifest.num_rows, rejected.num_rows) == (4442, 0)
    assert summary["num_writers"] == {"train": 183, "validation": 25, "test": 26}
    assert (
        summary["num_characters"]["train"]
        == pd.Series(
            [
                len(text)
                for text, split in zip(*(manifest[c].to_pylist() for c in ("text", "split")), strict=True)
                if split == "train"
            ]
        ).sum()
    )


def test_validation_loads_neither_tensorflow_nor_great_expectations_until_it_runs():
    code = (
        "import sys, htr_pipeline.pipelines.data_validation; "
        "sys.exit(', '.join({'tensorflow', 'great_expectations', 'mlflow'} & sys.modules.keys()) or None)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
