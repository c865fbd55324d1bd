"""The page that shows a curator what was found: counts, distributions, checks, and the lines with their images.

It needs nothing from outside. How it looks, and all escaping, is in summary.html.
"""

import base64
import contextlib
import importlib.resources
import io
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined
from PIL import Image

from htr_pipeline.core.config import UserError
from htr_pipeline.io.features import line_images
from htr_pipeline.io.manifest import SPLITS, id_prefixes, image_roots
from htr_pipeline.pipelines.data_validation.facts import count_characters

_MAX_WRITERS = 50
_MAX_CHARACTERS = 300
_THUMBNAIL_PIXELS = (640, 48)
_CHART_PIXELS = (420, 200)


def render_page(
    summary: Mapping[str, Any], kept: pd.DataFrame, lines: pa.Table, findings: pa.Table, num_shown: int
) -> str:
    """One HTML page.

    Args:
        summary: validation_summary.
        kept: facts of the lines that stay.
        lines: all lines, schema MANIFEST, with image_roots in the metadata.
        findings: rejected and warned lines.
        num_shown: lines to show for each reason.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["number"] = lambda number: f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    environment.filters["visible"] = _visible
    template = importlib.resources.files(__package__).joinpath("summary.html").read_text(encoding="utf-8")
    length = kept["text"].str.len().to_numpy(np.int64)
    return environment.from_string(template).render(
        summary=summary,
        writers=_count_writers(kept),
        max_writers=_MAX_WRITERS,
        characters=_count_characters(kept),
        max_characters=_MAX_CHARACTERS,
        chart_pixels=_CHART_PIXELS,
        histograms=[
            _histogram("Characters in a line", length),
            _histogram("Width of the image in pixels", kept["width_pixels"].to_numpy(np.int64)),
        ],
        heat_map=_heat_map(length, kept["frames"].to_numpy(np.int64)),
        gallery=_gallery(kept, lines, findings, num_shown),
    )


def _visible(text: str) -> str:
    """With codes for controls and signs of direction, which would turn what stands around them round."""
    return "".join(f"U+{ord(c):04X}" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


# Counts


def _count_writers(kept: pd.DataFrame) -> dict[str, Any]:
    counts = kept.assign(characters=kept["text"].str.len()).groupby("writer_id")
    writers = counts.agg(split=("writer_splits", "first"), lines=("text", "size"), characters=("characters", "sum"))
    largest = writers.reset_index().sort_values(["lines", "writer_id"], ascending=[False, True], kind="stable")
    return {"num": len(writers), "shown": largest.head(_MAX_WRITERS).to_dict("records")}


def _count_characters(kept: pd.DataFrame) -> dict[str, Any]:
    texts, splits = (pa.chunked_array(pa.array(kept[name], pa.string())) for name in ("text", "split"))
    by_split = {split: count_characters(texts.filter(pc.equal(splits, split))) for split in SPLITS}
    total = sum(by_split.values(), Counter())
    rows = [
        {
            "character": character,
            "code": f"U+{ord(character):04X}",
            "name": unicodedata.name(character, "without a name").lower(),
            "counts": [by_split[split][character] for split in SPLITS],
        }
        for character in sorted(total, key=lambda character: (by_split["train"][character], character))
    ]
    return {"num": len(rows), "shown": rows[:_MAX_CHARACTERS]}


# Charts


def _histogram(title: str, values: np.ndarray) -> dict[str, Any] | None:
    if not len(values):
        return None
    step, num_bins = _bins(values, 40)
    counts = np.bincount(np.minimum(values // step, num_bins - 1), minlength=num_bins)
    width, height = _CHART_PIXELS
    bars = [
        {
            "x": round(index * width / num_bins, 2),
            "width": round(width / num_bins * 0.9, 2),
            "height": round(height * int(count) / int(counts.max()), 2),
            "label": f"{_range(index, step, num_bins, values)}: {count} lines",
        }
        for index, count in enumerate(counts)
    ]
    median = int(np.median(values))
    note = f"median {median}, from {values.min()} to {values.max()}; the highest bar is {counts.max()} lines"
    return {"title": title, "bars": bars, "ticks": _ticks(step, num_bins, width), "note": note}


def _heat_map(characters: np.ndarray, frames: np.ndarray) -> dict[str, Any] | None:
    """Lines by characters (across) and frames (upwards); darker where there are more."""
    if not len(characters):
        return None
    width, height = _CHART_PIXELS[0], 2 * _CHART_PIXELS[1]
    (x_step, num_x), (y_step, num_y) = _bins(characters, 40), _bins(frames, 40)
    places = np.minimum(characters // x_step, num_x - 1) * num_y + np.minimum(frames // y_step, num_y - 1)
    counts = np.bincount(places, minlength=num_x * num_y).reshape(num_x, num_y)
    cells = [
        {
            "x": round(x * width / num_x, 2),
            "y": round(height - (y + 1) * height / num_y, 2),
            "opacity": round(0.15 + 0.85 * math.log1p(counts[x, y]) / math.log1p(counts.max()), 3),
            "label": (
                f"{_range(x, x_step, num_x, characters)} characters, {_range(y, y_step, num_y, frames)} frames: "
                f"{counts[x, y]} lines"
            ),
        }
        for x, y in np.argwhere(counts).tolist()
    ]
    # Where the frames are as many as the characters: below it, CTC has no room for the text.
    reach = min(num_x * x_step, num_y * y_step)
    limit = (round(width * reach / (num_x * x_step), 2), round(height - height * reach / (num_y * y_step), 2))
    return {
        "cells": cells,
        "cell": (round(width / num_x, 2), round(height / num_y, 2)),
        "size": (width, height),
        "limit": limit,
        "x_ticks": _ticks(x_step, num_x, width),
        "y_ticks": _ticks(y_step, num_y, height),
    }


def _bins(values: np.ndarray, most: int) -> tuple[int, int]:
    """A round step and the number of bins from 0; the last bin takes the thousandth that lies beyond."""
    top = max(float(np.quantile(values, 0.999)), 1.0)
    magnitude = 10 ** math.floor(math.log10(max(top / most, 1)))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if top / (factor * magnitude) <= most)
    return step, int(top // step) + 1


def _range(index: int, step: int, num_bins: int, values: np.ndarray) -> str:
    last = index * step + step - 1
    if index == num_bins - 1:
        last = max(last, int(values.max()))
    return f"{index * step}" if last == index * step else f"{index * step} to {last}"


def _ticks(step: int, num_bins: int, length: int) -> list[tuple[float, int]]:
    """Places and numbers of at most about six marks."""
    every = max(1, math.ceil(num_bins / 6))
    return [(round(index * length / num_bins, 2), index * step) for index in range(0, num_bins, every)]


# Gallery


def _gallery(kept: pd.DataFrame, lines: pa.Table, findings: pa.Table, num_shown: int) -> list[dict[str, Any]]:
    """For each reason the first lines with their images; the rest are counted."""
    reasons = sorted(pc.unique(findings["reason"]).to_pylist())
    found = {reason: findings.filter(pc.field("reason") == reason) for reason in reasons}
    shown = {reason: table.slice(0, num_shown).to_pylist() for reason, table in found.items()}
    rows = [row for group in shown.values() for row in group]
    facts = kept[kept["line_id"].isin([row["line_id"] for row in rows])]
    others = {
        reason: dict(zip(facts["line_id"], facts[column], strict=True))
        for reason, column in (("same_image", "same_image"), ("near_duplicate_image", "near_image"))
    }
    for row in rows:
        row["other_line"] = others.get(row["reason"], {}).get(row["line_id"], "")
    line_ids = pa.array([row[name] for row in rows for name in ("line_id", "other_line")], pa.string())
    of_rows = lines.select(["line_id", "source", "image_path", "polygon", "baseline"])
    images = _thumbnails(lines, of_rows.filter(pc.is_in(lines["line_id"], line_ids)).to_pylist())
    # What was rejected at the import has no image but its file; a line with the same id may have been kept.
    files = _thumbnails_of_files(lines, {row["file"] for row in rows if row["stage"] == "import"})
    for row in rows:
        row["image"] = files.get(row["file"]) if row["stage"] == "import" else images.get(row["line_id"])
        row["other_image"] = images.get(row["other_line"])
    return [{"reason": reason, "num": found[reason].num_rows, "shown": group} for reason, group in shown.items()]


def _thumbnails_of_files(lines: pa.Table, files: set[str | None]) -> dict[str, str]:
    """Small images of files, by the name that rejected_lines has."""
    rows = [
        {"line_id": file, "source": source, "image_path": file.removeprefix(prefix), "polygon": None, "baseline": None}
        for source, prefix in id_prefixes(lines).items()
        for file in files
        if file and file.startswith(prefix)
    ]
    return _thumbnails(lines, rows)


def _thumbnails(lines: pa.Table, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Small images as data URIs, by line_id, of the rows that have an image to show.

    Args:
        lines: all imported lines, with the roots of their sources in the metadata.
        rows: as for line_images, in any order.
    """
    roots = {source: root.resolve() for source, root in image_roots(lines).items()}
    by_image = itemgetter("source", "image_path")
    thumbnails = {}
    for (source, image_path), of_image in groupby(sorted(rows, key=by_image), by_image):
        with contextlib.suppress(UserError, OSError, ValueError, RuntimeError):  # also names too long, loops of links
            path = (roots[source] / image_path).resolve()
            # An image outside the source's folder was rejected for that, and is not shown to the world here.
            if path.is_relative_to(roots[source]) and path.is_file():
                for row, grey in line_images(of_image, roots):
                    thumbnails[row["line_id"]] = _data_uri(grey)
    return thumbnails


def _data_uri(grey: np.ndarray) -> str:
    image = Image.fromarray(grey)
    image.thumbnail(_THUMBNAIL_PIXELS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
