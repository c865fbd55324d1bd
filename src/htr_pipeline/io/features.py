"""Normalised line images in Parquet shards: made in parallel, read as a stream."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from htr_pipeline.core.batching import Line
from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig, normalise_line, read_image
from htr_pipeline.io.manifest import FEATURES, SCHEMA_VERSION, SPLITS, image_roots

logger = logging.getLogger(__name__)

_ROW_GROUP_LINES = 64
# All but the pixels: what statistics and look-ups read.
_FIGURES = [name for name in FEATURES.names if name != "pixels"]


@dataclass(frozen=True)
class ShardPlan:
    """What the shards of a manifest will hold; `write` makes them.

    Attributes:
        manifest: table of io.manifest.MANIFEST with the metadata entry image_roots.
        config: how lines are normalised.
    """

    manifest: pa.Table
    config: ImageConfig

    def write(self, folder: Path, previous: Path) -> None:
        """Makes every shard in `folder`, taking over finished ones of the same content from there and from `previous`.

        Raises:
            UserError: an image cannot be read any more.
        """
        roots = image_roots(self.manifest)
        shards = list(self._shards())
        wanted = {name for name, _, _ in shards}
        for path in sorted(folder.rglob("*.parquet")):
            if str(path.relative_to(folder)) not in wanted:
                path.unlink()
        missing = []
        for name, rows, key in shards:
            if _shard_key(folder / name) == key:
                continue
            if _shard_key(previous / name) == key:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(previous / name, _beside(folder / name))
                _beside(folder / name).replace(folder / name)
            else:
                missing.append((rows, roots, folder / name, key, self.config))
        folder.mkdir(parents=True, exist_ok=True)
        if reused := len(shards) - len(missing):
            logger.info("%d of %d shards are unchanged and kept.", reused, len(shards))
        total = sum(len(job[0]) for job in missing)
        with tqdm(total=total, desc="Features", unit="line", disable=not total) as bar:
            for count in _run(missing, self.config.num_workers or os.cpu_count() or 1):
                bar.update(count)

    def _shards(self) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
        """(file name, manifest rows, key of the content) of each shard, in a fixed order."""
        columns = ["line_id", "split", "writer_id", "group", "text", "source", "image_path", "content_hash"]
        settings = {k: v for k, v in asdict(self.config).items() if k not in ("num_workers", "shard_lines")}
        table = self.manifest.select(columns)
        for split in SPLITS:
            part = table.filter(pc.field("split") == split).sort_by("line_id")
            for index, start in enumerate(range(0, len(part), self.config.shard_lines)):
                rows = part.slice(start, self.config.shard_lines).to_pylist()
                content = json.dumps([SCHEMA_VERSION, settings, rows], sort_keys=True)
                yield f"split={split}/shard-{index:05d}.parquet", rows, hashlib.sha256(content.encode()).hexdigest()


class FeatureShards:
    """The line images of one folder of shards.

    Args:
        folder: holds split=*/shard-*.parquet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def figures(self) -> pa.Table:
        """All columns but the pixels, of all lines, in the order of the shards."""
        # The split is a column of the files; from the folders' names it would come a second time.
        paths = [path for split in SPLITS for path in self._paths(split)]
        tables = [pq.read_table(path, columns=_FIGURES, partitioning=None) for path in paths]
        return pa.concat_tables(tables) if tables else FEATURES.empty_table().select(_FIGURES)

    def data_hash(self, splits: tuple[str, ...] = SPLITS) -> str:
        """Hash of everything that went into the shards of these splits: texts, images and settings."""
        keys = [_shard_key(path) or "" for split in splits for path in self._paths(split)]
        return hashlib.sha256("".join(keys).encode()).hexdigest()

    def lines(self, split: str, rng: np.random.Generator | None = None) -> Iterator[Line]:
        """The lines of a split, one row group in memory at a time.

        Args:
            split: train, validation or test.
            rng: shuffles shards and row groups; None keeps the order.
        """
        for row in self._rows(split, ["line_id", "pixels", "width_pixels", "height_pixels", "text"], rng):
            yield Line(row["line_id"], _pixels(row), row["text"])

    def spread(self, split: str, most: int) -> list[Line]:
        """At most that many lines, evenly from all of the split, so that every writer has a share."""
        available = self.figures()["split"].to_pylist().count(split)
        return list(islice(self.lines(split), 0, None, max(-(-available // most), 1)))

    def read_lines(self, line_ids: list[str]) -> dict[str, dict[str, Any]]:
        """Whole rows of some lines, by line_id."""
        wanted = pa.array(line_ids, pa.string())
        found: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            for path in self._paths(split):
                ids = pq.read_table(path, columns=["line_id"], partitioning=None)["line_id"]
                if pc.any(pc.is_in(ids, wanted)).as_py():
                    table = pq.read_table(path, filters=pc.field("line_id").isin(wanted), partitioning=None)
                    found |= {row["line_id"]: row for row in table.to_pylist()}
        return found

    def _paths(self, split: str) -> list[Path]:
        return sorted((self._folder / f"split={split}").glob("shard-*.parquet"))

    def _rows(self, split: str, columns: list[str], rng: np.random.Generator | None) -> Iterator[dict[str, Any]]:
        paths = self._paths(split)
        groups = [(path, index) for path in paths for index in range(pq.read_metadata(path).num_row_groups)]
        for position in rng.permutation(len(groups)) if rng else range(len(groups)):
            path, index = groups[position]
            with pq.ParquetFile(path) as file:
                yield from file.read_row_group(index, columns=columns).to_pylist()


def _pixels(row: dict[str, Any]) -> np.ndarray:
    """(width, height) uint8."""
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], row["height_pixels"])


def _run(jobs: list[tuple], num_workers: int) -> Iterator[int]:
    """Writes the shards; yields the number of lines of each as it is done."""
    if len(jobs) <= 1 or num_workers == 1:
        yield from map(_write_shard, *zip(*jobs, strict=True)) if jobs else ()
        return
    # Spawned, not forked: TensorFlow in the parent does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(_write_shard, *zip(*jobs, strict=True))


def _write_shard(rows: list[dict[str, Any]], roots: dict[str, Path], path: Path, key: str, config: ImageConfig) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = FEATURES.with_metadata({**FEATURES.metadata, "shard_key": key})
    with pq.ParquetWriter(_beside(path), schema, compression="zstd") as writer:
        for start in range(0, len(rows), _ROW_GROUP_LINES):
            features = [
                _feature_row(row, roots[row["source"]], config) for row in rows[start : start + _ROW_GROUP_LINES]
            ]
            writer.write_table(pa.Table.from_pylist(features, schema=schema))
    with _beside(path).open("rb+") as stream:
        os.fsync(stream.fileno())
    _beside(path).replace(path)
    return len(rows)


def _feature_row(row: dict[str, Any], root: Path, config: ImageConfig) -> dict[str, Any]:
    path = root / row["image_path"]
    try:
        line = normalise_line(read_image(path), config)
    except UserError as exc:
        raise UserError(
            f"line {row['line_id']!r}: {exc} It could be read at validation: "
            "if images were changed, run `kedro run --pipeline data_validation` again."
        ) from exc
    return {
        **{name: row[name] for name in ("line_id", "split", "writer_id", "group", "text")},
        "pixels": line.pixels.tobytes(),
        "width_pixels": line.pixels.shape[0],
        "height_pixels": line.pixels.shape[1],
        "ink_share": line.ink_share,
        "contrast": line.contrast,
        "slant_degrees": line.slant_degrees,
    }


def _shard_key(path: Path) -> str | None:
    """Key of a shard's content; None where there is no whole shard."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return metadata.get(b"shard_key", b"").decode()


def _beside(path: Path) -> Path:
    return path.with_name(f".partial-{path.name}")
