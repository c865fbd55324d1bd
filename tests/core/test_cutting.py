import math
import time

import cv2
import numpy as np
import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.cutting import cut_line, line_band

PAPER = 200
INK = 40


def page(width=900, height=300):
    """Paper with a grain, so that nothing is exactly even."""
    noise = np.random.default_rng(0).normal(0, 2, (height, width))
    return np.clip(PAPER + noise, 0, 255).astype(np.uint8)


def band(points, above=30, below=14):
    """Polygon around a baseline."""
    return [[x, y - above] for x, y in points] + [[x, y + below] for x, y in reversed(points)]


def draw_marks(grey, points):
    """Squares that stand on the baseline, 12 pixels high, every 40 pixels of x."""
    xs, ys = np.array(points, float).T
    for x in np.arange(xs.min() + 20, xs.max() - 10, 40):
        y = round(float(np.interp(x, xs, ys)))
        grey[y - 12 : y, round(x) : round(x) + 12] = INK


def ink_rows(line):
    return np.flatnonzero((line < 120).any(axis=1))


def test_level_line_keeps_its_pixels():
    grey = page()
    baseline = [[50, 150], [450, 150]]
    draw_marks(grey, baseline)
    line = cut_line(grey, band(baseline), baseline)
    inside = grey[120:164, 50:450]
    offset = cv2.matchTemplate(line, inside[5:-5, 5:-5], cv2.TM_SQDIFF).min()
    assert offset <= 1.0 * inside.size  # rounding of one grey step a pixel at most


@pytest.mark.parametrize("slope", [-0.3, -0.05, 0.05, 0.3])
def test_slanting_line_is_turned_level(slope):
    grey = page(height=500)
    baseline = [[50, 250], [650, 250 + 600 * slope]]
    draw_marks(grey, baseline)
    line = cut_line(grey, band(baseline), baseline)
    # Marks are 12 pixels high and were drawn upright: turned, a corner of them rises by less than 12 * slope.
    assert np.ptp(ink_rows(line)) <= 12 + 12 * abs(slope) + 3
    assert line.shape[1] == pytest.approx(600 * math.hypot(1, slope), abs=30 * abs(slope) * 2 + 8)


def test_curved_line_is_straightened():
    grey = page(height=500)
    baseline = [[x, round(250 + 60 * math.sin(x / 150))] for x in range(50, 851, 25)]
    draw_marks(grey, baseline)
    line = cut_line(grey, band(baseline), baseline)
    assert np.ptp(ink_rows(line)) <= 22
    assert line.shape[0] < 90


def test_corner_of_the_baseline_keeps_the_line_whole():
    baseline = [[50, 150], [400, 150], [800, 260]]
    grey = page(height=400)
    cv2.polylines(grey, [np.array(baseline) - (0, 6)], False, INK, 3)
    line = cut_line(grey, band(baseline), baseline)
    assert (line[:, 10:-10].min(axis=0) < 120).all()


def test_neighbours_ink_becomes_paper_without_an_edge():
    grey = page()
    baseline = [[50, 150], [450, 150]]
    grey[100:118] = INK
    grey[168:180] = INK
    line = cut_line(grey, band(baseline), baseline)
    assert line.min() > PAPER - 20
    assert line.max() < PAPER + 20


def test_fill_follows_the_shade_of_the_paper():
    grey = np.tile(np.linspace(120, 240, 900), (300, 1)).astype(np.uint8)
    baseline = [[50, 150], [850, 150]]
    outline = [[50, 120], [450, 140], [850, 120], [850, 164], [50, 164]]
    line = cut_line(grey, outline, baseline).astype(int)
    assert np.abs(line[3] - line[-6]).max() <= 20  # of the 107 by which the paper changes


