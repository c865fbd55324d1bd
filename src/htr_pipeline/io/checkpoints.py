"""The newest state of a training run, in one file without pickle."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

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
        header = json.dumps({"fingerprint": self._fingerprint, "state": state})
        with replacing(self._path) as partial:
            np.savez(partial, header=np.frombuffer(header.encode(), np.uint8), **arrays)  # type: ignore[arg-type]

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and state, or None where there is no checkpoint of this training."""
        if not self._path.exists():
            return None
        with np.load(self._path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["fingerprint"] != self._fingerprint:
                logger.warning("%s is of other data or settings: training begins anew and replaces it.", self._path)
                return None
            return {name: file[name] for name in file.files if name != "header"}, header["state"]

    def clear(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)
