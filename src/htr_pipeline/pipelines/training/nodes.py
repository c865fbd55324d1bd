"""Nodes: features → charset, language_model, lexicon, model, history, provenance, learning_curves."""

import contextlib
import hashlib
import io
import json
import logging
import math
import signal
import threading
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.batching import Line
from htr_pipeline.core.collapse import ADVICE, HEALTHY, READING_CER
from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.ctc.lexicon import bare_word
from htr_pipeline.core.image import differing_settings
from htr_pipeline.core.recipe import (
    DEFAULT_SIZE,
    DecodingConfig,
    LanguageModelConfig,
    ModelConfig,
    TrainingConfig,
    unusual_rate,
)
from htr_pipeline.core.text import Charset, visual_text
from htr_pipeline.io.checkpoints import FileCheckpoints, stored_settings
from htr_pipeline.io.features import FeatureShards
from htr_pipeline.io.manifest import HISTORY, to_table
from htr_pipeline.io.starting_point import StartingPoint, charset_hash, make_provenance

logger = logging.getLogger(__name__)

# Columns of the batch that check-batch learns: enough for 16 lines of a page's width, and for 100 steps a minute.
_MOST_CHECKED_PIXELS = 20_000

# Settings that change no weight which is there: a training goes on from its checkpoint with others. Of the network to
# start from the content counts, not its name.
_NOT_OF_WEIGHTS = ("checkpoint_seconds", "max_bad_batches", "on_collapse", "patience", "start_from")
# Of the MLflow run: how the same few validation lines are read after each epoch.
_SAMPLES = "samples.json"
_MANY_UNKNOWN_WORDS = 0.5  # of the words of the training texts, by a language model of words from a file


@config("checkpoint")
class CheckpointConfig:
    """Where training keeps what it needs to go on after an interruption."""

    path: str = setting(default="data/06_models/checkpoint.npz")


def collect_charset(features: FeatureShards, training: TrainingConfig, checkpoint: CheckpointConfig) -> str:
    """Features → charset: every character of the training texts, and those of the network to start from."""
    # The checkpoint may be put elsewhere; by default it is where the catalog has model and charset.
    written = {Path(path).parent.resolve() for path in (checkpoint.path, CheckpointConfig().path)}
    if training.start_from and Path(training.start_from).resolve() in written:
        raise UserError(
            f"training.start_from = {training.start_from!r} is the folder that this training writes to. Copy its "
            "model.keras, charset.json and provenance.json to another one, or start from the registered model: "
            "models:/NAME@ALIAS."
        )
    texts = _training_texts(features)
    charset = Charset.from_texts(texts)
    start = find_start(training, checkpoint, features.data_hash())
    if not start:
        return charset.to_json()
    known = start.charset()
    new, unused = charset.unknown("".join(known.characters)), known.unknown("".join(charset.characters))
    if training.start_charset == "fail" and unused:
        raise UserError(
            f"training.start_charset is fail, and the training texts have characters that {training.start_from!r} "
            f"does not know: {unused!r}. union adds them to its charset, new keeps only those of the texts."
        )
    chosen = charset if training.start_charset == "new" else known.extended(texts)
    logger.info(
        "Charset: %d characters, %d of them new, to those of %s.", len(chosen), len(unused), training.start_from
    )
    if training.start_charset == "new" and new:
        logger.info("Not kept, since no training text has them: %r.", new)
    return chosen.to_json()


def train_language_model(features: FeatureShards, language_model: LanguageModelConfig) -> Any:
    """Features → language_model: n-grams of the training texts and of more texts if there are, or those of a file.

    They are n-grams of texts in visual order; a file of others is of no use for text from right to left.
    """
    from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram

    kind = {"character": CharacterNGram, "word": WordNGram}[language_model.kind]
    if language_model.arpa:
        try:
            model = kind.from_arpa(language_model.arpa, space_token=language_model.space_token)
        except (OSError, ValueError) as exc:
            raise UserError(f"language_model.arpa: {exc}") from None
        if language_model.kind == "character" and " " not in model.vocabulary:
            logger.warning(
                "%s has no %r, so the model knows no blanks. language_model.space_token says how it writes them.",
                language_model.arpa, language_model.space_token,
            )  # fmt: skip
        _warn_of_unknown_tokens(features, language_model, set(model.vocabulary))
        if any(visual_text(text) != text for text in _training_texts(features)):
            logger.warning(
                "There are texts from right to left, whose language model is one of texts in visual order "
                "(htr_pipeline.core.text.visual_text). %s has to be such a one.", language_model.arpa,
            )  # fmt: skip
        source = language_model.arpa
    else:
        texts = list(map(visual_text, _known_texts(features, language_model)))
        model = kind.train(texts) if language_model.order is None else kind.train(texts, language_model.order)
        source = f"{len(texts)} lines"
    logger.info("Language model of %ss, order %d, of %s: %d n-grams.",
                language_model.kind, model.order, source, len(model.trie) - 2)  # fmt: skip
    return model


