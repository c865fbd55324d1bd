"""model, charset, language_model, features → tuned_decoding, predictions, metrics."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.evaluation.nodes import measure_errors, read_lines, tune_decoding


def create_pipeline() -> Pipeline:
    """The evaluation pipeline."""
    return Pipeline(
        [
            Node(
                tune_decoding,
                ["features", "model", "charset", "language_model", "params:decoding"],
                "tuned_decoding",
                name="tune_decoding",
            ),
            Node(
                read_lines,
                ["features", "model", "charset", "language_model", "tuned_decoding"],
                "predictions",
                name="read_lines",
            ),
            Node(
                measure_errors,
                ["predictions", "features", "feature_stats", "charset", "tuned_decoding", "params:evaluation"],
                "metrics",
                name="measure_errors",
            ),
        ],
        tags="evaluation",
    )
