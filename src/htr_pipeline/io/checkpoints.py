"""The newest state of a training run, in one file without pickle."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import check_writable, remove_leftovers, replacing

logger = logging.getLogger(__name__)

# A file may be whole, and yet not to be had.
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.EIO, errno.ESTALE)
# What reading a damaged .npz or .keras file may raise.
DAMAGED_ARCHIVE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


def check_place(path: str) -> None:
    """Whether a checkpoint can be kept there.

    Raises:
        UserError: it cannot.
    """
    place = Path(path)
    try:
        if not path or place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "that is a folder")
        check_writable(place.parent)
    except OSError as exc:
        raise UserError(
            f"checkpoint.path = {path!r}: expected a file that can be written, such as data/06_models/checkpoint.npz "
            f"({exc.strerror})."
        ) from exc


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
        remove_leftovers(self._path.parent, self._path.name)
        other, damage = None, None
        for path in filter(Path.exists, (self._path, self._aside(self._fingerprint))):
            try:
                header, arrays = _read(path)
            except UserError as exc:  # perhaps of another training, and ours was put aside
                damage = damage or exc
                continue
            if header["fingerprint"] == self._fingerprint:
                return arrays, header["state"]
            other = header
        if damage:
            raise damage
        if other:
            logger.warning(
                "%s is of another training, which was not completed%s. This one begins anew; the other one is kept as "
                "%s, and its command goes on with it.",
                self._path, self._differences(other), self._aside(other["fingerprint"]).name,
            )  # fmt: skip
        return None

    def clear(self) -> None:
        """Removes what is of this training."""
        for path in (self._path, self._aside(self._fingerprint)):
            with contextlib.suppress(UserError):  # damaged: whose it is cannot be told
                if path.exists() and _read_header(path)["fingerprint"] == self._fingerprint:
                    path.unlink()

    def _aside(self, fingerprint: str) -> Path:
        name = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]
        return self._path.with_name(f"{self._path.stem}-{name}{self._path.suffix}")

    def _put_aside(self) -> None:
        """Makes place for a file of this training."""
        if self._is_ours or not self._path.exists():
            return
        with contextlib.suppress(UserError):  # damaged: nothing to keep
            header = _read_header(self._path)
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
                settings.append(_read_header(file)["settings"])
    return settings


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path) as (header, file):
        arrays = {name: file[name] for name in file.files if name != "header"}
        if _hash(arrays) != header["sha256"]:
            raise ValueError("the arrays are not those that were saved")
    return header, arrays


def _read_header(path: Path) -> dict[str, Any]:
    """What a file says of itself, without its arrays, which are large.

    Raises:
        UserError: the file is damaged.
    """
    with _reading(path) as (header, _):
        return header


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            header = {"settings": {}} | json.loads(file["header"].tobytes())
            if missing := {"fingerprint", "state", "sha256"} - header.keys():
                raise KeyError(*missing)
            yield header, file
    except DAMAGED_ARCHIVE as exc:
        if isinstance(exc, OSError) and exc.errno in _UNREADABLE:
            raise UserError(
                f"{path}: this checkpoint cannot be read ({exc.strerror}). Let this user read it."
            ) from None
        raise UserError(f"{path}: this checkpoint is damaged ({exc!r}). Remove it to train anew.") from None


def _hash(arrays: dict[str, np.ndarray]) -> str:
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(array.tobytes())
    return content.hexdigest()