def test_light_ink_on_dark_paper_is_filled_dark():
    grey = page()
    baseline = [[50, 150], [450, 150]]
    draw_marks(grey, baseline)
    outline = [[50, 120], [250, 140], [450, 120], [450, 164], [50, 164]]
    dark = cut_line(255 - grey, outline, baseline)
    np.testing.assert_allclose(dark.astype(int), 255 - cut_line(grey, outline, baseline).astype(int), atol=4)


def test_polygon_longer_than_the_baseline_is_cut_whole():
    baseline = [[150, 150], [350, 150]]
    _, width = cut_line(page(), band([[50, 150], [450, 150]]), baseline).shape
    assert width == pytest.approx(400, abs=6)


def test_baseline_longer_than_the_polygon_adds_nothing():
    _, width = cut_line(page(), band([[150, 150], [350, 150]]), [[50, 150], [450, 150]]).shape
    assert width == pytest.approx(200, abs=6)


def test_tip_of_a_far_flourish_is_cut_off():
    flat = [[50, 120], [450, 120], [450, 164], [50, 164]]
    baseline = [[50, 150], [450, 150]]
    spiked = [[50, 120], [100, 120], [105, 0], [110, 120], *flat[1:]]
    assert len(cut_line(page(), flat, baseline)) == 48
    assert 60 < len(cut_line(page(), spiked, baseline)) < 90


def test_usual_rise_of_letters_stays():
    outline = [[50, 120], [100, 120], [105, 100], [110, 120], [450, 120], [450, 164], [50, 164]]
    assert len(cut_line(page(), outline, [[50, 150], [450, 150]])) == 68


@pytest.mark.parametrize("baseline", [None, [[100, 100]], [[100, 100], [100, 100]], []])
def test_polygon_alone_is_cut_along_its_main_axis(baseline):
    grey = page(height=500)
    points = [[50, 200], [650, 260]]
    draw_marks(grey, points)
    line = cut_line(grey, band(points), baseline)
    assert np.ptp(ink_rows(line)) <= 17


@pytest.mark.parametrize(
    "outline", [[[50, 50], [100, 50], [100, 90], [50, 90]], [[50, 50], [80, 50], [80, 250], [50, 250]]]
)
def test_short_or_upright_box_is_not_turned(outline):
    height, width = cut_line(page(), outline, None).shape
    assert (width, height) == (outline[1][0] - 50 + 4, outline[2][1] - 50 + 4)


def test_baseline_alone_gets_a_band_of_a_usual_height():
    line = cut_line(page(height=900), None, [[50, 450], [450, 450]])
    assert 25 <= line.shape[0] <= 45
    assert line.shape[1] == pytest.approx(400, abs=6)


def test_band_lies_more_above_than_below_the_baseline():
    outline = np.array(line_band([[50, 450], [450, 450]], 100))
    assert outline[:, 1].min() < 450 - 60
    assert 450 + 20 < outline[:, 1].max() < 450 + 50


def test_baseline_drawn_from_right_to_left_gives_the_same_line():
    grey = page()
    baseline = [[50, 150], [450, 160]]
    draw_marks(grey, baseline)
    outline = band(baseline)
    np.testing.assert_array_equal(cut_line(grey, outline, baseline[::-1]), cut_line(grey, outline, baseline))


