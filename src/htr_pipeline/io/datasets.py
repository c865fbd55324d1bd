"""Kedro datasets of the catalog: every save replaces the old file or folder in one step.

Kedro's own datasets write in place, so that a reader, or a process killed half-way, would see half a file.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from kedro.io import AbstractDataset

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replace_folder, replacing
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

    def _missing(self) -> UserError:
        return UserError(
            f"{self._filepath}: there is no such file. It is made by an earlier pipeline: `kedro run` runs them all, "
            "`kedro run --only-missing-outputs` those whose results are missing."
        )

    def _damaged(self, exc: Exception) -> UserError:
        return UserError(
            f"{self._filepath}: cannot be read ({exc}). If it is damaged, remove it: "
            "`kedro run --only-missing-outputs` makes it again."
        )


class ParquetTable(_FileDataset):
    """A pyarrow.Table in one Parquet file, its schema's metadata kept."""

    def load(self) -> pa.Table:
        """Reads the file."""
        if not self._filepath.exists():
            raise self._missing()
        try:
            return pq.read_table(self._filepath, partitioning=None)
        except (pa.ArrowException, OSError) as exc:
            raise self._damaged(exc) from exc

    def save(self, data: pa.Table) -> None:
        """Writes the file, ZSTD-compressed."""
        with replacing(self._filepath) as partial:
            pq.write_table(data, partial, compression="zstd")


class JsonDocument(_FileDataset):
    """Mappings and lists in one JSON file."""

    def load(self) -> Any:
        """Reads the file."""
        if not self._filepath.exists():
            raise self._missing()
        try:
            return json.loads(self._filepath.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise self._damaged(exc) from exc

    def save(self, data: Any) -> None:
        """Writes the file, keys in the order given."""
        with replacing(self._filepath) as partial:
            partial.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


class TextDocument(_FileDataset):
    """A string in one UTF-8 file."""

    def load(self) -> str:
        """Reads the file."""
        if not self._filepath.exists():
            raise self._missing()
        return self._filepath.read_text(encoding="utf-8")

    def save(self, data: str) -> None:
        """Writes the file."""
        with replacing(self._filepath) as partial:
            partial.write_text(data, encoding="utf-8")


class KerasModel(_FileDataset):
    """A Keras model in one .keras file."""

    def load(self) -> Any:
        """Reads the model; its layers come from core.model, nothing is unpickled."""
        if not self._filepath.exists():
            raise self._missing()
        import keras

        import htr_pipeline.core.model  # noqa: F401  registers the layers

        return keras.models.load_model(self._filepath, compile=False, safe_mode=True)

    def save(self, data: Any) -> None:
        """Writes the model."""
        with replacing(self._filepath) as partial:
            data.save(partial)


class LanguageModel(_FileDataset):
    """An n-gram model of characters or words in one .npz file."""

    def load(self) -> Any:
        """Reads the model; nothing is unpickled."""
        if not self._filepath.exists():
            raise self._missing()
        from htr_pipeline.core.ctc.language_model import load_language_model

        return load_language_model(self._filepath)

    def save(self, data: Any) -> None:
        """Writes the model."""
        with replacing(self._filepath) as partial:
            data.save(partial)


class LineFeatures(_FileDataset):
    """A folder of Parquet shards of line images; saving makes the shards, loading gives access to them."""

    def load(self) -> FeatureShards:
        """Opens the folder."""
        if not self._filepath.exists():
            raise self._missing()
        return FeatureShards(self._filepath)

    def save(self, data: Any) -> None:
        """Lets the plan (io.features.ShardPlan) write its shards beside the folder, then swaps them in.

        Shards that a killed run had finished are taken over, and so are unchanged ones of the last run.
        """
        partial = self._filepath.with_name(f".partial-{self._filepath.name}")
        data.write(partial, previous=self._filepath)
        replace_folder(partial, self._filepath)
