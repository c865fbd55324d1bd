"""Which settings count: conf/base, over it conf/local, over it the environment of `--env`, over all `--params`."""

from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from omegaconf import OmegaConf


class LayeredConfigLoader(OmegaConfigLoader):
    """Kedro's loader, which leaves conf/local out where there is an `--env`; this machine's settings stay in force."""

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The settings of one kind: parameters, catalog, mlflow, ...

        Raises:
            MissingConfigException: there is no such environment, or none of the folders has settings of this kind.
        """
        env = self.env
        if key in self or not env or env in (self.base_env, self.default_run_env):
            return super().__getitem__(key)
        local = self._of(key, self.base_env, None) if (Path(self.conf_source) / env).is_dir() else None
        if local is None:  # nor is there a conf/local in a packaged project
            return super().__getitem__(key)
        own = self._of(key, env, env) or {}
        if self.merge_strategy.get(key) == "soft":
            return dict(OmegaConf.to_container(OmegaConf.merge(local, own)))  # type: ignore[arg-type]
        return local | own

    def _of(self, key: str, base_env: str, env: str | None) -> dict[str, Any] | None:
        """The settings of other folders, by this very loader: each new one would take Kedro's resolvers for itself."""
        kept = self.base_env, self.env
        self.base_env, self.env = base_env, env
        try:
            return super().__getitem__(key)
        except MissingConfigException:
            return None
        finally:
            self.base_env, self.env = kept
