"""What is trained and how: the settings of network and training, without TensorFlow."""

import math
from collections.abc import Iterable

from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.ctc.lexicon import Lexicon
from htr_pipeline.core.text import Charset, normalise_text, visual_text

DEFAULT_SIZE = "SM"


@config("model")
class ModelConfig:
    """Which network is built; without a size, one of DEFAULT_SIZE, or of that of the network to start from."""

    size: str | None = setting(default=None, choices=("XS", "S", "SM", "M", "L"))
    column_dropout: float = setting(default=0.3, minimum=0.0, maximum=0.9)
    recurrent_dropout: float = setting(default=0.3, minimum=0.0, maximum=0.9)


@config("training")
class TrainingConfig:
    """How long and how the network is trained."""

    epochs: int = setting(default=10, minimum=1)
    max_minutes: float | None = setting(default=None, minimum=0.01, maximum=1e6)  # null: epochs alone end it
    batch_size: int = setting(default=16, minimum=1, maximum=65_536)
    learning_rate: float = setting(default=6e-3, minimum=0.0, maximum=1.0)  # at its peak
    warmup_share: float = setting(default=0.02, minimum=0.0, maximum=0.5)  # of the whole training
    weight_decay: float = setting(default=0.1, minimum=0.0, maximum=1.0)
    gradient_clip_norm: float = setting(default=5.0, minimum=0.0, maximum=1e6)  # 0: never
    shortcut_weight: float = setting(default=0.1, minimum=0.0, maximum=1.0)
    label_smoothing: float = setting(default=0.01, minimum=0.0, maximum=1.0)
    buffer_lines: int = setting(default=4096, minimum=1)
    max_validation_lines: int = setting(default=256, minimum=1)  # scored after every epoch
    checkpoint_seconds: float = setting(default=60.0, minimum=0.0)
    patience: int | None = setting(default=None, minimum=1)  # epochs without a better CER; None: never ends early
    on_collapse: str = setting(default="warn", choices=("warn", "back", "stop"))
    plateau_steps: int = setting(default=1000, minimum=20)  # the loss may stand still before it is a collapse
    max_bad_batches: int = setting(default=10, minimum=0)  # skipped because their gradient is not finite
    distribution: str = setting(default="none", choices=("none", "mirrored", "multi_worker"))
    precision: str = setting(default="auto", choices=("auto", "float32", "mixed_bfloat16"))
    start_from: str | None = setting(default=None)  # folder of model.keras and charset.json, models:/ URI, starter
    start_charset: str = setting(default="union", choices=("union", "new", "fail"))
    seed: int = setting(default=1, minimum=0, maximum=2**32 - 1)


def learning_rate(done: float, config: TrainingConfig) -> float:
    """Linear warm-up, then a straight line down to a hundredth of the peak.

    Args:
        done: share of the whole training, 0 to 1.
        config: peak and share of warm-up.
    """
    if done < config.warmup_share:
        return config.learning_rate * max(done / config.warmup_share, 0.01)
    falling = (done - config.warmup_share) / (1.0 - config.warmup_share)
    return config.learning_rate * max(1.0 - falling, 0.01)


def unusual_rate(config: TrainingConfig) -> str:
    """A sentence about a peak rate that is far from the default, or nothing."""
    default = TrainingConfig().learning_rate
    if default / 10 <= config.learning_rate <= default * 3:
        return ""
    return f" training.learning_rate is {config.learning_rate:g}; the default is {default:g}."


# Best path; prefix beam search; the same with what is known of the language.
DECODERS = ("greedy", "beam", "beam_lm")


@config("decoding")
class DecodingConfig:
    """How network outputs become text; language model, lexicon and hot words are those of beam_lm."""

    decoder: str = setting(default="beam_lm", choices=DECODERS)  # of headline, gate and served model
    beam_width: int = setting(default=50, minimum=1, maximum=10_000)  # requests set it too: a bound of memory
    looks: int = setting(default=3, choices=(1, 3))  # 3: at the line as it is, a little higher, a little lower
    # Weight of the language model, bonus for each character. None: tuned on the validation lines.
    alpha: float | None = setting(default=None, minimum=0.0, maximum=100.0)
    beta: float | None = setting(default=None, minimum=-100.0, maximum=100.0)
    lexicon: str | bool = setting(default="open", choices=("off", False, "strict", "open"))  # YAML reads off as False
    lexicon_words: str | None = setting(default=None)  # file of words; None: those of the language model's texts
    unknown_word_price: float = setting(default=3.0, minimum=0.0)  # nats, of an open lexicon
    hot_words: dict[str, float] = setting(default={})  # nats that each occurrence gains

    def __post_init__(self) -> None:
        """Checks the hot words, so that a wrong one stops a run before it begins.

        Raises:
            UserError: something among the hot words is no word, or its weight no number.
        """
        for word, weight in self.hot_words.items():
            if not isinstance(word, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(f"decoding.hot_words has {word!r}: {weight!r}. Expected a word and a number of nats.")
        if len({normalise_text(word) for word in self.hot_words}) < len(self.hot_words):
            raise UserError(
                f"decoding.hot_words has a word twice, perhaps in two Unicode forms: {', '.join(self.hot_words)}. Give "
                "it one weight."
            )
        try:
            Lexicon(hot_words={normalise_text(word): weight for word, weight in self.hot_words.items()})
        except ValueError as exc:
            raise UserError(f"decoding.hot_words: {exc}") from None

    def build_lexicon(self, words: Iterable[str], charset: Charset) -> Lexicon | None:
        """Lexicon and hot words as beam_search takes them, in visual order; None where there are neither.

        Args:
            words: the known words; not looked at where the lexicon is off.
            charset: of the network.
        """
        hot_words = {visual_text(word): weight for word, weight in self.normalised_hot_words(charset).items()}
        if self.lexicon in ("off", False):
            return Lexicon(unknown_price=0.0, hot_words=hot_words) if hot_words else None
        price = math.inf if self.lexicon == "strict" else self.unknown_word_price
        return Lexicon(map(visual_text, words), unknown_price=price, hot_words=hot_words)

    def normalised_hot_words(self, charset: Charset) -> dict[str, float]:
        """As the network writes them: a decomposed é would never be found where it writes composed ones."""
        return {charset.normalised(word): weight for word, weight in self.hot_words.items()}


@config("language_model")
class LanguageModelConfig:
    """The n-gram model that beam_lm reads with."""

    kind: str = setting(default="character", choices=("character", "word"))
    order: int | None = setting(default=None, minimum=1, maximum=10)  # None: 6 characters or 3 words
    texts: str | None = setting(default=None)  # folder of more texts: .txt files, UTF-8, learnt from line by line
    arpa: str | None = setting(default=None)  # a model of that kind as ARPA file, taken instead of training one
    space_token: str = setting(default="<space>")  # how the ARPA file writes the blank

    def __post_init__(self) -> None:
        """Refuses what would do nothing.

        Raises:
            UserError: an order is given for a model that is not trained here.
        """
        if self.arpa and self.order is not None:
            raise UserError(
                f"language_model.order = {self.order} beside language_model.arpa: the model of a file has the order of "
                "that file. Leave one of the two out."
            )
