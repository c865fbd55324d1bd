"""Which settings count: conf/base, over it conf/local, over it the environment of `--env`, over all `--params`."""

from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from omegaconf import OmegaConf

from htr_pipeline.core.config import UserError


class LayeredConfigLoader(OmegaConfigLoader):
    """Kedro's loader, which leaves conf/local out where there is an `--env`; this machine's settings stay in force."""

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The settings of one kind: parameters, catalog, mlflow, ...

        Raises:
            MissingConfigException: there is no such environment, or none of the folders has settings of this kind.
            UserError: one of their files cannot be read.
        """
        try:
            return self._layers(key)
        except MissingConfigException:
            raise
        except Exception:
            self._look_at_files()
            raise

    def _look_at_files(self) -> None:
        """Raises UserError for the first file that is no YAML with names and values."""
        for file in sorted(Path(self.conf_source).rglob("*.yml")):
            try:
                found = OmegaConf.load(file)
            except Exception as exc:  # PyYAML's, OmegaConf's and those of reading
                raise UserError(f"{file}: cannot be read as YAML: {exc}") from exc
            if not OmegaConf.is_dict(found):
                raise UserError(f"{file}: expected settings, a NAME: VALUE on each line, got a list.")

    def _layers(self, key: str) -> dict[str, Any]:
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
