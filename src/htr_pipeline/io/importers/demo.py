"""The demo data: English prose in rendered handwriting, as a folder of line images with a table.

    FOLDER/lines.tsv            id, split, writer, page, group (the font), image, text; tab separated, no quoting
    FOLDER/lines/<id>.png
    FOLDER/rendered.json        what it was rendered from; the folder is kept as long as that stays the same

A writer is a font with habits of its own and belongs to one split. The writers of the test split are new; some of them
write in fonts that occur nowhere else. No text occurs twice, and no sentence in two splits.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import fontpkg
import numpy as np
from tqdm import tqdm

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.synthesis import Font, draw_style, render_line
from htr_pipeline.core.threads import num_cores
from htr_pipeline.io.atomic import partial_path, remove_leftovers, replace_folder
from htr_pipeline.io.workers import map_jobs

logger = logging.getLogger(__name__)

RENDERING_VERSION = 1  # another number renders existing folders anew: raise it when lines come out differently
COLUMNS = ("id", "split", "writer", "page", "group", "image", "text")
_TABLE, _RECORD = "lines.tsv", "rendered.json"
_LINES_PER_PAGE = 12
_LINE_LENGTH = (20, 38)  # characters
_MOST_READINGS = 20  # of the prose, each in another order and with other cuts; about 3,600 lines each


@dataclass(frozen=True)
class _Family:
    """Which files of a font family look like handwriting: (weight, style) of each, or a range of a variable weight."""

    files: tuple[tuple[int, str], ...] = ((400, "normal"),)
    weights: tuple[int, int] | None = None
    joined: bool = False


_FAMILIES = {
    "caveat": _Family(weights=(400, 600), joined=True),
    "dancing-script": _Family(weights=(400, 550), joined=True),
    "delius": _Family(),
    "great-vibes": _Family(joined=True),
    "indie-flower": _Family(),
    "kalam": _Family(files=((300, "normal"), (400, "normal"))),
    "lobster-two": _Family(files=((400, "normal"), (400, "italic")), joined=True),
    "oleo-script": _Family(joined=True),
    "pacifico": _Family(joined=True),
    "permanent-marker": _Family(),
    "satisfy": _Family(joined=True),
    "shadows-into-light": _Family(),
    "yellowtail": _Family(joined=True),
    "zeyada": _Family(),
}
FONT_NAMES = tuple(_FAMILIES)


@config("demo")
class DemoConfig:
    """How much demo data, and from which fonts."""

    seed: int = setting(default=1, minimum=0)
    train_writers: int = setting(default=48, minimum=1)
    validation_writers: int = setting(default=8, minimum=1)
    test_writers: int = setting(default=16, minimum=1)
    train_lines_per_writer: int = setting(default=42, minimum=1)
    validation_lines_per_writer: int = setting(default=32, minimum=1)
    test_lines_per_writer: int = setting(default=25, minimum=1)
    heldout_fonts: list[str] = setting(default=["delius", "satisfy"])  # only in the test split
    heldout_share: float = setting(default=0.25, minimum=0.0, maximum=1.0)  # of the test writers
    num_workers: int | None = setting(default=None, minimum=1)  # processes; null: all cores. Does not change the lines

    def __post_init__(self) -> None:
        unknown = sorted(set(self.heldout_fonts) - set(FONT_NAMES))
        if unknown or set(self.heldout_fonts) >= set(FONT_NAMES):
            raise UserError(
                f"demo.heldout_fonts = {self.heldout_fonts!r}: expected some, not all, of {', '.join(FONT_NAMES)}."
            )


@dataclass(frozen=True)
class _Writer:
    """The lines of one writer, ready to be rendered in any process."""

    writer_id: str
    split: str
    font: Font
    seed: tuple[int, int]
    texts: tuple[str, ...]

    def rows(self) -> list[dict[str, str]]:
        """The writer's rows of the table, in the order of its texts."""
        rows = []
        for index, text in enumerate(self.texts):
            page_id = f"{self.writer_id}-p{index // _LINES_PER_PAGE + 1}"
            line_id = f"{page_id}-l{index % _LINES_PER_PAGE + 1:02d}"
            image = f"lines/{line_id}.png"
            values = (line_id, self.split, self.writer_id, page_id, self.font.name, image, text)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows


