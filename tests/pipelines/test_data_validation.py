import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.importers import SourceConfig
from htr_pipeline.io.importers.demo import DemoConfig
from htr_pipeline.io.manifest import MANIFEST, REJECTED_LINES, to_table
from htr_pipeline.pipelines.data_validation.expectations import (
    ValidationConfig,
    Validator,
    check_frame,
    line_checks,
    replaced_folder,
    set_checks,
    unknown_characters,
)
from htr_pipeline.pipelines.data_validation.nodes import check_manifest, import_source, validate_lines

SHARED = Path(__file__).parents[3] / "shared" / "data"


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
            "source": "test",
            "format": "lines",
            "width_pixels": 400,
            "height_pixels": 50,
            "content_hash": f"{index:064x}",
        }
        for index in range(num)
    ]


def validate(rows, tmp_path, **settings):
    """validated_lines, rejected_lines, summary and configuration for manifest rows."""
    config = ValidationConfig(**({"docs_path": str(tmp_path / "docs"), "max_rejected_share": 0.5} | settings))
    nothing = to_table([], REJECTED_LINES)
    return *validate_lines(to_table(rows, MANIFEST), nothing, [], config, ImageConfig(height_pixels=48)), config


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
        ({"text": "a\ue000b"}, "unknown_character", "U\\+E000.*validation.allowed_characters"),
        ({"text": "a\x07b"}, "unknown_character", "U\\+0007"),
        ({"text": "a\ufffdb"}, "unknown_character", "U\\+FFFD REPLACEMENT CHARACTER"),
        ({"content_hash": ""}, "unreadable_image", "was not decoded"),
        ({"height_pixels": 7}, "height", "7 pixels high, 8 to 1000.*validation.min_height_pixels"),
        ({"height_pixels": 1001, "width_pixels": 9000}, "height", "1001 pixels high"),
        ({"width_pixels": 7}, "width", "7 pixels wide, 8 to 20000"),
        ({"width_pixels": 5050}, "aspect", "101.0 times as wide as high, 100 is allowed"),
        ({"text": "x" * 97}, "too_narrow", "97 characters need at least 193 frames, 400 x 50 pixels give 96"),
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


def test_characters_outside_those_allowed_are_rejected_with_their_names(tmp_path):
    rows = good_lines()
    rows[6]["text"] = "Wört"
    _, rejected, _, _ = validate(rows, tmp_path, allowed_characters="Wortabe ")
    assert "U+00F6 LATIN SMALL LETTER O WITH DIAERESIS" in rejected["detail"][0].as_py()


def test_ordinary_characters_of_any_script_are_known():
    assert unknown_characters("Æther, ﬁn — “שלום” 漢字 e\u0301", None) == "none"


def test_writer_in_two_splits_stops_the_run(tmp_path):
    rows = good_lines()
    rows[6]["split"] = "test"
    validated, rejected, summary, config = validate(rows, tmp_path)
    with pytest.raises(UserError, match=r"more than one split.*'writer0' \(test and train\).*source\.split_column"):
        check_manifest(validated, rejected, summary, config)


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
    rejection = {"line_id": "x", "file": "x.png", "stage": "import", "reason": "missing_text", "detail": "no x.gt.txt"}
    config = ValidationConfig(docs_path=str(tmp_path / "docs"), max_rejected_share=1.0)
    outputs = validate_lines(to_table([], MANIFEST), to_table([rejection], REJECTED_LINES), [], config, ImageConfig())
    with pytest.raises(UserError, match=r"1 of 1 lines were rejected.*\n.*x\.png \| missing_text \| no x\.gt\.txt"):
        check_manifest(*outputs, config)


def test_character_that_only_the_test_has_is_a_warning_and_the_line_stays(tmp_path):
    rows = good_lines()
    rows[2]["text"] = "Wörter"
    validated, rejected, summary, _ = validate(rows, tmp_path)
    assert (validated.num_rows, rejected.num_rows) == (12, 0)
    assert summary["characters_outside_train"] == {"ö": 1}
    assert "'ö' (in 1)" in summary["warnings"][0]


def test_image_that_occurs_twice_under_one_text_is_a_warning(tmp_path):
    rows = good_lines()
    rows[4] |= {"text": rows[6]["text"], "content_hash": rows[6]["content_hash"]}
    validated, _, summary, _ = validate(rows, tmp_path)
    assert validated.num_rows == 12
    assert (
        "1 images occur more than once with the same text, 1 of them in more than one split" in summary["warnings"][-1]
    )


