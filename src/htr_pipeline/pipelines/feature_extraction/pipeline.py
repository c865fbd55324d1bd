"""manifest → features, feature_stats."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.feature_extraction.nodes import extract_features, summarise_features


def create_pipeline() -> Pipeline:
    """The feature_extraction pipeline."""
    return Pipeline(
        [
            Node(extract_features, ["manifest", "params:features"], "features", name="extract_features"),
            Node(summarise_features, ["features", "params:features"], "feature_stats", name="summarise_features"),
        ],
        tags="feature_extraction",
    )
