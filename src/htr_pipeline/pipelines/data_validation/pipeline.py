"""Source to manifest: import, split by writer, check with Great Expectations."""

from kedro.pipeline import Node, Pipeline

from htr_pipeline.pipelines.data_validation.nodes import check_manifest, import_sources, validate_lines


def create_pipeline() -> Pipeline:
    """The data_validation pipeline."""
    return Pipeline(
        [
            Node(
                import_sources,
                inputs=["params:source", "params:sources", "params:demo"],
                outputs=["imported_lines", "import_rejections", "import_warnings"],
                name="import_sources",
            ),
            Node(
                validate_lines,
                inputs=[
                    "imported_lines",
                    "import_rejections",
                    "import_warnings",
                    "params:validation",
                    "params:features",
                ],
                outputs=["validated_lines", "rejected_lines", "warned_lines", "validation_summary"],
                name="validate_lines",
            ),
            # A node of its own: what a node returns is saved only if it does not raise, and the rejected lines must be
            # on disk when the run stops because of them.
            Node(
                check_manifest,
                inputs=["validated_lines", "rejected_lines", "validation_summary", "params:validation"],
                outputs="manifest",
                name="check_manifest",
            ),
        ],
        tags="data_validation",
    )
