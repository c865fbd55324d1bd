import hashlib
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kedro.io import DatasetError
from PIL import Image, ImageDraw

from htr_pipeline.core.config import UserError
from htr_pipeline.core.cutting import cut_line
from htr_pipeline.core.image import ImageConfig, normalise_line, read_image
from htr_pipeline.io.datasets import LineFeatures, ParquetTable
from htr_pipeline.io.features import FeatureShards, ShardPlan
from htr_pipeline.io.manifest import FEATURES, MANIFEST, line_hash, to_table

CONFIG = ImageConfig(height_pixels=24, shard_lines=4, num_workers=1)
NUM_LINES = {"train": 10, "validation": 3, "test": 5}


def draw_line(path, seed):
    rng = np.random.default_rng(seed)
    image = Image.new("L", (int(rng.integers(60, 120)), 32), 230)
    pen = ImageDraw.Draw(image)
    for x in range(6, image.width - 12, 12):
        pen.line([(x, 26), (x + int(rng.integers(0, 9)), int(rng.integers(4, 16)))], fill=30, width=3)
    image.save(path)


def hash_of(path, polygon=None, baseline=None):
    return line_hash(hashlib.sha256(path.read_bytes()).hexdigest(), polygon, baseline)


def make_manifest(root, num_lines=NUM_LINES):
    rows = []
    for split, count in num_lines.items():
        for index in range(count):
            name = f"{split}-{index:02d}"
            draw_line(root / f"{name}.png", len(rows))
            rows.append(
                {
                    "line_id": name,
                    "page_id": name,
                    "writer_id": f"writer {split}",
                    "split": split,
                    "text": f"text {index}",
                    "image_path": f"{name}.png",
                    "source": "test",
                    "format": "lines",
                    "width_pixels": 80,
                    "height_pixels": 32,
                    "content_hash": hash_of(root / f"{name}.png"),
                    "group": "odd" if index % 2 else None,
                }
            )
    # Not in the order of the shards.
    return to_table(rows[::-1], MANIFEST, {"image_roots": json.dumps({"test": str(root)})})


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "images").mkdir()
    return make_manifest(tmp_path / "images")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(folder, manifest, config=CONFIG):
    dataset = LineFeatures(str(folder))
    dataset.save(ShardPlan(manifest, config))
    return dataset.load()


def test_shards_hold_the_normalised_pixels_column_after_column(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    seen = 0
    for split in NUM_LINES:
        for line in features.lines(split):
            expected = normalise_line(read_image(tmp_path / "images" / f"{line.line_id}.png"), CONFIG)
            assert line.pixels.dtype == np.uint8
            assert line.pixels.shape[1] == CONFIG.height_pixels
            np.testing.assert_array_equal(line.pixels, expected.pixels)
            row = features.rows_of([line.line_id])[line.line_id]
            columns = np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], row["height_pixels"])
            np.testing.assert_array_equal(columns, expected.pixels)
            assert row["ink_share"] == pytest.approx(expected.ink_share)
            assert row["slant_degrees"] == expected.slant_degrees
            seen += 1
    assert seen == 18


def test_shards_have_fixed_names_and_sorted_lines(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    assert list(files(tmp_path / "features")) == [
        "_SHA256SUMS",
        "split=test/shard-00000.parquet",
        "split=test/shard-00001.parquet",
        "split=train/shard-00000.parquet",
        "split=train/shard-00001.parquet",
        "split=train/shard-00002.parquet",
        "split=validation/shard-00000.parquet",
    ]
    ids = [line.line_id for line in features.lines("train")]
    assert ids == [f"train-{index:02d}" for index in range(10)]


def test_shards_are_the_same_bytes_with_one_process_and_with_two(tmp_path, manifest):
    save(tmp_path / "one", manifest)
    save(tmp_path / "two", manifest, replace(CONFIG, num_workers=2))
    save(tmp_path / "shuffled", manifest.take(np.random.default_rng(0).permutation(len(manifest))))
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "shuffled")


