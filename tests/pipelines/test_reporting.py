"""One page from real tables: what it says, what it hides, and that a browser shows it."""

import base64
import io
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from PIL import Image, ImageDraw, ImageFont

from htr_pipeline.core.calibration import reliability, right_characters
from htr_pipeline.core.config import UserError
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.io.manifest import FEATURES, HISTORY, MANIFEST, PREDICTIONS, REJECTED_LINES, to_table
from htr_pipeline.pipelines.reporting import create_pipeline
from htr_pipeline.pipelines.reporting.nodes import (
    ReportConfig,
    Series,
    _chart,
    _log_ticks,
    _nice_ticks,
    _show_character,
)

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards brew strong coffee near an old quiet mill".split()
)
VOID = {"meta", "img", "br", "link", "input", "hr"}
TRAINED = {
    "model_hash": "2d" * 32,
    "network_size": "S",
    "num_weights": "774912",
    "precision": "float32",
    "best_cer": "0.045",
    "best_epoch": "3",
    "num_validation_lines": "256",
}


class FewLines:
    """Features of few lines, held in memory, through the real schema."""

    def __init__(self, rows):
        self._rows = {row["line_id"]: row for row in to_table(rows, FEATURES).to_pylist()}

    def rows_of(self, line_ids):
        return {line_id: self._rows[line_id] for line_id in line_ids if line_id in self._rows}


