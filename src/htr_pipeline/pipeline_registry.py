"""The pipelines by name, in the order in which data flows."""

from kedro.pipeline import Pipeline

from htr_pipeline.pipelines import (
    data_validation,
    evaluation,
    feature_extraction,
    registration,
    reporting,
    training,
)


def register_pipelines() -> dict[str, Pipeline]:
    """Each pipeline alone, and `__default__`: all of them in one."""
    pipelines = {
        "data_validation": data_validation.create_pipeline(),
        "feature_extraction": feature_extraction.create_pipeline(),
        "training": training.create_pipeline(),
        "evaluation": evaluation.create_pipeline(),
        "registration": registration.create_pipeline(),
        "reporting": reporting.create_pipeline(),
    }
    return {**pipelines, "__default__": sum(pipelines.values(), Pipeline([]))}
