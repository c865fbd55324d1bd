"""What tests of importers share: samples put into a folder, and the folder imported."""

import os
import struct
import zlib
from pathlib import Path

from htr_pipeline.io.importers import import_lines

RESOURCES = Path(__file__).parents[1] / "resources"
# Real collections, which are not part of the project: tests that want them skip where they are not.
REAL_DATA = Path(os.environ.get("HTR_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def add(resources, source, sample, name=None, change=None):
    """Copies a sample into the source, with words replaced."""
    text = (resources / sample).read_text(encoding="utf-8")
    for old, new in (change or {}).items():
        assert old in text
        text = text.replace(old, new)
    path = source / (name or Path(sample).name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def import_rows(*arguments, **options):
    """Records and rejected lines as import_lines finds them, row by row."""
    return [table.to_pylist() for table in import_lines(*arguments, **options)]


def by_line(rows):
    return {row["line_id"]: row for row in rows}


def png_bomb():
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 100))


def damaged(data, rng):
    """The bytes with digits, signs, whole pieces or the end changed."""
    data = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:  # digits only: the file stays well-formed, the geometry becomes absurd
        places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        for place in rng.choice(places, 20):
            data[place] = ord(rng.choice(list("0123456789-. e,")))
    elif kind == 1:
        for place in rng.integers(0, len(data), 5):
            data[place] = rng.integers(256)
    elif kind == 2:
        del data[rng.integers(len(data)) :]
    elif kind == 3:
        start = rng.integers(len(data))
        del data[start : start + rng.integers(1, 60)]
    else:
        start, stop = sorted(rng.integers(0, len(data), 2))
        data[stop:stop] = data[start:stop]
    return bytes(data)
