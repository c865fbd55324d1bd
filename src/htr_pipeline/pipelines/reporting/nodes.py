"""Nodes: everything that the other pipelines made → report.

Here the figures are computed; how they look, and all escaping, is in report.html.
"""

import base64
import io
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, StrictUndefined
from PIL import Image

from htr_pipeline.core.collapse import ADVICE, HEALTHY
from htr_pipeline.core.config import config, setting
from htr_pipeline.core.metrics import align, confusions
from htr_pipeline.io.features import FeatureShards
from htr_pipeline.io.manifest import SPLITS

_FOLDER = "data/08_reporting"  # where the catalog puts the report
# Longer tables end in a note that says how much is left out.
_MAX_WRITERS = 30
_MAX_GROUPS = 40
_MAX_REJECTED = 10
_MAX_CONFUSIONS = 20
_MAX_CHARACTERS = 20
# Fewer readings than this make no point of a reliability diagram: one line more would move it by a third.
_FEWEST_IN_BIN = 3
_FEW_LINES = 20  # of which an interval is itself uncertain
# A character's error rate means little below this many occurrences.
_MIN_OCCURRENCES = 10
_MAX_HOVER_POINTS = 80
_SMALL = {"width": 300, "height": 180}
_THIN_SPACE = "\N{NARROW NO-BREAK SPACE}"


@config("report")
class ReportConfig:
    """What the report shows."""

    title: str = setting(default="Handwritten text recognition")
    num_samples: int = setting(default=20, minimum=0, maximum=500)
    num_worst: int = setting(default=20, minimum=0, maximum=500)
    seed: int = setting(default=1, minimum=0)


def render_report(
    metrics: dict[str, Any],
    history: pa.Table,
    predictions: pa.Table,
    rejected_lines: pa.Table,
    manifest: pa.Table,
    feature_stats: dict[str, Any],
    registration: dict[str, Any],
    validation_summary: dict[str, Any],
    features: FeatureShards,
    parameters: dict[str, Any],
    report: ReportConfig,
) -> str:
    """Metrics, history, predictions and what led to them → report: one HTML page that needs nothing from outside."""
    headline = metrics["headline"]
    test = predictions.filter(
        pc.and_(
            pc.equal(predictions["split"], headline["split"]), pc.equal(predictions["decoder"], headline["decoder"])
        )
    ).sort_by("line_id")
    lines = test.drop_columns(["characters"]).to_pylist()
    samples, worst = _sample(lines, report.num_samples, report.seed), _worst(lines, report.num_worst)
    rows = features.rows_of(sorted({line["line_id"] for line in samples + worst}))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "percent": _percent, "number": _number, "show": _show_character, "show_text": _show_text
    }  # fmt: skip
    return (
        environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
        .render(
            title=report.title,
            metrics=metrics,
            headline=metrics["splits"][headline["split"]][headline["decoder"]],
            scores=[{"decoder": name, **metrics["splits"][headline["split"]][name]} for name in metrics["decoders"]],
            verdict=_verdict(metrics, lines, manifest),
            warnings=_warnings(metrics, history, registration, lines, manifest, feature_stats)
            + _without_image(samples + worst, rows),
            registration=registration,
            splits=_describe_splits(manifest),
            feature_stats=feature_stats,
            validation=validation_summary,
            reasons=Counter(zip(*(rejected_lines[name].to_pylist() for name in ("stage", "reason")), strict=True)),
            rejected=rejected_lines.slice(0, _MAX_REJECTED).to_pylist(),
            num_rejected=len(rejected_lines),
            validation_page=_validation_page(parameters),
            training=_describe_training(history),
            learning_charts=_learning_charts(history),
            writers=_ranked(metrics.get("writers") or [], "writer_id", _MAX_WRITERS),
            writer_chart=_writer_chart(metrics.get("writers") or []),
            groups=_ranked(metrics.get("groups") or [], "group", _MAX_GROUPS),
            samples=[_show_line(line, rows.get(line["line_id"])) for line in samples],
            worst=[_show_line(line, rows.get(line["line_id"])) for line in worst],
            confusions=_describe_confusions(lines),
            calibration=metrics["calibration"],
            confidence_charts=[
                chart
                for chart in (
                    _reliability_chart("line", metrics["calibration"][headline["decoder"]]["lines"]),
                    _reliability_chart("character", metrics["calibration"][headline["decoder"]]["characters"]),
                    _review_chart(lines),
                )
                if chart
            ],
            parameters=_settings(parameters),
        )
        .lstrip()
    )


