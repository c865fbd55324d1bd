"""Random distortions of normalised line images, as a writer or a scanner might have made them."""

import dataclasses
import math

import cv2
import numpy as np

from htr_pipeline.core.config import config, setting


@config("augmentation")
class AugmentationConfig:
    """Largest distortions; each line draws its own. All off with enabled: false."""

    enabled: bool = setting(default=True)
    width_scale: float = setting(default=0.15, minimum=0.0, maximum=0.5)  # 0.15: 85 to 115 % of the width
    height_scale: float = setting(default=0.15, minimum=0.0, maximum=0.5)  # down to 85 %, at a random offset
    shear: float = setting(default=0.25, minimum=0.0, maximum=1.0)  # horizontal shift per unit of height
    rotation_degrees: float = setting(default=0.8, minimum=0.0, maximum=5.0)
    waviness: float = setting(default=0.04, minimum=0.0, maximum=0.2)  # of vertical waves, share of the height
    elastic: float = setting(default=0.06, minimum=0.0, maximum=0.2)  # local shifts, share of the height
    stroke_probability: float = setting(default=0.3, minimum=0.0, maximum=1.0)  # strokes made thicker or thinner
    ink_gain: float = setting(default=0.3, minimum=0.0, maximum=0.9)  # ink as faint as 70 %
    noise: float = setting(default=0.04, minimum=0.0, maximum=0.5)  # standard deviation, share of full scale
    final_strength: float = setting(default=0.3, minimum=0.0, maximum=1.0)  # of all these in epochs of the last fifth

    def at(self, done: float) -> "AugmentationConfig":
        """Towards the end of training lines are distorted less, so that they look as those do that will be read.

        Args:
            done: share of the whole training, 0 to 1.
        """
        if done < _FINAL_FROM:
            return self
        names = {field.name for field in dataclasses.fields(self)} - {"enabled", "final_strength"}
        return dataclasses.replace(self, **{name: getattr(self, name) * self.final_strength for name in names})


_FINAL_FROM = 0.8


def augment_line(pixels: np.ndarray, rng: np.random.Generator, config: AugmentationConfig) -> np.ndarray:
    """A distorted copy of a normalised line; its width may change, its height does not.

    Args:
        pixels: (width, height) uint8, ink high.
        rng: source of all randomness.
        config: how far to go.
    """
    if not config.enabled:
        return pixels
    width, height = pixels.shape
    new_width, margin, shear = _draw_size(width, height, rng, config)
    image = _warp(pixels.T, new_width, margin, shear, rng, config)
    if rng.random() < config.stroke_probability:
        operation = cv2.dilate if rng.random() < 0.5 else cv2.erode
        changed = operation(image, _STROKE_KERNELS[rng.integers(len(_STROKE_KERNELS))])
        image = cv2.addWeighted(image, 0.4, changed, 0.6, 0.0)
    values = image * np.float32(rng.uniform(1.0 - config.ink_gain, 1.0))
    if config.noise > 0:
        start = rng.integers(max(_NOISE.size - values.size, 1))
        noise = np.resize(_NOISE[start : start + values.size], values.shape)
        values += noise * np.float32(rng.uniform(0.0, config.noise) * 255.0)
    return np.ascontiguousarray(np.clip(values, 0, 255, out=values).astype(np.uint8).T)


def augmented_width(width: int, height: int, rng: np.random.Generator, config: AugmentationConfig) -> int:
    """The width in pixels that augment_line gives a line of that size, with a generator in the same state."""
    if not config.enabled:
        return width
    new_width, margin, _ = _draw_size(width, height, rng, config)
    return new_width + 2 * margin


def _draw_size(width: int, height: int, rng: np.random.Generator, config: AugmentationConfig) -> tuple[int, int, float]:
    """Width and shear of the ink, and the margin on both sides that keeps sheared letters from being cut."""
    new_width = max(int(width * (1.0 + rng.uniform(-config.width_scale, config.width_scale))), 1)
    shear = rng.uniform(-config.shear, config.shear)
    return new_width, math.ceil(abs(shear) * height / 2.0), shear


# Drawn once: noise of its own for each line would take half the time of all distortions.
_NOISE = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
_STROKE_KERNELS = (
    np.ones((2, 2), np.uint8),
    np.ones((1, 3), np.uint8),
    np.ones((3, 1), np.uint8),
)


def _warp(
    image: np.ndarray, new_width: int, margin: int, shear: float, rng: np.random.Generator, config: AugmentationConfig
) -> np.ndarray:
    """(height, new_width + 2 margin): scaling, offset, shear, rotation, waves and local shifts in one."""
    height, width = image.shape
    scale_y = 1.0 - rng.uniform(0.0, config.height_scale)
    free = height * (1.0 - scale_y)
    offset_y = rng.uniform(0.0, free)
    # Rotating a long line by an angle lifts its ends far off: bound the lift to a tenth of the height.
    slope = math.tan(math.radians(rng.uniform(-config.rotation_degrees, config.rotation_degrees)))
    slope = float(np.clip(slope, -0.1 * height / max(new_width, 1), 0.1 * height / max(new_width, 1)))
    amplitude = rng.uniform(0.0, config.waviness) * height
    wavelength = rng.uniform(2.0, 8.0) * height
    phase = rng.uniform(0.0, 2.0 * math.pi)
    total_width = new_width + 2 * margin
    x = np.arange(total_width, dtype=np.float32) - margin
    y = np.arange(height, dtype=np.float32)[:, None]
    lift = slope * (x - new_width / 2.0) + amplitude * np.sin(2.0 * math.pi * x / wavelength + phase)
    source_y = y - offset_y - lift[None, :]
    source_x = x[None, :] + shear * (y - height / 2.0)
    if config.elastic > 0:
        cell = rng.uniform(0.25, 0.6) * height
        shift = rng.uniform(0.0, config.elastic) * height
        source_y += _smooth_field(height, total_width, cell, rng) * shift
        source_x += _smooth_field(height, total_width, cell, rng) * shift
    source_y /= scale_y
    source_x *= width / new_width
    return cv2.remap(image, source_x, source_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def _smooth_field(height: int, width: int, cell: float, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float32 of -1 to 1, drawn at points about `cell` pixels apart, interpolated between them."""
    points = rng.random((round(height / cell) + 2, round(width / cell) + 2), dtype=np.float32)
    return cv2.resize(2.0 * points - 1.0, (width, height), interpolation=cv2.INTER_LINEAR)
