"""Nodes: manifest → features, feature_stats."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.features import FeatureShards, ShardPlan
from htr_pipeline.io.manifest import SPLITS

_MEASURED = ("width_pixels", "ink_share", "contrast", "slant_degrees")


def extract_features(manifest: pa.Table, image_config: ImageConfig) -> ShardPlan:
    """Manifest → features: the dataset carries the plan out shard by shard, so that no more is ever in memory."""
    return ShardPlan(manifest, image_config)


def summarise_features(features: FeatureShards, image_config: ImageConfig) -> dict[str, Any]:
    """Features → feature_stats."""
    table = features.figures()
    by_split = {split: table.filter(pc.equal(table["split"], split)) for split in SPLITS}
    return {
        "data_hash": features.data_hash(),
        "height_pixels": image_config.height_pixels,
        "num_lines": {split: len(part) for split, part in by_split.items()},
        "num_bytes": features.num_bytes(),
        **{name: _distribution(table[name].to_numpy()) for name in _MEASURED},
        "writers": {split: pc.count_distinct(part["writer_id"]).as_py() for split, part in by_split.items()},
        "characters": {
            split: dict(sorted(Counter("".join(part["text"].to_pylist())).items())) for split, part in by_split.items()
        },
    }


def _distribution(values: np.ndarray) -> dict[str, float]:
    shares = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    return {name: round(float(np.percentile(values, share)), 4) for name, share in shares.items()}
