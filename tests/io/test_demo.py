import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.synthesis import missing_characters
from htr_pipeline.io.importers import demo
from htr_pipeline.io.importers.demo import COLUMNS, FONT_NAMES, DemoConfig, demo_font, demo_sentences, render_demo

SMALL = {
    "train_writers": 3,
    "validation_writers": 1,
    "test_writers": 2,
    "train_lines_per_writer": 4,
    "validation_lines_per_writer": 2,
    "test_lines_per_writer": 3,
    "heldout_share": 0.5,
    "num_workers": 1,
}


def read_rows(folder):
    with (folder / "lines.tsv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def planned_rows(**changes):
    """The table of a demo without its images."""
    return [row for writer in demo._plan_writers(DemoConfig(**changes)) for row in writer.rows()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "demo"
    render_demo(folder, DemoConfig(**SMALL), progress=False)
    return folder


def test_table_and_images_fit_together(small):
    rows = read_rows(small)
    assert tuple(rows[0]) == COLUMNS == ("id", "split", "writer", "page", "group", "image", "text")
    assert len(rows) == 3 * 4 + 2 + 2 * 3
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["image"] for row in rows} == {f"lines/{path.name}" for path in (small / "lines").iterdir()}
    for row in rows:
        assert row["image"] == f"lines/{row['id']}.png"
        image = cv2.imread(str(small / row["image"]), cv2.IMREAD_UNCHANGED)
        assert image.ndim == 2
        assert image.shape[1] > image.shape[0]


def test_same_settings_give_the_same_bytes_whatever_the_number_of_processes(small, tmp_path):
    render_demo(tmp_path / "again", DemoConfig(**SMALL | {"num_workers": 2}), progress=False)
    assert digest(tmp_path / "again") == digest(small)


def test_another_seed_gives_other_lines(small, tmp_path):
    render_demo(tmp_path / "other", DemoConfig(**SMALL, seed=2), progress=False)
    assert {row["text"] for row in read_rows(tmp_path / "other")}.isdisjoint(row["text"] for row in read_rows(small))
    assert set(digest(tmp_path / "other").values()).isdisjoint(digest(small).values())


def test_default_demo_has_the_promised_writers_fonts_and_lines():
    rows = planned_rows()
    counts = Counter(row["split"] for row in rows)
    assert counts == {"train": 2016, "validation": 256, "test": 400}
    assert len({row["writer"] for row in rows}) >= 60
    assert len({row["group"] for row in rows}) >= 12
    assert len({row["group"] for row in rows if row["split"] == "train"}) >= 12


def test_writers_belong_to_one_split_and_one_font():
    rows = planned_rows()
    for column in ("split", "group"):
        assert len({(row["writer"], row[column]) for row in rows}) == len({row["writer"] for row in rows})
    assert len({(row["page"], row["writer"]) for row in rows}) == len({row["page"] for row in rows})


def test_heldout_fonts_occur_in_the_test_split_only():
    rows = planned_rows()
    fonts = {
        split: {row["group"] for row in rows if row["split"] == split} for split in ("train", "validation", "test")
    }
    assert fonts["test"] - fonts["train"] == {"delius", "satisfy"}
    assert fonts["validation"] <= fonts["train"]
    heldout = [row for row in rows if row["group"] in {"delius", "satisfy"}]
    assert 0.2 <= len(heldout) / 400 <= 0.25


def test_no_text_occurs_twice_and_no_sentence_in_two_splits():
    rows = planned_rows()
    assert len({row["text"] for row in rows}) == len(rows)
    assert all(20 <= len(row["text"]) <= 38 for row in rows)
    sentences = demo_sentences()
    joined = {split: " ".join(row["text"] for row in rows if row["split"] == split) for split in ("train", "test")}
    whole = [sentence for sentence in sentences if sentence in joined["train"] and sentence in joined["test"]]
    assert whole == []


def test_more_lines_than_one_reading_gives_are_cut_differently():
    rows = planned_rows(train_lines_per_writer=120)
    assert len({row["text"] for row in rows}) == len(rows) > 6000


@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_line_beside_many_can_be_had(split):
    rows = planned_rows(**{f"{split}_writers": 1, f"{split}_lines_per_writer": 1})
    assert [row["split"] for row in rows].count(split) == 1


def test_more_lines_than_the_prose_can_give_are_refused():
    with pytest.raises(UserError, match=r"gives the train split \d+ different lines, 96000 are wanted"):
        planned_rows(train_writers=48, train_lines_per_writer=2000)


def test_every_character_of_the_test_occurs_in_training():
    rows = planned_rows()
    characters = {split: set("".join(r["text"] for r in rows if r["split"] == split)) for split in ("train", "test")}
    assert characters["test"] <= characters["train"]


@pytest.mark.parametrize("name", FONT_NAMES)
def test_every_character_of_the_prose_is_in_every_font(name):
    characters = "".join(sorted(set("".join(demo_sentences()))))
    assert characters.isascii()
    assert missing_characters(demo_font(name), characters) == ""


def test_prose_is_real_language_without_repetition():
    sentences = demo_sentences()
    assert 60_000 < sum(map(len, sentences)) < 150_000
    assert len(set(sentences)) == len(sentences)
    assert all(sentence[-1] in ".!?\"')" for sentence in sentences)
    assert not set("_{}[]<>=*|\\`@#$") & set("".join(sentences))


def test_complete_folder_is_kept_and_other_settings_replace_it(small, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(small, folder)
    marker = folder / "lines" / "marker"
    marker.touch()
    render_demo(folder, DemoConfig(**SMALL | {"num_workers": 2}), progress=False)
    assert marker.exists()
    render_demo(folder, DemoConfig(**SMALL, seed=2), progress=False)
    assert not marker.exists()
    assert len(read_rows(folder)) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files.*say by source\.format what these files are"):
        render_demo(tmp_path, DemoConfig(**SMALL), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_path_of_a_file_is_an_error(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="is a file"):
        render_demo(tmp_path / "demo", DemoConfig(**SMALL), progress=False)


@pytest.mark.parametrize("fonts", [["delius", "comic-sans"], list(FONT_NAMES)], ids=["unknown", "all"])
def test_impossible_heldout_fonts_are_an_error(fonts):
    with pytest.raises(UserError, match=r"demo.heldout_fonts = .*expected some, not all, of caveat, dancing-script"):
        DemoConfig(heldout_fonts=fonts)


def test_error_while_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "render_line", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        render_demo(tmp_path / "demo", DemoConfig(**SMALL), progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_half_way_leaves_no_folder_and_the_next_run_completes(tmp_path):
    folder = tmp_path / "demo"
    script = tmp_path / "render.py"
    script.write_text(
        "import sys\n"
        "from htr_pipeline.io.importers.demo import DemoConfig, render_demo\n"
        "if __name__ == '__main__':\n"
        "    render_demo(sys.argv[1], DemoConfig(num_workers=2, train_lines_per_writer=400), progress=False)\n"
    )
    source = str(Path(demo.__file__).parents[3])
    process = subprocess.Popen([sys.executable, str(script), str(folder)], env={**os.environ, "PYTHONPATH": source})
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(".partial-*/lines/*.png"))) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.exists()
    leftover = list(tmp_path.glob(".partial-*"))
    assert len(leftover) == 1

    # The worker processes go with their parent: no more images appear.
    time.sleep(1.0)
    num_images = len(list(leftover[0].glob("lines/*.png")))
    time.sleep(0.5)
    assert len(list(leftover[0].glob("lines/*.png"))) == num_images < 48 * 400

    render_demo(folder, DemoConfig(**SMALL), progress=False)
    assert len(read_rows(folder)) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "render.py"]
