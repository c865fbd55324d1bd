"""One HTML page about a run."""

from htr_pipeline.pipelines.reporting.pipeline import create_pipeline

__all__ = ["create_pipeline"]
