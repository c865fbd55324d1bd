"""model, charset, provenance, language_model, lexicon, features → tuned_decoding, calibration, predictions, metrics."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.evaluation.nodes import calibrate_confidences, measure_errors, read_lines


def create_pipeline() -> Pipeline:
    """The evaluation pipeline."""
    return Pipeline(
        [
            Node(
                read_lines,
                ["features", "model", "charset", "provenance", "language_model", "lexicon", "params:decoding"],
                ["tuned_decoding", "readings"],
                name="read_lines",
            ),
            Node(calibrate_confidences, "readings", ["calibration", "predictions"], name="calibrate_confidences"),
            Node(
                measure_errors,
                [
                    "predictions",
                    "readings",
                    "features",
                    "charset",
                    "provenance",
                    "tuned_decoding",
                    "params:evaluation",
                ],
                "metrics",
                name="measure_errors",
            ),
        ],
        tags="evaluation",
    )