def collect_words(
    features: FeatureShards, language_model: LanguageModelConfig, decoding: DecodingConfig, model: Any = None
) -> str:
    """Features → lexicon: the words of the file, or those that the language model knows; one a line, in order.

    These are the words of its texts, and of an ARPA file of words those of the file too.
    """
    if decoding.lexicon_words:
        known = Charset.from_texts(_training_texts(features))
        words = set(filter(None, map(bare_word, known.normalised(_read_text(Path(decoding.lexicon_words))).split())))
        if not words:
            raise UserError(f"decoding.lexicon_words = {decoding.lexicon_words!r}: there is no word in this file.")
    else:
        texts = _known_texts(features, language_model)
        if language_model.arpa and language_model.kind == "word":
            from htr_pipeline.core.ctc.language_model import END

            texts += model.vocabulary[END + 1 :]
        words = {bare for text in texts for bare in map(bare_word, text.split()) if bare}
    return "".join(f"{word}\n" for word in sorted(words))


def _warn_of_unknown_tokens(
    features: FeatureShards, language_model: LanguageModelConfig, vocabulary: Collection[str]
) -> None:
    """What the model of a file does not know is hardly ever read, and nothing else would say so."""
    texts = _training_texts(features)
    if language_model.kind == "character":
        # The blank has a warning of its own.
        if unknown := sorted(set("".join(texts)).difference(vocabulary, " ")):
            logger.warning(
                "%s does not know %d of the characters of the training texts: %s. beam_lm will hardly write them. Is "
                "the file of another Unicode form (source.unicode_form), or of other texts?",
                language_model.arpa, len(unknown), " ".join(unknown[:20]),
            )  # fmt: skip
    else:
        words = {word for text in texts for word in text.split()}
        unknown = sorted(words.difference(vocabulary))
        if len(unknown) > _MANY_UNKNOWN_WORDS * len(words):
            logger.warning(
                "%s does not know %d of the %d words of the training texts, such as %s. Its words have to be what "
                "stands between blanks, with their punctuation.",
                language_model.arpa, len(unknown), len(words), ", ".join(unknown[:5]),
            )  # fmt: skip


def _training_texts(features: FeatureShards) -> list[str]:
    figures = features.figures()
    return figures.filter(pc.equal(figures["split"], "train"))["text"].to_pylist()


def _known_texts(features: FeatureShards, language_model: LanguageModelConfig) -> list[str]:
    """The training texts, then the lines of the extra ones."""
    texts = _training_texts(features)
    if language_model.texts:
        folder = Path(language_model.texts)
        files = sorted(folder.rglob("*.txt"))
        if not files:
            raise UserError(f"language_model.texts = {str(folder)!r}: expected a folder with .txt files.")
        known = Charset.from_texts(texts)
        texts += filter(None, [known.normalised(line) for file in files for line in _read_text(file).splitlines()])
    return texts


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UserError(f"{file}: this is not UTF-8 ({exc.reason} at byte {exc.start}).") from None
    except OSError as exc:
        raise UserError(f"{file}: cannot be read: {exc.strerror}.") from None