@pytest.mark.parametrize(
    "outline",
    [
        [[50, 120], [450, 120], *([x, 165 - 2 * (x // 20 % 2)] for x in range(450, 40, -20))],  # many points below
        [[50, 130], [450, 130], [450, 170], [50, 170]],  # the baseline runs through the middle
    ],
)
def test_points_below_the_baseline_do_not_turn_a_line_that_was_drawn_from_right_to_left(outline):
    grey = page()
    baseline = [[50, 150], [450, 150]]
    draw_marks(grey, baseline)
    np.testing.assert_array_equal(cut_line(grey, outline, baseline[::-1]), cut_line(grey, outline, baseline))


def test_line_on_its_head_is_turned_by_its_baseline():
    grey = page()
    baseline = [[50, 150], [450, 150]]
    draw_marks(grey, baseline)
    outline = band(baseline)
    height, width = grey.shape
    turned = [[width - 1 - x, height - 1 - y] for x, y in outline]
    upright = cut_line(grey, outline, baseline)
    line = cut_line(grey[::-1, ::-1], turned, [[width - 1 - x, height - 1 - y] for x, y in baseline])
    np.testing.assert_allclose(line.astype(int), upright.astype(int), atol=3)


def test_upright_line_follows_its_baseline():
    line = cut_line(page(300, 900), [[100, 50], [144, 50], [144, 450], [100, 450]], [[114, 450], [114, 50]])
    assert line.shape[1] == pytest.approx(400, abs=6)
    assert line.shape[0] == pytest.approx(44, abs=6)


def test_part_outside_the_page_is_paper():
    grey = page()
    grey[:, :3] = INK  # the scanner's black edge
    line = cut_line(grey, [[-80, 120], [300, 120], [300, 164], [-80, 164]], [[-80, 150], [300, 150]])
    assert line.shape[1] == pytest.approx(380, abs=6)
    assert line[:, :70].min() > PAPER - 30


@pytest.mark.parametrize(
    ("outline", "baseline", "message"),
    [
        (None, None, "neither polygon nor baseline"),
        (None, [[5, 5]], "baseline: it starts and ends at the same point"),
        ([[10, 10], [20, 20]], None, "polygon: 2 different points without an area"),
        ([[10, 10], [20, 10], [30, 10]], [[0, 10], [40, 10]], "polygon: 3 different points without an area"),
        ([[10, 10], [20, math.nan], [30, 30]], None, "a coordinate is not a number"),
        ([[10, 10], [2e6, 10], [30, 30]], None, "beyond 1000000 pixels"),
        ([[10, 10, 1], [20, 10, 1], [30, 30, 1]], None, r"got an array of shape \(3, 3\)"),
        ([[1000, 10], [1100, 10], [1100, 50]], None, "x 1000 to 1100.*outside the page of 900 x 300"),
        ([[10, 10], [100, 10], [100, 40], [10, 40]], [[10, 200], [100, 200]], "158 pixels from the polygon"),
        ([[0, 0], [50000, 0], [50000, 100], [0, 100]], None, "50004 x 104 pixels large. At most 32000 a side"),
        ([[0, 0], [9000, 0], [9000, 8000], [0, 8000]], None, "9004 x 8004 pixels large. At most .* 20000000 in all"),
        ([[0, 0], [100, 0], [100, 40], [0, 40]], [[0, 0], [900000, 0]], "900000 pixels long"),
    ],
)
def test_lines_that_cannot_be_cut_say_why(outline, baseline, message):
    with pytest.raises(UserError, match=message):
        cut_line(page(), outline, baseline)


def test_any_geometry_is_cut_or_refused():
    rng = np.random.default_rng(2)
    grey = page(200, 100)
    num_cut = 0
    for _ in range(300):
        outline = rng.integers(-50, 250, (rng.integers(0, 12), 2)).tolist()
        baseline = rng.integers(-50, 250, (rng.integers(0, 6), 2)).tolist() if rng.random() < 0.6 else None
        try:
            line = cut_line(grey, outline, baseline)
        except UserError:
            continue
        num_cut += 1
        assert line.dtype == np.uint8
        assert line.ndim == 2
        assert line.size
    assert num_cut > 50


def test_polygon_that_runs_to_and_fro_costs_little():
    rng = np.random.default_rng(3)
    outline = rng.integers(0, 4000, (5000, 2)) * (5, 0.01)
    grey = page(20_000, 40)
    start = time.process_time()
    cut_line(grey, outline.tolist(), (rng.integers(0, 40, (2000, 2)) * (500, 1)).tolist()[:3])
    assert time.process_time() - start < 5
