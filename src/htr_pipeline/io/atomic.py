"""Files and folders that take the place of old ones whole: a reader never sees a half."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

# Of the name that a file under way has from its target: systems allow 255 bytes in all, a character has up to four.
_MAX_NAME_CHARACTERS = 50


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes the place of `path` when the block ends without an error.

    Raises:
        OSError: with the name of the file where writing does not give any, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as exc:
        if exc.errno:
            exc.filename = exc.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # of a folder that cannot be written to, which the first error says
            partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where this process writes what is to take the place of `path`."""
    # The suffix stays: Keras chooses the format by it.
    return path.with_name(f".partial-{os.getpid()}-{path.name[-_MAX_NAME_CHARACTERS:]}")


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Removes what killed processes were writing in `folder`; what is under way stays.

    Args:
        folder: where it would be; it may be missing.
        of: name of the file or folder that was to be replaced, whose leftovers may have more behind it, as the journal
            of a database; None: any file.
    """
    name = "*" if of is None else f"{glob.escape(of[-_MAX_NAME_CHARACTERS:])}*"
    for left in folder.glob(f".partial-[0-9]*-{name}"):
        process_id = left.name.split("-")[1]
        if not process_id.isdecimal() or _is_running(int(process_id)):
            continue
        if left.is_file():
            left.unlink(missing_ok=True)
        elif of is not None:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 is harmless on POSIX only
    try:
        os.kill(process_id, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process_id != os.getpid()  # which in a container is the same each time


def check_writable(folder: Path) -> None:
    """Makes the folder where it is missing, and a file in it that goes again.

    Raises:
        OSError: it cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def replace_folder(new: Path, old: Path) -> None:
    """Puts folder `new` in the place of folder `old`, which may not exist yet.

    Between two renames there is no such folder: a reader or a kill may find none, but never a half.
    """
    retired = old.with_name(f".retired-{old.name}")
    shutil.rmtree(retired, ignore_errors=True)  # of a process that was killed here
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)
