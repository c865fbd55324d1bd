"""Runs of the pipelines that nobody starts by hand."""
