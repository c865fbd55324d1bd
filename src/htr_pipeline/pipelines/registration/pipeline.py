"""model, charset, metrics → registration."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.registration.nodes import register_model


def create_pipeline() -> Pipeline:
    """The registration pipeline."""
    return Pipeline(
        [
            Node(
                register_model,
                [
                    "model",
                    "charset",
                    "provenance",
                    "features",
                    "manifest",
                    "metrics",
                    "language_model",
                    "lexicon",
                    "calibration",
                    "params:features",
                    "tuned_decoding",
                    "params:registration",
                ],
                "registration",
                name="register_model",
            )
        ],
        tags="registration",
    )