class Page(HTMLParser):
    """Text, tags and attributes of a page; checks that every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text_of = [], [], {}
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert [t for t, _ in self.open[-1:]] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for tag, attributes in self.open:
            for key in (tag, attributes.get("id")):
                self.text_of[key] = self.text_of.get(key, "") + data

    def all(self, tag, class_name=None):
        return [
            a for t, a in self.tags if t == tag and (not class_name or class_name in (a.get("class") or "").split())
        ]


def text_image(text, height=48):
    """(width, height) uint8, ink high."""
    font = ImageFont.load_default(26)
    width = int(font.getlength(text or " ")) + 24
    image = Image.new("L", (width, height), 0)
    ImageDraw.Draw(image).text((12, 8), text, fill=230, font=font)
    return np.asarray(image).T


def garble(text, rng, share):
    """Text with some characters substituted, deleted and inserted."""
    written = []
    for character in text:
        draw = rng.random()
        if draw < share / 3:
            continue
        written.append(str(rng.choice(list("aeiourn"))) if draw < 2 * share / 3 else character)
        if 2 * share / 3 <= draw < share:
            written.append(str(rng.choice(list("eit "))))
    return " ".join("".join(written).split())


def rates(pairs):
    score = score_lines([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    counts = {
        name: int(getattr(score.characters, name).sum())
        for name in ("hits", "substitutions", "insertions", "deletions")
    }
    return {
        "num_lines": score.num_lines,
        "num_characters": score.num_characters,
        "num_words": score.num_words,
        "cer": score.cer,
        "cer_low": 0.8 * score.cer,
        "cer_high": 1.25 * score.cer,
        "wer": score.wer,
        "wer_low": 0.8 * score.wer,
        "wer_high": 1.25 * score.wer,
        "macro_cer": score.macro_cer,
        "line_accuracy": score.line_accuracy,
        "interval_over": "writers",
        **counts,
    }


def kept_promises(rows):
    """As metrics.json has them: of lines and characters, with the square of the confidence for what was before."""
    lines = [row["confidence"] for row in rows], [row["reference"] == row["hypothesis"] for row in rows]
    characters = (
        [character["confidence"] for row in rows for character in row["characters"]],
        [right for row in rows for right in right_characters(row["reference"], row["hypothesis"])],
    )
    return {
        level: {
            "before": asdict(reliability(np.square(confidences), is_right)),
            "after": asdict(reliability(confidences, is_right)),
        }
        for level, (confidences, is_right) in (("lines", lines), ("characters", characters))
    }


def few(row):
    return {name: row[name] for name in ("num_lines", "num_characters", "cer")}


def make_inputs(
    *,
    lines_per_writer=4,
    num_writers=10,
    replace=None,
    with_groups=True,
    epochs=12,
    errors=0.08,
    num_rejected=14,
    draw=text_image,
    **settings,
):
    """Inputs of the node as the other pipelines make them; replace: {index of a test line: (reference, hypothesis)}."""
    rng = np.random.default_rng(3)
    lines = []
    for writer in range(num_writers):
        split = "test" if writer % 5 == 4 else "validation" if writer % 5 == 3 else "train"
        for number in range(lines_per_writer):
            lines.append(
                {
                    "line_id": f"writer{writer:03d}-{number:03d}",
                    "page_id": f"page{writer:03d}",
                    "writer_id": f"writer{writer:03d}",
                    "split": split,
                    "text": " ".join(rng.choice(WORDS, size=rng.integers(4, 9))),
                    "image_path": f"writer{writer:03d}/{number:03d}.png",
                    "source": "demo",
                    "format": "demo",
                    "width_pixels": 400,
                    "height_pixels": 48,
                    "content_hash": f"{writer}-{number}",
                    "group": f"font {writer % 7}" if with_groups else None,
                }
            )
    test = [line for line in lines if line["split"] == "test"]
    given = {}
    for index, (reference, hypothesis) in (replace or {}).items():
        test[index]["text"] = reference
        given[test[index]["line_id"]] = hypothesis
    predictions = []
    for line in lines:
        if line["split"] == "train":
            continue
        for decoder, share in (("greedy", errors), ("beam", 0.8 * errors)):
            hypothesis = given.get(line["line_id"], garble(line["text"], rng, share))
            counts = score_lines([line["text"]], [hypothesis]).characters
            characters = [
                {"character": c, "start_frame": 4 * i, "end_frame": 4 * i + 3, "confidence": float(rng.beta(12, 1))}
                for i, c in enumerate(hypothesis)
            ]
            predictions.append(
                {
                    **{name: line[name] for name in ("line_id", "split", "writer_id", "group")},
                    "decoder": decoder,
                    "reference": line["text"],
                    "hypothesis": hypothesis,
                    "confidence": float(rng.beta(9, 1) * math.exp(-2 * int(counts.edits[0]) / max(len(hypothesis), 1))),
                    **{n: int(getattr(counts, n)[0]) for n in ("hits", "substitutions", "insertions", "deletions")},
                    "characters": characters,
                }
            )

    def pairs(decoder="greedy", **wanted):
        rows = [p for p in predictions if p["decoder"] == decoder and all(p[k] == v for k, v in wanted.items())]
        return [(row["reference"], row["hypothesis"]) for row in rows]

    seen = {line["group"] for line in lines if line["split"] == "train"}
    tested = sorted({line["group"] for line in test if line["group"]})
    by_seen = {
        flag: [pair for g in tested if (g in seen) is flag for pair in pairs(split="test", group=g)]
        for flag in (True, False)
    }
    metrics = {
        "signature": f"CER|norm:NFC|space:single|case:mixed|split:test|n:{len(test)}|v:0.1.0",
        "data_hash": "0f" * 32,
        "test_hash": "1e" * 32,
        "model_hash": "2d" * 32,
        "confidence": 0.95,
        "decoders": ["greedy", "beam"],
        "headline": {"split": "test", "decoder": "greedy"},
        "decoding": {"decoder": "greedy", "looks": 3},
        "splits": {
            split: {decoder: rates(pairs(decoder, split=split)) for decoder in ("greedy", "beam")}
            for split in ("validation", "test")
        },
        "calibration": {
            decoder: kept_promises([p for p in predictions if (p["decoder"], p["split"]) == (decoder, "test")])
            for decoder in ("greedy", "beam")
        },
        "writers": [
            {"writer_id": w, "split": "test", **few(rates(pairs(split="test", writer_id=w)))}
            for w in sorted({line["writer_id"] for line in test})
        ],
        "groups": [
            {"group": g, "seen_in_training": g in seen, **few(rates(pairs(split="test", group=g)))} for g in tested
        ],
        "seen_groups": few(rates(by_seen[True])) if by_seen[True] else None,
        "unseen_groups": few(rates(by_seen[False])) if by_seen[False] else None,
        "characters_outside_charset": {"é": 3},
        "learnt_lines": {"validation": 0, "test": 0},
        "lines_in_training": {"validation": 0, "test": 0},
    }
    history = [
        {
            "epoch": epoch,
            "step": 40 * epoch,
            "train_loss": 4 + 170 * math.exp(-0.4 * epoch),
            "train_cer": 0.05 + math.exp(-0.4 * epoch),
            "validation_loss": 5 + 165 * math.exp(-0.38 * epoch) + 0.4 * math.sin(3 * epoch),
            "validation_cer": 0.04 + 0.95 * math.exp(-0.4 * epoch) + 0.002 * math.sin(5 * epoch),
            "learning_rate": 1e-3 * (1 + math.cos(math.pi * epoch / (epochs + 1))),
            "blank_share": 0.7 + 0.3 * math.exp(-epoch),
            "output_length_ratio": 1 - math.exp(-0.8 * epoch),
            "gradient_norm": 3.0,
            "lines_per_second": 210.0,
            "data_wait_seconds": 0.4,
            "elapsed_seconds": 31.0 * epoch,
        }
        for epoch in range(1, epochs + 1)
    ]
    rejected = [
        {
            "line_id": f"bad-{n:02d}",
            "file": f"scans/bad-{n:02d}.png",
            "stage": "validation" if n % 3 else "import",
            "reason": "too_narrow" if n % 3 else "unreadable_image",
            "detail": "41 characters with 2 repeats need at least 43 frames, the image has room for 38.",
        }
        for n in range(num_rejected)
    ]
    pixels = {line["line_id"]: draw(line["text"]) for line in test}
    features = FewLines(
        {
            **{name: line[name] for name in ("line_id", "split", "writer_id", "group", "text", "content_hash")},
            "pixels": np.ascontiguousarray(pixels[line["line_id"]]).tobytes(),
            "width_pixels": pixels[line["line_id"]].shape[0],
            "height_pixels": pixels[line["line_id"]].shape[1],
            "ink_share": 0.1,
            "contrast": 0.8,
            "slant_degrees": 2.0,
        }
        for line in test
    )
    return {
        "metrics": metrics,
        "history": to_table(history, HISTORY, TRAINED),
        "predictions": to_table(predictions, PREDICTIONS),
        "rejected_lines": to_table(rejected, REJECTED_LINES),
        "manifest": to_table(lines, MANIFEST),
        "feature_stats": {
            "data_hash": "0f" * 32,
            "height_pixels": 48,
            "width_pixels": {"min": 90, "median": 410, "p95": 610, "max": 702},
        },
        "registration": {
            "name": "htr",
            "version": "3",
            "model_uri": "models:/htr/3",
            "alias": "champion",
            "promoted": True,
            "reason": "CER 3.10% on the test lines is better than the 3.95% of version 2",
            "champion_version": "3",
            "candidate_cer": 0.031,
            "champion_cer": 0.0395,
            "model_hash": "2d" * 32,
            "decoding": {"decoder": "greedy", "looks": 3},
            "run_id": "3c" * 16,
            "tracking_uri": "sqlite:///mlflow.db",
            "git_commit": "4b" * 20,
            "git_changes": "none",
            "command": "kedro run --env finetune --params source.path=lines",
        },
        "validation_summary": {
            "warnings": ["2 images occur more than once with the same text, 0 of them in more than one split."],
            "expectations": [{"claim": "ids are unique", "success": True}],
            "num_warned": 5,
            "warned_reasons": {"rare_character": 3, "unusual_width": 4},
        },
        "features": features,
        "parameters": {"training": {"epochs": epochs, "max_minutes": None}, "report": ReportConfig()},
        "params:report": ReportConfig(**settings),
    }


def render(inputs):
    (node,) = create_pipeline().nodes
    return node.func(*(inputs[name] for name in node.inputs))


def ordinary_inputs():
    """Twelve test writers of four lines; one line is a single word that is wider than any page."""
    long = "antidisestablishmentarianism" * 12
    return make_inputs(num_writers=60, replace={0: (long, long.replace("a", "e"))})


@pytest.fixture(scope="module")
def inputs():
    return ordinary_inputs()


@pytest.fixture(scope="module")
def html(inputs):
    return render(inputs)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def num_of(text):
    return int(re.sub(r"\D", "", text))


def test_page_loads_nothing_from_anywhere(page, html):
    addresses = [a[name] for _, a in page.tags for name in ("src", "href", "action", "data", "poster") if a.get(name)]
    assert addresses
    beside = {"validation/summary.html"}  # a link that nothing is loaded from
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in set(addresses) - beside)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "form")]
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_pipeline_reads_the_catalogs_tables_and_writes_the_report(inputs, html):
    catalog = DataCatalog({name: MemoryDataset(value, copy_mode="assign") for name, value in inputs.items()})
    catalog["report"] = MemoryDataset()
    SequentialRunner().run(create_pipeline(), catalog)
    assert catalog.load("report") == html


def test_same_tables_give_the_same_bytes(html):
    assert render(ordinary_inputs()) == html


def test_page_is_no_larger_than_it_must_be(html):
    assert len(re.sub(r"data:image/png;base64,[^\"]*", "", html).encode()) < 150_000


def test_headline_and_decoders_are_those_of_the_metrics(page, inputs):
    text = page.text_of["header"]
    for score in inputs["metrics"]["splits"]["test"].values():
        for name in ("cer", "wer", "macro_cer", "line_accuracy"):
            assert f"{100 * score[name]:.2f}" in text
    assert inputs["metrics"]["signature"] in text
    assert inputs["metrics"]["data_hash"] in text
    assert "htr version 3 is the champion" in text
    assert "better than the 3.95% of version 2" in text
    cer = inputs["metrics"]["splits"]["test"]["greedy"]["cer"]
    assert f"One error for every {1 / cer:.0f} characters on 48 test lines by 12 writers who are not in" in text


def test_version_that_lost_is_said_to_have_lost(inputs):
    lost = inputs["registration"] | {"promoted": False, "champion_version": "2"}
    text = Page(render(inputs | {"registration": lost})).text_of["header"]
    assert "htr version 3 was not promoted" in text
    assert "The champion is still version 2." in text


def test_interval_of_one_writer_comes_with_a_warning(inputs):
    assert "All test lines are by one writer" in Page(render(make_inputs(num_writers=5))).text_of["header"]
    assert "by one writer" not in Page(render(inputs)).text_of["header"]


def test_lines_that_were_learnt_come_with_a_warning(inputs):
    assert "were training lines" not in Page(render(inputs)).text_of["header"]
    learnt = inputs["metrics"] | {"learnt_lines": {"validation": 0, "test": 7}}
    text = Page(render(inputs | {"metrics": learnt})).text_of["header"]
    assert "test lines were training lines of the network that this one started from" in text


def test_test_lines_that_stand_in_training_come_with_a_warning(inputs):
    text = Page(render(inputs)).text_of["header"]
    assert "who are not in the training data" in text
    assert "the image of a training line" not in text
    doubled = inputs["metrics"] | {"lines_in_training": {"validation": 0, "test": 5}}
    text = Page(render(inputs | {"metrics": doubled})).text_of["header"]
    assert "test lines have the image of a training line" in text
    assert "who are not in the training data" not in text


def test_a_training_that_collapsed_comes_with_a_warning(inputs):
    rows = inputs["history"].to_pylist()
    for verdict, words in (("exploded", "last judged as exploded. Lower training.learning_rate"), ("learning", None)):
        rows[-1]["verdict"] = verdict
        text = Page(render(inputs | {"history": to_table(rows, HISTORY, TRAINED)})).text_of["header"]
        assert words in text if words else "last judged" not in text


def test_splits_are_counted(html, inputs):
    rows = re.findall(r'<th scope="row">(train|validation|test|all)</th>(.*?)</tr>', html)
    counted = {split: [num_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for split, row in rows}
    lines = inputs["manifest"].to_pylist()
    for split, (num_lines, num_writers, _, num_characters, _) in counted.items():
        own = [line for line in lines if split in ("all", line["split"])]
        assert num_lines == len(own)
        assert num_writers == len({line["writer_id"] for line in own})
        assert num_characters == sum(len(line["text"]) for line in own)


def test_rejections_are_counted_by_reason_and_the_first_ten_shown(page, html):
    table = re.search(r'<table class="reasons">.*?</table>', html, re.S)[0]
    assert [num_of(count) for count in re.findall(r'<td class="num">(.*?)</td>', table)] == [9, 5]
    assert "bad-09.png" in page.text_of["data"]
    assert "bad-10.png" not in page.text_of["data"]
    assert "The first 10" in page.text_of["data"]


def test_what_was_left_out_or_doubted_leads_to_the_page_of_validation(page):
    text = re.sub("[ \n]+", " ", page.text_of["data"])
    assert "5 lines stay with a warning: rare_character 3, unusual_width 4." in text
    assert "validation/summary.html" in [link["href"] for link in page.all("a")]


def test_every_shown_line_has_its_image_dark_on_white(page, inputs):
    images = page.all("img")
    assert len(images) == 40
    for image in images:
        line_id = image["alt"].split()[1]
        row = inputs["features"].rows_of([line_id])[line_id]
        png = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        expected = 255 - np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], -1).T.astype(int)
        assert np.abs(np.asarray(png.convert("L")).astype(int) - expected).max() <= 9  # 16 greys
        assert (int(image["width"]), int(image["height"])) == png.size


def test_samples_take_the_writers_in_turn(html):
    samples = re.search(r'<section id="samples">.*?</section>', html, re.S)[0]
    drawn = Counter(re.findall(r"<span>writer <bdi>(.*?)</bdi>", samples))
    assert len(drawn) == 12
    assert set(drawn.values()) == {1, 2}


def test_seed_draws_other_lines(inputs, html):
    other = render(inputs | {"params:report": ReportConfig(seed=2)})
    ids = [re.findall(r"alt=\"Line (\S+)", text.split('id="worst"')[0]) for text in (html, other)]
    assert len(ids[0]) == len(ids[1]) == 20
    assert set(ids[0]) != set(ids[1])


def test_worst_lines_have_most_edits_first_and_no_perfect_line(html, inputs):
    worst = re.search(r'<section id="worst">.*?</section>', html, re.S)[0]
    edits = [int(n) for n in re.findall(r", (\d+) edits?</span>", worst)]
    table = inputs["predictions"].to_pylist()
    counted = [
        r["substitutions"] + r["insertions"] + r["deletions"]
        for r in table
        if (r["split"], r["decoder"]) == ("test", "greedy")
    ]
    assert edits == [count for count in sorted(counted, reverse=True)[:20] if count]


def test_differences_are_marked_on_both_sides():
    html = render(make_inputs(replace={0: ("a cat sat", "a cot satt"), 1: ("to be", "tobe")}))
    assert '<mark title="read as o">a</mark>' in html
    assert '<mark title="should be a">o</mark>' in html
    assert '<ins title="not in the reference">t</ins>' in html
    assert '<del title="not read">␣</del>' in html
    assert '<span class="gap" title="missing: ␣"></span>' in html


def test_an_edit_that_cannot_be_seen_is_marked_by_its_code():
    html = render(make_inputs(replace={0: ("\u202eok", "ok"), 1: ("no", "n\u200bo")}))
    assert '<del title="not read">U+202E</del>' in html
    assert '<ins title="not in the reference">U+200B</ins>' in html


def test_confusions_are_counted_and_blanks_seen():
    html = render(make_inputs(errors=0.0, replace={0: ("on no", "om mo"), 1: ("no no", "mono")}))
    table = re.search(r'<table class="confusions">.*?</table>', html, re.S)[0]
    rows = [re.sub(r"<[^>]+>|\s+", " ", row).split() for row in re.findall(r"<tr><td>.*?</tr>", table)]
    assert [row[:4] for row in rows] == [["n", "→", "m", "3"], ["␣", "→", "nothing", "1"]]
    assert [row[4] for row in rows] == ["75.0", "25.0"]
    assert "4 edits of 2 kinds." in html


@pytest.mark.parametrize(
    ("character", "shown"), [(" ", "␣"), ("\u0301", "◌\u0301"), ("\u202e", "U+202E"), ("\t", "U+0009"), ("é", "é")]
)
def test_characters_that_cannot_be_seen_get_a_stand_in(character, shown):
    assert _show_character(character) == shown


def test_reliability_is_drawn_before_and_after_calibration_with_its_counts(html, inputs):
    section = re.search(r'<section id="confidence">.*?</section>', html, re.S)[0]
    for level, unit in (("lines", "line"), ("characters", "character")):
        found = inputs["metrics"]["calibration"]["greedy"][level]
        for name, key in (("before", "before"), ("calibrated", "after")):
            drawn = [entry for entry in found[key]["bins"] if entry["num"] >= 3]
            titles = re.findall(rf"<title>{name}: ([\d\u202f]+) {unit}s? with a mean confidence of ([\d.]+)", section)
            assert [(num_of(num), float(mean)) for num, mean in titles] == [
                (entry["num"], round(100 * entry["confidence"], 1)) for entry in drawn
            ]
        columns = re.findall(rf"<title>([\d\u202f]+) {unit}s? with a confidence of", section)
        assert sum(map(num_of, columns)) == found["after"]["num"]
    table = re.search(r'<table class="calibration">.*?</table>', section, re.S)[0]
    rows = re.findall(r'<th scope="row">(.*?)</th><td class="num">(.*?)</td><td class="num">(.*?)</td>', table)
    assert [name for name, _, _ in rows] == [
        f"{d}, {level}" for d in ("greedy", "beam") for level in ("lines", "characters")
    ]
    error = inputs["metrics"]["calibration"]["beam"]["lines"]["after"]["expected_calibration_error"]
    assert rows[2][2] == f"{100 * error:.1f}\u202f%"
    assert "calibrated on the validation lines" in section


def test_confidences_that_were_not_calibrated_are_called_so(inputs):
    calibration = inputs["metrics"]["calibration"]["greedy"]
    same = {level: {"before": found["after"], "after": found["after"]} for level, found in calibration.items()}
    metrics = inputs["metrics"] | {"calibration": inputs["metrics"]["calibration"] | {"greedy": same}}
    section = Page(render(inputs | {"metrics": metrics})).text_of["confidence"]
    assert "for that there are too few validation lines" in section
    assert "as the decoder gives it" in section
    assert "after calibration" not in section


def test_groups_say_whether_training_saw_them():
    inputs = make_inputs(num_writers=60)
    inputs["metrics"]["groups"][0]["seen_in_training"] = False
    inputs["metrics"]["seen_groups"] = {"num_lines": 40, "num_characters": 900, "cer": 0.02}
    inputs["metrics"]["unseen_groups"] = {"num_lines": 8, "num_characters": 200, "cer": 0.05}
    text = re.sub("[ \n]+", " ", Page(render(inputs)).text_of["groups"])
    assert "seen in training are read with a CER of 2.00\u202f% (40 lines)" in text
    assert "never seen with 5.00\u202f% (8 lines): 2.5 times that error rate" in text


def test_hostile_text_stays_text():
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    inputs = make_inputs(
        num_writers=40, num_rejected=1, title=evil, replace={0: (evil, evil + "</dd>"), 1: ("{{ 7 * 7 }}", "\u202e<b>")}
    )
    for table, columns in (("rejected_lines", ("file", "detail", "reason")), ("predictions", ("writer_id", "group"))):
        for column in columns:
            index = inputs[table].schema.get_field_index(column)
            values = [evil] * len(inputs[table])
            inputs[table] = inputs[table].set_column(index, inputs[table].schema.field(column), [values])
    inputs["metrics"]["writers"][0]["writer_id"] = evil
    inputs["metrics"]["groups"][0]["group"] = evil
    inputs["metrics"]["characters_outside_charset"] = {"<": 1}
    inputs["registration"]["reason"] = inputs["registration"]["model_uri"] = evil
    inputs["validation_summary"]["warnings"] = [evil]
    inputs["parameters"]["source"] = {evil: evil}
    html = render(inputs)
    page = Page(html)
    assert not page.all("script")
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert "49" not in re.findall(r'dd dir="auto" class="reference">(.*?)</dd>', html)
    assert evil in page.text_of["h1"] + page.text_of["title"]


def test_empty_and_long_and_right_to_left_texts_are_shown():
    long = "antidisestablishmentarianism" * 100
    html = render(
        make_inputs(replace={0: ("a line", ""), 1: ("", "ghost"), 2: (long, long[:-9]), 3: ("שלום עולם", "שלוס עולם")})
    )
    Page(html)
    assert "nothing was read" in html
    assert '<ins title="not in the reference">ghost</ins>' in html
    assert 'dir="auto" class="reference">שלו<mark' in html


def test_tables_without_groups_rejections_errors_or_epochs_make_a_page():
    inputs = make_inputs(with_groups=False, num_rejected=0, errors=0.0, epochs=0)
    inputs["metrics"] |= {"characters_outside_charset": {}}
    page = Page(render(inputs | {"parameters": {}, "validation_summary": {}}))
    assert "groups" not in page.text_of
    assert "None: every line that was found is used." in page.text_of["data"]
    assert "Every character is right on 8 test lines by 2 writers" in page.text_of["h1"]
    assert "Every line was read without an error." in page.text_of["worst"]
    assert "not a single edit" in page.text_of["confusions"]
    assert "no epochs" in page.text_of["training"]


def test_one_epoch_and_epochs_that_diverged_are_drawn():
    inputs = make_inputs(epochs=4)
    rows = inputs["history"].to_pylist()
    for name in ("train_loss", "validation_loss"):
        rows[1][name], rows[2][name] = math.nan, math.inf
    for num in (1, 4):
        html = render(inputs | {"history": to_table(rows[:num], HISTORY, TRAINED)})
        assert "nan" not in re.sub(r"[^\w ]", " ", html).lower().split()
        assert html.count('class="chart"') == 7


def test_no_samples_are_shown_when_none_are_wanted():
    html = render(make_inputs(num_samples=0, num_worst=0))
    assert "<article" not in html
    assert "Not asked for." in html


def test_thousands_of_writers_end_in_a_note():
    inputs = make_inputs()
    inputs["metrics"]["writers"] = [
        {"writer_id": f"w{n}", "split": "test", "num_lines": 3, "num_characters": 90, "cer": n / 30_000}
        for n in range(3000)
    ]
    html = render(inputs)
    table = re.search(r'<table class="writers">.*?</table>', html, re.S)[0]
    assert table.count("<tr>") == 31
    assert "2\u202f970 more writers are not shown, with error rates from 0.00\u202f% to 9.90\u202f%" in html


def test_tables_of_different_runs_are_noticed(inputs):
    stale = inputs["feature_stats"] | {"data_hash": "ab" * 32}
    html = render(inputs | {"feature_stats": stale, "features": FewLines([])})
    assert "made on data 0f0f0f0f0f0f, feature_stats is of data abababababab" in html
    assert "shown below without an image" in html
    assert "no image in the features" in html


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"history": to_table([], HISTORY, TRAINED | {"model_hash": "ff" * 32})}, "whose training is described below"),
        ({"registration": {"model_hash": "ff" * 32}}, "of another network than htr version 3"),
        (
            {"registration": {"decoding": {"decoder": "greedy", "looks": 1}}},
            "with other settings of decoding than those of",
        ),
        ({"manifest": None}, "are not those of the manifest on disk"),
    ],
)
def test_network_or_lines_of_another_run_are_noticed(inputs, change, words):
    ((name, value),) = change.items()
    if name == "registration":
        value = inputs["registration"] | value
    elif name == "manifest":
        value = inputs["manifest"].slice(0, len(inputs["manifest"]) - 1)
    assert words not in Page(render(inputs)).text_of["header"]
    assert words in Page(render(inputs | {name: value})).text_of["header"]


def test_writers_that_nobody_knows_are_not_counted():
    text = Page(render(make_inputs(lines_per_writer=1, num_writers=20))).text_of["h1"]
    assert text.strip().endswith("on 4 test lines.")


def test_network_that_no_epoch_has_bettered_is_said_to_be_kept(inputs):
    rows = inputs["history"].to_pylist()
    metadata = TRAINED | {"best_cer": "0.01", "best_epoch": "0"}
    text = Page(render(inputs | {"history": to_table(rows, HISTORY, metadata)})).text_of["training"]
    assert "No epoch was better than the network that training started from, which is kept" in text
    assert "validation CER of 1.00\u202f% (greedy, one look, 256 lines)" in text


def test_page_says_which_network_was_trained(page):
    assert "A network of size S (774\u202f912 weights), trained in float32: " in page.text_of["training"]


def test_a_history_of_an_earlier_version_has_a_page_too(inputs):
    metadata = {name: value for name, value in TRAINED.items() if name not in ("network_size", "num_weights")}
    history = to_table(inputs["history"].to_pylist(), HISTORY, metadata)
    assert "A network of size" not in Page(render(inputs | {"history": history})).text_of["training"]


def test_page_says_where_the_model_comes_from(page, html):
    for trace in ("2d" * 32, "3c" * 16, "4b" * 20):
        assert trace in page.text_of["header"]
    assert "kedro run --env finetune --params source.path=lines" in page.text_of["reproduce"]
    assert "95\u202f% interval" in html


def test_validation_page_elsewhere_is_linked(inputs):
    parameters = {"validation": {"docs_path": "data/02_intermediate/check me"}}
    links = Page(render(inputs | {"parameters": parameters})).all("a")
    assert "../02_intermediate/check%20me/summary.html" in [link["href"] for link in links]


def test_wrong_setting_is_named():
    with pytest.raises(UserError, match=r"report.num_sampels.*Did you mean report.num_samples"):
        ReportConfig(num_sampels=3)
    with pytest.raises(UserError, match=r"report.num_samples = -1: expected a whole number from 0 to 500"):
        ReportConfig(num_samples=-1)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0037), (2, 2), (0, 0), (-3, 17), (0, 98765), (1, 40)])
def test_ticks_enclose_the_data_with_round_values(low, high):
    ticks = _nice_ticks(low, high, 4)
    assert ticks[0] <= low <= high <= ticks[-1] or math.isclose(ticks[-1], high)
    assert 2 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_ticks_of_a_logarithmic_axis_enclose_the_data():
    assert _log_ticks(3.2, 170) == [2, 5, 10, 20, 50, 100, 200]
    assert _log_ticks(1, 5000) == [1, 10, 100, 1000, 10000]


def test_points_of_a_chart_lie_within_its_axes():
    series = Series("s", "first", [(x, 100.0 * math.exp(-x)) for x in range(200)], [str(x) for x in range(200)])
    chart = _chart("t", "x", "y", [series])
    points = chart.lines[0]["points"]
    assert len(points) <= 80
    assert points[-1][2] == "199"
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y, _ in points)


def test_browser_shows_the_page_without_complaint(html, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on PATH: the page is not seen by a browser")
    # The page's policy forbids scripts from where it stands; the probe goes in front of it and answers in the title.
    probe = (
        "<script>addEventListener('load', () => { const images = [...document.images];"
        "document.title = JSON.stringify({"
        "images: images.length, loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,"
        "height: document.documentElement.scrollHeight, "
        "overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth}); });</script>"
    )
    path = tmp_path / "report.html"
    path.write_text(html.replace("<head>", "<head>" + probe), encoding="utf-8")
    for width in (1200, 500):
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--window-size={width},900", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not complaints
        seen = re.search(r"<title>(\{.*?\})</title>", done.stdout)[1].replace("&quot;", '"')
        assert '"images":40,"loaded":40' in seen
        assert '"overflow":0' in seen
        assert int(re.search(r'"height":(\d+)', seen)[1]) > 4000