def train(
    features: FeatureShards,
    feature_stats: dict[str, Any],
    charset: str,
    model: ModelConfig,
    augmentation: AugmentationConfig,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
) -> tuple[Any, pa.Table, dict[str, Any]]:
    """Features, charset → model, history, provenance."""
    from htr_pipeline.core.distribution import Distribution
    from htr_pipeline.core.model import chosen_precision, size_of, weights_hash
    from htr_pipeline.core.training import train_network

    features.check_stats(feature_stats)
    precision = chosen_precision(training.precision)
    logger.info("training.precision is %s: trains in %s.", training.precision, precision)
    distribution = Distribution(training.distribution)
    if distribution.num_replicas > 1:
        logger.info("Each batch of %d lines is shared by %d devices.", training.batch_size, distribution.num_replicas)
    classes = Charset.from_json(charset)
    start = find_start(training, checkpoint, feature_stats["data_hash"])
    if start and start.name != training.start_from:
        logger.info("%s is %s.", training.start_from, start.name)
    settings = _settings_of_weights(feature_stats["data_hash"], charset, model, augmentation, training, start)
    names_of_start = {"training.start_from": training.start_from, "start": start.name if start else None}
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    distribution.require_equal(
        f"{fingerprint} {replace(training, start_from=None)}",
        "The workers of this training do not have the same lines (this one: data_hash "
        f"{feature_stats['data_hash'][:12]}), settings, network to start from or versions of htr-pipeline, Keras and "
        "NumPy. Give all of them the same features and the same --params.",
    )
    with distribution.scope():
        network = build_network(model, training, classes, feature_stats, features.settings(), start)

    def read_training_lines(rng: np.random.Generator) -> Iterator[Line]:
        return features.lines("train", rng)

    validation_lines = features.spread("validation", training.max_validation_lines)
    with (
        logging_redirect_tqdm(),
        distribution.lost_workers_in_words(),
        _TrainingProgress(distribution.is_chief) as progress,
    ):
        trained = train_network(
            network,
            read_training_lines,
            feature_stats["num_lines"]["train"],
            validation_lines,
            classes,
            augmentation=augmentation,
            config=training,
            checkpoints=FileCheckpoints(Path(checkpoint.path), fingerprint, settings | names_of_start),
            progress=progress,
            distribution=distribution,
        )
        progress.complete(trained.history)
    logger.info("Best validation CER: %.2f %% (greedy); ended by: %s.", 100 * trained.best_cer, trained.ended_by)
    if trained.best_cer > READING_CER:
        _warn_of_not_reading(trained.history[-1], training)
    if trained.ended_by == "interrupt":
        logger.warning("Training is not complete: the same command goes on where it was stopped.")
    metadata = {
        "ended_by": trained.ended_by,
        "is_chief": str(distribution.is_chief),
        "network_size": str(size_of(trained.model)),
        "num_weights": str(trained.model.count_params()),
        "precision": precision,
        "fingerprint": fingerprint,
        "model_hash": weights_hash(trained.model),
        "best_cer": repr(trained.best_cer),
        "best_epoch": str(trained.best_epoch),
        "num_validation_lines": str(len(validation_lines)),
    }
    provenance = make_provenance(
        metadata["model_hash"], charset, features.settings(), features.content_hashes()["train"], start
    )
    return trained.model, to_table(trained.history, HISTORY, metadata), provenance


def _settings_of_weights(
    data_hash: str,
    charset: str,
    model: ModelConfig,
    augmentation: AugmentationConfig,
    training: TrainingConfig,
    start: StartingPoint | None,
) -> dict[str, Any]:
    """All that the weights depend on, by name. The fingerprint of a training is made of it, in this order."""
    settings = {
        "set of lines": data_hash,
        "charset": charset_hash(charset),
        **{f"version of {package}": version(package) for package in ("htr-pipeline", "keras", "numpy")},
    }
    for block, values in {"model": model, "augmentation": augmentation, "training": training}.items():
        settings |= {f"{block}.{name}": value for name, value in asdict(values).items() if name not in _NOT_OF_WEIGHTS}
    return settings | {
        "model.size": None if start else model.size or DEFAULT_SIZE,
        "network to start from": start.content_hash() if start else None,
    }


def _warn_of_not_reading(last_epoch: dict[str, Any], training: TrainingConfig) -> None:
    """Says why the best network does not read validation lines, and what to try."""
    verdict = last_epoch["verdict"]
    if verdict not in (*HEALTHY, "by_heart"):
        advice = ADVICE[verdict] + unusual_rate(training)
        logger.warning("The network does not read: its training was last judged as %s. %s", verdict, advice)
    elif last_epoch["train_cer"] < READING_CER:
        logger.warning(
            "The network reads its training lines better (CER %.0f %%) than others. %s",
            100 * last_epoch["train_cer"], ADVICE["by_heart"],
        )  # fmt: skip
    else:
        logger.warning(
            "The network does not read yet. It made %d steps, and from scratch reading takes some thousand: raise "
            "training.epochs (%d) or training.max_minutes, or begin with a network that reads, by --env finetune.%s",
            last_epoch["step"], training.epochs, unusual_rate(training),
        )  # fmt: skip


def find_start(training: TrainingConfig, checkpoint: CheckpointConfig, data_hash: str) -> StartingPoint | None:
    """The network to start from; where a training on these lines was stopped, the one that it started from.

    An alias may have moved since, as after a run that was killed behind the registration of its own model.
    """
    name = training.start_from
    if not name:
        return None
    start = StartingPoint.find(name)
    if start.name == name:  # no alias
        return start
    wanted = {f"training.{key}": value for key, value in asdict(training).items() if key not in _NOT_OF_WEIGHTS}
    wanted |= {"training.start_from": name, "set of lines": data_hash}
    for stored in stored_settings(Path(checkpoint.path)):
        if all(stored.get(key) == value for key, value in wanted.items()):
            with contextlib.suppress(UserError):  # the version is gone
                return StartingPoint.find(stored["start"])
    return start


