"""Kedro's settings of this project."""

from htr_pipeline.hooks import MlflowHook, SettingsHook

HOOKS = (SettingsHook(), MlflowHook())

# One environment overrides single keys of a block, not the whole block.
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},
    "config_patterns": {"mlflow": ["mlflow*"]},
}
