r"""Lines read a second, beside kraken and PyLaia: line images to texts.

    python benchmarks/transcription.py LINES --kraken PATH/TO/kraken --kraken-model best.safetensors \
        --pylaia PATH/TO/pylaia-htr-decode-ctc --pylaia-folder FOLDER

LINES is a folder of line images (.png). Ours is what `kedro transcribe` calls, with the starter model unless --model
names a folder or a registered one. A peer's model is one that benchmarks/training.py has trained and kept (--keep): for
a fair figure its small one, of the cost of ours. FOLDER holds PyLaia's symbols.txt, model and experiment; its lines are
scaled to 64 pixels first, which is not counted.

Every program starts as a process, once for all lines and once for the first eight; the difference is the time of the
others, without start, loading and compilation. The rounds alternate; the table has medians. On a busy machine, lines
per second of processor time are the figure to look at.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

FEW = 8
PYLAIA_HEIGHT = 64
OURS = """
import sys
from pathlib import Path
from htr_pipeline.io.importers import NewLinesConfig
from htr_pipeline.io.starting_point import StartingPoint
from htr_pipeline.transcription import transcribe

lines, output, model, decoder, looks = sys.argv[1:]
transcribe(NewLinesConfig(path=lines), Path(output) / "out", StartingPoint.find(model, "--model"),
           Path(output) / "store.sqlite", decoder=decoder or None, looks=int(looks) if looks else None)
"""


def ours(model, decoder="", looks=""):
    def command(lines, output):
        return [sys.executable, "-c", OURS, str(lines), str(output), model, decoder, looks]

    return command


def kraken(program, model):
    def command(lines, output):
        common = [program, "-d", "cpu", "-I", f"{lines}/*.png", "-o", ".read.txt"]
        return [*common, "ocr", "-s", "-m", str(Path(model).resolve()), "-B", "16", "--num-line-workers", "0"]

    return command


def pylaia(program, folder):
    def command(lines, output):
        (output / "names.txt").write_text("".join(f"{path.stem}\n" for path in sorted(lines.glob("*.png"))))
        # It looks for model and experiment in the folder that it is told to train in, and writes a log there.
        shutil.copytree(folder, output / "train", ignore=shutil.ignore_patterns("lines"))
        options = ["--common.train_path=train", "--data.batch_size=16", "--data.num_workers=0"]
        return [program, "train/symbols.txt", "names.txt", f"--img_dirs=[{lines}]", *options]

    return command


def measure(command, lines):
    """Seconds by the clock, and of processor time."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        words = command(lines, output)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
        before, start = processor_seconds(), time.perf_counter()
        done = subprocess.run(words, cwd=output, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{done.stdout[-500:]}{done.stderr[-1500:]}\n{' '.join(words[:3])} ... ended with {done.returncode}.")
    return seconds, processor_seconds() - before


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy_lines(paths, folder, height=None):
    folder.mkdir()
    for path in paths:
        with Image.open(path) as image:
            grey = image.convert("L")
        if height:
            grey = grey.resize((max(1, round(grey.width * height / grey.height)), height), Image.Resampling.LANCZOS)
        grey.save(folder / path.name, compress_level=1)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="folder of line images, .png")
    parser.add_argument("--model", default="starter", help="ours: a folder, models:/NAME/VERSION or starter")
    parser.add_argument("--kraken", help="its program")
    parser.add_argument("--kraken-model", help="a .safetensors file")
    parser.add_argument("--pylaia", help="its program pylaia-htr-decode-ctc")
    parser.add_argument("--pylaia-folder", type=Path, help="where it was trained")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    paths = sorted(arguments.lines.glob("*.png"))
    if len(paths) <= FEW:
        sys.exit(f"{arguments.lines}: {len(paths)} .png files; expected more than {FEW}.")
    model = arguments.model
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    programs = {f"ours, greedy, {looks} look(s)": (ours(model, "greedy", looks), None) for looks in "31"}
    if model.startswith("models:"):
        programs["ours, as registered"] = (ours(model), None)
    if arguments.kraken:
        programs["kraken"] = (kraken(arguments.kraken, arguments.kraken_model), None)
    if arguments.pylaia:
        programs["PyLaia"] = (pylaia(arguments.pylaia, arguments.pylaia_folder), PYLAIA_HEIGHT)
    with tempfile.TemporaryDirectory() as name:
        folders = {}
        for height in {height for _, height in programs.values()}:
            of_height = Path(name) / str(height)
            of_height.mkdir()
            folders[height] = [copy_lines(some, of_height / str(len(some)), height) for some in (paths, paths[:FEW])]
        figures = {program: [] for program in programs}
        for round_ in range(arguments.repeats):
            for program, (command, height) in programs.items():
                every, few = (measure(command, folder) for folder in folders[height])
                figures[program].append((every[0], every[0] - few[0], every[1] - few[1]))
                print(f"round {round_ + 1}, {program}: {every[0]:.1f} s", file=sys.stderr)
    print(f"{len(paths)} lines, median of {arguments.repeats}\n")
    print("| program | seconds, all | lines/s after the start | lines/s of processor time |\n| --- | --- | --- | --- |")
    for program, rounds in figures.items():
        whole, rest, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
        others = len(paths) - FEW
        print(f"| {program} | {whole:.1f} | {others / rest:.1f} | {others / processor:.1f} |")


if __name__ == "__main__":
    main()
