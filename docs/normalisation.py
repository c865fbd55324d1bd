"""Draws docs/normalisation.png: one rendered line after every step of its normalisation.

`python docs/normalisation.py` in the project's folder; the steps are those of core/image.py.
"""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from htr_pipeline.core.image import ImageConfig, normalise_line
from htr_pipeline.core.synthesis import draw_style, render_line
from htr_pipeline.io.importers.demo import demo_font


def badly_lit_negative() -> np.ndarray:
    """(height, width) uint8 image of a slanted hand: light on dark, and darker to the right."""
    rng = np.random.default_rng(4)
    style = replace(draw_style(rng, demo_font("kalam")), slant=0.45, ink=90.0, paper=225.0, grain=3.0, rule=0.0)
    line = render_line("Every line becomes ink on even paper", style, rng)
    light = np.linspace(1.0, 0.45, line.shape[1])[None, :]
    return 255 - (line * light).astype(np.uint8)


def main() -> None:
    """Writes the picture."""
    line = badly_lit_negative()
    off = dict.fromkeys(("find_polarity", "even_paper", "stretch_contrast", "even_size", "deslant"), False)
    steps = [
        ("one height, ink high", {}),
        ("find_polarity", {"find_polarity": True}),
        ("even_paper", {"even_paper": True}),
        ("stretch_contrast", {"stretch_contrast": True}),
        ("even_size", {"even_size": True}),
        ("deslant", {"deslant": True}),
        ("binarise", {"binarise": True}),
    ]
    pictures, settings = [("as read, grey", line)], dict(off)
    for name, step in steps:
        settings |= step
        pictures.append((name, 255 - normalise_line(line, ImageConfig(**settings)).pixels.T))
    figure, axes = plt.subplots(len(pictures), 1, figsize=(6.5, 7.1))
    for axis, (name, picture) in zip(axes, pictures, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, loc="left", fontsize=9, family="monospace")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(h_pad=0.3)
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=100)
    Image.open(path).convert("L").quantize(24).save(path, optimize=True)


if __name__ == "__main__":
    main()
