"""Normalised line images in Parquet shards: made in parallel, checked, read as a stream."""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from htr_pipeline.core.batching import Line
from htr_pipeline.core.config import UserError
from htr_pipeline.core.cutting import cut_line
from htr_pipeline.core.image import ImageConfig, normalise_line, read_image, signature
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.manifest import FEATURES, SCHEMA_VERSION, SPLITS, image_roots, line_hash
from htr_pipeline.io.workers import map_jobs

logger = logging.getLogger(__name__)

# In the form of the program sha256sum: `sha256sum -c _SHA256SUMS` checks a folder of shards too.
CHECKSUMS = "_SHA256SUMS"  # readers of Parquet folders pass over names with an underscore
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (split=\w+/shard-\d+\.parquet)")
_REMEDY = "`kedro run --pipeline feature_extraction` makes it again."
_ROW_GROUP_LINES = 64
# All but the pixels: what statistics and look-ups read.
_FIGURES = [name for name in FEATURES.names if name != "pixels"]
_LABELS = ["line_id", "split", "writer_id", "group", "text"]
# What is computed from a line's image, and taken over as long as that and the settings are the same.
_COMPUTED = ["content_hash", "pixels", "width_pixels", "height_pixels", "ink_share", "contrast", "slant_degrees"]


@dataclass(frozen=True)
class ShardPlan:
    """What the shards of a manifest will hold; `write` makes them.

    Attributes:
        manifest: table of io.manifest.MANIFEST with the metadata entry image_roots. Lines with the same
            content_hash have the same image: that of a line on a page covers its polygon and baseline.
        config: how lines are normalised, stored and by whom.
    """

    manifest: pa.Table
    config: ImageConfig

    def write(self, folder: Path, previous: Path) -> None:
        """Makes every shard in `folder`; what has not changed since is taken over from there and from `previous`.

        Finished shards of an interrupted run (in `folder`) and shards of the last run (in `previous`) are checked
        against their checksums first. A shard with the same lines is linked; lines that occur in others, with the same
        image and settings, are copied; only the rest is computed. The bytes do not depend on what could be taken over.

        Raises:
            UserError: an image cannot be read any more, or workers are lost.
        """
        plan = [(name, rows, _shard_key(rows, self.config)) for name, rows in self._shards()]
        old = _sound_shards(previous)
        old_by_key = {_read_key(previous / name): name for name in old}
        with _Output(folder, {name: key for name, _, key in plan}) as output:
            for name, _, key in plan:
                if name not in output.checksums and key in old_by_key:
                    output.link(name, previous / old_by_key[key], old[old_by_key[key]])
            missing = [shard for shard in plan if shard[0] not in output.checksums]
            sound = [folder / name for name in output.checksums] + [previous / name for name in old]
            num_computed = self._make(missing, _places_of_lines(sound, self.config) if missing else {}, output)
        logger.info(
            "%d lines in %d shards: %d lines computed, %d taken over (%d shards as they were).",
            *(len(self.manifest), len(plan), num_computed, len(self.manifest) - num_computed, len(plan) - len(missing)),
        )

    def _make(
        self, missing: list[tuple[str, pa.Table, str]], places: dict[str, tuple[Path, int]], output: "_Output"
    ) -> int:
        """Makes the shards that cannot be taken over whole; the number of lines that were computed for them."""
        # In a form that holds in other processes and on other machines.
        roots = {source: root.resolve() for source, root in image_roots(self.manifest).items()}
        results = map_jobs(
            _make_shard,
            (self._job(rows, key, places, roots) for _, rows, key in missing),
            num_workers=1 if len(missing) <= 1 else self.config.num_workers,
            dask_address=self.config.dask_address if missing else None,
        )
        num_computed = 0
        total = sum(len(rows) for _, rows, _ in missing)
        with tqdm(total=total, desc="Features", unit="line", disable=not total) as bar:
            for (name, rows, _), (content, num_new) in zip(missing, results, strict=True):
                output.write(name, content)
                num_computed += num_new
                bar.update(len(rows))
        return num_computed

    def _shards(self) -> Iterator[tuple[str, pa.Table]]:
        """File name and manifest rows of each shard, in a fixed order."""
        for split in SPLITS:
            part = self.manifest.filter(pc.field("split") == split).sort_by("line_id")
            for index, start in enumerate(range(0, len(part), self.config.shard_lines)):
                yield f"split={split}/shard-{index:05d}.parquet", part.slice(start, self.config.shard_lines)

    def _job(self, rows: pa.Table, key: str, places: dict[str, tuple[Path, int]], roots: dict[str, Path]) -> "_Job":
        needed = [*_LABELS, "source", "image_path", "polygon", "baseline", "content_hash"]
        images = {str(content_hash) for content_hash in rows["content_hash"]}
        known = {content_hash: places[content_hash] for content_hash in images & places.keys()}
        return _Job(rows.select(needed).to_pylist(), known, roots, key, self.config, signature(self.config))


