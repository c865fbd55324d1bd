"""Lines per second and peak memory of feature extraction, beside kraken's `ketos compile` on the same lines.

    python benchmarks/features.py LINES --ketos PATH/TO/ketos     # LINES: a folder of NAME.png with NAME.gt.txt
    python benchmarks/features.py --synthetic 200000              # ours alone, on images drawn for it

kraken lives in an environment of its own (`pip install torch==2.13.0 kraken`). Both start as new processes; the time
includes their start, ours without Kedro's. The memory is the sum of the peaks (VmHWM) of a program's processes. We
normalise every line, kraken stores it as it is. On a busy machine, lines per second of processor time are the figure
to look at.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.features import ShardPlan
from htr_pipeline.io.manifest import MANIFEST, to_table

SYNTHETIC_WIDTH, SYNTHETIC_HEIGHT = 320, 48
IMAGES_IN_FOLDER = 1000


def synthetic_manifest(folder, num_lines):
    """That many small images, no two alike, and their manifest."""
    rng = np.random.default_rng(0)
    strokes = 230 - 200 * (rng.random((64, SYNTHETIC_HEIGHT, SYNTHETIC_WIDTH // 4)) < 0.12).repeat(4, axis=2)
    rows = []
    for index in range(num_lines):
        pieces = strokes[index % 64].astype(np.uint8)
        pieces[:2, :64] = np.unpackbits(np.frombuffer(index.to_bytes(8, "big") * 2, np.uint8)).reshape(2, 64) * 255
        name = f"{index // IMAGES_IN_FOLDER:05d}/{index:08d}.png"
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pieces).save(path, compress_level=1)
        rows.append(
            {
                "line_id": f"{index:08d}",
                "page_id": f"{index // 30}",
                "writer_id": f"{index // 300}",
                "split": "train",
                "text": f"line number {index}",
                "image_path": name,
                "source": "synthetic",
                "format": "lines",
                "width_pixels": SYNTHETIC_WIDTH,
                "height_pixels": SYNTHETIC_HEIGHT,
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    return to_table(rows, MANIFEST, {"image_roots": json.dumps({"synthetic": str(folder)})})


def folder_manifest(folder):
    from htr_pipeline.io.importers import import_lines

    rows = import_lines(folder, "lines")[0].to_pylist()
    metadata = {"image_roots": json.dumps({row["source"]: str(folder) for row in rows})}
    return to_table([row | {"split": "train"} for row in rows], MANIFEST, metadata)


def measure(command):
    """(seconds, seconds of processor time, MiB) of a command with all its processes."""
    start, before = time.perf_counter(), processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = {}
    stop = threading.Event()

    def watch():
        while not stop.wait(0.05):
            for pid in [process.pid, *descendants(process.pid)]:
                peaks[pid] = max(peak_kib(pid), peaks.get(pid, 0))

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    if process.returncode:
        sys.exit(errors.decode())
    return seconds, processor_seconds() - before, sum(peaks.values()) / 1024


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def descendants(pid):
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has ended meanwhile
        return []
    return children + [grandchild for child in children for grandchild in descendants(child)]


def peak_kib(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def show(name, num_lines, seconds, processor, mebibytes):
    rates = f"{num_lines / seconds:>10.0f}{processor:>10.1f}{num_lines / processor:>14.0f}"
    print(f"{name:24}{num_lines:>10,}{seconds:>10.1f}{rates}{mebibytes:>10.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", type=Path, help="folder of NAME.png with NAME.gt.txt")
    parser.add_argument("--ketos", help="kraken's program")
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 4000], help="numbers of lines")
    parser.add_argument("--synthetic", type=int, help="number of drawn lines; also run with a tenth and a half")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of processes")
    parser.add_argument("--extract", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.extract:
        manifest, folder, previous = arguments.extract
        config = ImageConfig(num_workers=arguments.workers[0])
        ShardPlan(pq.read_table(manifest), config).write(Path(folder), previous=Path(previous))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{'':24}{'lines':>10}{'seconds':>10}{'lines/s':>10}{'CPU s':>10}{'lines/CPU s':>14}{'MiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.synthetic:
            (folder / "images").mkdir()
            whole = synthetic_manifest(folder / "images", arguments.synthetic)
            counts = [arguments.synthetic // 10, arguments.synthetic // 2, arguments.synthetic]
        else:
            whole = folder_manifest(arguments.lines)
            counts = [min(count, len(whole)) for count in arguments.counts]
        for count in counts:
            table = whole.slice(0, count)
            manifest = str(folder / "manifest.parquet")
            pq.write_table(table, manifest)
            for num_workers in arguments.workers:
                command = [sys.executable, __file__, "--workers", str(num_workers), "--extract", manifest]
                features, again = (str(folder / f"{name}-{count}-{num_workers}") for name in ("features", "again"))
                show(f"ours, processes: {num_workers}", count, *measure([*command, features, "none"]))
            show("ours, nothing changed", count, *measure([*command, again, features]))
            if arguments.ketos:
                images = [str(arguments.lines / path) for path in table["image_path"].to_pylist()]
                command = [arguments.ketos, "compile", "-f", "path", "-o", str(folder / "kraken.arrow"), *images]
                show("ketos compile", count, *measure(command))


if __name__ == "__main__":
    main()
