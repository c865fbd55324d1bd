import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.io.workers import map_jobs


def square(number):
    return number * number


def end_this_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number):
    raise UserError(f"line {number}: no.")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(num_workers):
    assert list(map_jobs(square, range(20), num_workers=num_workers)) == [number**2 for number in range(20)]


def test_jobs_are_taken_only_as_workers_become_free():
    taken = []

    def jobs():
        for number in range(20):
            taken.append(number)
            yield number

    results = map_jobs(square, jobs(), num_workers=2)
    assert next(results) == 0
    assert len(taken) == 4  # two for each process
    results.close()


def test_error_of_a_job_reaches_the_caller_as_it_is():
    with pytest.raises(UserError, match=r"^line 3: no\.$"):
        list(map_jobs(refuse, [3, 4, 5], num_workers=2))


def test_process_that_was_ended_from_outside_is_explained():
    with pytest.raises(UserError, match=r"ended from outside.*fewer processes"):
        list(map_jobs(end_this_process, range(3), num_workers=2))


BUSY = """
import signal, sys
from htr_pipeline.io.workers import map_jobs
from tests.io.test_workers import note_and_sleep_a_little
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    try:
        for _ in map_jobs(note_and_sleep_a_little, [sys.argv[1]] * 100_000, num_workers=2):
            pass
    except KeyboardInterrupt:
        sys.exit(3)
"""


def note_and_sleep_a_little(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.2)


def workers_are_starting(parent, _):
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return any("spawn_main" in Path(f"/proc/{child}/cmdline").read_text() for child in children)


def workers_work(_, folder):
    return len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "is_time",
    [
        pytest.param(
            workers_are_starting,
            marks=pytest.mark.skipif(
                not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them"
            ),
        ),
        workers_work,
    ],
)
def test_ctrl_c_ends_the_processes_without_tracebacks(tmp_path, is_time):
    (tmp_path / "noted").mkdir()
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    }
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path / "noted"], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not is_time(parent.pid, tmp_path / "noted") and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=240)
    assert (parent.returncode, errors) == (3, b"")


ENDLESS = """
import sys, time
from pathlib import Path
from htr_pipeline.io.workers import map_jobs
from tests.io.test_workers import sleep_after_noting
if __name__ == "__main__":
    list(map_jobs(sleep_after_noting, [sys.argv[1]] * 4, num_workers=2))
"""


def sleep_after_noting(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "noted").mkdir()
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    parent = subprocess.Popen([sys.executable, script, tmp_path / "noted"], env=environment)
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "noted").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [path.name for path in (tmp_path / "noted").iterdir()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_dask_cluster_gives_the_results_of_local_processes(cluster):
    results = list(map_jobs(square, range(20), dask_address=cluster.scheduler_address))
    assert results == [number**2 for number in range(20)]


def test_error_of_a_job_on_dask_reaches_the_caller_as_it_is(cluster):
    with pytest.raises(UserError, match=r"^line 3: no\.$"):
        list(map_jobs(refuse, [3, 4, 5], dask_address=cluster.scheduler_address))


def test_dask_workers_that_die_are_explained(cluster):
    with pytest.raises(UserError, match=r"the cluster lost a job.*run again"):
        list(map_jobs(end_this_process, [0], dask_address=cluster.scheduler_address))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x", "tcp://"])
def test_address_without_a_scheduler_is_named(address, monkeypatch):
    pytest.importorskip("distributed", reason="Dask is an extra: pip install distributed")
    monkeypatch.setattr("htr_pipeline.io.workers._CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match=f"dask_address = '{address}': no Dask scheduler answers"):
        list(map_jobs(square, [1], dask_address=address))


def test_scheduler_without_workers_is_named(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="Dask is an extra: pip install distributed")
    monkeypatch.setattr("htr_pipeline.io.workers._CONNECT_SECONDS", 3.0)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
        pytest.raises(UserError, match="has no workers"),
    ):
        list(map_jobs(square, [1], dask_address=empty.scheduler_address))


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1:9", "nonsense://x", "tcp://"])
def test_right_address_after_a_wrong_one(wrong, cluster, monkeypatch):
    monkeypatch.setattr("htr_pipeline.io.workers._CONNECT_SECONDS", 2.0)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        list(map_jobs(square, [1], dask_address=wrong))
    new_event_loop = asyncio.events.new_event_loop

    def collect_first():
        gc.collect()  # the worst moment: distributed holds a lock that the end of a client waits for
        return new_event_loop()

    monkeypatch.setattr("asyncio.events.new_event_loop", collect_first)
    assert list(map_jobs(square, [2], dask_address=cluster.scheduler_address)) == [4]


def test_missing_dask_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"Dask is not installed here.*pip install distributed"):
        list(map_jobs(square, [1], dask_address="tcp://127.0.0.1:8786"))