class _Output:
    """A folder of shards while they are made: a shard with its final name is whole and has a checksum in the list.

    Args:
        folder: made, or cleared of all but the sound shards that are wanted as they are.
        keys: of the content of the shards that the folder will hold, by name.
    """

    def __init__(self, folder: Path, keys: dict[str, str]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in keys:
            (folder / name).parent.mkdir(exist_ok=True)
        sound = _sound_shards(folder)
        self.checksums = {name: sound[name] for name in sound if keys.get(name) == _read_key(folder / name)}
        for path in folder.rglob("*.parquet"):
            if path.relative_to(folder).as_posix() not in self.checksums:
                path.unlink()
        _write_checksums(folder, self.checksums)

    def __enter__(self) -> "_Output":
        self._list = (self._folder / CHECKSUMS).open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._list.close()
        if kind is None:  # in the order of names, not of events: two runs give the same bytes
            _write_checksums(self._folder, self.checksums)

    def link(self, name: str, path: Path, checksum: str) -> None:
        """Takes over a shard: the same file under another name, or a copy where the file system has no links."""
        try:
            os.link(path, self._beside(name))
        except OSError:
            shutil.copyfile(path, self._beside(name))
        self._finish(name, checksum)

    def write(self, name: str, content: bytes) -> None:
        """Stores a new shard."""
        with self._beside(name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self._finish(name, hashlib.sha256(content).hexdigest())

    def _finish(self, name: str, checksum: str) -> None:
        self._list.write(f"{checksum}  {name}\n")
        self._list.flush()
        os.fsync(self._list.fileno())
        self._beside(name).replace(self._folder / name)
        self.checksums[name] = checksum

    def _beside(self, name: str) -> Path:
        return (self._folder / name).with_name(f".partial-{Path(name).name}")


class FeatureShards:
    """The line images of one folder of shards.

    A shard's checksum is verified when a process opens it for the first time, and again only once it was written to:
    a second or so for every gigabyte, against hours of training, and nothing from the second epoch on.

    Args:
        folder: holds split=*/shard-*.parquet and _SHA256SUMS.

    Raises:
        UserError: by the constructor and every method: the folder is not whole, or a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CHECKSUMS).exists():
            raise UserError(f"{folder}: there is no {CHECKSUMS}, so that nothing says what it should hold. {_REMEDY}")
        self._folder = folder
        self._checksums = _read_checksums(folder)
        # A list that lost lines would make the collection smaller without a word.
        there = {path.relative_to(folder).as_posix() for path in folder.glob("split=*/shard-*.parquet")}
        if unlisted := sorted(there - self._checksums.keys()):
            raise UserError(
                f"{folder / CHECKSUMS}: it does not list {unlisted[0]}"
                + (f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else "")
                + f", which the folder holds: it is damaged. {_REMEDY}"
            )

    def figures(self) -> pa.Table:
        """All columns but the pixels, of all lines, in the order of the shards."""
        # The split is a column of the files; from the folders' names it would come a second time.
        paths = [path for split in SPLITS for path in self._paths(split)]
        tables = [pq.read_table(path, columns=_FIGURES, partitioning=None) for path in paths]
        return pa.concat_tables(tables) if tables else FEATURES.empty_table().select(_FIGURES)

    def settings(self) -> dict[str, Any]:
        """What core.image.signature says of the shards: the settings and versions that their pixels were made with."""
        for split in SPLITS:
            for path in self._paths(split):
                settings: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"normalisation"])
                return settings
        return {}

    def content_hashes(self) -> dict[str, list[str]]:
        """Those of the lines of each split, in the order of the shards."""

        def read(split: str) -> Iterator[str]:
            for path in self._paths(split):
                yield from map(str, pq.read_table(path, columns=["content_hash"], partitioning=None)["content_hash"])

        return {split: list(read(split)) for split in SPLITS}

    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for split in SPLITS for path in self._paths(split))

    def data_hash(self, splits: tuple[str, ...] = SPLITS) -> str:
        """Hash of everything that went into the shards of these splits: texts, images and settings."""
        keys = [_read_key(path) for split in splits for path in self._paths(split)]
        return hashlib.sha256("".join(keys).encode()).hexdigest()

    def check_stats(self, feature_stats: Mapping[str, Any]) -> None:
        """Looks whether these figures are those of the shards.

        Raises:
            UserError: of other ones, as when a run ended between the two nodes that make them.
        """
        if feature_stats["data_hash"] != (data_hash := self.data_hash()):
            raise UserError(
                f"feature_stats is of data {feature_stats['data_hash'][:12]}, the features on disk are data "
                f"{data_hash[:12]}. Run `kedro run --from-nodes summarise_features`."
            )

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
        available = sum(pq.read_metadata(path).num_rows for path in self._paths(split))
        wanted = {place * available // most for place in range(most)} if available > most else range(available)
        return [line for place, line in enumerate(self.lines(split)) if place in wanted]

    def rows_of(self, line_ids: list[str]) -> dict[str, dict[str, Any]]:
        """Whole rows of some lines, by line_id; lines that are not there are left out."""
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
        """Sound shards of a split."""
        names = sorted(name for name in self._checksums if name.startswith(f"split={split}/"))
        for name in names:
            if damage := _damage(self._folder / name, self._checksums[name]):
                raise UserError(f"{self._folder / name}: {damage}. {_REMEDY}")
        return [self._folder / name for name in names]

    def _rows(self, split: str, columns: list[str], rng: np.random.Generator | None) -> Iterator[dict[str, Any]]:
        paths = self._paths(split)
        groups = [(path, index) for path in paths for index in range(pq.read_metadata(path).num_row_groups)]
        for position in rng.permutation(len(groups)) if rng else range(len(groups)):
            path, index = groups[position]
            with pq.ParquetFile(path) as file:
                yield from file.read_row_group(index, columns=columns).to_pylist()


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make one shard.

    Attributes:
        rows: of the manifest, in the order of the shard.
        known: shard and row group that hold the same image already, by content hash.
        roots: folder of the images, by source.
        key: of the shard's content.
        config: how lines are normalised.
        signature: of the normalisation where the job was planned.
    """

    rows: list[dict[str, Any]]
    known: dict[str, tuple[Path, int]]
    roots: dict[str, Path]
    key: str
    config: ImageConfig
    signature: str


def _make_shard(job: _Job) -> tuple[bytes, int]:
    """A Parquet file's content and how many of its lines had to be computed."""
    if signature(job.config) != job.signature:
        raise UserError(
            f"This worker would make other pixels: it has {signature(job.config)}, the run was planned with "
            f"{job.signature}. Install the same versions on all machines."
        )
    computed = _copy_known(job.known) if job.known else {}
    todo = [row for row in job.rows if row["content_hash"] not in computed]
    # Page by page, so that each is decoded once and no more than one is in memory.
    todo.sort(key=_image_of)
    for row, grey in line_images(todo, job.roots):
        computed[row["content_hash"]] = _compute(row, grey, job.config)

    schema = FEATURES.with_metadata(
        {**FEATURES.metadata, "shard_key": job.key, "normalisation": job.signature}  # all that the bytes depend on
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=["split", "writer_id", "group"],  # type: ignore[arg-type]  # the stubs know only bool
        write_statistics=_FIGURES,  # those of pixels say nothing
    ) as writer:
        for start in range(0, len(job.rows), _ROW_GROUP_LINES):
            rows_of_group = job.rows[start : start + _ROW_GROUP_LINES]
            features = [{name: row[name] for name in _LABELS} | computed[row["content_hash"]] for row in rows_of_group]
            writer.write_table(pa.Table.from_pylist(features, schema=schema))
    return sink.getvalue().to_pybytes(), len(todo)


def _copy_known(known: dict[str, tuple[Path, int]]) -> dict[str, dict[str, Any]]:
    """Columns _COMPUTED by content hash, read from the shards that have them, one row group at a time."""
    copied = {}
    for path, group in sorted(set(known.values())):
        with pq.ParquetFile(path) as file:
            for row in file.read_row_group(group, columns=_COMPUTED).to_pylist():
                if known.get(row["content_hash"]) == (path, group):
                    copied[row["content_hash"]] = row
    return copied


def _image_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["source"], row["image_path"]


def line_images(rows: Iterable[dict[str, Any]], roots: dict[str, Path]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each row of a manifest with its line, (height, width) uint8 grey, cut out where the image is a page.

    Args:
        rows: with source, image_path, polygon and baseline; a page is decoded once for lines that follow each other.
            Where they have a content_hash too, the image must be the one that it was taken of.
        roots: folder of the images, by source.

    Raises:
        UserError: an image cannot be read any more, or is another one than at validation.
    """
    for (source, image_path), group in groupby(rows, key=_image_of):
        path, image, file_hash = roots[source] / image_path, None, ""
        for row in group:
            try:
                if image is None:
                    image = read_image(path)
                    file_hash = _checksum(path)
                if row.get("content_hash", found := line_hash(file_hash, row["polygon"], row["baseline"])) != found:
                    raise UserError(f"{path} is not the file that was imported: its SHA-256 is now {file_hash[:12]}….")
                is_page = row["polygon"] is not None or row["baseline"] is not None
                line = cut_line(image, row["polygon"], row["baseline"]) if is_page else image
            except UserError as exc:
                raise UserError(
                    f"line {row['line_id']!r}: {exc} It was there and could be read when the lines were imported: if "
                    "images were changed, import them again (`kedro run --pipeline data_validation`, or the same "
                    "`kedro transcribe`)."
                ) from exc
            yield row, line


def _compute(row: dict[str, Any], grey: np.ndarray, config: ImageConfig) -> dict[str, Any]:
    """Columns _COMPUTED of a line."""
    line = normalise_line(grey, config)
    return {
        "content_hash": row["content_hash"],
        "pixels": line.pixels.tobytes(),
        "width_pixels": line.pixels.shape[0],
        "height_pixels": line.pixels.shape[1],
        "ink_share": line.ink_share,
        "contrast": line.contrast,
        "slant_degrees": line.slant_degrees,
    }


def _shard_key(rows: pa.Table, config: ImageConfig) -> str:
    """Hash of all that a shard's bytes depend on; where the images lie is no part of it."""
    lines = rows.select([*_LABELS, "content_hash"]).to_pylist()
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, signature(config), lines]).encode()).hexdigest()