# Header


def _verdict(metrics: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], manifest: pa.Table) -> str:
    headline = metrics["headline"]
    score = metrics["splits"][headline["split"]][headline["decoder"]]
    edits = score["substitutions"] + score["insertions"] + score["deletions"]
    writers = {line["writer_id"] for line in lines}
    where = f"on {_count(score['num_lines'], headline['split'] + ' line')}"
    # Where nobody knows the writers, each line counts as one.
    if len(writers) < len(lines):
        where += f" by {_count(len(writers), 'writer')}"
        trained = set(_of_split(manifest, "train")["writer_id"].to_pylist())
        if not writers & trained and not metrics["lines_in_training"][headline["split"]]:
            where += " who " + ("is" if len(writers) == 1 else "are") + " not in the training data"
    if not edits:
        return f"Every character is right {where}."
    if score["cer"] > 1 / 3:
        return f"{100 * score['cer']:.0f} errors for every 100 characters {where}."
    return f"One error for every {_number(1 / score['cer'])} characters {where}."


def _warnings(
    metrics: Mapping[str, Any],
    history: pa.Table,
    registration: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    manifest: pa.Table,
    feature_stats: Mapping[str, Any],
) -> list[str]:
    """What a reader of the figures has to know: one writer only, or tables that are not of one and the same run."""
    warnings = []
    split = metrics["headline"]["split"]
    score = metrics["splits"][split][metrics["headline"]["decoder"]]
    writers = {line["writer_id"] for line in lines}
    if len(writers) == 1 < len(lines):
        warnings.append(f"All {split} lines are by one writer: the interval is over lines and says nothing of others.")
    elif len(lines) < _FEW_LINES:
        warnings.append(
            f"Measured on {_count(len(lines), f'{split} line')} only: neither the figures nor their interval say much "
            "about new lines."
        )
    elif len(writers) < len(lines) and score["interval_over"] == "lines":
        warnings.append(
            f"The {split} lines are by {len(writers)} writers only: the interval is over lines and says little of "
            "others."
        )
    for epoch in history.to_pylist()[-1:]:
        if (verdict := epoch.get("verdict")) and verdict not in HEALTHY:
            warnings.append(f"The training was last judged as {verdict}. {ADVICE[verdict]}")
    if learnt := metrics["learnt_lines"][split]:
        warnings.append(
            f"{learnt} of the {len(lines)} {split} lines were training lines of the network that this one started "
            "from: on them the figures say nothing about new lines."
        )
    if doubled := metrics["lines_in_training"][split]:
        warnings.append(
            f"{doubled} of the {len(lines)} {split} lines have the image of a training line: on them the figures say "
            "nothing about new lines."
        )
    if metrics["data_hash"] != feature_stats["data_hash"]:
        warnings.append(
            f"The evaluation was made on data {metrics['data_hash'][:12]}, feature_stats is of data "
            f"{feature_stats['data_hash'][:12]}: run `kedro run --from-nodes extract_features` to bring all up to date."
        )
    elif {line["line_id"] for line in lines} != set(
        _of_split(manifest, metrics["headline"]["split"])["line_id"].to_pylist()
    ):
        warnings.append(
            "The lines that were read are not those of the manifest on disk, from which the numbers of lines below "
            "are: run `kedro run --from-nodes extract_features` to bring all up to date."
        )
    if history.schema.metadata[b"model_hash"].decode() != metrics["model_hash"]:
        warnings.append(
            "The figures are of another network than the one whose training is described below, which was trained "
            "since: run `kedro run --from-nodes read_lines` to measure that one."
        )
    if registration["model_hash"] != metrics["model_hash"]:
        warnings.append(
            f"The figures are of another network than {registration['name']} version {registration['version']}: run "
            "`kedro run --from-nodes register_model` to register the one that was measured."
        )
    elif registration["decoding"] != metrics["decoding"]:
        warnings.append(
            f"The figures were measured with other settings of decoding than those of {registration['name']} version "
            f"{registration['version']}: run `kedro run --from-nodes register_model` to register the present ones."
        )
    return warnings


def _without_image(shown: Sequence[Mapping[str, Any]], rows: Mapping[str, Any]) -> list[str]:
    missing = {line["line_id"] for line in shown} - rows.keys()
    if not missing:
        return []
    return [
        f"{_count(len(missing), 'line')} shown below without an image, since the features lack "
        f"{'it' if len(missing) == 1 else 'them'}, for instance {min(missing)}."
    ]


