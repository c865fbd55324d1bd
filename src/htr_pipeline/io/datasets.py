"""Kedro datasets of the catalog: every save replaces the old file or folder in one step.

Kedro's own datasets write in place, so that a reader, or a process killed half-way, would see half a file.
"""

import json
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from kedro.io import AbstractDataset

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replace_folder, replacing
from htr_pipeline.io.checkpoints import DAMAGED_ARCHIVE
from htr_pipeline.io.features import FeatureShards


class _FileDataset(AbstractDataset):
    """A local file of the project."""

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}

    def load(self) -> Any:
        """Reads the file.

        Raises:
            UserError: it is not there, or damaged.
        """
        if not self._filepath.exists():
            raise UserError(
                f"{self._filepath}: there is no such file. It is made by an earlier pipeline: `kedro run` runs them "
                "all, `kedro run --only-missing-outputs` those whose results are missing."
            )
        try:
            return self._read()
        except UserError:
            raise
        except (*DAMAGED_ARCHIVE, pa.ArrowException) as exc:
            raise UserError(
                f"{self._filepath}: cannot be read ({exc}). If it is damaged, remove it: "
                "`kedro run --only-missing-outputs` makes it again."
            ) from exc

    @abstractmethod
    def _read(self) -> Any: ...


class ParquetTable(_FileDataset):
    """A pyarrow.Table in one Parquet file, its schema's metadata kept."""

    def _read(self) -> pa.Table:
        return pq.read_table(self._filepath, partitioning=None)

    def save(self, data: pa.Table) -> None:
        """Writes the file, ZSTD-compressed."""
        with replacing(self._filepath) as partial:
            pq.write_table(data, partial, compression="zstd")


class JsonDocument(_FileDataset):
    """Mappings and lists in one JSON file."""

    def _read(self) -> Any:
        return json.loads(self._filepath.read_text(encoding="utf-8"))

    def save(self, data: Any) -> None:
        """Writes the file, keys in the order given."""
        with replacing(self._filepath) as partial:
            partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class TextDocument(_FileDataset):
    """A string in one UTF-8 file."""

    def _read(self) -> str:
        return self._filepath.read_text(encoding="utf-8")

    def save(self, data: str) -> None:
        """Writes the file."""
        with replacing(self._filepath) as partial:
            partial.write_text(data, encoding="utf-8")


def read_network(path: Path) -> Any:
    """A network of this project from a .keras file, of which nothing is unpickled.

    Raises:
        Exception: one of checkpoints.DAMAGED_ARCHIVE where it is damaged.
    """
    import keras

    import htr_pipeline.core.model  # noqa: F401  registers the layers

    with zipfile.ZipFile(path) as archive:  # Keras reads parts of it, past the checksums
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")
    return keras.models.load_model(path, compile=False, safe_mode=True)


class KerasModel(_FileDataset):
    """A Keras model in one .keras file."""

    def _read(self) -> Any:
        return read_network(self._filepath)

    def save(self, data: Any) -> None:
        """Writes the model."""
        with replacing(self._filepath) as partial:
            data.save(partial)


class LanguageModel(_FileDataset):
    """An n-gram model of characters or words in one .npz file."""

    def _read(self) -> Any:
        from htr_pipeline.core.ctc.language_model import load_language_model

        return load_language_model(self._filepath)

    def save(self, data: Any) -> None:
        """Writes the model."""
        with replacing(self._filepath) as partial:
            data.save(partial)


class LineFeatures(_FileDataset):
    """A folder of Parquet shards of line images; saving makes the shards, loading gives access to them."""

    def _read(self) -> FeatureShards:
        return FeatureShards(self._filepath)

    def save(self, data: Any) -> None:
        """Lets the plan (io.features.ShardPlan) write its shards beside the folder, then swaps them in.

        Shards that a killed run had finished are taken over, and so are unchanged ones of the last run.
        """
        partial = self._filepath.with_name(f".partial-{self._filepath.name}")
        data.write(partial, previous=self._filepath)
        replace_folder(partial, self._filepath)
