"""What is trained and how: the settings of network and training, without TensorFlow."""

import math

from htr_pipeline.core.config import config, setting


@config("model")
class ModelConfig:
    """Which network is built."""

    size: str = setting("S", choices=("XS", "S", "M"))
    column_dropout: float = setting(0.2, minimum=0.0, maximum=0.9)
    recurrent_dropout: float = setting(0.2, minimum=0.0, maximum=0.9)


@config("training")
class TrainingConfig:
    """How long and how the network is trained."""

    epochs: int = setting(40, minimum=1)
    max_minutes: float | None = setting(None, minimum=0.01)  # null: only epochs count, and runs repeat bit for bit
    batch_size: int = setting(16, minimum=1)
    learning_rate: float = setting(2e-3, minimum=0.0, maximum=1.0)  # at its peak
    warmup_share: float = setting(0.02, minimum=0.0, maximum=0.5)  # of the whole training
    weight_decay: float = setting(1e-4, minimum=0.0)
    gradient_clip_norm: float = setting(5.0, minimum=0.0)
    shortcut_weight: float = setting(0.1, minimum=0.0, maximum=1.0)
    buffer_lines: int = setting(4096, minimum=1)
    max_validation_lines: int = setting(256, minimum=1)  # scored after every epoch
    checkpoint_seconds: float = setting(60.0, minimum=0.0)
    seed: int = setting(1, minimum=0)


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


@config("decoding")
class DecodingConfig:
    """How network outputs become text."""

    decoder: str = setting("greedy", choices=("greedy", "beam"))  # of headline, gate and served model
    beam_width: int = setting(20, minimum=1)
