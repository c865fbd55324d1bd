import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from click import ClickException
from kedro.io import DatasetError

from htr_pipeline.cli import errors_in_words
from htr_pipeline.core.config import UserError
from htr_pipeline.io.checkpoints import FileCheckpoints
from htr_pipeline.io.datasets import (
    JsonDocument,
    KerasModel,
    LineFeatures,
    ParquetTable,
    TextDocument,
    replace_folder,
    replacing,
)
from htr_pipeline.io.manifest import REJECTED_LINES, to_table
from htr_pipeline.io.starting_point import STARTER_FOLDER, StartingPoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- replacing -------------------------------------------------------------------------------------------------------


def test_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    for content in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(content)
            assert partial.suffix == path.suffix
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
    assert names(path.parent) == ["file.txt"]


def test_error_while_writing_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail_half_way():
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail_half_way()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_full_disk_is_a_sentence_with_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_too_much():
        with errors_in_words(), replacing(tmp_path / "model.bin") as partial:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            partial.write_bytes(bytes(5000))

    try:
        with pytest.raises(ClickException, match=r"no room left to write to .*model\.bin.*Make room"):
            write_too_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path):
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "model.bin"))
    with pytest.raises(ClickException, match=r"model\.bin: Read-only file system\. Give yourself the right"):
        with errors_in_words():
            raise read_only


def test_dataset_that_fails_to_save_keeps_the_old_document(tmp_path):
    dataset = JsonDocument(str(tmp_path / "metrics.json"))
    dataset.save({"cer": 0.1})
    with pytest.raises(Exception, match="not JSON serializable"):
        dataset.save({"cer": object()})
    assert dataset.load() == {"cer": 0.1}
    assert names(tmp_path) == ["metrics.json"]


HANG = """
import sys, time
from pathlib import Path
from htr_pipeline.io.datasets import replacing
with replacing(Path(sys.argv[1])) as partial:
    with partial.open("w") as stream:
        stream.write("half")
        stream.flush()
        sys.stdout.write("written")
        sys.stdout.flush()
        time.sleep(60)
"""


def kill_a_writer(path):
    with subprocess.Popen([sys.executable, "-c", HANG, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.read(7) == b"written"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    kill_a_writer(path)
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_folder_takes_the_place_of_another_or_of_none(tmp_path):
    old = tmp_path / "old"
    for content in ("first", "second"):
        new = tmp_path / "new"
        new.mkdir()
        (new / content).touch()
        replace_folder(new, old)
        assert names(old) == [content]
        assert names(tmp_path) == ["old"]


# --- datasets --------------------------------------------------------------------------------------------------------


def test_table_comes_back_with_its_metadata(tmp_path):
    row = {"line_id": "a", "file": None, "stage": "import", "reason": "no_text", "detail": "a.png: no text"}
    table = to_table([row], REJECTED_LINES, {"image_root": "lines"})
    dataset = ParquetTable(str(tmp_path / "split=x" / "table.parquet"))
    dataset.save(table)
    loaded = dataset.load()
    assert loaded.equals(table)
    assert loaded.schema.metadata[b"image_root"] == b"lines"
    assert loaded.schema.metadata[b"schema_version"] == b"1"
    assert isinstance(loaded, pa.Table)


def test_json_and_text_come_back_with_every_character_and_the_order_of_keys(tmp_path):
    document, text = JsonDocument(str(tmp_path / "a.json")), TextDocument(str(tmp_path / "a.txt"))
    content = {"ß": 1, "a": ["ſ", None, 0.1]}
    document.save(content)
    text.save("ſtraße\n")
    assert list(document.load().items()) == list(content.items())
    assert "ß" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.load() == "ſtraße\n"


@pytest.mark.parametrize("kind", [ParquetTable, JsonDocument, TextDocument, KerasModel, LineFeatures])
def test_missing_file_is_named_with_the_command_that_makes_it(tmp_path, kind):
    dataset = kind(str(tmp_path / "missing"))
    assert not dataset.exists()
    with pytest.raises(Exception, match="missing: there is no such file") as caught:
        dataset.load()
    # Kedro wraps what a dataset raises; the command line looks for the cause.
    chain = [caught.value, caught.value.__cause__]
    assert any(isinstance(error, UserError) for error in chain)
    assert "kedro run --only-missing-outputs" in str(caught.value)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoint_comes_back_with_arrays_and_state(tmp_path):
    checkpoints = FileCheckpoints(tmp_path / "models" / "checkpoint.npz", "fingerprint")
    assert checkpoints.load() is None
    arrays = {
        "model/0": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model/1": np.array(3, np.int64),
        "optimizer/0": np.zeros((0, 2)),
    }
    state = {"step": 7, "sums": {"loss": 1.5}, "history": [{"epoch": 1}], "best_cer": None}
    checkpoints.save({"model/0": np.ones(1)}, {"step": 1})
    checkpoints.save(arrays, state)
    loaded_arrays, loaded_state = checkpoints.load()
    assert loaded_state == state
    assert loaded_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded_arrays[name], array)
        assert loaded_arrays[name].dtype == array.dtype
    assert names(tmp_path / "models") == ["checkpoint.npz"]


def test_checkpoint_of_another_training_is_not_taken_up(tmp_path):
    path = tmp_path / "checkpoint.npz"
    FileCheckpoints(path, "one").save({"a": np.ones(2)}, {"step": 1})
    assert FileCheckpoints(path, "other").load() is None
    assert FileCheckpoints(path, "one").load() is not None


def test_checkpoint_of_another_training_is_put_aside_and_taken_up_again(tmp_path, caplog):
    path = tmp_path / "checkpoint.npz"
    settings = {"training.epochs": 10, "data": "a" * 64, "model.size": "S"}
    one = FileCheckpoints(path, "one", settings)
    one.save({}, {"step": 1})
    other = FileCheckpoints(path, "other", settings | {"training.epochs": 12, "data": "b" * 64})
    assert other.load() is None
    assert "not completed (another data; training.epochs = 10, now 12). This one begins anew" in caplog.text
    other.save({}, {"step": 5})
    other.save({}, {"step": 6})
    assert len(names(tmp_path)) == 2
    assert re.search(r"kept as (checkpoint-\w{8}\.npz)", caplog.text)[1] in names(tmp_path)
    again = FileCheckpoints(path, "one", settings)
    assert again.load() == ({}, {"step": 1})
    again.save({}, {"step": 2})
    assert again.load() == ({}, {"step": 2})
    assert FileCheckpoints(path, "other").load() == ({}, {"step": 6})
    again.clear()
    assert FileCheckpoints(path, "other").load() == ({}, {"step": 6})
    FileCheckpoints(path, "other").clear()
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["checkpoint.npz", "checkpoint"])
def test_checkpoint_is_cleared_by_its_own_training_alone(tmp_path, name):
    checkpoints = FileCheckpoints(tmp_path / name, "one")
    checkpoints.save({}, {"step": 1})
    FileCheckpoints(tmp_path / name, "other").clear()
    assert checkpoints.load() == ({}, {"step": 1})
    checkpoints.clear()
    checkpoints.clear()
    assert checkpoints.load() is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [ParquetTable, JsonDocument])
