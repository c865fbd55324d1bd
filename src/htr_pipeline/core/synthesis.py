"""Handwritten lines rendered from fonts: each writer is a font with habits of its own.

A line is drawn on a canvas twice as large, word by word or, where the font's letters do not join, letter by letter.
One warp then slants it, lets its baseline drift and wave, makes no two letters quite alike, and brings it to its final
size; pen, ink and paper follow as arithmetic on the small image.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SUPERSAMPLING = 2.0
_EDGE_SIGMA = 0.65  # final pixels; blur under which the edges of strokes are moved
_EDGE_SLOPE = 1 / (_EDGE_SIGMA * math.sqrt(2 * math.pi))  # of a blurred edge, per pixel


@dataclass(frozen=True)
class Font:
    """A handwriting font and what the drawing must know of it.

    Attributes:
        name: what to call it in tables.
        paths: font files of similar weights; a writer uses one of them.
        weights: smallest and largest weight of a variable font that still looks like a pen's.
        joined: its letters join, so that space between them would tear words apart.
    """

    name: str
    paths: tuple[Path, ...]
    weights: tuple[int, int] | None = None
    joined: bool = False


@dataclass(frozen=True)
class WriterStyle:
    """One writer's habits. Lengths are in pixels of the final image unless another unit is named.

    Attributes:
        font_path: font file.
        weight: of a variable font; None for others.
        joined: the font's letters join.
        x_height: height of a lower-case x.
        aspect: width of the letters over their natural width.
        slant: shear, as the tangent of the angle; positive leans to the right.
        letter_spacing: extra space between letters that do not join, in x-heights.
        word_spacing: width of a space, in x-heights.
        jitter: irregularity of single letters and words, in x-heights.
        wave_height: amplitude of the baseline's waves.
        wave_length: of the baseline's waves.
        drift: rise of the baseline over its length, as a tangent.
        stroke: shift of the edge of every stroke; positive thickens.
        pressure: how much the stroke's edge wanders along the line.
        ink: grey level of the ink, 0 black.
        ink_texture: share of the ink that the pen leaves out here and there.
        blur: sigma of the optics.
        paper: grey level of the paper, 255 white.
        shading: depth of slow changes of the paper's brightness, in grey levels.
        grain: standard deviation of the paper's grain, in grey levels.
        margins: left, top, right and bottom; room around the ink and around the reach of the font's tall letters.
        rule: contrast of a ruled line under the text, in grey levels; 0 for blank paper.
    """

    font_path: Path
    weight: int | None
    joined: bool
    x_height: float
    aspect: float
    slant: float
    letter_spacing: float
    word_spacing: float
    jitter: float
    wave_height: float
    wave_length: float
    drift: float
    stroke: float
    pressure: float
    ink: float
    ink_texture: float
    blur: float
    paper: float
    shading: float
    grain: float
    margins: tuple[int, int, int, int]
    rule: float


def draw_style(rng: np.random.Generator, font: Font) -> WriterStyle:
    """The habits of one more writer.

    Args:
        rng: decides everything.
        font: the hand that the writer starts from.
    """
    path = font.paths[rng.integers(len(font.paths))]
    weight = int(rng.integers(font.weights[0], font.weights[1] + 1)) if font.weights else None
    x_height = rng.uniform(17.0, 23.0)
    left, top, right, bottom = (int(margin) for margin in rng.integers((5, 3, 5, 3), (18, 9, 18, 9)))
    # Strokes tend to a pen's width, whatever the font: markers are thinned, as far as their hairlines bear it. A thin
    # stroke does not reach full ink once it is blurred; the level that is cut out of it must lie well below its peak.
    thin, usual = (width * x_height for width in _stroke_widths(path, weight))
    wanted = x_height * rng.uniform(0.11, 0.19)
    peak = math.erf(thin / (2 * math.sqrt(2) * _EDGE_SIGMA))
    thinnest = (0.5 - 0.6 * peak) / _EDGE_SLOPE
    return WriterStyle(
        font_path=path,
        weight=weight,
        joined=font.joined,
        x_height=x_height,
        aspect=rng.uniform(0.88, 1.15),
        slant=rng.normal(0.02, 0.12),
        letter_spacing=0.0 if font.joined else rng.uniform(-0.04, 0.14),
        word_spacing=rng.uniform(0.55, 1.05),
        jitter=rng.uniform(0.02, 0.07),
        wave_height=rng.uniform(0.0, 1.8),
        wave_length=rng.uniform(120.0, 400.0),
        drift=rng.normal(0.0, 0.006),
        stroke=max(thinnest, min((wanted - usual) / 2, 0.4)),
        pressure=rng.uniform(0.05, 0.25),
        ink=rng.uniform(15.0, 95.0),
        ink_texture=rng.uniform(0.0, 0.35),
        blur=rng.uniform(0.3, 0.8),
        paper=rng.uniform(205.0, 250.0),
        shading=rng.uniform(0.0, 22.0),
        grain=rng.uniform(0.5, 3.0),
        margins=(left, top, right, bottom),
        rule=rng.uniform(15.0, 45.0) if rng.random() < 0.15 else 0.0,
    )


def render_line(text: str, style: WriterStyle, rng: np.random.Generator) -> np.ndarray:
    """(height, width) uint8 grey image of the text, dark ink on light paper; no ink is cut off.

    Args:
        text: at least one visible character, all of them in the font (see missing_characters).
        style: the writer's habits.
        rng: decides what differs between two lines of the same writer.

    Raises:
        ValueError: nothing to draw.
    """
    canvas, baseline_row = _draw_words(text, style, rng)
    if not canvas.any():
        raise ValueError(f"Nothing to draw: {text!r} has no visible character in {style.font_path.name}.")
    ink, baseline = _warp(canvas, baseline_row, style, rng)
    return _develop(ink, baseline, style, rng)


def missing_characters(font: Font, text: str) -> str:
    """Characters of the text that some file of the font lacks, each once, in code point order."""
    missing = set()
    for path in font.paths:
        # FreeType draws the glyph "not defined" for what is not in the font; U+FFFF is in none.
        face = _face(path, None, 32)
        undefined = _glyph(face, "\uffff")
        missing |= {c for c in set(text) if not c.isspace() and _glyph(face, c) == undefined}
    return "".join(sorted(missing))


def _glyph(face: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = face.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=64)
def _face(path: Path, weight: int | None, size: float) -> ImageFont.FreeTypeFont:
    """The font at a size. Basic layout: Raqm's comes from a system library that not every machine has."""
    face = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    if weight is not None:
        face.set_variation_by_axes([weight])
    return face


