"""The newest state of a training run, in one file without pickle."""

import glob
import hashlib
import json
import logging
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replacing

logger = logging.getLogger(__name__)


class FileCheckpoints:
    """A checkpoint file that belongs to one training: the one whose fingerprint it carries.

    Args:
        path: of the .npz file.
        fingerprint: hash of all that training depends on; a file with another one is not taken up.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint

    def save(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Replaces the file in one step."""
        header = json.dumps({"fingerprint": self._fingerprint, "state": state, "sha256": _hash(arrays)})
        with replacing(self._path) as partial, partial.open("wb") as stream:
            np.savez(stream, header=np.frombuffer(header.encode(), np.uint8), **arrays)  # type: ignore[arg-type]

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and state, or None where there is no checkpoint of this training.

        Raises:
            UserError: the file is damaged.
        """
        for left in self._path.parent.glob(f".partial-*-{glob.escape(self._path.name)}"):
            left.unlink(missing_ok=True)  # of processes that were killed while they saved
        if not self._path.exists():
            return None
        fingerprint, arrays, state = self._read()
        if fingerprint != self._fingerprint:
            logger.warning(
                "%s is of other data, settings or versions: training begins anew and replaces it.", self._path
            )
            return None
        return arrays, state

    def clear(self) -> None:
        """Removes the file if it is of this training."""
        if self._path.exists() and self._read()[0] == self._fingerprint:
            self._path.unlink()

    def _read(self) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                header = json.loads(file["header"].tobytes())
                arrays = {name: file[name] for name in file.files if name != "header"}
                if _hash(arrays) != header["sha256"]:
                    raise ValueError("the arrays are not those that were saved")
                return header["fingerprint"], arrays, header["state"]
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
            raise UserError(f"{self._path}: this checkpoint is damaged ({exc!r}). Remove it to train anew.") from None


def _hash(arrays: dict[str, np.ndarray]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
    return content.hexdigest()