def build_network(
    model: ModelConfig,
    training: TrainingConfig,
    charset: Charset,
    feature_stats: dict[str, Any],
    feature_settings: dict[str, Any],
    start: StartingPoint | None,
) -> Any:
    """The network to begin with: new, or with the weights of the one to start from. Logs its size and cost."""
    from htr_pipeline.core.model import build_model, multiplications, size_of

    if start:
        network = _from_start(model, training, charset, feature_stats["height_pixels"], feature_settings, start)
    else:
        network = build_model(model, charset.num_classes, feature_stats["height_pixels"], training.seed)
    width = feature_stats["width_pixels"]["median"]
    logger.info(
        "Network %s: %.2f million parameters, %.2f billion multiplications for a line of %d x %d pixels (the median).",
        size_of(network),
        network.count_params() / 1e6,
        multiplications(network, int(width)) / 1e9,
        width,
        feature_stats["height_pixels"],
    )
    return network


def _from_start(
    model: ModelConfig,
    training: TrainingConfig,
    charset: Charset,
    height_pixels: int,
    feature_settings: dict[str, Any],
    start: StartingPoint,
) -> Any:
    """A network of the size and with the weights of the one to start from."""
    from htr_pipeline.core.model import build_model, copy_weights, size_of

    trained = start.model()
    size = size_of(trained)
    if size is None:
        raise UserError(
            f"{training.start_from!r} is a network of no size that there is. Start from one that this version of "
            "htr_pipeline has trained."
        )
    if model.size not in (None, size):
        raise UserError(
            f"model.size = {model.size!r}: {training.start_from!r} is of size {size}, and weights of one size are "
            "of no use to another. Set model.size=null, or start from a network of that size."
        )
    network = build_model(replace(model, size=size), charset.num_classes, height_pixels, training.seed)
    copy_weights(trained, start.charset(), network, charset)
    provenance = start.provenance()
    if not provenance:
        logger.warning(
            "%r has no provenance.json: whether it was trained on lines of the present test, and with which "
            "settings of features, cannot be told.", training.start_from
        )  # fmt: skip
    theirs = provenance.get("feature_settings", feature_settings) | {"height_pixels": trained.inputs[0].shape[-1]}
    if different := differing_settings(theirs, feature_settings):
        logger.warning(
            "%r was trained on lines that were made with other settings of features (%s): it knows strokes of "
            "another kind. Set them as it had them.", training.start_from, "; ".join(different)
        )  # fmt: skip
    return network


