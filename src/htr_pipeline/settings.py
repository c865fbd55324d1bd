"""Kedro's settings of this project."""

import os
import sys
import warnings

from htr_pipeline.config_loader import LayeredConfigLoader
from htr_pipeline.hooks import CheckpointHook, InterruptHook, LockHook, MlflowHook, SettingsHook

# Nothing that is used here reports to anyone, TensorFlow's notes on the processor are not for users, and in a log file
# a bar needs no line ten times a second. tqdm reads its variable when it is imported: by the pipelines, later.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TQDM_MININTERVAL": "0.1" if sys.stderr.isatty() else "10",
}.items():
    os.environ.setdefault(_name, _value)
# Kedro 1.7 with OmegaConf 2.4: nothing that a user could change.
warnings.filterwarnings("ignore", message="register_new_resolver")

# Of two wrappers the later one is around.
HOOKS = (LockHook(), SettingsHook(), InterruptHook(), CheckpointHook(), MlflowHook())

CONFIG_LOADER_CLASS = LayeredConfigLoader
# One environment overrides single keys of a block, not the whole block.
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "merge_strategy": {"parameters": "soft"},
    "config_patterns": {"mlflow": ["mlflow*"]},
}
