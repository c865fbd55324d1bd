"""What is trained and how: the settings of network and training, without TensorFlow."""

import math

from htr_pipeline.core.config import config, setting


@config("model")
class ModelConfig:
    """Which network is built."""

    size: str = setting(default="S", choices=("XS", "S", "M"))
    column_dropout: float = setting(default=0.2, minimum=0.0, maximum=0.9)
    recurrent_dropout: float = setting(default=0.2, minimum=0.0, maximum=0.9)


@config("training")
class TrainingConfig:
    """How long and how the network is trained."""

    epochs: int = setting(default=20, minimum=1)
    max_minutes: float | None = setting(default=None, minimum=0.01)  # null: epochs alone end it
    batch_size: int = setting(default=16, minimum=1)
    learning_rate: float = setting(default=2e-3, minimum=0.0, maximum=1.0)  # at its peak
    warmup_share: float = setting(default=0.02, minimum=0.0, maximum=0.5)  # of the whole training
    weight_decay: float = setting(default=1e-4, minimum=0.0)
    gradient_clip_norm: float = setting(default=5.0, minimum=0.0)
    shortcut_weight: float = setting(default=0.1, minimum=0.0, maximum=1.0)
    buffer_lines: int = setting(default=4096, minimum=1)
    max_validation_lines: int = setting(default=256, minimum=1)  # scored after every epoch
    checkpoint_seconds: float = setting(default=60.0, minimum=0.0)
    seed: int = setting(default=1, minimum=0)


def learning_rate(done: float, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak.

    Args:
        done: share of the whole training, 0 to 1.
        config: peak and share of warm-up.
    """
    if done < config.warmup_share:
        return config.learning_rate * max(done / config.warmup_share, 0.01)
    falling = (done - config.warmup_share) / (1.0 - config.warmup_share)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(falling, 1.0))))


# Best path; prefix beam search; the same with a language model.
DECODERS = ("greedy", "beam", "beam_lm")


@config("decoding")
class DecodingConfig:
    """How network outputs become text."""

    decoder: str = setting(default="greedy", choices=DECODERS)  # of headline, gate and served model
    beam_width: int = setting(default=20, minimum=1)
    # Of beam_lm: weight of the language model, bonus for each character. None: tuned on the validation lines.
    alpha: float | None = setting(default=None, minimum=0.0)
    beta: float | None = setting(default=None)


@config("language_model")
class LanguageModelConfig:
    """The character n-gram model that beam_lm reads with."""

    order: int = setting(default=6, minimum=1, maximum=10)
    texts: str | None = setting(default=None)  # folder of more texts: .txt files, UTF-8, learnt from line by line
