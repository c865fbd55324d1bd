"""Nodes: manifest → features, feature_stats."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.features import FeatureShards, ShardPlan
from htr_pipeline.io.manifest import SPLITS


def extract_features(manifest: pa.Table, features: ImageConfig) -> ShardPlan:
    """Manifest → features: the dataset carries the plan out shard by shard, so that no more is ever in memory."""
    return ShardPlan(manifest, features)


def summarise_features(features: FeatureShards, config: ImageConfig) -> dict[str, Any]:
    """Features → feature_stats."""
    table = features.figures()
    widths = table["width_pixels"].to_numpy()
    by_split = {split: table.filter(pc.equal(table["split"], split)) for split in SPLITS}
    return {
        "data_hash": features.data_hash(),
        "height_pixels": config.height_pixels,
        "num_lines": {split: len(part) for split, part in by_split.items()},
        "width_pixels": {
            "min": int(widths.min()),
            "median": int(np.median(widths)),
            "p95": int(np.percentile(widths, 95)),
            "max": int(widths.max()),
        },
        "writers": {split: pc.count_distinct(part["writer_id"]).as_py() for split, part in by_split.items()},
        "characters": {
            split: dict(sorted(Counter("".join(part["text"].to_pylist())).items())) for split, part in by_split.items()
        },
    }
