"""CER after a budget of training, with the learning curve, beside others on the same lines for the same processor time.

    python benchmarks/training.py --minutes 5                                   # the demo
    python benchmarks/training.py LINES --minutes 30 --ketos PATH/TO/ketos --pylaia PATH/TO/pylaia-htr-train-ctc
    python benchmarks/training.py LINES --minutes 10 --train-lines 300 --start-from starter training.learning_rate=2e-3

LINES is any source of `kedro run`, which is what is measured, in a folder of its own: import, validation, features,
training until the clock of the budget runs out, language model, evaluation. KEY=VALUE overrides any setting; one of
conf/base applies where none is given, conf/local is left out. The processor time is that of `kedro run --pipeline
training` from its start to its end.

kraken and PyLaia live in environments of their own (`pip install torch==2.13.0 kraken`; Python 3.10 and `pip install
pylaia==1.1.2`). Each is trained twice on the same lines and splits: with its defaults, and as a network of our size. A
training is killed when it has used as much processor time as ours; its checkpoint with the best validation figure reads
the test lines, and its readings are scored as ours are. Lines of pages are given to them cut out, as ours are; to
kraken as `ketos compile` stores them, to PyLaia as files of one height, since it asks for that.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from htr_pipeline.core.metrics import bootstrap_interval, independent_groups, paired_bootstrap, score_lines
from htr_pipeline.core.recipe import DECODERS
from htr_pipeline.core.text import normalise_text
from htr_pipeline.io.features import line_images
from htr_pipeline.io.manifest import SPLITS, image_roots

ROOT = Path(__file__).parents[1]
EPOCHS = 1_000_000  # of kraken: the clock ends training
MOST_ROWS = 20  # of the learning curve

# 1.1 million parameters and 0.39 billion multiplications for a line of 800 x 64 pixels; size S has 0.8 and 0.37, SM,
# the default, 1.6 and 0.67.
SMALL_NETWORK = (
    "[1,64,0,1 Cr3,3,16 Mp2,2 Cr3,3,32 Mp2,2 Cr3,3,64 Mp2,1 Cr3,3,64 S1(1x0)1,3 Do0.2,2 Lbx128 Do0.2,2 Lbx128 Do0.2,2]"
)
KRAKEN = {
    "kraken, its defaults": [],
    "kraken, small": ["-s", SMALL_NETWORK, "-B", "16", "-q", "fixed", "-N", str(EPOCHS)],
}
# Height of the lines in pixels, batch size, and what the network has otherwise than by default. 128 is the height that
# PyLaia's own documentation takes; the small network is that of SMALL_NETWORK.
PYLAIA = {
    "PyLaia, its defaults": (128, 8, []),
    "PyLaia, small": (64, 16, [
        "--crnn.cnn_num_features=[16,32,64,64]", "--crnn.cnn_poolsize=[2,2,[2,1],0]", "--crnn.rnn_layers=2",
        "--crnn.rnn_units=128", "--crnn.rnn_dropout=0.2", "--crnn.lin_dropout=0.2",
    ]),
}  # fmt: skip


def new_project(folder, settings):
    """The project with these settings, so that what the user has in data/ stays."""
    ignored = shutil.ignore_patterns("__pycache__", "local")
    shutil.copytree(ROOT / "conf", folder / "conf", ignore=ignored)
    # Not a link: Kedro insists on code within the project.
    shutil.copytree(ROOT / "src" / "htr_pipeline", folder / "src" / "htr_pipeline", ignore=ignored)
    shutil.copy2(ROOT / "pyproject.toml", folder)
    (folder / "conf" / "local").mkdir()
    (folder / "conf" / "local" / "parameters.yml").write_text(json.dumps(settings), encoding="utf-8")


def read_settings(arguments):
    """Settings of the arguments; those that are given by name go before."""
    settings = {
        "training.max_minutes": arguments.minutes,
        "training.seed": arguments.seed,
    }
    if arguments.source:
        settings |= {"source.path": str(arguments.source.resolve()), "source.format": "auto"}
    if arguments.start_from:
        folder = Path(arguments.start_from)
        settings["training.start_from"] = str(folder.resolve()) if folder.is_dir() else arguments.start_from
    for override in arguments.overrides:
        key, equals, value = override.partition("=")
        if not equals:
            sys.exit(f"{override!r}: expected a setting as KEY=VALUE, for instance training.batch_size=32.")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
        if key == "training.epochs":  # in place of the minutes, which would go before
            settings["training.max_minutes"] = None
    nested = {}
    for key, value in settings.items():
        *blocks, name = key.split(".")
        place = nested
        for block in blocks:
            place = place.setdefault(block, {})
        place[name] = value
    return nested


def kedro_run(folder, *options):
    """Seconds of processor time."""
    return run([sys.executable, "-m", "kedro", "run", *options], folder)


def run(command, folder, processor_seconds=None, **options):
    """Runs a command, ended after that much processor time; seconds of processor time that it used.

    Args:
        options: further ones of subprocess.run.
    """
    before = used_by_children()

    def limit():
        if processor_seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (int(processor_seconds), int(processor_seconds) + 10))

    with (folder / "log.txt").open("ab") as log:
        options = {"stdout": log, "stderr": log} | options
        done = subprocess.run(command, cwd=folder, preexec_fn=limit, **options)
    if done.returncode and done.returncode != -signal.SIGXCPU:
        tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        sys.exit(f"{tail}\n{' '.join(command[:4])} ... ended with code {done.returncode}.")
    return used_by_children() - before


def used_by_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def keep_training_lines(path, num_lines, seed):
    """Leaves that many training lines in the manifest, drawn by seed; fewer are always among more."""
    manifest = pq.read_table(path)
    splits = dict(zip(manifest["line_id"].to_pylist(), manifest["split"].to_pylist(), strict=True))
    known = sorted(line_id for line_id, split in splits.items() if split == "train")
    if num_lines > len(known):
        sys.exit(f"--train-lines {num_lines}: there are {len(known)} training lines.")
    drawn = {known[index] for index in np.random.default_rng(seed).permutation(len(known))[:num_lines]}
    pq.write_table(manifest.filter([line in drawn or split != "train" for line, split in splits.items()]), path)


def train_ours(folder, settings, arguments):
    """Processor seconds of training."""
    new_project(folder, settings)
    kedro_run(folder, "--pipeline", "data_validation")
    if arguments.train_lines:
        keep_training_lines(folder / "data/02_intermediate/manifest.parquet", arguments.train_lines, arguments.seed)
    kedro_run(folder, "--pipeline", "feature_extraction")
    used = kedro_run(folder, "--pipeline", "training")
    kedro_run(folder, "--pipeline", "evaluation")
    return used


def show_curve(history):
    print(f"\n{'epoch':>8}{'seconds':>10}{'lines/s':>10}{'train CER':>12}{'validation CER':>16}")
    rows = history.to_pylist()
    shown = {*range(0, len(rows), -(-len(rows) // MOST_ROWS)), len(rows) - 1}
    for row in (rows[index] for index in sorted(shown)):
        print(
            f"{row['epoch']:>8}{row['elapsed_seconds']:>10.0f}{row['lines_per_second']:>10.0f}"
            f"{row['train_cer']:>12.2%}{row['validation_cer']:>16.2%}"
        )
    best = min(rows, key=lambda row: row["validation_cer"])
    waited = sum(row["data_wait_seconds"] for row in rows) / rows[-1]["elapsed_seconds"]
    print(f"Best: epoch {best['epoch']}, {best['validation_cer']:.2%}. Waiting for data: {waited:.1%} of the time.")


def show_header():
    print(f"\n{'test lines':26}{'CER':>9}{'95 % interval':>19}{'WER':>9}{'95 % interval':>19}{'CPU s':>9}", flush=True)


def show_score(name, score, used):
    cells = (
        f"{score[rate]:>9.2%}{'{:.2%} to {:.2%}'.format(score[f'{rate}_low'], score[f'{rate}_high']):>19}"
        for rate in ("cer", "wer")
    )
    print(f"{name:26}{''.join(cells)}{used:>9.0f}", flush=True)


def write_lines(project, folder, height=None):
    """Every line as SPLIT/NAME.png, of that height if one is given; by split the rows of the manifest by path."""
    manifest = pq.read_table(project / "data/02_intermediate/manifest.parquet")
    roots = {source: project / root for source, root in image_roots(manifest).items()}
    rows = {split: {} for split in SPLITS}
    for index, (row, grey) in enumerate(line_images(manifest.to_pylist(), roots)):
        path = folder / row["split"] / f"{index:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(grey)
        if height:
            image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
        image.save(path, compress_level=1)
        rows[row["split"]][path] = row
    return rows


def read_with_kraken(ketos, options, project, seed, folder, processor_seconds):
    """Trains kraken for that much processor time; its reading of each test line, the seconds, and the best epoch."""
    rows = write_lines(project, folder / "lines")
    for split, paths in rows.items():
        for path, row in paths.items():
            path.with_suffix(".gt.txt").write_text(row["text"], encoding="utf-8")
        (folder / f"{split}.paths").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    # In one process, since the limit of processor time is one of processes. On one thread, its default: on a busy
    # machine, two spent most of their processor time waiting for each other.
    train = [ketos, "-d", "cpu", "-s", str(seed), "--workers", "0", "train"]
    for split in ("train", "validation"):
        stored = folder / f"{split}.arrow"
        run([ketos, "compile", "-f", "path", "-F", f"{split}.paths", "-o", str(stored)], folder)
        (folder / f"{split}.txt").write_text(str(stored), encoding="utf-8")
    data = ["-f", "binary", "-t", "train.txt", "-e", "validation.txt"]
    used = run([*train, *data, "-o", "checkpoints", *options], folder, processor_seconds)
    checkpoints = {}
    for path in (folder / "checkpoints").glob("checkpoint_*-*.ckpt"):
        epoch, accuracy = path.stem.removeprefix("checkpoint_").split("-", maxsplit=1)
        checkpoints[float(accuracy), int(epoch)] = path
    if not checkpoints:
        return None, used, "no epoch was finished"
    (accuracy, epoch), best = max(checkpoints.items())
    run([ketos, "convert", "-o", "best.safetensors", str(best)], folder)
    kraken = [str(Path(ketos).with_name("kraken")), "-d", "cpu", "-I", "lines/test/*.png", "-o", ".read.txt"]
    run([*kraken, "ocr", "-s", "-m", "best.safetensors", "-B", "16", "--num-line-workers", "0"], folder)
    readings = {}
    for path, row in rows["test"].items():
        reading = path.with_suffix(".read.txt")
        if reading.exists():
            readings[row["line_id"]] = normalise_text(reading.read_text(encoding="utf-8"))
    return readings, used, f"epoch {epoch + 1}, {accuracy:.2%} right on validation by its own count"


def read_with_pylaia(program, network, project, seed, folder, processor_seconds):
    """Trains PyLaia as read_with_kraken does; the process that loads its lines comes on top of the processor time."""
    height, batch_size, options = network
    rows = write_lines(project, folder / "lines", height)
    characters = sorted({c for split in ("train", "validation") for row in rows[split].values() for c in row["text"]})
    symbols = ["<ctc>", "<space>", *(c for c in characters if c != " ")]
    (folder / "symbols.txt").write_text("".join(f"{s} {i}\n" for i, s in enumerate(symbols)), encoding="utf-8")
    for split, paths in rows.items():
        texts = {f"{split}/{path.name}": row["text"] for path, row in paths.items()}
        table = (" ".join([name, *("<space>" if c == " " else c for c in text)]) for name, text in texts.items())
        (folder / f"{split}.txt").write_text("\n".join(table), encoding="utf-8")
    (folder / "test.names").write_text("".join(f"test/{path.name}\n" for path in rows["test"]), encoding="utf-8")

    def tool(name):
        return str(Path(program).with_name(f"pylaia-htr-{name}"))

    # On one thread, as kraken.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run([tool("create-model"), "symbols.txt", f"--fixed_input_height={height}", *options], folder, env=environment)
    common = [f"--common.seed={seed}", f"--data.batch_size={batch_size}", "--data.num_workers=1"]
    train = [tool("train-ctc"), "symbols.txt", "[lines]", "train.txt", "validation.txt", *common]
    used = run(train, folder, processor_seconds, env=environment)
    checkpoints = [*(folder / "experiment").glob("epoch=*-lowest_va_cer.ckpt")]
    if not checkpoints:
        return None, used, "no epoch was finished"
    decode = [tool("decode-ctc"), "symbols.txt", "test.names", "--img_dirs=[lines]", *common]
    # Tabs part the names from the texts.
    decode += ["--decode.join_string=", "--decode.convert_spaces=true", "--decode.separator=\t"]
    with (folder / "readings.txt").open("wb") as output:
        run(decode, folder, env=environment, stdout=output)
    line_ids = {f"test/{path.name}": row["line_id"] for path, row in rows["test"].items()}
    readings = {}
    for line in (folder / "readings.txt").read_text(encoding="utf-8").splitlines():
        name, _, text = line.partition("\t")
        readings[line_ids[name]] = normalise_text(text)
    epochs = max(int(path.name.partition("-")[0].removeprefix("epoch=")) for path in checkpoints)
    return readings, used, f"best after {epochs + 1} epochs or before"


def score(references, hypotheses, writers):
    """As the evaluation makes it."""
    scored = score_lines(references, hypotheses)
    groups = independent_groups(writers)
    figures = {}
    for name, counts in (("cer", scored.characters), ("wer", scored.words)):
        low, high = bootstrap_interval(counts.edits, counts.lengths, groups, seed=1)
        figures |= {name: counts.rate, f"{name}_low": low, f"{name}_high": high}
    return scored, figures, groups


def peers(arguments):
    """By name the function that trains it and reads the test lines, its program and its options."""
    found = {}
    if arguments.ketos:
        found |= {name: (read_with_kraken, arguments.ketos, options) for name, options in KRAKEN.items()}
    if arguments.pylaia:
        found |= {name: (read_with_pylaia, arguments.pylaia, network) for name, network in PYLAIA.items()}
    return found


def compare_with_peers(arguments, project, folder, used):
    predictions = pq.read_table(project / "data/07_model_output/predictions.parquet").to_pylist()
    greedy = [row for row in predictions if row["decoder"] == "greedy" and row["split"] == "test"]
    references, writers, hypotheses = ([row[n] for row in greedy] for n in ("reference", "writer_id", "hypothesis"))
    ours, _, groups = score(references, hypotheses, writers)
    notes = []
    for name, (read, program, options) in peers(arguments).items():
        place = folder / name.replace(", ", "-").replace(" ", "-")
        readings, seconds, note = read(program, options, project, arguments.seed, place, used)
        if readings is not None:
            read_lines = [readings.get(row["line_id"]) for row in greedy]
            theirs, figures, _ = score(references, [text or "" for text in read_lines], writers)
            show_score(name, figures, seconds)
            pair = (ours.characters.edits, theirs.characters.edits, ours.characters.lengths, groups)
            compared = paired_bootstrap(*pair)
            note += (
                f"; ours, greedy, makes {1 - ours.cer / max(theirs.cer, 1e-9):.0%} fewer errors "
                f"(difference of CER {compared.low:+.2%} to {compared.high:+.2%})"
            )
            if None in read_lines:
                note += f"; {read_lines.count(None)} lines were not read"
        notes.append(f"{name}: {note}.")
    print("\n".join(["", *notes]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="folder or table with lines; default: the demo")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings; paths in them are absolute")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, by the clock (default 5)")
    parser.add_argument("--train-lines", type=int, help="so many of the training lines, drawn by --seed")
    parser.add_argument("--start-from", help="training.start_from")
    parser.add_argument("--seed", type=int, default=1, help="of training and of the drawing (default 1)")
    parser.add_argument("--ketos", help="kraken's program, to train it too")
    parser.add_argument("--pylaia", help="PyLaia's program pylaia-htr-train-ctc, to train it too")
    parser.add_argument("--keep", type=Path, help="new folder for everything that is made; default: removed at the end")
    arguments = parser.parse_intermixed_args()
    if arguments.source and "=" in str(arguments.source) and not arguments.source.exists():
        arguments.overrides.insert(0, str(arguments.source))
        arguments.source = None
    if arguments.source and not arguments.source.exists():
        parser.error(f"{arguments.source}: there is no such folder or table")
    if arguments.keep and arguments.keep.exists():
        parser.error(f"--keep {arguments.keep}: there is something already; give a new folder")
    settings = read_settings(arguments)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "training"
        folder.mkdir(parents=True)
        folder = folder.resolve()
        project = folder / "ours"
        project.mkdir()
        used = train_ours(project, settings, arguments)
        stats = json.loads((project / "data/04_feature/feature_stats.json").read_text(encoding="utf-8"))
        print("lines: " + ", ".join(f"{split} {count:,}" for split, count in stats["num_lines"].items()))
        history = pq.read_table(project / "data/06_models/history.parquet")
        show_curve(history)
        metrics = json.loads((project / "data/07_model_output/metrics.json").read_text(encoding="utf-8"))
        print(metrics["signature"])
        show_header()
        for decoder in DECODERS:
            show_score(f"ours, {decoder}", metrics["splits"]["test"][decoder], used)
        if arguments.ketos or arguments.pylaia:
            compare_with_peers(arguments, project, folder, used)


if __name__ == "__main__":
    main()
