"""Line images of the manifest to Parquet shards."""

from htr_pipeline.pipelines.feature_extraction.pipeline import create_pipeline

__all__ = ["create_pipeline"]
