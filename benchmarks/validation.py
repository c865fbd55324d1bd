"""Time and peak memory of validation on manifests without images: `python benchmarks/validation.py`.

Each size is made in one process and validated in another, so that the peak memory is that of validation. The rows
come out the same every time; of every fault that validation looks for, some thousandths of the lines have it.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time

import great_expectations.expectations  # noqa: F401  takes seconds, which are not validation's
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.manifest import MANIFEST, REJECTED_LINES, SPLITS, to_table
from htr_pipeline.pipelines.data_validation.expectations import ValidationConfig
from htr_pipeline.pipelines.data_validation.nodes import check_manifest, validate_lines

LINES_PER_WRITER = 200
LINES_PER_PAGE = 25
WORDS = "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus".split()


def make_manifest(num_lines):
    """A manifest as the importers make it."""
    random = np.random.default_rng(1)
    number = np.arange(num_lines)
    writer = number // LINES_PER_WRITER
    words = np.array(WORDS, object)
    texts = [" ".join(row) for row in words[random.integers(0, len(words), (num_lines, 9))]]
    width = (np.array([len(text) for text in texts]) * 20 * random.normal(1.0, 0.08, num_lines)).astype(np.int64)

    def some(one_in):
        return np.flatnonzero(random.integers(0, one_in, num_lines) == 0)

    for line in some(500):
        texts[line] += "\ue000"  # unknown_character
    for line in some(500):
        texts[line] = texts[line].replace("e", "е", 1)  # look_alike
    for line in some(500):
        texts[line] += "’"  # mixed_forms
    for line in some(500):
        texts[line] += "'"
    for line in some(100_000):
        texts[line] += "ſß"  # rare_character, untrained_character
    width[some(500)] //= 3  # unusual_width
    height = np.full(num_lines, 64)
    height[some(500)] = 3
    image_hash = [f"{upper:016x}{lower:016x}" for upper, lower in random.integers(0, 2**64, (num_lines, 2), np.uint64)]
    content_hash = [hashed * 2 for hashed in image_hash]
    for line in some(500)[1:]:
        image_hash[line] = f"{int(image_hash[line - 1], 16) ^ 5:032x}"  # near_duplicate_image
    for line in some(500)[1:]:
        content_hash[line] = content_hash[line - 1]  # same_image_two_texts
    for page in some(500 * LINES_PER_PAGE):  # same_page_text
        start = page // LINES_PER_PAGE * LINES_PER_PAGE
        other = (start + num_lines // 2) // LINES_PER_PAGE * LINES_PER_PAGE % num_lines
        texts[other : other + LINES_PER_PAGE] = texts[start : start + LINES_PER_PAGE]

    columns = {
        "line_id": [f"line{line:08}" for line in number],
        "page_id": [f"page{page:06}" for page in number // LINES_PER_PAGE],
        "writer_id": [f"writer{one:05}" for one in writer],
        "split": np.array(SPLITS, object)[np.maximum(writer % 10, 7) - 7],
        "text": texts,
        "image_path": [f"lines/line{line:08}.png" for line in number],
        "polygon": pa.nulls(num_lines, MANIFEST.field("polygon").type),
        "baseline": pa.nulls(num_lines, MANIFEST.field("baseline").type),
        "source": ["synthetic"] * num_lines,
        "format": ["lines"] * num_lines,
        "width_pixels": width,
        "height_pixels": height,
        "content_hash": content_hash,
        "group": pa.nulls(num_lines, pa.string()),
        "image_hash": image_hash,
        "grey_range": np.full(num_lines, 200),
    }
    schema = MANIFEST.with_metadata({"image_roots": json.dumps({"synthetic": "/nowhere"})})  # there are no images
    return pa.table([pa.array(columns[field.name], field.type) for field in MANIFEST], schema=schema)


def make(path, num_lines):
    pq.write_table(make_manifest(num_lines), path)


def measure(path, docs_path):
    """Runs both nodes on the manifest and prints what they took, with the memory of reading it."""
    lines = pq.read_table(path)
    nothing = to_table([], REJECTED_LINES)
    config = ValidationConfig(docs_path=docs_path)
    start, processor_start = time.perf_counter(), time.process_time()
    validated, rejected, warned, summary = validate_lines(lines, nothing, [], config, ImageConfig())
    check_manifest(validated, rejected, summary, config)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    micros = processor_seconds / len(lines) * 1e6
    print(
        f"{len(lines):>9,} {seconds:>9.1f} {processor_seconds:>12.1f} {micros:>14.0f} {peak:>9.2f} "
        f"{rejected.num_rows:>9,} {warned.num_rows:>9,}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print("    lines   seconds  CPU seconds  CPU µs a line  peak GiB  rejected  warnings", flush=True)
    for num_lines in arguments.lines:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/manifest.parquet"
            for work, given in ((make, (path, num_lines)), (measure, (path, folder))):
                process = spawn.Process(target=work, args=given)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