def test_shards_are_read_by_plain_pandas(tmp_path, manifest):
    save(tmp_path / "features", manifest)
    frame = pd.read_parquet(tmp_path / "features", partitioning=None)
    assert frame["split"].value_counts().to_dict() == NUM_LINES
    one = pd.read_parquet(tmp_path / "features" / "split=validation" / "shard-00000.parquet", partitioning=None)
    assert list(one["text"]) == ["text 0", "text 1", "text 2"]
    assert one["group"].isna().tolist() == [True, False, True]


def test_unchanged_shards_are_taken_over_and_only_changed_ones_made_anew(tmp_path, manifest):
    folder = tmp_path / "features"
    save(folder, manifest)
    old = files(folder)
    # Without its images a shard cannot be made again.
    for path in (tmp_path / "images").glob("*.png"):
        if not path.name.startswith("validation"):
            path.unlink()
    rows = [row | {"text": "new text"} if row["line_id"] == "validation-01" else row for row in manifest.to_pylist()]
    features = save(folder, to_table(rows, MANIFEST, {"image_roots": json.dumps({"test": str(tmp_path / "images")})}))
    new = files(folder)
    assert {name for name in old if new[name] != old[name]} == {
        "_SHA256SUMS",
        "split=validation/shard-00000.parquet",
    }
    assert features.rows_of(["validation-01"])["validation-01"]["text"] == "new text"


def test_shards_that_no_line_belongs_to_any_more_are_removed(tmp_path, manifest):
    folder = tmp_path / "features"
    save(folder, manifest)
    save(
        folder,
        manifest.filter([line_id not in ("train-08", "train-09") for line_id in manifest["line_id"].to_pylist()]),
    )
    assert "split=train/shard-00002.parquet" not in files(folder)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("change", [{"height_pixels": 32}, {"even_paper": False}, {"deslant": False}])
def test_another_setting_makes_every_shard_anew(tmp_path, manifest, change):
    folder, config = tmp_path / "features", replace(CONFIG, **change)
    hash_before, before = save(folder, manifest).data_hash(), files(folder)
    features = save(folder, manifest, config)
    after = files(folder)
    assert all(after[name] != before[name] for name in before)
    assert features.data_hash() != hash_before
    for line in features.lines("test"):
        expected = normalise_line(read_image(tmp_path / "images" / f"{line.line_id}.png"), config)
        np.testing.assert_array_equal(line.pixels, expected.pixels)


def test_number_of_processes_does_not_make_shards_anew(tmp_path, manifest):
    folder = tmp_path / "features"
    hash_before = save(folder, manifest).data_hash()
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    assert save(folder, manifest, replace(CONFIG, num_workers=2)).data_hash() == hash_before


def computed_and_taken_over(caplog):
    """The two numbers of the last message of an extraction."""
    messages = [record.getMessage() for record in caplog.records if "lines computed" in record.getMessage()]
    return tuple(map(int, re.search(r"(\d+) lines computed, (\d+) taken over", messages[-1]).groups()))


def test_lines_are_taken_over_one_by_one_where_added_and_removed_lines_shift_the_shards(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="htr_pipeline")
    (tmp_path / "images").mkdir()
    whole = make_manifest(tmp_path / "images", {"train": 30, "validation": 3, "test": 5})
    names = whole["line_id"].to_pylist()
    first = whole.filter(pa.array([name not in ("train-00", "train-17", "test-04") for name in names]))
    second = whole.filter(pa.array([name not in ("train-05", "train-29") for name in names]))
    save(tmp_path / "features", first)
    assert computed_and_taken_over(caplog) == (35, 0)
    save(tmp_path / "features", second)
    assert computed_and_taken_over(caplog) == (3, 33)
    save(tmp_path / "features", second, replace(CONFIG, shard_lines=7))
    assert computed_and_taken_over(caplog) == (0, 36)
    save(tmp_path / "afresh", second, replace(CONFIG, shard_lines=7))
    assert computed_and_taken_over(caplog) == (36, 0)
    assert files(tmp_path / "features") == files(tmp_path / "afresh")