def test_log_ends_with_reasons_and_counts(tmp_path, caplog):
    rows = good_lines()
    rows[6]["height_pixels"] = 3
    *outputs, config = validate(rows, tmp_path)
    with caplog.at_level("INFO"):
        check_manifest(*outputs, config)
    assert re.search(r"rejected +1\n +height +1\n", caplog.messages[-1])


def test_summary_page_needs_nothing_from_outside(tmp_path):
    rows = good_lines()
    rows[6]["text"] = "<script>alert(1)</script>\x07"
    validate(rows, tmp_path)
    page = (tmp_path / "docs" / "summary.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|<script|<link|@import|src=", page)
    assert "&lt;script&gt;" in page
    assert "unknown_character" in page
    assert "every writer is in one split" in page


def test_data_docs_are_pages_in_the_folder_and_nothing_lies_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validate(good_lines(), tmp_path)
    validate(good_lines(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
    assert (tmp_path / "docs" / "index.html").is_file()
    pages = [path.name for path in (tmp_path / "docs" / "validations").rglob("*.html")]
    assert sorted(pages) == ["lines-lines.html", "lines-set.html"]


def test_names_from_strangers_are_text_in_every_page(tmp_path):
    rows = good_lines()
    rows[1]["line_id"] = rows[6]["line_id"] = "<script>alert(1)</script>&amp;"
    _, rejected, _, _ = validate(rows, tmp_path)
    assert rejected["line_id"].to_pylist() == ["<script>alert(1)</script>&amp;"] * 2
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "docs").rglob("*.html")]
    assert not any("<script>alert" in page for page in pages)


def test_folder_of_a_run_that_fails_stays_as_it_was(tmp_path):
    folder = tmp_path / "docs"
    with replaced_folder(folder) as new:
        (new / "page").write_text("first")
    with pytest.raises(FileNotFoundError), replaced_folder(folder) as new:
        (new / "page").write_bytes((new / "no such page").read_bytes())
    assert (folder / "page").read_text() == "first"
    with replaced_folder(folder) as new:
        assert list(new.iterdir()) == []
        (new / "page").write_text("third")
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
    assert (folder / "page").read_text() == "third"


def test_expectation_that_cannot_be_evaluated_is_not_taken_for_a_pass(tmp_path):
    frame = check_frame(to_table(good_lines(), MANIFEST), ValidationConfig(), ImageConfig())
    with pytest.raises(RuntimeError, match="could not evaluate 'same_image_two_texts'"):
        Validator(tmp_path).run("lines", frame.drop(columns="texts_of_image"), line_checks(ValidationConfig()))


def test_every_reason_is_used_once():
    reasons = [check.reason for check in (*line_checks(ValidationConfig()), *set_checks())]
    assert len(set(reasons)) == len(reasons)


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
        validated, rejected, summary = validate_lines(*import_source(source, DemoConfig()), config, ImageConfig())
        runs.append((check_manifest(validated, rejected, summary, config), rejected, summary))
    assert runs[0] == runs[1]
    manifest, rejected, _ = runs[0]
    frame = manifest.to_pandas()
    assert frame["line_id"].is_monotonic_increasing
    assert frame.groupby("writer_id")["split"].nunique().eq(1).all()
    assert set(frame["split"]) == {"train", "validation", "test"}
    assert manifest.schema.metadata[b"image_root"] == str(tmp_path / "source").encode()
    assert rejected.to_pylist()[0]["file"] == "writer0/line0.png"


def test_pipeline_saves_the_rejected_lines_before_it_stops(tmp_path):
    from kedro.io import DataCatalog, MemoryDataset
    from kedro.runner import SequentialRunner

    from htr_pipeline.pipelines.data_validation import create_pipeline

    write_lines(tmp_path / "source")
    (tmp_path / "source" / "writer0" / "line0.gt.txt").unlink()
    rejected_lines = MemoryDataset()
    catalog = DataCatalog(
        {
            "params:source": MemoryDataset(SourceConfig(path=str(tmp_path / "source"))),
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
    assert rejected_lines.load()["reason"].to_pylist() == ["missing_text"]


def test_validation_of_real_lines_rejects_none_and_repeats_itself(tmp_path):
    if not (SHARED / "copiste_fr").exists():
        pytest.skip(f"{SHARED / 'copiste_fr'} is not here")
    config = ValidationConfig(docs_path=str(tmp_path / "docs"))
    imported = import_source(SourceConfig(path=str(SHARED / "copiste_fr")), DemoConfig())
    assert imported[0].equals(import_source(SourceConfig(path=str(SHARED / "copiste_fr")), DemoConfig())[0])
    validated, rejected, summary = validate_lines(*imported, config, ImageConfig())
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
