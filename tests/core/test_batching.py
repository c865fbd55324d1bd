import numpy as np
import pytest

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.batching import Line, collate, ordered_batches, training_batches
from htr_pipeline.core.text import Charset

CHARSET = Charset("abc")
OFF = AugmentationConfig(enabled=False)


def lines(count):
    rng = np.random.default_rng(0)
    return [
        Line(f"line-{i:03d}", np.full((int(rng.integers(40, 400)), 8), 1 + i % 255, np.uint8), "abc")
        for i in range(count)
    ]


def batches(count, epoch=0, skip=0, buffer_lines=64, seed=5, augmentation=OFF):
    def read(rng):
        return iter(lines(count))

    found = training_batches(
        read,
        CHARSET,
        augmentation,
        batch_size=8,
        buffer_lines=buffer_lines,
        seed=seed,
        epoch=epoch,
        skip_batches=skip,
    )
    return [batch for _, batch in found]


def marks(some):
    """Which lines stand in the batches: each line's pixels hold a value of its own."""
    return [
        int(row[0, 0]) for batch in some for row, width in zip(batch.pixels, batch.width_pixels, strict=True) if width
    ]


@pytest.mark.parametrize("count", [1, 7, 8, 100, 200])
@pytest.mark.parametrize("buffer_lines", [1, 64, 4096])
def test_every_line_comes_once_an_epoch(count, buffer_lines):
    found = batches(count, buffer_lines=buffer_lines)
    assert sorted(marks(found)) == sorted(1 + i % 255 for i in range(count))
    assert len(found) == -(-count // 8)


def test_order_is_fixed_by_seed_and_epoch():
    assert marks(batches(100)) == marks(batches(100))
    assert marks(batches(100)) != marks(batches(100, epoch=1))
    assert marks(batches(100)) != marks(batches(100, seed=6))


def test_an_epoch_goes_on_where_it_was_left():
    whole, rest = (
        batches(100, augmentation=AugmentationConfig()),
        batches(100, skip=5, augmentation=AugmentationConfig()),
    )
    assert len(rest) == len(whole) - 5
    for left, right in zip(whole[5:], rest, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_widths_in_a_batch_are_similar():
    found = batches(256, buffer_lines=256)
    padding = sum(b.pixels.shape[1] * len(b.pixels) for b in found) / sum(b.width_pixels.sum() for b in found)
    assert padding < 1.4, "the distinct widths of random batches would waste far more"


@pytest.mark.parametrize("augmentation", [OFF, AugmentationConfig()])
def test_widths_in_a_batch_are_similar_as_distorted(augmentation):
    found = batches(1024, buffer_lines=1024, augmentation=augmentation)
    padded = sum(len(b.pixels) * max(b.width_pixels) for b in found)
    assert padded < 1.04 * sum(b.width_pixels.sum() for b in found), "sorted by the widths before, it is 1.15"


def test_other_lines_meet_in_another_epoch():
    first, second = ({frozenset(marks([batch])) for batch in batches(255, epoch, buffer_lines=255)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 4


def test_true_lengths_and_filler_rows():
    batch = collate([Line("x", np.ones((70, 8), np.uint8), "aXb")], CHARSET, 3)
    assert batch.pixels.shape == (3, 128, 8)
    assert batch.width_pixels.tolist() == [70, 0, 0]
    assert batch.label_length.tolist() == [2, 0, 0], "X is not in the charset"
    assert batch.labels[0, :2].tolist() == [0, 1]
    assert batch.pixels[0, 70:].max() == 0


def test_ordered_batches_keep_the_order():
    members = [line.line_id for group, _ in ordered_batches(lines(20), CHARSET, 8) for line in group]
    assert members == [line.line_id for line in lines(20)]


def test_a_worker_makes_its_own_rows_of_the_same_batches():
    def batches_of(rows):
        return list(
            training_batches(
                lambda rng: iter(lines(18)),
                CHARSET,
                AugmentationConfig(),
                batch_size=8,
                buffer_lines=64,
                seed=5,
                epoch=0,
                rows=rows,
            )
        )

    whole = batches_of(slice(None))
    halves = batches_of(slice(0, 4)), batches_of(slice(4, 8))
    for (members, batch), *parts in zip(whole, *halves, strict=True):
        for (all_members, part), start in zip(parts, (0, 4), strict=True):
            assert [line.line_id for line in all_members] == [line.line_id for line in members]
            np.testing.assert_array_equal(part.width_pixels, batch.width_pixels[start : start + 4])
            width = part.pixels.shape[1]
            np.testing.assert_array_equal(part.pixels, batch.pixels[start : start + 4, :width])
            assert not batch.pixels[start : start + 4, width:].any()
    # One batch has two lines: nothing for the second worker.
    assert sorted(part.width_pixels.any() for _, part in halves[1]) == [False, True, True]
