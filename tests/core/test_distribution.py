"""Two replicas, of one process and of two, against one device on the same batches."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import ModelConfig, TrainingConfig
from htr_pipeline.core.text import Charset
from htr_pipeline.io.checkpoints import FileCheckpoints
from htr_pipeline.io.features import CHECKSUMS, FeatureShards
from htr_pipeline.pipelines.training import nodes
from htr_pipeline.pipelines.training.nodes import CheckpointConfig
from tests.core.test_training import CONFIG, MemoryCheckpoints, Silent, drawn, poisoned, with_poison

ROOT = Path(__file__).parents[2]
# 30 lines in batches of 8: the last one holds 6, so that its second half is not full.
NUM_LINES = 30
# Additions come in another order. A step of an entry is some 6e-3 long.
CLOSE = {"rtol": 0.0, "atol": 2e-4}


@pytest.fixture
def _same_normalisation(monkeypatch):
    """On one device too; test_model compares it with the fused kernel, whose rounding differs more than the rest."""
    from htr_pipeline.core.model import FusedBatchNorm

    monkeypatch.setattr(FusedBatchNorm, "_fused", FusedBatchNorm._over_replicas)


def configured(**settings):
    # In bfloat16 every rounding is a thousand times as coarse.
    return dataclasses.replace(CONFIG, **{"epochs": 2, "precision": "float32", **settings})


def train(config, distribution=None, poison=False, checkpoints=None, progress=None):
    from htr_pipeline.core.distribution import Distribution
    from htr_pipeline.core.model import build_model
    from htr_pipeline.core.training import train_network

    lines = with_poison() if poison else [drawn(index) for index in range(NUM_LINES)]
    distribution = distribution or Distribution()
    with distribution.scope():
        off = {"column_dropout": 0.0, "recurrent_dropout": 0.0}
        model = poisoned(**off) if poison else build_model(ModelConfig(size="XS", **off), 11, 32, config.seed)
    return train_network(
        model,
        lambda rng: (lines[index] for index in rng.permutation(len(lines))),
        len(lines),
        [drawn(index) for index in range(1000, 1005)],
        Charset("0123456789"),
        augmentation=AugmentationConfig(enabled=not poison),
        config=config,
        checkpoints=checkpoints or MemoryCheckpoints(),
        progress=progress or Silent(),
        distribution=distribution,
    )


def start(tf_config=None, **task):
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "TF_CPP_MIN_LOG_LEVEL": "2"}
    if tf_config:
        variables["TF_CONFIG"] = json.dumps(tf_config)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.distribution_worker", json.dumps(task)],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]


@contextmanager
def workers(folder, **of_the_second):
    """Two processes; the second has further settings. None is left behind."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in (first, second)]
    processes = [
        start(
            {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}},
            kind="multi_worker",
            folder=str(folder / f"worker-{index}"),
            **(of_the_second if index == 1 else {}),
        )
        for index in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def results(folder):
    with np.load(folder / "weights.npz") as file:
        arrays = [file[name] for name in file.files]
    return {**json.loads((folder / "results.json").read_text()), "weights": arrays}


def assert_like_one_device(found, trained):
    assert found["num_replicas"] == 2
    for array, expected in zip(found["weights"], trained.model.get_weights(), strict=True):
        np.testing.assert_allclose(array, expected, **CLOSE)
    for row, expected in zip(found["history"], trained.history, strict=True):
        for name in ("train_loss", "validation_loss", "gradient_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4)
        for name in ("step", "learning_rate", "skipped_batches", "verdict"):
            assert row[name] == expected[name]


@pytest.mark.usefixtures("_same_normalisation")
def test_two_devices_end_with_the_weights_of_one_and_skip_the_same_batches(tmp_path):
    progress = Silent()
    alone = train(configured(), poison=True, progress=progress)
    process = start(kind="mirrored", cpus=2, poison=True, folder=str(tmp_path / "two"))
    finish(process)
    found = results(tmp_path / "two")
    assert_like_one_device(found, alone)
    assert [row["skipped_batches"] for row in found["history"]] == [1, 1]
    assert [sentence.split(". ", 1)[1] for sentence in found["warnings"]] == [
        sentence.split(". ", 1)[1] for sentence in progress.warnings
    ]


@pytest.mark.usefixtures("_same_normalisation")
def test_two_processes_killed_and_started_again_end_with_the_weights_of_one_device(tmp_path):
    alone = train(configured())
    with workers(tmp_path, die_at_step=5) as (chief, other):
        other.communicate(timeout=240)
        assert other.returncode == -signal.SIGKILL
        output, _ = chief.communicate(timeout=240)
    assert chief.returncode == 1
    assert "UserError: Another worker of this training was lost" in output
    _, state = FileCheckpoints(tmp_path / "checkpoint.npz", "test").load()
    assert 4 <= state["step"] <= 5
    with workers(tmp_path) as started:
        for worker in started:
            finish(worker)
    first, second = (results(tmp_path / f"worker-{index}") for index in range(2))
    assert_like_one_device(first, alone)
    for array, other in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_batch_that_the_devices_cannot_share_is_an_error():
    from htr_pipeline.core.distribution import Distribution

    distribution = Distribution()
    distribution.num_replicas = 4
    with pytest.raises(
        UserError, match=r"batch_size = 10: expected a multiple of 4: so many devices share each batch. Set it to 12"
    ):
        distribution.rows(10)


@pytest.mark.parametrize(
    "text", [None, "no JSON", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}']
)
def test_without_a_list_of_the_machines_there_is_no_multi_worker(text, monkeypatch):
    from htr_pipeline.core.distribution import Distribution

    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match=r"TF_CONFIG is .* Expected the addresses of all workers"):
        Distribution("multi_worker")


def test_workers_with_other_checkpoints_are_an_error(monkeypatch):
    from htr_pipeline.core.distribution import Distribution

    monkeypatch.setattr(Distribution, "largest", lambda self, *values: (values[0] + 1, values[1]))
    with pytest.raises(
        UserError, match=r"different checkpoints; that of this one is of step 0.*that all of them share"
    ):
        train(configured())


def test_workers_with_other_data_or_settings_are_an_error_before_anything_is_built(tmp_path, monkeypatch):
    from htr_pipeline.core.distribution import Distribution

    monkeypatch.setattr(Distribution, "largest", lambda self, *values: (values[0] + 1, values[1]))
    settings = (ModelConfig(), AugmentationConfig(), TrainingConfig(), CheckpointConfig())
    (tmp_path / CHECKSUMS).touch()
    features = FeatureShards(tmp_path)
    data_hash = features.data_hash()
    expected = rf"do not have the same lines \(this one: data_hash {data_hash[:12]}\), settings"
    with pytest.raises(UserError, match=expected):
        nodes.train(features, {"data_hash": data_hash}, Charset("ab").to_json(), *settings)
