"""Which settings count: conf/base, over it conf/local, over it the environment of `--env`, over all `--params`."""

from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from omegaconf import OmegaConf


class LayeredConfigLoader(OmegaConfigLoader):
    """Kedro's loader, which leaves conf/local out where there is an `--env`; this machine's settings stay in force."""

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The settings of one kind: parameters, catalog, mlflow, ..."""
        merged = super().__getitem__(key)
        if key in self or self.env in (None, "", self.base_env, self.default_run_env):
            return merged
        try:
            local = self._of(key, self.base_env, self.default_run_env)
        except MissingConfigException:  # there is no conf/local, as in a packaged project
            return merged
        try:
            env = self._of(key, self.env, self.env)
        except MissingConfigException:  # conf/ENV says nothing of this kind
            return local
        if self.merge_strategy.get(key) == "soft":
            return dict(OmegaConf.to_container(OmegaConf.merge(local, env)))  # type: ignore[arg-type]
        return local | env

    def _of(self, key: str, base_env: str, env: str) -> dict[str, Any]:
        loader = OmegaConfigLoader(
            self.conf_source,
            env,
            self.runtime_params,
            config_patterns=self.config_patterns,
            base_env=base_env,
            merge_strategy=self.merge_strategy,
        )
        return loader[key]