@functools.lru_cache(maxsize=64)
def _x_height(path: Path, weight: int | None) -> float:
    """Height of the letter x over the font's size."""
    _, top, _, bottom = _face(path, weight, 400).getbbox("x", anchor="ls")
    return (bottom - top) / 400


@functools.lru_cache(maxsize=64)
def _stroke_widths(path: Path, weight: int | None) -> tuple[float, float]:
    """Thin and usual width of a stroke over the x-height, from the distances of the strokes' ridges to their edges."""
    face = _face(path, weight, 200)
    _, top, right, bottom = face.getbbox("nodule", anchor="ls")
    image = Image.new("L", (math.ceil(right) + 40, math.ceil(bottom - top) + 40))
    ImageDraw.Draw(image).text((20, 20 - top), "nodule", font=face, fill=255, anchor="ls")
    distance = cv2.distanceTransform((np.asarray(image) > 127).astype(np.uint8), cv2.DIST_L2, 5)
    ridge = (distance > 0) & (distance == cv2.dilate(distance, np.ones((3, 3), np.uint8)))
    thin, usual = np.quantile(2 * distance[ridge], (0.1, 0.5)) / (200 * _x_height(path, weight))
    return float(thin), float(usual)


def _writer_face(style: WriterStyle) -> ImageFont.FreeTypeFont:
    """The writer's font at the size of the canvas."""
    size = style.x_height * _SUPERSAMPLING / _x_height(style.font_path, style.weight)
    return _face(style.font_path, style.weight, size)


@functools.lru_cache(maxsize=64)
def _reach(style: WriterStyle) -> tuple[float, float]:
    """How far letters reach above and below the baseline, on the canvas; a font of capitals gets the usual room."""
    x_height = style.x_height * _SUPERSAMPLING
    _, top, _, bottom = _writer_face(style).getbbox("bdhklpqgy", anchor="ls")
    return max(-top, 1.9 * x_height), max(bottom, 0.75 * x_height)


