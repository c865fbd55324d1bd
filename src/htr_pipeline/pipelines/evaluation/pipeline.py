"""model, charset, features → predictions, metrics."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.evaluation.nodes import measure_errors, read_lines


def create_pipeline() -> Pipeline:
    """The evaluation pipeline."""
    return Pipeline(
        [
            Node(read_lines, ["features", "model", "charset", "params:decoding"], "predictions", name="read_lines"),
            Node(
                measure_errors,
                ["predictions", "features", "feature_stats", "charset", "params:decoding", "params:evaluation"],
                "metrics",
                name="measure_errors",
            ),
        ],
        tags="evaluation",
    )
