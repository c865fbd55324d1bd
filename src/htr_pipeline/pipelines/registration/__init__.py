"""The evaluated network into the model registry."""

from htr_pipeline.pipelines.registration.pipeline import create_pipeline

__all__ = ["create_pipeline"]
