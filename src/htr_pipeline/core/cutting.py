"""Text lines cut out of pages: straightened along the baseline, everything outside the polygon laid over with paper."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from htr_pipeline.core.config import UserError

Points = Sequence[Sequence[float]]

# OpenCV's remap addresses pixels with 16 bits.
MAX_SIDE_PIXELS = 32_000
MAX_LINE_PIXELS = 20_000_000
_MAX_COORDINATE = 1_000_000
# Share of the distance between two baselines that the line above and below its own takes.
_ABOVE, _BELOW = 0.75, 0.35
# Lines on a page where nothing tells their distance.
_USUAL_LINES = 30
# A polygon without a baseline is turned upright only if it is this many times as long as high: the direction of a
# shorter one says nothing about its writing.
_MIN_ELONGATION = 3.0
_LEAST_ABOVE = 0.1  # how far above a baseline the middle of a polygon is at least, share of its height
_MARGIN_PIXELS = 2
# How far a single flourish may rise or fall beyond the polygon's usual border, in mean heights of the polygon. More
# would shrink all letters of the line when it is scaled to the network's height.
_MAX_FLOURISH = 0.75
# Bounds on the work for a polygon drawn to make much of it.
_MAX_SAMPLES, _MAX_ANCHORS = 2000, 256


@dataclass(frozen=True)
class _Grid:
    """Where the pixels of a cut line come from.

    Attributes:
        centre: (width, 2) points of the baseline, one pixel apart.
        normal: (width, 2) unit vectors to what is below the line.
        top: distance of the first row from the baseline; negative is above it.
        height: number of rows.
    """

    centre: np.ndarray
    normal: np.ndarray
    top: int
    height: int


def cut_line(page: np.ndarray, polygon: Points | None, baseline: Points | None) -> np.ndarray:
    """(h, w) uint8 grey image of one line, at the page's resolution.

    The line is straightened along its baseline; without one, along the main axis of a long polygon, or not at all.
    What lies outside the polygon (neighbours' ink, the page's edge) becomes the colour of the paper nearby. The height
    is that of the polygon, but the tip of a single flourish far above or below the others is cut off.

    Args:
        page: (H, W) uint8 grey.
        polygon: [x, y] points around the line in pixels of the page; parts outside the page count as paper. None for a
            band around the baseline of a usual line's height.
        baseline: [x, y] points under the letters, or None. One without a length is not looked at where there is a
            polygon. It is taken from left to right, unless it was drawn from right to left over a polygon that says
            that the line stands on its head.

    Raises:
        UserError: neither polygon nor baseline has an extent, they do not belong together, the line lies outside the
            page, or it is larger than MAX_SIDE_PIXELS or MAX_LINE_PIXELS.

    Source: as in kraken's extract_polygons the line follows its baseline; here by normals that turn slowly instead of a
        piecewise affine map, so that no letter breaks where the baseline has a corner.
    """
    if polygon is None:
        if baseline is None:
            raise UserError("the line has neither polygon nor baseline. Draw one of them.")
        polygon = line_band(baseline, page.shape[0] / _USUAL_LINES)
    outline = _checked(polygon, "polygon")
    grid = _plan(outline, baseline)
    steps = np.arange(grid.top, grid.top + grid.height, dtype=np.float32)[:, None]
    map_x = grid.centre[:, 0] + steps * grid.normal[:, 0]  # (h, w)
    map_y = grid.centre[:, 1] + steps * grid.normal[:, 1]  # (h, w)

    left, right = max(int(map_x.min()) - 1, 0), min(int(map_x.max()) + 2, page.shape[1])
    upper, lower = max(int(map_y.min()) - 1, 0), min(int(map_y.max()) + 2, page.shape[0])
    if left >= right or upper >= lower:
        raise UserError(_outside(outline, page))
    if max(right - left, lower - upper) > MAX_SIDE_PIXELS:
        raise UserError(f"the line takes {right - left} x {lower - upper} pixels of the page. {_TOO_LARGE}")
    inside = np.zeros((lower - upper, right - left), np.uint8)
    cv2.fillPoly(inside, [np.rint(outline - (left, upper)).astype(np.int32)], 255)
    if not inside.any():
        raise UserError(_outside(outline, page))
    map_x, map_y = map_x - np.float32(left), map_y - np.float32(upper)
    region = np.ascontiguousarray(page[upper:lower, left:right])
    line = cv2.remap(region, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.remap(inside, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return _lay_paper(line, mask)


def line_band(baseline: Points, spacing_pixels: float) -> list[list[int]]:
    """Polygon of a line that has only a baseline.

    Args:
        baseline: [x, y] points.
        spacing_pixels: distance to the baselines of the neighbouring lines.

    Raises:
        UserError: the baseline has no length.
    """
    points = _left_to_right(_checked(baseline, "baseline"))
    tangent = _unit(points[-1] - points[0])
    below = np.array([-tangent[1], tangent[0]])
    upper, lower = points - below * spacing_pixels * _ABOVE, points + below * spacing_pixels * _BELOW
    band: list[list[int]] = np.rint(np.concatenate([upper, lower[::-1]])).astype(int).tolist()
    return band


_TOO_LARGE = f"At most {MAX_SIDE_PIXELS} a side and {MAX_LINE_PIXELS} in all are cut. Scale the page down."


def _checked(points: Points, kind: str) -> np.ndarray:
    """(n, 2) float64 points without repetitions, of a polygon that has an area or a baseline that has a length."""
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise UserError(f"{kind}: expected [x, y] points, got an array of shape {array.shape}. Draw the line again.")
    if not (np.abs(array) <= _MAX_COORDINATE).all():
        raise UserError(
            f"{kind}: a coordinate is not a number or beyond {_MAX_COORDINATE} pixels. Draw the line again."
        )
    changes = np.any(np.diff(array, axis=0) != 0, axis=1)
    array = array[np.concatenate([[True], changes])] if len(array) else array
    if kind == "polygon" and (len(array) < 3 or np.ptp(array, axis=0).min() < 1):
        raise UserError(f"polygon: {len(array)} different points without an area. Draw the line again.")
    if kind == "baseline" and (len(array) < 2 or np.linalg.norm(array[-1] - array[0]) < 1):
        raise UserError("baseline: it starts and ends at the same point. Draw the line again.")
    return array


def _outside(outline: np.ndarray, page: np.ndarray) -> str:
    (left, upper), (right, lower) = outline.min(axis=0), outline.max(axis=0)
    return (
        f"the line lies at x {left:.0f} to {right:.0f}, y {upper:.0f} to {lower:.0f}, outside the page of "
        f"{page.shape[1]} x {page.shape[0]} pixels. Does the image belong to these coordinates?"
    )


def _plan(outline: np.ndarray, baseline: Points | None) -> _Grid:
    """The grid that covers the polygon along the baseline."""
    try:
        points = None if baseline is None else _checked(baseline, "baseline")
    except UserError:
        points = None
    points = _main_axis(outline) if points is None else _oriented(points, outline)
    length = _length(points)
    body = min(max(abs(cv2.contourArea(outline.astype(np.float32))) / length, 8.0), 1000.0)  # mean height
    if length > 2 * MAX_SIDE_PIXELS:
        raise UserError(f"the baseline is {length:.0f} pixels long. {_TOO_LARGE}")

    # Corners and jitter of the drawn points are smoothed over a letter, the normals over several: they must not cross.
    step = max(body / 16, 1.0)
    knots = _resample(_smooth(_resample(points, step), body / 4 / step), step)
    directions = _smooth(np.gradient(knots, axis=0), body / step)
    centre = _resample(knots, 1.0)
    position = np.linspace(0.0, len(knots) - 1.0, len(centre))
    tangent = _unit(np.stack([np.interp(position, np.arange(len(knots)), axis) for axis in directions.T], axis=1))
    along, across = _line_coordinates(outline, centre, tangent, body)
    start, stop = round(along.min()) - _MARGIN_PIXELS, round(along.max()) + _MARGIN_PIXELS
    top, bottom = -_reach(-across, body) - _MARGIN_PIXELS, _reach(across, body) + _MARGIN_PIXELS
    if max(top, -bottom) > bottom - top:
        raise UserError(
            f"the baseline lies {max(top, -bottom)} pixels from the polygon, which is {bottom - top} high. "
            "They do not belong together: draw the line again."
        )
    width, height = stop - start, bottom - top
    if max(width, height) > MAX_SIDE_PIXELS or width * height > MAX_LINE_PIXELS:
        raise UserError(f"the line is {width} x {height} pixels large. {_TOO_LARGE}")

    positions = np.arange(start, stop)
    nearest = np.clip(positions, 0, len(centre) - 1)
    overhang = (positions - nearest)[:, None]  # the baseline goes straight on where the polygon is longer
    tangent = tangent[nearest]
    centre = (centre[nearest] + overhang * tangent).astype(np.float32)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1).astype(np.float32)
    return _Grid(centre, normal, top, height)


def _oriented(baseline: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """The baseline in reading direction.

    One that was drawn from right to left is of a line that stands on its head if most of the polygon is above it as it
    was drawn, else of one that was drawn from its end.
    """
    turned = _left_to_right(baseline)
    moments = cv2.moments(outline.astype(np.float32))
    if turned is baseline or abs(moments["m00"]) < 1:
        return turned
    centroid = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
    chord = baseline[-1] - baseline[0]
    offset = centroid - _resample(baseline, _length(baseline) / 64).mean(axis=0)
    above = (chord[1] * offset[0] - chord[0] * offset[1]) / np.linalg.norm(chord)
    mean_height = abs(moments["m00"]) / _length(baseline)
    return baseline if above > _LEAST_ABOVE * mean_height else turned


def _left_to_right(baseline: np.ndarray) -> np.ndarray:
    chord = baseline[-1] - baseline[0]
    return baseline[::-1] if chord[0] < 0 and abs(chord[0]) >= abs(chord[1]) else baseline


def _main_axis(outline: np.ndarray) -> np.ndarray:
    """(2, 2) end points of a line through the middle of the polygon, along it where it is long, else horizontal."""
    moments = cv2.moments(outline.astype(np.float32))
    (left, upper), (right, lower) = outline.min(axis=0), outline.max(axis=0)
    centre, direction = np.array([(left + right) / 2, (upper + lower) / 2]), np.array([1.0, 0.0])
    if moments["m00"] >= 1:
        covariance = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]])
        variances, axes = np.linalg.eigh(covariance)
        axis = axes[:, 1] * np.sign(axes[0, 1] or 1.0)
        if variances[1] >= _MIN_ELONGATION**2 * max(variances[0], 0.0) and abs(axis[0]) >= abs(axis[1]):
            centre = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
            direction = axis
    reach = np.abs((outline - centre) @ direction).max()
    return np.stack([centre - reach * direction, centre + reach * direction])


def _resample(points: np.ndarray, step: float) -> np.ndarray:
    """(n, 2) points about `step` apart along the polyline, its ends among them."""
    position = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    wanted = np.linspace(0.0, position[-1], max(round(position[-1] / step) + 1, 2))
    return np.stack([np.interp(wanted, position, points[:, axis]) for axis in (0, 1)], axis=1)


def _length(points: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """(n, 2) values smoothed along the first axis; the ends keep their place."""
    reach = min(int(3 * sigma), len(values) - 1)
    before = 2 * values[0] - values[reach:0:-1]
    after = 2 * values[-1] - values[-2 : -2 - reach : -1]
    padded = np.concatenate([before, values, after])
    size = 2 * max(reach, 1) + 1
    blurred = cv2.GaussianBlur(padded, (1, size), sigmaX=1.0, sigmaY=max(sigma, 1e-3), borderType=cv2.BORDER_REPLICATE)
    return blurred[reach : reach + len(values)].reshape(values.shape)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _line_coordinates(
    outline: np.ndarray, centre: np.ndarray, tangent: np.ndarray, body: float
) -> tuple[np.ndarray, np.ndarray]:
    """Position along the baseline and distance below it, in pixels, of points all along the polygon."""
    closed = np.concatenate([outline, outline[:1]])
    border = np.concatenate([_resample(closed, max(body / 4, _length(closed) / _MAX_SAMPLES)), outline])
    anchors = np.linspace(0, len(centre) - 1, int(np.clip(len(centre) / (body / 2), 2, _MAX_ANCHORS))).astype(int)
    distances = np.linalg.norm(border[:, None] - centre[anchors], axis=2)  # (points, anchors)
    anchor = anchors[distances.argmin(axis=1)]
    offset = border - centre[anchor]
    direction = tangent[anchor]
    along = anchor + (offset * direction).sum(axis=1)
    across = offset[:, 1] * direction[:, 0] - offset[:, 0] * direction[:, 1]
    return along, across


def _reach(across: np.ndarray, body: float) -> int:
    """Distance from the baseline to the last row on its positive side, without the tip of a far flourish."""
    farthest = float(across.max())
    outer = across[across > 0]
    return round(min(farthest, float(np.median(outer)) + _MAX_FLOURISH * body) if len(outer) else farthest)


def _lay_paper(line: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The line with the colour of the paper nearby where the mask is 0, and a soft change between the two.

    The paper is the local mean of what is brighter than the local mean (darker, for light ink on dark paper), of the
    pixels inside the mask, at an eighth of the scale.
    """
    height, width = line.shape
    small_size = (max(width // 8, 1), max(height // 8, 1))
    share_inside = cv2.resize(mask, small_size, interpolation=cv2.INTER_AREA)
    weight = (share_inside > 254).astype(np.float32)
    if not weight.any():
        weight = np.maximum(share_inside, 1).astype(np.float32)
    small = cv2.resize(line, small_size, interpolation=cv2.INTER_AREA).astype(np.float32)
    values = small[weight > 0]
    sigma = max(small_size[1], 2)
    brighter = small >= _local_mean(small, weight, sigma)
    dark_ink = np.median(values) >= values.mean()
    paper = _local_mean(small, weight * (brighter if dark_ink else ~brighter), sigma)
    paper = cv2.resize(paper, (width, height), interpolation=cv2.INTER_LINEAR)
    share = cv2.GaussianBlur(mask, (3, 3), 0).astype(np.float32) * np.float32(1 / 255)
    mixed: np.ndarray = np.rint(paper + share * (line - paper)).astype(np.uint8)
    return mixed


def _local_mean(values: np.ndarray, weight: np.ndarray, sigma: float) -> np.ndarray:
    """(h, w) float32 weighted mean of the values around each pixel; far from any weight, that of all of them."""
    weight = weight.astype(np.float32)
    total = float((values * weight).sum() / max(float(weight.sum()), 1e-6))
    near = cv2.GaussianBlur(weight, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) + 1e-4
    blurred = cv2.GaussianBlur((values - total) * weight, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    mean: np.ndarray = blurred / near + total
    return mean