def test_line_that_moved_to_another_split_or_got_another_text_is_taken_over(tmp_path, manifest, caplog):
    caplog.set_level(logging.INFO, logger="htr_pipeline")
    save(tmp_path / "features", manifest)
    rows = [
        row | {"split": "test", "text": "moved"} if row["line_id"] == "train-00" else row
        for row in manifest.to_pylist()
    ]
    features = save(tmp_path / "features", to_table(rows, MANIFEST, manifest.schema.metadata))
    assert computed_and_taken_over(caplog) == (0, 18)
    assert features.rows_of(["train-00"])["train-00"]["split"] == "test"


def test_changed_image_is_computed_and_a_changed_setting_computes_all(tmp_path, manifest, caplog):
    caplog.set_level(logging.INFO, logger="htr_pipeline")
    save(tmp_path / "features", manifest)
    draw_line(tmp_path / "images" / "train-03.png", 1000)
    new = {"content_hash": hash_of(tmp_path / "images" / "train-03.png")}
    rows = [row | new if row["line_id"] == "train-03" else row for row in manifest.to_pylist()]
    changed = to_table(rows, MANIFEST, manifest.schema.metadata)
    features = save(tmp_path / "features", changed)
    assert computed_and_taken_over(caplog) == (1, 17)
    expected = normalise_line(read_image(tmp_path / "images" / "train-03.png"), CONFIG).pixels
    np.testing.assert_array_equal(next(islice(features.lines("train"), 3, None)).pixels, expected)
    save(tmp_path / "features", changed, replace(CONFIG, find_polarity=False))
    assert computed_and_taken_over(caplog) == (18, 0)


def test_image_that_was_replaced_after_validation_is_refused(tmp_path, manifest):
    draw_line(tmp_path / "images" / "train-03.png", 1000)
    with pytest.raises(DatasetError, match=r"'train-03': .*train-03.png is not the file that was imported.*kedro run"):
        save(tmp_path / "features", manifest)


@pytest.mark.parametrize("damage", [lambda lines: lines[:-1], lambda lines: [lines[0][1:], *lines[1:]]])
def test_list_of_checksums_that_lost_a_shard_is_an_error(tmp_path, manifest, damage):
    features = save(tmp_path / "features", manifest)
    assert features.figures().num_rows == len(manifest)
    path = tmp_path / "features" / "_SHA256SUMS"
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=r"not list split=\w+/shard-0000\d\.parquet, which the folder holds.*kedro"):
        FeatureShards(tmp_path / "features")


def test_dask_cluster_writes_the_bytes_of_local_processes(tmp_path, manifest, cluster):
    save(tmp_path / "local", manifest)
    save(tmp_path / "dask", manifest, replace(CONFIG, dask_address=cluster.scheduler_address))
    assert files(tmp_path / "dask") == files(tmp_path / "local")
    # What lines already have is taken over on the workers too.
    fewer = manifest.filter(pa.array([name != "train-00" for name in manifest["line_id"].to_pylist()]))
    save(tmp_path / "local", fewer)
    save(tmp_path / "dask", fewer, replace(CONFIG, dask_address=cluster.scheduler_address))
    assert files(tmp_path / "dask") == files(tmp_path / "local")


