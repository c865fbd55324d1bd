"""Tables and figures of the other pipelines → report."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.reporting.nodes import render_report


def create_pipeline() -> Pipeline:
    """The reporting pipeline."""
    return Pipeline(
        [
            Node(
                render_report,
                [
                    "metrics",
                    "history",
                    "predictions",
                    "rejected_lines",
                    "manifest",
                    "feature_stats",
                    "registration",
                    "validation_summary",
                    "features",
                    "parameters",
                    "params:report",
                ],
                "report",
                name="render_report",
            )
        ],
        tags="reporting",
    )