def render_demo(folder: str | Path, config: DemoConfig, progress: bool = True) -> None:
    """Renders the demo data into a folder, unless it already holds what these settings give.

    The folder appears, or is replaced, in one step once every line is there.

    Args:
        folder: will be made; may exist if it is empty or was rendered before.
        config: what to render.
        progress: show a bar.

    Raises:
        UserError: the folder holds something else, or a font is not installed.
    """
    folder = Path(folder).absolute()
    record = _record(config)
    if folder.is_file():
        raise UserError(f"demo folder {str(folder)!r} is a file: give source.path a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _RECORD).exists():
            raise UserError(
                f"demo folder {str(folder)!r} holds other files, and the demo data would replace them: "
                "give source.path another folder, or say by source.format what these files are (lines, table, page, "
                "alto, iam)."
            )
        if (folder / _RECORD).read_text(encoding="utf-8") == record:
            logger.info("%s: the demo data is already there.", folder)
            return

    writers = _plan_writers(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, folder.name)
    partial = partial_path(folder)
    try:
        (partial / "lines").mkdir(parents=True)
        _render_writers(partial, writers, config.num_workers or num_cores(), progress)
        table = ["\t".join(COLUMNS)] + ["\t".join(row.values()) for writer in writers for row in writer.rows()]
        (partial / _TABLE).write_text("\n".join(table) + "\n", encoding="utf-8", newline="\n")
        (partial / _RECORD).write_text(record, encoding="utf-8")
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def demo_font(name: str) -> Font:
    """One of FONT_NAMES as the renderer wants it.

    Raises:
        UserError: its package is not installed.
    """
    family = _FAMILIES[name]
    try:
        paths = tuple(fontpkg.path(name, weight, style) for weight, style in family.files)
    except fontpkg.FontpkgError as exc:
        raise UserError(f"Font {name!r} of the demo data is missing ({exc}): pip install fontpkg-{name}") from exc
    return Font(name, paths, family.weights, family.joined)


def demo_sentences() -> list[str]:
    """The sentences of the demo data, without the notice above them."""
    text = (importlib.resources.files(__package__) / "demo_prose.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _record(config: DemoConfig) -> str:
    """Everything that decides what the lines look like."""
    settings = dataclasses.asdict(config)
    del settings["num_workers"]
    prose = hashlib.sha256("\n".join(demo_sentences()).encode()).hexdigest()
    return json.dumps({"version": RENDERING_VERSION, "prose": prose, "settings": settings}, indent=1) + "\n"


def _plan_writers(config: DemoConfig) -> list[_Writer]:
    """All writers of all splits with their fonts and texts."""
    rng = np.random.default_rng((config.seed, 0))
    heldout = list(config.heldout_fonts)
    seen = [name for name in FONT_NAMES if name not in heldout]
    num_heldout = round(config.heldout_share * config.test_writers) if heldout else 0
    fonts = {
        "train": _deal(seen, config.train_writers, rng),
        "validation": _deal(seen, config.validation_writers, rng),
        "test": _deal(seen, config.test_writers - num_heldout, rng) + _deal(heldout, num_heldout, rng),
    }
    lines_per_writer = {
        "train": config.train_lines_per_writer,
        "validation": config.validation_lines_per_writer,
        "test": config.test_lines_per_writer,
    }
    texts = _cut_texts({split: len(fonts[split]) * lines_per_writer[split] for split in fonts}, rng)
    writers: list[_Writer] = []
    for split, names in fonts.items():
        for index, name in enumerate(names):
            number = len(writers) + 1  # from 1: a seed of (s, 0) is taken above
            own = texts[split][index * lines_per_writer[split] : (index + 1) * lines_per_writer[split]]
            writers.append(_Writer(f"w{number:03d}", split, demo_font(name), (config.seed, number), tuple(own)))
    return writers


def _deal(names: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` of the names in random order, none of them more than once oftener than another."""
    order = [names[index] for index in rng.permutation(len(names))]
    return [order[index % len(order)] for index in range(count)]


def _cut_texts(num_lines: dict[str, int], rng: np.random.Generator) -> dict[str, list[str]]:
    """So many different texts for each split, cut from sentences that no other split has."""
    sentences = demo_sentences()
    order = rng.permutation(len(sentences))
    # In proportion to the lines, but one short sentence alone may give no line at all.
    shares = np.maximum([*num_lines.values()], sum(num_lines.values()) / 100)
    bounds = np.cumsum([0, *shares]) / shares.sum() * len(sentences)
    taken: set[str] = set()
    texts: dict[str, list[str]] = {}
    for index, (split, wanted) in enumerate(num_lines.items()):
        own = [sentences[i] for i in order[int(bounds[index]) : int(bounds[index + 1])]]
        texts[split] = []
        for _ in range(_MOST_READINGS):
            new = dict.fromkeys(text for text in _cut_lines(own, rng) if text not in taken)
            texts[split] += list(new)[: wanted - len(texts[split])]
            taken.update(texts[split])
            if len(texts[split]) == wanted:
                break
            own = [own[i] for i in rng.permutation(len(own))]
        else:
            raise UserError(
                f"demo: the prose gives the {split} split {len(texts[split])} different lines, {wanted} are wanted. "
                "Lower the number of writers or of lines per writer."
            )
    return texts


def _cut_lines(sentences: list[str], rng: np.random.Generator) -> list[str]:
    """The running text of the sentences, cut between words; a line too short for the usual length is left out."""
    shortest, longest = _LINE_LENGTH
    lines, line, room = [], "", longest
    for word in " ".join(sentences).split():
        if line and len(line) + 1 + len(word) > room:
            lines.append(line)
            line, room = "", int(rng.integers(shortest + 6, longest + 1))
        line = f"{line} {word}" if line else word
    return [line for line in lines if shortest <= len(line) <= longest]


def _render_writers(folder: Path, writers: list[_Writer], num_workers: int, progress: bool) -> None:
    """Writes the line images of all writers, each writer in one of the processes."""
    total = sum(len(writer.texts) for writer in writers)
    counts = map_jobs(functools.partial(_render_writer, folder), writers, num_workers=min(num_workers, len(writers)))
    with tqdm(total=total, desc="Rendering demo lines", unit="line", disable=not progress) as bar:
        for count in counts:
            bar.update(count)


def _render_writer(folder: Path, writer: _Writer) -> int:
    """Writes the line images of one writer; returns how many."""
    style = draw_style(np.random.default_rng(writer.seed), writer.font)
    for index, row in enumerate(writer.rows()):
        # One generator a line: a line looks the same however many the writer has.
        image = render_line(row["text"], style, np.random.default_rng((*writer.seed, index + 1)))
        _, png = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        (folder / row["image"]).write_bytes(png.tobytes())
    return len(writer.texts)