def test_image_that_cannot_be_read_is_named_from_a_dask_cluster_too(tmp_path, manifest, cluster):
    (tmp_path / "images" / "train-05.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"line 'train-05'.*kedro run --pipeline data_validation"):
        save(tmp_path / "features", manifest, replace(CONFIG, dask_address=cluster.scheduler_address))


def page_manifest(root):
    """Three lines on each of two pages, in shards that begin in the middle of a page."""
    rows = []
    for page in range(2):
        image = Image.new("L", (400, 300), 240)
        pen = ImageDraw.Draw(image)
        for line in range(3):
            top = 20 + 90 * line
            for x in range(30, 360, 14):
                pen.line([(x, top + 50), (x + (page + line) % 5, top + 10)], fill=20, width=3)
            polygon = [[20, top], [380, top], [380, top + 60], [20, top + 60]]
            rows.append(
                {
                    "line_id": f"page {page} line {line}",
                    "page_id": f"page {page}",
                    "writer_id": "writer",
                    "split": "train",
                    "text": f"text {line}",
                    "image_path": f"page {page}.png",
                    "polygon": polygon,
                    "baseline": [[20, top + 50], [380, top + 50]],
                    "source": "pages",
                    "format": "page",
                    "width_pixels": 360,
                    "height_pixels": 60,
                }
            )
        image.save(root / f"page {page}.png")
    rows = [row | {"content_hash": hash_of(root / row["image_path"], row["polygon"], row["baseline"])} for row in rows]
    return to_table(rows, MANIFEST, {"image_roots": json.dumps({"pages": str(root)})})


def test_lines_of_pages_are_cut_out_and_each_page_is_decoded_once(tmp_path, monkeypatch):
    manifest = page_manifest(tmp_path)
    reads = []
    monkeypatch.setattr("htr_pipeline.io.features.read_image", lambda path: reads.append(path.name) or read_image(path))
    features = save(tmp_path / "features", manifest, replace(CONFIG, shard_lines=6))
    assert reads == ["page 0.png", "page 1.png"]
    rows = {row["line_id"]: row for row in manifest.to_pylist()}
    for line in features.lines("train"):
        row = rows[line.line_id]
        cut = cut_line(read_image(tmp_path / row["image_path"]), row["polygon"], row["baseline"])
        np.testing.assert_array_equal(line.pixels, normalise_line(cut, CONFIG).pixels)


def test_line_whose_polygon_was_changed_is_the_only_one_of_its_page_to_be_computed(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="htr_pipeline")
    manifest = page_manifest(tmp_path)
    save(tmp_path / "features", manifest)
    rows = manifest.to_pylist()
    polygon = [[20, 110], [300, 110], [300, 170], [20, 170]]
    rows[1] |= {
        "polygon": polygon,
        "content_hash": hash_of(tmp_path / rows[1]["image_path"], polygon, rows[1]["baseline"]),
    }
    changed = to_table(rows, MANIFEST, manifest.schema.metadata)
    save(tmp_path / "features", changed)
    assert computed_and_taken_over(caplog) == (1, 5)
    save(tmp_path / "afresh", changed)
    assert files(tmp_path / "features") == files(tmp_path / "afresh")


def test_line_outside_its_page_is_named(tmp_path):
    rows = page_manifest(tmp_path).to_pylist()
    far = [[5000, 5000], [5300, 5000], [5300, 5060], [5000, 5060]]
    rows[4] |= {
        "polygon": far,
        "baseline": None,
        "content_hash": hash_of(tmp_path / rows[4]["image_path"], far, None),
    }
    with pytest.raises(DatasetError, match="line 'page 1 line 1': "):
        save(tmp_path / "features", to_table(rows, MANIFEST, {"image_roots": json.dumps({"pages": str(tmp_path)})}))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


SHARD = "split=train/shard-00001.parquet"


@pytest.mark.parametrize("damage", ["flipped", "cut short", "emptied", "removed", "swapped"])
def test_damaged_shard_is_named_and_made_again_from_its_images(tmp_path, manifest, caplog, damage):
    caplog.set_level(logging.INFO, logger="htr_pipeline")
    folder = tmp_path / "features"
    save(folder, manifest)
    sound = files(folder)
    path = folder / SHARD
    if damage == "flipped":
        flip(path, path.stat().st_size // 3)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes((folder / "split=train/shard-00000.parquet").read_bytes())
    save(folder, manifest)
    assert files(folder) == sound
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path}: the shard is {'missing' if damage == 'removed' else 'damaged'}")
    assert computed_and_taken_over(caplog) == (4, 14)


def test_every_flipped_byte_is_found_when_features_are_used(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    path = tmp_path / "features" / SHARD
    sound = path.read_bytes()
    for position in range(0, len(sound), 97):
        flip(path, position)
        with pytest.raises(UserError, match=f"{SHARD}: the shard is damaged"):
            next(features.lines("train"))
        path.write_bytes(sound)
    assert len(list(features.lines("train"))) == 10


def test_checksums_are_not_computed_again_on_every_read(tmp_path, manifest, monkeypatch):
    features = save(tmp_path / "features", manifest)
    features.figures()
    monkeypatch.setattr("htr_pipeline.io.features.hashlib.file_digest", None)
    assert len(list(features.lines("train"))) == 10
    assert features.figures().num_rows == 18


def test_damaged_or_missing_shard_is_named_when_features_are_used(tmp_path, manifest):
    folder = tmp_path / "features"
    features = save(folder, manifest)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-30])
    for use in (features.figures, features.data_hash, lambda: list(features.lines("train"))):
        with pytest.raises(UserError, match=f"{SHARD}: the shard is damaged.*kedro run --pipeline feature_extraction"):
            use()
    (folder / SHARD).unlink()
    with pytest.raises(UserError, match=f"{SHARD}: the shard is missing.*kedro run --pipeline feature_extraction"):
        features.figures()
    (folder / "_SHA256SUMS").unlink()
    with pytest.raises(UserError, match="there is no _SHA256SUMS"):
        FeatureShards(folder)