def _places_of_lines(paths: Iterable[Path], config: ImageConfig) -> dict[str, tuple[Path, int]]:
    """Shard and row group of each content hash, among the shards that were normalised with the same settings."""
    places: dict[str, tuple[Path, int]] = {}
    for path in paths:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow.metadata[b"normalisation"] != signature(config).encode():
                continue
            for group in range(file.num_row_groups):
                for content_hash in file.read_row_group(group, columns=["content_hash"])["content_hash"]:
                    places[str(content_hash)] = path.resolve(), group
    return places


def _sound_shards(folder: Path) -> dict[str, str]:
    """Checksums, by name, of the shards whose content still has them; the others are named in the log."""
    sound = {}
    for name, checksum in _read_checksums(folder).items():
        if damage := _damage(folder / name, checksum):
            logger.warning("%s: %s. It is made again.", folder / name, damage)
        else:
            sound[name] = checksum
    return sound


def _damage(path: Path, checksum: str) -> str | None:
    """Words for what is wrong with a shard."""
    try:
        found = _checksum(path)
    except FileNotFoundError:
        return "the shard is missing"
    except OSError as exc:
        return f"the shard cannot be read ({exc.strerror})"
    return None if found == checksum else f"the shard is damaged (SHA-256 {found[:12]}…, it was {checksum[:12]}…)"


def _read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by name; none where there is no list. The last line of a killed run may be cut off."""
    try:
        lines = (folder / CHECKSUMS).read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {match[2]: match[1] for line in lines if (match := _CHECKSUM_LINE.fullmatch(line))}


def _write_checksums(folder: Path, checksums: dict[str, str]) -> None:
    with replacing(folder / CHECKSUMS) as partial:
        partial.write_text("".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)), encoding="utf-8")


def _checksum(path: Path) -> str:
    """SHA-256 of a file; computed once for as long as it is not written to."""
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=65536)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_key(path: Path) -> str:
    return pq.read_schema(path).metadata[b"shard_key"].decode()


def _pixels(row: dict[str, Any]) -> np.ndarray:
    """(width, height) uint8."""
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], row["height_pixels"])