def draw_learning_curves(history: pa.Table) -> str:
    """History → learning_curves: loss, CER and learning rate by epoch, an SVG picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    rows = history.to_pydict()
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, errors, rates = figure.subplots(1, 3)
    lowest = min((cer for cer in rows["validation_cer"] if math.isfinite(cer)), default=math.nan)
    for axes, title, columns, write in (
        (losses, "Loss, nats a line", ("train_loss", "validation_loss"), "{x:g}"),
        (errors, f"CER, lowest on validation {lowest:.2%}", ("train_cer", "validation_cer"), _write_percent),
        (rates, "Learning rate", ("learning_rate",), None),
    ):
        for column in columns:
            axes.plot(rows["epoch"], rows[column], marker=".", label=column.replace("_", " "))
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
        positive = [value for column in columns for value in rows[column] if value > 0 and math.isfinite(value)]
        if write and positive:
            factor = max(positive) / min(positive)
            steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if factor < 30 else (1.0, 2.0, 5.0) if factor < 1000 else (1.0,)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
            axes.yaxis.set_major_formatter(write)
            axes.yaxis.set_minor_formatter(NullFormatter())
    stream = io.StringIO()
    # Texts as texts, no date, and ids from a fixed salt: equal runs draw equal pictures.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "learning_curves"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _write_percent(share: float, _: int | None = None) -> str:
    return f"{100 * share:g} %"


def check_training_batch(
    features: FeatureShards,
    feature_stats: dict[str, Any],
    model: ModelConfig,
    training: TrainingConfig,
    checkpoint: CheckpointConfig,
    max_seconds: float,
) -> tuple[bool, str]:
    """Whether one batch of the training lines, spread over all of them, is learnt by heart; and a sentence."""
    from htr_pipeline.core.check_batch import check_batch

    features.check_stats(feature_stats)
    lines = features.spread("train", training.batch_size)
    if not lines:
        raise UserError("There are no training lines. Look into the manifest's column 'split'.")
    lines.sort(key=lambda line: line.pixels.shape[0])
    while len(lines) > 2 and len(lines) * lines[-1].pixels.shape[0] > _MOST_CHECKED_PIXELS:
        lines.pop()
    charset = Charset.from_json(collect_charset(features, training, checkpoint))
    start = find_start(training, checkpoint, feature_stats["data_hash"])
    model = replace(model, column_dropout=0.0, recurrent_dropout=0.0)
    network = build_network(model, training, charset, feature_stats, features.settings(), start)
    with tqdm(desc="Steps", unit="") as bar:

        def show(steps: int, cer: float) -> None:
            bar.set_postfix_str(f"CER {cer:.1%}", refresh=False)
            bar.update(steps - bar.n)

        return check_batch(network, lines, charset, training, max_seconds=max_seconds, on_step=show)


class _TrainingProgress:
    """A progress bar over the whole training, after each epoch a log line, and metrics and readings in MLflow.

    Ctrl-C ends training.

    Args:
        is_chief: of several workers only the chief logs to MLflow.
    """

    _stop_asked = False

    def __init__(self, is_chief: bool) -> None:
        self._is_chief = is_chief

    def __enter__(self) -> "_TrainingProgress":
        self._samples = _logged_samples()
        self._on_main_thread = threading.current_thread() is threading.main_thread()
        if self._on_main_thread:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(total=100, desc="Training", bar_format=form, postfix="the first step is being compiled")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._on_main_thread:
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, *_: object) -> None:
        self._stop_asked = True
        signal.signal(signal.SIGINT, self._handler)
        logger.warning(
            "Training stops after this batch; the best network so far is kept and the run goes on with it. "
            "Ctrl-C once more ends the run at once."
        )

    def stop_asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._stop_asked

    def notice(self, sentence: str, warning: bool) -> None:
        """Logs the sentence."""
        logger.log(logging.WARNING if warning else logging.INFO, sentence)

    def step(self, done: float, figures: dict[str, float]) -> None:
        """Moves the bar."""
        self._bar.set_postfix_str(
            f"loss {figures['loss']:.1f}, CER {figures['cer']:.1%}, {figures['lines_per_second']:.0f} lines/s",
            refresh=False,
        )
        self._bar.update(min(100.0 * done, 100.0) - self._bar.n)

    def complete(self, history: list[dict[str, Any]]) -> None:
        """Logs the epochs that an earlier MLflow run has, where training went on in a new one: after Ctrl-C, say."""
        import mlflow

        if self._is_chief and (run := mlflow.active_run()):
            logged = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation_cer")
            steps = {metric.step for metric in logged}
            for row in history:
                if int(row["step"]) not in steps:
                    _log_epoch(row)

    def epoch(self, row: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """Logs the epoch."""
        import mlflow

        logger.info(
            "Epoch %d: loss %.1f, validation loss %.1f, CER train %.1f %%, validation %.1f %%, %.0f lines/s",
            row["epoch"],
            row["train_loss"],
            row["validation_loss"],
            100 * row["train_cer"],
            100 * row["validation_cer"],
            row["lines_per_second"],
        )
        reference, hypothesis = samples[int(row["epoch"]) % len(samples)]
        logger.info("  %r is read as %r", reference, hypothesis)
        if self._is_chief and mlflow.active_run():
            _log_epoch(row)
            # A run that goes on repeats the epochs since its checkpoint.
            self._samples = [sample for sample in self._samples if sample["epoch"] < row["epoch"]]
            self._samples += [{"epoch": row["epoch"], "reference": r, "hypothesis": h} for r, h in samples]
            mlflow.log_text(json.dumps(self._samples, ensure_ascii=False, indent=1), _SAMPLES)


def _log_epoch(row: dict[str, Any]) -> None:
    import mlflow

    figures = {k: v for k, v in row.items() if k not in ("epoch", "step", "verdict")}
    mlflow.log_metrics(figures, step=int(row["step"]))
    mlflow.set_tag("training_state", row["verdict"])


def _logged_samples() -> list[dict[str, Any]]:
    """What the MLflow run holds already, if it goes on after an interruption."""
    import mlflow

    run = mlflow.active_run()
    if not run or _SAMPLES not in [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)]:
        return []
    with contextlib.suppress(ValueError):  # cut off by a power cut
        return json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{_SAMPLES}"))
    return []
