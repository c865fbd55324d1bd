"""The newest state of a training run, in one file without pickle."""

import contextlib
import glob
import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replacing

logger = logging.getLogger(__name__)


class FileCheckpoints:
    """A checkpoint file that belongs to one training: the one whose fingerprint it carries.

    That of another training, which was stopped before its end, is put aside under a name with its fingerprint: hours of
    work must not be lost for a setting that was tried in between.

    Args:
        path: of the .npz file.
        fingerprint: hash of all that training depends on; a file with another one is not taken up.
        settings: what the fingerprint is made of, by name, so that a warning can say what differs; a string of 64
            characters is a hash.
    """

    def __init__(self, path: Path, fingerprint: str, settings: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._settings = json.loads(json.dumps(settings or {}))  # as they are read again
        self._is_ours = False  # what lies at the path, as far as is known

    def save(self, arrays: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Replaces the file in one step."""
        header = json.dumps(
            {
                "fingerprint": self._fingerprint,
                "settings": self._settings,
                "state": state,
                "sha256": _hash(arrays),
            }
        )
        with replacing(self._path) as partial:
            with partial.open("wb") as stream:
                np.savez(stream, header=np.frombuffer(header.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
            self._put_aside()
        self._is_ours = True
        self._aside(self._fingerprint).unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays and state, or None where there is no checkpoint of this training.

        Raises:
            UserError: the file is damaged.
        """
        for left in self._path.parent.glob(f".partial-*-{glob.escape(self._path.name)}"):
            left.unlink(missing_ok=True)  # of processes that were killed while they saved
        found = [_read(path) for path in (self._path, self._aside(self._fingerprint)) if path.exists()]
        for header, arrays in found:
            if header["fingerprint"] == self._fingerprint:
                return arrays, header["state"]
        if found:
            logger.warning(
                "%s is of another training, which was not completed%s. This one begins anew; the other one is kept as "
                "%s, and its command goes on with it.",
                self._path, self._differences(found[0][0]), self._aside(found[0][0]["fingerprint"]).name,
            )  # fmt: skip
        return None

    def clear(self) -> None:
        """Removes what is of this training."""
        for path in (self._path, self._aside(self._fingerprint)):
            if path.exists() and _read(path)[0]["fingerprint"] == self._fingerprint:
                path.unlink()

    def _aside(self, fingerprint: str) -> Path:
        name = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]
        return self._path.with_name(f"{self._path.stem}-{name}{self._path.suffix}")

    def _put_aside(self) -> None:
        """Makes place for a file of this training."""
        if self._is_ours or not self._path.exists():
            return
        with contextlib.suppress(UserError):  # damaged: nothing to keep
            header, _ = _read(self._path)
            if header["fingerprint"] != self._fingerprint:
                self._path.replace(self._aside(header["fingerprint"]))

    def _differences(self, header: Mapping[str, Any]) -> str:
        """In brackets, what the other training had."""
        theirs, words = header["settings"], []
        for name in sorted(theirs.keys() | self._settings.keys()):
            old, new = theirs.get(name), self._settings.get(name)
            if old != new:
                is_hash = any(isinstance(value, str) and len(value) == 64 for value in (old, new))
                words.append(f"another {name}" if is_hash else f"{name} = {old}, now {new}")
        return f" ({'; '.join(words)})" if words else ""


def stored_settings(path: Path) -> list[dict[str, Any]]:
    """The settings of the checkpoint at the path and of those that were put aside; damaged ones are left out."""
    settings = []
    for file in [path, *sorted(path.parent.glob(f"{glob.escape(path.stem)}-????????{glob.escape(path.suffix)}"))]:
        with contextlib.suppress(UserError):
            if file.exists():
                settings.append(_read(file)[0]["settings"])
    return settings


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            arrays = {name: file[name] for name in file.files if name != "header"}
            if _hash(arrays) != header["sha256"]:
                raise ValueError("the arrays are not those that were saved")
            return {"settings": {}} | {name: header[name] for name in header if name != "sha256"}, arrays
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise UserError(f"{path}: this checkpoint is damaged ({exc!r}). Remove it to train anew.") from None


def _hash(arrays: dict[str, np.ndarray]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
    return content.hexdigest()