def test_list_of_checksums_is_read_by_sha256sum(tmp_path, manifest):
    save(tmp_path / "features", manifest)
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum")
    subprocess.run(["sha256sum", "--strict", "-c", "_SHA256SUMS"], cwd=tmp_path / "features", check=True)


def test_shards_say_how_they_were_made(tmp_path, manifest):
    save(tmp_path / "features", manifest)
    metadata = pq.read_schema(tmp_path / "features" / SHARD).metadata
    assert json.loads(metadata[b"normalisation"])["height_pixels"] == 24
    assert metadata[b"table"] == b"features"
    assert metadata[b"schema_version"]
    group = pq.read_metadata(tmp_path / "features" / SHARD).row_group(0)
    assert group.column(0).compression == "ZSTD"
    assert group.column(FEATURES.get_field_index("width_pixels")).statistics.has_min_max


SAVE = """
import sys
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.datasets import LineFeatures, ParquetTable
from htr_pipeline.io.features import ShardPlan
manifest = ParquetTable(sys.argv[1]).load()
config = ImageConfig(height_pixels=32, shard_lines=4, num_workers=int(sys.argv[3]))
LineFeatures(sys.argv[2]).save(ShardPlan(manifest, config))
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_killed_run_leaves_the_old_shards_and_the_next_one_takes_over_what_it_finished(tmp_path, num_workers):
    (tmp_path / "images").mkdir()
    manifest = make_manifest(tmp_path / "images", {"train": 400, "validation": 4, "test": 4})
    ParquetTable(str(tmp_path / "manifest.parquet")).save(manifest)
    folder, partial = tmp_path / "features", tmp_path / ".partial-features"
    save(folder, manifest)
    old = files(folder)

    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(tmp_path / "manifest.parquet"), str(folder), str(num_workers)],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(partial.glob("split=train/shard-*"))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert files(folder) == old

    finished = {
        name: content for name, content in files(partial).items() if ".partial" not in name and name != "_SHA256SUMS"
    }
    assert 5 <= len(finished) < len(old)
    for name in finished:
        for row in pd.read_parquet(partial / name, columns=["line_id"], partitioning=None)["line_id"]:
            (tmp_path / "images" / f"{row}.png").unlink()  # not needed a second time
    with (partial / "_SHA256SUMS").open("a") as stream:
        stream.write("0123456789abcdef")  # the kill may come in the middle of a line
    features = save(folder, manifest, replace(CONFIG, height_pixels=32))
    assert not partial.exists()
    assert finished.items() <= files(folder).items()
    assert files(folder).keys() == old.keys()
    assert set(features.figures()["height_pixels"].to_pylist()) == {32}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_image_that_cannot_be_read_any_more_is_named_by_its_line_and_the_old_shards_stay(
    tmp_path, manifest, num_workers
):
    folder = tmp_path / "features"
    save(folder, manifest)
    old = files(folder)
    (tmp_path / "images" / "train-05.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"line 'train-05'.*kedro run --pipeline data_validation") as caught:
        save(folder, manifest, replace(CONFIG, height_pixels=32, num_workers=num_workers))
    assert isinstance(caught.value.__cause__, UserError)  # which the command line shows without a traceback
    assert files(folder) == old


def test_lines_by_id_come_from_every_split_and_unknown_ones_are_left_out(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    rows = features.rows_of(["test-04", "train-09", "nobody"])
    assert rows.keys() == {"test-04", "train-09"}
    assert (rows["train-09"]["text"], rows["train-09"]["split"]) == ("text 9", "train")


def test_figures_have_a_row_for_every_line_and_no_pixels(tmp_path, manifest):
    table = save(tmp_path / "features", manifest).figures()
    assert len(table) == 18
    assert "pixels" not in table.column_names
    assert table["split"].to_pylist() == ["train"] * 10 + ["validation"] * 3 + ["test"] * 5
    assert save(tmp_path / "nothing", manifest.slice(0, 0)).figures().num_rows == 0


def test_shuffled_lines_come_once_each_and_in_the_same_order_for_the_same_seed(tmp_path, manifest):
    features = save(tmp_path / "features", manifest, replace(CONFIG, shard_lines=1))

    def ids(seed):
        return [line.line_id for line in features.lines("train", np.random.default_rng(seed))]

    in_order = [line.line_id for line in features.lines("train")]
    assert sorted(ids(1)) == in_order
    assert ids(1) == ids(1)
    assert ids(1) != in_order
    assert ids(1) != ids(2)


def test_as_many_lines_as_wanted_are_spread_over_a_split(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    lines = [line.line_id for line in features.lines("train")]
    for most in range(1, len(lines) + 3):
        spread = [line.line_id for line in features.spread("train", most)]
        assert len(spread) == min(most, len(lines))
        assert spread == [line_id for line_id in lines if line_id in spread]
    assert lines[0] in spread


def test_data_hash_follows_texts_images_and_splits(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    rows = manifest.to_pylist()
    metadata = {"image_roots": json.dumps({"test": str(tmp_path / "images")})}
    other_text = to_table([rows[0] | {"text": "other"}, *rows[1:]], MANIFEST, metadata)
    hashes = {features.data_hash(), features.data_hash(("test",)), save(tmp_path / "text", other_text).data_hash()}
    image = tmp_path / "images" / rows[0]["image_path"]
    draw_line(image, 1000)
    other_image = to_table([rows[0] | {"content_hash": hash_of(image)}, *rows[1:]], MANIFEST, metadata)
    hashes.add(save(tmp_path / "image", other_image).data_hash())
    assert len(hashes) == 4
    # rows[0] is a test line: what is trained on is the same.
    assert FeatureShards(tmp_path / "text").data_hash(("train",)) == features.data_hash(("train",))


def test_figures_of_other_lines_are_refused(tmp_path, manifest):
    features = save(tmp_path / "features", manifest)
    features.check_stats({"data_hash": features.data_hash()})
    with pytest.raises(UserError, match=r"feature_stats is of data 0f0f.*Run `kedro run --from-nodes summarise_feat"):
        features.check_stats({"data_hash": "0f" * 32})


def test_images_of_several_sources_lie_in_their_own_folders(tmp_path):
    for source in ("first", "second"):
        (tmp_path / source).mkdir()
    rows = make_manifest(tmp_path / "first", {"train": 1, "validation": 1, "test": 1}).to_pylist()
    rows = [row | {"source": "second" if row["split"] == "validation" else "first"} for row in rows]
    (tmp_path / "first" / "validation-00.png").rename(tmp_path / "second" / "validation-00.png")
    roots = {source: str(tmp_path / source) for source in ("first", "second")}
    features = save(tmp_path / "features", to_table(rows, MANIFEST, {"image_roots": json.dumps(roots)}))
    line = next(features.lines("validation"))
    expected = normalise_line(read_image(tmp_path / "second" / "validation-00.png"), CONFIG).pixels
    np.testing.assert_array_equal(line.pixels, expected)
