"""Lines to padded batches of similar width: shuffled in bounded memory, the same for the same seed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from htr_pipeline.core.augmentation import AugmentationConfig, augment_line, augmented_width
from htr_pipeline.core.image import DOWNSAMPLING
from htr_pipeline.core.text import Charset, required_frames

# Few distinct shapes keep TensorFlow's kernels and XLA's compilations few; 64 pixels waste about 5 % of a line.
WIDTH_MULTIPLE_PIXELS = 64
LABEL_MULTIPLE = 32


class Line(NamedTuple):
    """A normalised line image, (width, height) uint8 with ink high, and its text."""

    line_id: str
    pixels: np.ndarray
    text: str


class Batch(NamedTuple):
    """Padded arrays of B lines; filler rows have no frames and no labels, hence no loss and no gradient.

    Attributes:
        pixels: (B, W, height) uint8, zero to the right of each line.
        width_pixels: (B,) int32 true widths; 0 marks a filler row.
        labels: (B, N) int32 classes, right-padded with zeros.
        label_length: (B,) int32.
    """

    pixels: np.ndarray
    width_pixels: np.ndarray
    labels: np.ndarray
    label_length: np.ndarray


def training_batches(
    read_lines: Callable[[np.random.Generator], Iterable[Line]],
    charset: Charset,
    augmentation: AugmentationConfig,
    *,
    batch_size: int,
    buffer_lines: int,
    seed: int,
    epoch: int,
    skip_batches: int = 0,
    rows: slice = slice(None),
) -> Iterator[tuple[list[Line], Batch]]:
    """One epoch of augmented batches, each with all its lines; order and distortions are fixed by seed and epoch.

    Args:
        read_lines: yields all training lines in an order drawn from the generator that it is given.
        charset: encodes the texts.
        augmentation: distortions.
        batch_size: lines a batch; the last one is filled up with empty rows.
        buffer_lines: how many lines are shuffled and sorted by width at a time: the bound of memory.
        seed: of the run.
        epoch: number of the pass over the data.
        skip_batches: batches already trained on, left out at the beginning.
        rows: of each batch, those that are made; another process makes the others.
    """
    num_rows = len(range(batch_size)[rows])
    rng = np.random.default_rng([seed, epoch])

    def new_width(line: Line) -> int:
        width, height = line.pixels.shape
        return augmented_width(width, height, _generator(line, seed, epoch), augmentation)

    for index, lines in enumerate(_similar_widths(read_lines(rng), new_width, batch_size, buffer_lines, rng)):
        if index >= skip_batches:
            augmented = [_augmented(line, augmentation, seed, epoch) for line in lines[rows]]
            # The lines of the last batch may all be other processes': one without frames stands for none.
            empty = lines[0]._replace(pixels=lines[0].pixels[:0], text="")
            yield lines, collate(augmented or [empty], charset, num_rows)


def ordered_batches(lines: Iterable[Line], charset: Charset, batch_size: int) -> Iterator[tuple[list[Line], Batch]]:
    """Batches of the lines as they come, without distortions, each with its lines; the last one is filled up."""
    pending: list[Line] = []
    for line in lines:
        pending.append(line)
        if len(pending) == batch_size:
            yield pending, collate(pending, charset, batch_size)
            pending = []
    if pending:
        yield pending, collate(pending, charset, batch_size)


def collate(lines: list[Line], charset: Charset, batch_size: int) -> Batch:
    """Pads lines to one batch of batch_size rows. Characters that the charset lacks get no label."""
    encoded = [charset.encode(charset.known(line.text)) for line in lines]
    width = _round_up(max(line.pixels.shape[0] for line in lines), WIDTH_MULTIPLE_PIXELS)
    num_labels = _round_up(max(max(map(len, encoded)), 1), LABEL_MULTIPLE)
    batch = Batch(
        pixels=np.zeros((batch_size, width, lines[0].pixels.shape[1]), np.uint8),
        width_pixels=np.zeros(batch_size, np.int32),
        labels=np.zeros((batch_size, num_labels), np.int32),
        label_length=np.zeros(batch_size, np.int32),
    )
    for row, (line, labels) in enumerate(zip(lines, encoded, strict=True)):
        batch.pixels[row, : line.pixels.shape[0]] = line.pixels
        batch.width_pixels[row] = line.pixels.shape[0]
        batch.labels[row, : len(labels)] = labels
        batch.label_length[row] = len(labels)
    return batch


def _generator(line: Line, seed: int, epoch: int) -> np.random.Generator:
    """Of a line's distortion: seeded by the line itself, so that it does not depend on the batch."""
    return np.random.default_rng([seed, epoch, zlib.crc32(line.line_id.encode())])


def _augmented(line: Line, config: AugmentationConfig, seed: int, epoch: int) -> Line:
    pixels = augment_line(line.pixels, _generator(line, seed, epoch), config)
    too_narrow = pixels.shape[0] < DOWNSAMPLING * required_frames(line.text)
    return line if too_narrow else line._replace(pixels=pixels)


def _similar_widths(
    lines: Iterable[Line],
    new_width: Callable[[Line], int],
    batch_size: int,
    buffer_lines: int,
    rng: np.random.Generator,
) -> Iterator[list[Line]]:
    """Groups of batch_size lines of similar new width; only the very last group is smaller."""
    buffer: list[Line] = []

    def groups(last: bool) -> Iterator[list[Line]]:
        nonlocal buffer
        # A little noise in the sort key: the same lines do not meet in every epoch, also without augmentation.
        key = np.array([new_width(line) for line in buffer]) * rng.uniform(0.98, 1.02, len(buffer))
        whole = len(buffer) if last else len(buffer) - len(buffer) % batch_size
        chosen = rng.permutation(len(buffer))
        kept, rest = chosen[:whole], chosen[whole:]
        kept = kept[np.argsort(key[kept], kind="stable")]
        cut = [kept[start : start + batch_size] for start in range(0, whole, batch_size)]
        lines_now, buffer = buffer, [buffer[index] for index in rest]
        for index in rng.permutation(len(cut)):
            yield [lines_now[member] for member in cut[index]]

    for line in lines:
        buffer.append(line)
        if len(buffer) >= max(buffer_lines, 2 * batch_size):
            yield from groups(last=False)
    if buffer:
        yield from groups(last=True)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