# Data and training


def _describe_splits(manifest: pa.Table) -> list[dict[str, Any]]:
    """Counts of each split, then of all."""
    parts = {split: _of_split(manifest, split) for split in SPLITS} | {"all": manifest}
    return [
        {
            "split": split,
            "num_lines": len(part),
            "num_writers": pc.count_distinct(part["writer_id"]).as_py(),
            "num_groups": pc.count_distinct(part["group"], mode="only_valid").as_py(),
            "num_characters": pc.sum(pc.utf8_length(part["text"])).as_py() or 0,
            "num_distinct_characters": len(set().union(*part["text"].to_pylist())),
        }
        for split, part in parts.items()
    ]


def _validation_page(parameters: Mapping[str, Any]) -> str:
    """Address of the validation's page, seen from that of the report."""
    folder = _settings(parameters).get("validation", {}).get("docs_path", f"{_FOLDER}/validation")
    return quote(Path(os.path.relpath(folder, _FOLDER)).as_posix() + "/summary.html")


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def _describe_training(history: pa.Table) -> dict[str, Any] | None:
    rows = history.sort_by("epoch").to_pylist()
    if not rows:
        return None
    seconds = rows[-1]["elapsed_seconds"]
    metadata = history.schema.metadata
    best_epoch = int(metadata[b"best_epoch"])
    return {
        "network_size": metadata.get(b"network_size", b"").decode(),  # earlier versions did not keep it
        "num_weights": int(metadata.get(b"num_weights", 0)),
        "precision": metadata.get(b"precision", b"").decode(),
        "num_epochs": len(rows),
        "num_steps": rows[-1]["step"],
        "duration": f"{seconds / 60:.0f} minutes" if seconds >= 100 else f"{seconds:.0f} seconds",
        "lines_per_second": float(np.median([row["lines_per_second"] for row in rows])),
        "wait_share": sum(row["data_wait_seconds"] for row in rows) / max(seconds, 1e-9),
        "best_epoch": best_epoch,
        "best_cer": float(metadata[b"best_cer"]),
        "is_start_kept": best_epoch == 0,
        "num_validation_lines": int(metadata[b"num_validation_lines"]),
    }


def _learning_charts(history: pa.Table) -> list["Chart"]:
    """Loss, CER and learning rate, then the two small ones that show a collapse."""
    rows = history.sort_by("epoch").to_pylist()
    if not rows:
        return []

    def series(name: str, column: str, style: str, text: str, factor: float = 1.0) -> "Series":
        points = [(row["epoch"], factor * row[column]) for row in rows]
        return Series(name, style, points, [f"{name}, epoch {x:g}: {text.format(y)}" for x, y in points])

    percent = f"{{:.2f}}{_THIN_SPACE}%"
    rates = series("learning rate", "learning_rate", "first", "{:.3g} × 10⁻³", 1e3)
    blanks = series("blank share", "blank_share", "first", percent, 100.0)
    lengths = series("output length", "output_length_ratio", "first", percent, 100.0)
    return [
        _chart(
            "Loss",
            "epoch",
            "nats per line",
            [
                series("train", "train_loss", "second", "{:.2f} nats per line"),
                series("validation", "validation_loss", "first", "{:.2f} nats per line"),
            ],
        ),
        _chart(
            "Character error rate",
            "epoch",
            "%",
            [
                series("train", "train_cer", "second", percent, 100.0),
                series("validation", "validation_cer", "first", percent, 100.0),
            ],
            mark_lowest="validation",
        ),
        _chart("Learning rate", "epoch", "× 10⁻³", [rates], y_range=(0.0, max(y for _, y in rates.points)), **_SMALL),
        _chart(
            "Blank share",
            "epoch",
            "% of frames",
            [blanks],
            y_range=(0.0, 100.0),
            note=f"Frames where the blank wins. Near 100{_THIN_SPACE}% throughout: the network has collapsed.",
            **_SMALL,
        ),
        _chart(
            "Output length",
            "epoch",
            "% of reference",
            [lengths],
            note=f"Characters written over characters wanted; it should settle at 100{_THIN_SPACE}%.",
            **_SMALL,
        ),
    ]


# Writers and groups