def _draw_words(text: str, style: WriterStyle, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(height, width) uint8 ink on an enlarged canvas with room on all sides, and the row of the baseline."""
    x_height = style.x_height * _SUPERSAMPLING
    face = _writer_face(style)
    above, below = _reach(style)
    room = 2 * x_height  # swashes and brackets reach further than that
    pieces: list[tuple[float, float, str]] = []
    x = room
    for word in text.split():
        y = rng.normal(0.0, style.jitter * 0.5) * x_height
        if style.joined:
            pieces.append((x, y, word))
            x += face.getlength(word)
        else:
            # Positions by prefix keep the kerning.
            starts = [face.getlength(word[: end + 1]) - face.getlength(word[end]) for end in range(len(word))]
            steps = style.letter_spacing + rng.normal(0.0, style.jitter * 0.5, len(word))
            offsets = np.cumsum(steps) * x_height
            wobble = y + rng.normal(0.0, style.jitter * 0.6, len(word)) * x_height
            pieces += [(x + s + o, w, c) for s, o, w, c in zip(starts, offsets, wobble, word, strict=True)]
            x += face.getlength(word) + offsets[-1]
        x += x_height * style.word_spacing * rng.uniform(0.8, 1.25)
    baseline = room + above
    canvas = Image.new("L", (math.ceil(x + room), math.ceil(baseline + below + room)))
    draw = ImageDraw.Draw(canvas)
    for x, y, piece in pieces:
        draw.text((x, baseline + y), piece, font=face, fill=255, anchor="ls")
    return np.asarray(canvas), baseline


def _warp(
    canvas: np.ndarray, baseline_row: float, style: WriterStyle, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The ink, 0 to 1, at its final size with margins, and the row of the baseline in each column."""
    scale_x, scale_y = style.aspect / _SUPERSAMPLING, 1 / _SUPERSAMPLING
    rows, columns = np.flatnonzero(canvas.any(axis=1)), np.flatnonzero(canvas.any(axis=0))
    left, right = columns[0] * scale_x, (columns[-1] + 1) * scale_x
    above, below = _reach(style)
    above = max(baseline_row - rows[0], above) * scale_y
    below = max(rows[-1] + 1 - baseline_row, below) * scale_y

    # Where the ink can move to: shear, drift, waves and the letters' own wobble.
    width = right - left
    wobble = style.jitter * style.x_height
    lift = style.wave_height + abs(style.drift) * width / 2 + 1.5 * wobble + 1
    shear_right = max(style.slant * above, -style.slant * below, 0.0) + 1.5 * wobble + 1
    shear_left = max(-style.slant * above, style.slant * below, 0.0) + 1.5 * wobble + 1
    margin_left, margin_top, margin_right, margin_bottom = style.margins
    origin_x = margin_left + shear_left
    origin_y = margin_top + lift + above
    shape = (
        math.ceil(origin_y + below + lift + margin_bottom),
        math.ceil(origin_x + width + shear_right + margin_right),
    )

    x = np.arange(shape[1], dtype=np.float32)
    y = np.arange(shape[0], dtype=np.float32)[:, None]
    phase = rng.uniform(0, 2 * math.pi)
    baseline = origin_y - style.drift * (x - shape[1] / 2)
    baseline += style.wave_height * np.sin(2 * math.pi * x / style.wave_length + phase).astype(np.float32)
    depth = y - baseline + wobble * _smooth_noise(rng, shape, style.x_height)
    source_x = x - origin_x + left + style.slant * depth + wobble * _smooth_noise(rng, shape, style.x_height)
    ink = cv2.remap(
        cv2.GaussianBlur(canvas, (0, 0), _EDGE_SIGMA * _SUPERSAMPLING),
        (source_x / scale_x).astype(np.float32),
        (depth / scale_y + baseline_row).astype(np.float32),
        cv2.INTER_LINEAR,
    )
    return ink.astype(np.float32) / 255, baseline


def _develop(ink: np.ndarray, baseline: np.ndarray, style: WriterStyle, rng: np.random.Generator) -> np.ndarray:
    """(height, width) uint8 grey image of the ink on the writer's paper."""
    shape = ink.shape
    # A blurred edge is 0.5 where the sharp edge was and 0.5 - distance * slope outside it.
    level = 0.5 - _EDGE_SLOPE * (style.stroke + style.pressure * _smooth_noise(rng, shape, 30.0))
    ink = np.clip((ink - np.clip(level, 0.2, 0.8)) * 2.5 + 0.5, 0, 1)
    gaps = style.ink_texture * (0.6 * _smooth_noise(rng, shape, 14.0) + 0.5 * _smooth_noise(rng, shape, 1.5))
    ink *= 1 - np.clip(gaps, 0, 0.6)
    ink = cv2.GaussianBlur(ink, (0, 0), style.blur)

    along = _smooth_noise(rng, (1, shape[1]), 150.0)
    across = rng.uniform(-1, 1) * np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
    paper = style.paper - style.shading * (0.5 + 0.25 * (along + across))
    if style.rule:
        distance = np.arange(shape[0], dtype=np.float32)[:, None] - (baseline.mean() + 2)
        paper -= style.rule * np.exp(-(distance**2))
    paper += style.grain * _smooth_noise(rng, shape, 1.2)
    image = paper + (style.ink - paper) * ink
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """(height, width) float32 noise of about unit deviation, within +-1.5, that varies over `scale` pixels."""
    coarse = rng.standard_normal((int(shape[0] / scale) + 2, int(shape[1] / scale) + 2), dtype=np.float32)
    # Linear is fast where cells are small; where they are large, its creases would show.
    smoothing = cv2.INTER_LINEAR if scale < 100 else cv2.INTER_CUBIC
    return np.clip(cv2.resize(coarse, shape[::-1], interpolation=smoothing), -1.5, 1.5)