@pytest.mark.parametrize("num_bytes", [0, 10, 300])
def test_damaged_file_is_named(tmp_path, kind, num_bytes):
    path = tmp_path / "table"
    rows = [{"line_id": f"{index}", "file": "f", "stage": "s", "reason": "r", "detail": "d"} for index in range(50)]
    kind(str(path)).save(to_table(rows, REJECTED_LINES) if kind is ParquetTable else rows)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DatasetError, match=r"table: cannot be read \(.*remove it: `kedro run --only-missing"):
        kind(str(path)).load()


@pytest.mark.parametrize("num_bytes", [0, 10, 300])
def test_damaged_checkpoint_is_named(tmp_path, num_bytes):
    path = tmp_path / "checkpoint.npz"
    checkpoints = FileCheckpoints(path, "one")
    checkpoints.save({"a": np.arange(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=r"checkpoint\.npz: this checkpoint is damaged \(.*Remove it to train anew"):
        checkpoints.load()


def test_a_damaged_checkpoint_of_another_training_does_not_hide_the_own_one(tmp_path):
    path = tmp_path / "checkpoint.npz"
    one, other = FileCheckpoints(path, "one"), FileCheckpoints(path, "other")
    one.save({}, {"step": 1})
    other.load()
    other.save({}, {"step": 5})
    path.write_bytes(path.read_bytes()[:100])
    assert FileCheckpoints(path, "one").load() == ({}, {"step": 1})
    FileCheckpoints(path, "one").clear()
    assert names(tmp_path) == ["checkpoint.npz"]
    with pytest.raises(UserError, match="damaged"):
        FileCheckpoints(path, "one").load()


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path):
    path = tmp_path / "checkpoint.npz"
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)\. Let this user read it"):
        FileCheckpoints(path, "one").load()


def test_names_as_long_as_the_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".txt")
    with replacing(path) as partial:
        partial.write_text("x")
    assert path.read_text() == "x"


def test_a_network_with_a_flipped_bit_is_named(tmp_path):
    network = bytearray((STARTER_FOLDER / "model.keras").read_bytes())
    network[len(network) // 2] ^= 1
    (tmp_path / "model.keras").write_bytes(network)
    shutil.copy(STARTER_FOLDER / "charset.json", tmp_path)
    with pytest.raises(DatasetError, match=r"model\.keras: cannot be read \(.*CRC"):
        KerasModel(str(tmp_path / "model.keras")).load()
    with pytest.raises(UserError, match=r"model\.keras: no network can be read from it \(.*CRC.*Copy it again"):
        StartingPoint.find(str(tmp_path)).model()


def test_checkpoint_with_other_arrays_than_were_saved_is_damaged(tmp_path):
    path = tmp_path / "checkpoint.npz"
    FileCheckpoints(path, "one").save({"a": np.arange(100), "b": np.ones(2)}, {"step": 1})
    with np.load(path) as file:
        arrays = dict(file)
    del arrays["b"]
    with path.open("wb") as stream:
        np.savez(stream, **arrays)
    with pytest.raises(UserError, match=r"damaged .*not those that were saved"):
        FileCheckpoints(path, "one").load()


@pytest.mark.parametrize("name", ["checkpoint.npz", f"{'long' * 20}.npz"])
def test_what_a_process_left_that_was_killed_while_it_saved_is_removed(tmp_path, name):
    path = tmp_path / name
    FileCheckpoints(path, "one").save({}, {"step": 1})
    kill_a_writer(path)
    assert len(names(tmp_path)) == 2
    of_a_living_process = tmp_path / f".partial-{os.getppid()}-{name[-50:]}"
    of_a_living_process.write_bytes(b"half")
    assert FileCheckpoints(path, "one").load() == ({}, {"step": 1})
    assert names(tmp_path) == [of_a_living_process.name, name]