def _ranked(rows: Sequence[Mapping[str, Any]], key: str, limit: int) -> dict[str, Any]:
    """The rows with the highest CER first, cut at the limit, and the scale of their bars."""
    ranked = sorted(rows, key=lambda row: (-row["cer"], row[key]))
    return {
        "shown": ranked[:limit],
        "hidden": ranked[limit:],
        "scale": max((row["cer"] for row in ranked), default=0.0) or 1.0,
    }


def _writer_chart(writers: Sequence[Mapping[str, Any]]) -> "Chart | None":
    """Histogram; a handful of writers is told by the table alone."""
    if len(writers) < 8:
        return None
    cers = np.array([100.0 * row["cer"] for row in writers])
    edges = np.array(_nice_ticks(0.0, max(float(cers.max()), 0.1), 20))
    counts, _ = np.histogram(cers, edges)
    bars = [
        (
            left,
            right,
            int(count),
            f"{_count(int(count), 'writer')} with a CER of {left:.4g} to {right:.4g}{_THIN_SPACE}%",
        )
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return _chart("How the error rate spreads over the writers", "CER of the writer, %", "writers", [], bars=bars)


# Lines


def _sample(lines: Sequence[dict[str, Any]], num: int, seed: int) -> list[dict[str, Any]]:
    """Lines drawn at random, one of each writer in turn, so that no prolific writer fills the page."""
    rng = np.random.default_rng(seed)
    by_writer = defaultdict(list)
    for index in rng.permutation(len(lines)):
        by_writer[lines[index]["writer_id"]].append(lines[index])
    turns = [(turn, order, line) for order, own in enumerate(by_writer.values()) for turn, line in enumerate(own)]
    return [line for _, _, line in sorted(turns, key=lambda entry: entry[:2])[:num]]


def _worst(lines: Sequence[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """Lines with the most edits; those without any are not among them."""
    wrong = [line for line in lines if _num_edits(line)]
    return sorted(wrong, key=lambda line: (-_num_edits(line), line["line_id"]))[:num]


def _num_edits(line: Mapping[str, Any]) -> int:
    return line["substitutions"] + line["insertions"] + line["deletions"]


def _show_line(line: Mapping[str, Any], row: Mapping[str, Any] | None) -> dict[str, Any]:
    edits = _num_edits(line)
    return {
        **line,
        "edits": edits,
        "cer": edits / max(len(line["reference"]), 1),
        "pieces": align(line["reference"], line["hypothesis"]),
        "image": _image_uri(row) if row else None,
        "width_pixels": row["width_pixels"] if row else 0,
        "height_pixels": row["height_pixels"] if row else 0,
    }


def _image_uri(row: Mapping[str, Any]) -> str:
    """Data URI of a PNG, dark ink on white, in 16 greys: a third of the size, and the eye sees no difference."""
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], row["height_pixels"])
    greys = 15 - (pixels.T.astype(np.uint16) * 15 + 127) // 255
    image = Image.fromarray(greys.astype(np.uint8)).convert("P")
    image.putpalette([17 * level for level in range(16) for _ in range(3)])
    stream = io.BytesIO()
    image.save(stream, "PNG", bits=4, optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# Characters


def _describe_confusions(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    references = [line["reference"] for line in lines]
    counts = confusions(references, [line["hypothesis"] for line in lines])
    total = counts.total()
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    occurrences = Counter("".join(references))
    missed: Counter[str] = Counter()
    for (reference, _), count in counts.items():
        missed[reference] += count
    rates = [
        {"character": character, "count": count, "missed": missed[character], "rate": missed[character] / count}
        for character, count in occurrences.items()
        if count >= _MIN_OCCURRENCES and missed[character]
    ]
    return {
        "total": total,
        "num_kinds": len(ranked),
        "shown": [
            {"reference": reference, "hypothesis": hypothesis, "count": count, "share": count / total}
            for (reference, hypothesis), count in ranked[:_MAX_CONFUSIONS]
        ],
        "characters": sorted(rates, key=lambda row: (-row["rate"], row["character"]))[:_MAX_CHARACTERS],
        "min_occurrences": _MIN_OCCURRENCES,
    }


def _show_text(text: str) -> str:
    """A part of a line that is marked as wrong, so that every character of it can be seen."""
    return "".join(map(_show_character, text))


def _show_character(character: str) -> str:
    """One character so that it can be seen: blanks, combining marks and controls get a stand-in."""
    if character == " ":
        return "␣"
    if unicodedata.combining(character):
        return "◌" + character
    if unicodedata.category(character)[0] in "CZ":
        return f"U+{ord(character):04X}"
    return character


# Confidence


def _reliability_chart(unit: str, reliability: Mapping[str, Mapping[str, Any]]) -> "Chart | None":
    """Share of right lines or characters against their confidence, before and after calibration."""
    before, after = reliability["before"], reliability["after"]
    if not after["num"]:
        return None

    def series(name: str, style: str, figures: Mapping[str, Any]) -> "Series":
        bins = [entry for entry in figures["bins"] if entry["num"] >= _FEWEST_IN_BIN]
        points = [(100.0 * entry["confidence"], 100.0 * entry["right"]) for entry in bins]
        titles = [
            f"{name}: {_count(entry['num'], unit)} with a mean confidence of {x:.1f}{_THIN_SPACE}%: "
            f"{y:.1f}{_THIN_SPACE}% are right"
            for entry, (x, y) in zip(bins, points, strict=True)
        ]
        return Series(name, f"{style} dots", points, titles)

    most = max(entry["num"] for entry in after["bins"])
    bars = []
    for entry in after["bins"]:
        left = 10.0 * min(int(10 * entry["confidence"]), 9)
        text = f"{_count(entry['num'], unit)} with a confidence of {left:.0f} to {left + 10:.0f}{_THIN_SPACE}%"
        bars.append((left, left + 10.0, 25.0 * entry["num"] / most, text))
    is_calibrated = before != after
    curves = [series("before", "second", before), series("calibrated", "first", after)]
    return _chart(
        f"Can the confidence of a {unit} be believed?",
        "confidence, %",
        "right, %",
        [
            Series("perfect", "guide", [(0.0, 0.0), (100.0, 100.0)], []),
            *(curves if is_calibrated else [series("as the decoder gives it", "first", after)]),
        ],
        bars=bars,
        height=320,
        x_range=(0.0, 100.0),
        y_range=(0.0, 100.0),
        note=f"On the dotted line, nine in ten {unit}s with a confidence of 90{_THIN_SPACE}% are right; above it the "
        f"model is too modest, below it too sure. Columns: how many {unit}s have that confidence"
        f"{' after calibration' * is_calibrated}, the highest {_number(most)}; fewer than {_FEWEST_IN_BIN} make no "
        "point.",
    )


def _review_chart(lines: Sequence[Mapping[str, Any]]) -> "Chart | None":
    """CER of the lines that are left when the least confident ones are put aside for a person to read."""
    if len(lines) < 10:
        return None
    ranked = sorted(lines, key=lambda line: (-line["confidence"], line["line_id"]))
    edits = np.cumsum([_num_edits(line) for line in ranked])
    lengths = np.maximum(np.cumsum([len(line["reference"]) for line in ranked]), 1)
    kept = np.unique(np.ceil(np.arange(5, 101, 2.5) / 100 * len(lines)).astype(int))
    points = [(100.0 * num / len(lines), 100.0 * float(edits[num - 1] / lengths[num - 1])) for num in kept]
    titles = [
        f"The most confident {x:.0f}{_THIN_SPACE}% of the lines have a CER of {y:.2f}{_THIN_SPACE}%" for x, y in points
    ]
    return _chart(
        "What if the least confident lines are left to a person?",
        "lines kept, %",
        "CER of the lines kept, %",
        [Series("this model", "first", points, titles)],
        note="The error rate of what is left when the least confident lines are put aside.",
        height=320,
        x_range=(0.0, 100.0),
    )


# Charts: geometry in the units of an SVG's viewBox; report.html draws it


@dataclass(frozen=True)
class Series:
    """Points joined by a line, with the text that is shown over each; no texts, no points."""

    name: str
    style: str  # classes of report.html
    points: list[tuple[float, float]]
    titles: list[str]


@dataclass(frozen=True)
class Chart:
    """Axes and marks in viewBox units."""

    title: str
    x_label: str
    y_label: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    note: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    lowest: dict[str, Any] | None = None


def _chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    bars: Sequence[tuple[float, float, float, str]] = (),
    width: int = 460,
    height: int = 250,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    mark_lowest: str | None = None,
    note: str = "",
) -> Chart:
    """Lays a chart out.

    Args:
        title: over the chart.
        x_label: below the horizontal axis, with the unit.
        y_label: over the vertical axis, with the unit.
        series: lines; points that are not finite are left out and break their line.
        bars: (left, right, height, text) in data units.
        width: of the viewBox.
        height: of the viewBox.
        x_range: of the axis; None: of the data.
        y_range: of the axis; None: of the data, from zero, or logarithmic where the data spans more than 1 : 10.
        mark_lowest: name of the series whose lowest point is labelled.
        note: a sentence below.
    """
    left, right, top, bottom = 46.0, width - 14.0, 26.0, height - 38.0
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y)] or [(0.0, 0.0)]
    xs = [x for x, _ in finite] + [x for bar in bars for x in bar[:2]]
    ys = [y for _, y in finite] + [bar[2] for bar in bars]
    low, high = min(ys), max(ys)
    is_log = y_range is None and not bars and low > 0 and high / low > 10
    y_values = _log_ticks(low, high) if is_log else _nice_ticks(*(y_range or (0.0, high)), 4)
    x_values = _x_ticks(xs, x_range)
    x_low, x_high = x_range or (min(xs), max(xs))
    transform = math.log10 if is_log else float

    def place(value: float, limits: tuple[float, float], ends: tuple[float, float]) -> float:
        span = limits[1] - limits[0]
        share = (value - limits[0]) / span if span else 0.5
        return round(ends[0] + share * (ends[1] - ends[0]), 1)

    def place_x(value: float) -> float:
        return place(value, (x_low, x_high), (left, right))

    def place_y(value: float) -> float:
        return place(transform(value), (transform(y_values[0]), transform(y_values[-1])), (bottom, top))

    lines = []
    for entry in series:
        placed = [(place_x(x), place_y(y)) if math.isfinite(y) else None for x, y in entry.points]
        titled = [(*p, t) for p, t in zip(placed, entry.titles, strict=False) if p]
        step = max(-(-len(titled) // _MAX_HOVER_POINTS), 1)
        lines.append(
            {
                "name": entry.name,
                "style": entry.style,
                "path": _path(placed),
                "points": titled[::-step][::-1],  # thinned out backwards: the last one stays
                "is_single": len(titled) == 1,
            }
        )
    lowest = None
    marked = [p for s in series if s.name == mark_lowest for p in s.points if math.isfinite(p[1])]
    if marked:
        x, y = min(marked, key=lambda point: (point[1], point[0]))
        lowest = {"x": place_x(x), "y": place_y(y), "label": f"{y:.2f}", "is_right": place_x(x) > (left + right) / 2}
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        note=note,
        x_ticks=[(place_x(value), f"{value:g}") for value in x_values],
        y_ticks=[(place_y(value), f"{value:g}") for value in y_values],
        lines=lines,
        bars=[
            {
                "x": place_x(a) + 1,
                "width": round(max(place_x(b) - place_x(a) - 2, 1), 1),
                "y": place_y(y),
                "height": round(bottom - place_y(y), 1),
                "title": t,
            }
            for a, b, y, t in bars
        ],
        lowest=lowest,
    )


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    commands, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            commands.append(f"{pen}{point[0]:g} {point[1]:g}")
            pen = "L"
    return "".join(commands)


def _x_ticks(xs: Sequence[float], x_range: tuple[float, float] | None) -> list[float]:
    """Round values within the range of the data."""
    low, high = x_range or (min(xs), max(xs))
    if low == high:
        return [low]
    is_whole = all(float(x).is_integer() for x in xs)
    return [x for x in _nice_ticks(low, high, 6) if low <= x <= high and (not is_whole or x.is_integer())]


def _nice_ticks(low: float, high: float, num: int) -> list[float]:
    """About so many round values, the first at or below low, the last at or above high."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / num))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * num >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step + 1e-9) + 1)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from at or below low to at or above high; only powers of ten beyond three decades."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    first = max(index for index, value in enumerate(values) if value <= low)
    last = min(index for index, value in enumerate(values) if value >= high)
    return values[first : last + 1]


# Words and numbers


def _settings(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Blocks of parameters as plain mappings; Kedro has made dataclasses of those that a node checks."""
    blocks = {name: asdict(b) if is_dataclass(b) and not isinstance(b, type) else b for name, b in parameters.items()}
    return {name: block for name, block in sorted(blocks.items()) if isinstance(block, Mapping)}


def _percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}{_THIN_SPACE}%"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", _THIN_SPACE)


def _count(num: int, noun: str) -> str:
    return f"{_number(num)} {noun}{'' if num == 1 else 's'}"
