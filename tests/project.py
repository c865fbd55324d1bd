"""A project in a folder of its own, run as a user runs it: real processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.request import urlopen

import h5py
import yaml

ROOT = Path(__file__).parents[1]
# Compiled code goes along, for time; not the files that another worker of the tests is writing just then.
UNFINISHED = shutil.ignore_patterns("*.tmp.*", "*.pyc.*")
KEDRO = (sys.executable, "-m", "kedro", "run", "--env", "test")


def environment():
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_", "KEDRO_", "HTR_", "PYTHONPATH"))
    }
    return kept | {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "TF_CPP_MIN_LOG_LEVEL": "2"}


def kedro_run(project, *arguments):
    return subprocess.run(
        [*KEDRO, *arguments], cwd=project, env=environment(), capture_output=True, text=True, timeout=300
    )


def succeed(project, *arguments):
    done = kedro_run(project, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def new_project(folder):
    folder.mkdir()
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=shutil.ignore_patterns("local"))
    (folder / "conf" / "local").mkdir()
    shutil.copy2(ROOT / "pyproject.toml", folder)
    # Not a link: Kedro insists on code within the project.
    shutil.copytree(ROOT / "src" / "htr_pipeline", folder / "src" / "htr_pipeline", ignore=UNFINISHED)
    return folder


def catalog(project):
    entries = yaml.safe_load((project / "conf/base/catalog.yml").read_text(encoding="utf-8"))
    return {name: project / entry["filepath"] for name, entry in entries.items()}


def client(project):
    import mlflow

    uri = f"sqlite:///{project / 'mlflow.db'}"
    return mlflow.MlflowClient(uri, uri)


def mlflow_runs(project):
    """Newest first."""
    store = client(project)
    experiment = store.get_experiment_by_name("htr_pipeline")
    return store.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])


def artifact(run, name):
    import mlflow

    return mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{name}")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights(path):
    arrays = {}
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as stream, h5py.File(stream) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def mtimes(paths):
    return {name: path.stat().st_mtime_ns for name, path in paths.items()}


@contextlib.contextmanager
def serving(folder, health, arguments, **variables):
    """Address of an MLflow process that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = environment() | variables
    # MLflow starts uvicorn by its name.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=variables, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urlopen(f"{address}{health}", timeout=5):
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@contextlib.contextmanager
def started_run(project, *arguments, until):
    """A run in a process group of its own that has come so far; killed in the end."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell in the background has it: a run would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [*KEDRO, *arguments], cwd=project, env=environment(), start_new_session=True, **silent
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not until(process) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def kedro_transcribe(project, *arguments):
    command = [sys.executable, "-m", "kedro", "transcribe", "--env", "test", *arguments]
    return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
