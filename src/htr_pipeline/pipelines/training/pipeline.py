"""features → charset, language_model, lexicon, model, history, provenance, learning_curves."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.training.nodes import (
    collect_charset,
    collect_words,
    draw_learning_curves,
    train,
    train_language_model,
)


def create_pipeline() -> Pipeline:
    """The training pipeline."""
    return Pipeline(
        [
            Node(
                collect_charset,
                ["features", "params:training", "params:checkpoint"],
                "charset",
                name="collect_charset",
            ),
            Node(
                train_language_model,
                ["features", "params:language_model"],
                "language_model",
                name="train_language_model",
            ),
            Node(
                collect_words,
                ["features", "params:language_model", "params:decoding", "language_model"],
                "lexicon",
                name="collect_words",
            ),
            Node(
                train,
                [
                    "features",
                    "feature_stats",
                    "charset",
                    "params:model",
                    "params:augmentation",
                    "params:training",
                    "params:checkpoint",
                ],
                ["model", "history", "provenance"],
                name="train_network",
                tags="gpu",
            ),
            Node(draw_learning_curves, "history", "learning_curves", name="draw_learning_curves"),
        ],
        tags="training",
    )
