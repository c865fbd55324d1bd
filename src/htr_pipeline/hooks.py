"""What happens around a run: one at a time, one MLflow run for each, checked parameter names, a summary at the end."""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from datetime import datetime
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import DECODERS
from htr_pipeline.io.atomic import remove_leftovers, replacing
from htr_pipeline.io.checkpoints import FileCheckpoints, check_place
from htr_pipeline.io.tracking import (
    JOINT_RUN,
    database_of,
    is_of_the_disk,
    little_patience,
    mlflow_error,
    tracking_uri,
    without_passwords,
)

logger = logging.getLogger(__name__)

_LOCK_FILE = Path("data/.lock")
# A run that was killed left this file: the same command again goes on in the same MLflow run.
_RUN_FILE = Path("data/.mlflow_run.json")
_UNKNOWN = "unknown"
# In the environment of an image, which has no git: hash of the commit, and -dirty if there were changes.
_GIT_COMMIT = "HTR_GIT_COMMIT"
_MOST_PARAMETER_CHARACTERS = 6000  # MLflow cuts what is longer
# What a run was asked for: Kedro's options, and its names for them.
_OPTIONS = {
    "--pipelines": "pipeline_names",
    "--tags": "tags",
    "--from-nodes": "from_nodes",
    "--to-nodes": "to_nodes",
    "--nodes": "node_names",
    "--from-inputs": "from_inputs",
    "--to-outputs": "to_outputs",
    "--namespaces": "namespaces",
    "--only-missing-outputs": "only_missing_outputs",
}
# What is made with a file or folder, and the block and name of the setting that names it.
_MADE_WITH_FILES = (
    ("language_model", "language_model", "arpa"),
    ("language_model", "language_model", "texts"),
    ("lexicon", "decoding", "lexicon_words"),
)
_PACKAGES = ("htr-pipeline", "kedro", "keras", "mlflow", "great-expectations", "pyarrow", "numpy")


class SettingsHook:
    """Stops a run whose parameters hold a block that nothing reads, or name a file that is not there.

    Kedro checks the keys within the blocks.
    """

    _caller: Path | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Compares the names of the blocks with what the pipelines ask for."""
        inputs = set().union(*(pipeline.inputs() for pipeline in pipelines.values()))
        known = {name.removeprefix("params:").split(".")[0] for name in inputs if name.startswith("params:")}
        for key, value in context.params.items():
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise UserError(
                    f"{key} = {value!r}: there is no such block of parameters.{hint} "
                    f"Allowed: {', '.join(sorted(known))}."
                )
        given = (context.config_loader.runtime_params or {}).get("source", {})
        entries = getattr(context.params.get("sources"), "entries", {})
        if entries and isinstance(given, dict) and "path" in given:
            raise UserError(
                f"source.path = {given['path']!r} would not be read, since there are `sources`: {', '.join(entries)}. "
                "Take them out of conf/local/parameters.yml, or set sources.NAME.path."
            )
        self._params = context.params
        self._project = context.project_path

    @hook_impl(wrapper=True)
    def before_pipeline_run(self, pipeline: Pipeline) -> Generator[None, Any, Any]:
        """Looks for files now, not after import and features; the registry is left to the node that asks it.

        Goes to the project's folder before all other hooks, and back if one of them fails.
        """
        # Of Ctrl-C Kedro tells no hook: in a notebook, which lives on, the folder is still the project's then.
        if self._caller is None or Path.cwd() != self._project:
            self._caller = Path.cwd()
        try:
            # Paths among the settings mean the project's folder, as Kedro has it with those of the catalog.
            os.chdir(self._project)
            self._look_for_files(pipeline)
            return (yield)
        except BaseException:
            self._go_back()
            raise

    def _look_for_files(self, pipeline: Pipeline) -> None:
        from htr_pipeline.io.starting_point import StartingPoint

        made, params = pipeline.all_outputs(), self._params
        asked = (name.removeprefix("params:") for name in pipeline.inputs() if name.startswith("params:"))
        if missing := sorted({name.partition(".")[0] for name in asked} - params.keys()):
            raise UserError(f"conf/ has no settings of {', '.join(missing)}. Fetch its files anew: git checkout conf.")
        if "model" in made and (start := params["training"].start_from) and not start.startswith("models:"):
            StartingPoint.find(start)
        for output, block, name in _MADE_WITH_FILES:
            if output in made and (place := getattr(params[block], name)) and not Path(place).exists():
                raise UserError(
                    f"{block}.{name} = {place!r}: there is no such file or folder (working folder: {Path.cwd()})."
                )
        if "model" in made:
            check_place(params["checkpoint"].path)

    @hook_impl(wrapper=True)
    def after_pipeline_run(self) -> Generator[None, Any, Any]:
        """Goes back to the caller's folder, after all other hooks."""
        try:
            return (yield)
        finally:
            self._go_back()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """Goes back to the caller's folder."""
        self._go_back()

    def _go_back(self) -> None:
        if self._caller:
            os.chdir(self._caller)
        self._caller = None


class LockHook:
    """Lets one run at a time write into the project; the system frees the lock however the run's process ends."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remembers where the project is."""
        self._path = Path(context.project_path) / _LOCK_FILE

    @hook_impl(wrapper=True)
    def before_pipeline_run(self) -> Generator[None, Any, Any]:
        """Takes the lock, before any other hook writes, and frees it if one of them fails."""
        self._lock = FileLock(self._path)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"Another run is writing into {self._path.parent} (process {self._holder()}), and two at once would "
                "overwrite each other's tables. Wait until it has ended, or end it; for runs side by side give each a "
                "checkout of its own."
            ) from None
        with contextlib.suppress(OSError):  # Windows: a locked file cannot be written or read by its name
            self._path.write_text(f"{os.getpid()}, since {datetime.now().astimezone().isoformat(' ', 'seconds')}")
        try:
            for folder in self._path.parent.glob("*/"):
                remove_leftovers(folder)
            return (yield)
        except BaseException:
            self._lock.release()
            raise

    def _holder(self) -> str:
        try:
            return self._path.read_text() or _UNKNOWN
        except OSError:
            return _UNKNOWN

    @hook_impl(wrapper=True)
    def after_pipeline_run(self) -> Generator[None, Any, Any]:
        """Frees the lock, after all other hooks."""
        try:
            return (yield)
        finally:
            self._lock.release()

    @hook_impl(trylast=True)
    def on_pipeline_error(self) -> None:
        """Frees the lock."""
        self._lock.release()


class InterruptHook:
    """Ends the run before its next node where Python has lost Ctrl-C.

    What is raised in a destructor (TensorFlow has many) or in a callback of compiled code is printed and forgotten.
    """

    _asked = False

    @hook_impl
    def before_pipeline_run(self) -> None:
        """Remembers Ctrl-C from now on, unless it is ignored or means something else here."""
        self._asked = False
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.default_int_handler(number, frame)

    @hook_impl(tryfirst=True)
    def before_node_run(self) -> None:
        """Raises what was lost."""
        if self._asked:
            raise KeyboardInterrupt

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Leaves Ctrl-C as it was."""
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Leaves Ctrl-C as it was."""
        self.after_pipeline_run()


class CheckpointHook:
    """Removes the checkpoint of a complete training once the run that it belongs to has ended.

    What fails or is killed behind the training does not cost the training: the same command takes it up as it ended.
    """

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Model and history are on disk. A checkpoint of another training stays: the history may be an old one."""
        if "history" not in pipeline.all_outputs():
            return
        metadata = catalog.load("history").schema.metadata or {}
        # Of several workers only the chief knows that its files are written.
        if metadata.get(b"ended_by") != b"interrupt" and metadata.get(b"is_chief") != b"False":
            path = Path(catalog.load("params:checkpoint").path)
            FileCheckpoints(path, metadata.get(b"fingerprint", b"").decode()).clear()


class MlflowHook:
    """Keeps one MLflow run open during a `kedro run`, and puts into it what can be known without the nodes."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remembers where the project is and what was asked for."""
        self._project = Path(context.project_path)
        self._settings = context.config_loader["mlflow"]
        self._parameters = context.config_loader["parameters"]
        self._env = context.env

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Starts the run, or joins the one of MLFLOW_RUN_ID or HTR_JOINT_RUN or of an interrupted process.

        Raises:
            UserError: MLflow cannot be reached, or refuses.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        if (left := mlflow.active_run()) and left.info.run_id == getattr(self, "_run_id", None):
            # By Ctrl-C in a notebook, which lives on. The same command goes on in it.
            with contextlib.suppress(Exception):  # its server may be gone
                mlflow.end_run("KILLED")
        uri = tracking_uri(self._project, self._settings)
        mlflow.set_tracking_uri(uri)
        database = database_of(uri)
        if database is None:
            logger.info("MLflow is at %s.", without_passwords(uri))
        try:
            if database:
                self._open(database)
            atexit.register(self._interrupted)
            with little_patience():
                self._start(run_params)
        except (MlflowException, OSError) as exc:
            with contextlib.suppress(Exception):  # the server may be gone
                mlflow.end_run("KILLED")  # the same command goes on in it
            raise mlflow_error(uri, exc) from exc

    def _open(self, database: Path) -> None:
        """Makes an empty database in one step: of half a one, by a process that was killed, MLflow can make nothing."""
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        if database.exists():
            try:
                mlflow.search_experiments(max_results=1)
            except (MlflowException, OSError):
                raise
            except Exception as exc:  # whatever comes out of SQLAlchemy and Alembic
                if is_of_the_disk(exc):
                    raise mlflow_error(f"sqlite:///{database}", exc) from exc
                raise UserError(
                    f"MLflow's database {database}: its tables are not as they should be ({str(exc).splitlines()[0]}). "
                    "If the process that made them was killed, move the file away: a new one will be made. If a newer "
                    "MLflow made them, install that one."
                ) from exc
            return
        remove_leftovers(database.parent, database.name)
        with replacing(database) as partial:
            store = SqlAlchemyStore(f"sqlite:///{partial}", (self._project / self._settings["artifact_path"]).as_uri())
            store.engine.dispose()

    def _start(self, run_params: dict[str, Any]) -> None:
        import mlflow

        joint, left = os.environ.get(JOINT_RUN), self._left_run()
        run_id = os.environ.get("MLFLOW_RUN_ID") or (self._joint_run(joint) if joint else None)
        if left and not (joint or run_id) and left["command"] == self._command_hash(run_params):
            run_id = left["run_id"]
            logger.info("Going on in the MLflow run %s of an interrupted process.", run_id)
        elif left and left["run_id"] != run_id:
            mlflow.MlflowClient().set_terminated(left["run_id"], "KILLED")
        if run_id is None:
            names = [] if joint else sorted(run_params.get("pipeline_names") or [])
            mlflow.set_experiment(experiment_id=self._experiment_id())
            tags = {"joint_run": joint} if joint else None
            mlflow.start_run(run_name="+".join(names) or "kedro run", tags=tags)
        else:
            mlflow.start_run(run_id=run_id)
        self._run_id = mlflow.active_run().info.run_id
        known = mlflow.get_run(self._run_id).data  # by an earlier process, perhaps of another command
        own = self._tags(run_params)
        tags = {name: known.tags.get(name, tag) for name, tag in own.items()}
        for name, between in (("command", " && "), ("pipelines", ", ")):
            tags[name] = between.join(dict.fromkeys(tags[name].split(between) + own[name].split(between)))
        mlflow.set_tags(tags)
        parameters = _flat(self._parameters, whole=("hot_words",))  # words are no names of parameters
        mlflow.log_params({name: value for name, value in parameters.items() if name not in known.params})
        if other := [name for name, value in parameters.items() if known.params.get(name, str(value)) != str(value)]:
            logger.warning("The MLflow run %s keeps what it was first given of: %s.", self._run_id, ", ".join(other))
        with replacing(self._project / _RUN_FILE) as partial:
            content = {"run_id": self._run_id, "command": self._command_hash(run_params)}
            partial.write_text(json.dumps(content))

    @hook_impl
    def before_node_run(self) -> None:
        """Joins the run in a thread of Kedro's ThreadRunner: MLflow has one for each thread."""
        import mlflow

        if not mlflow.active_run() and (run_id := getattr(self, "_run_id", None)):
            mlflow.start_run(run_id=run_id)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Logs what the tables say."""
        import mlflow

        if not mlflow.active_run():
            return
        if dataset_name == "feature_stats":
            mlflow.set_tag("data_hash", data["data_hash"])
            mlflow.log_metrics({f"num_lines_{split}": count for split, count in data["num_lines"].items()})
        elif dataset_name == "history":
            # What null and auto among the parameters came to.
            made = data.schema.metadata
            mlflow.set_tags({name: made[name.encode()].decode() for name in ("network_size", "precision")})
        elif dataset_name == "metrics":
            mlflow.set_tag("signature", data["signature"])
            for split, decoders in data["splits"].items():
                for decoder, score in decoders.items():
                    mlflow.log_metrics({f"{split}_{name}_{decoder}": score[name] for name in ("cer", "wer")})
        elif dataset_name == "validation_summary":
            mlflow.log_dict(data, "validation_summary.json")
        elif dataset_name == "learning_curves":
            mlflow.log_text(data, "learning_curves.svg")
        elif dataset_name == "report":
            mlflow.log_text(data, "report.html")

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Ends the run and says where everything is."""
        import mlflow

        docs = self._project / self._parameters["validation"]["docs_path"]
        if "rejected_lines" in pipeline.all_outputs() and docs.exists():
            mlflow.log_artifacts(str(docs), "validation")
        run_id = mlflow.active_run().info.run_id
        self._end("FINISHED")
        if "report" in pipeline.all_outputs():
            _print_summary(catalog, docs, run_id)

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Ends the run as failed, if MLflow can still be written to; the error that led here is what counts."""
        try:
            self._end("FAILED")
        except Exception as exc:  # whatever comes out of a database
            logger.warning("The MLflow run could not be ended: %s", exc)

    def _interrupted(self) -> None:
        """At the end of the process, before MLflow would call a run that Ctrl-C has left finished."""
        import mlflow

        if mlflow.active_run() and (self._project / _RUN_FILE).exists():
            with contextlib.suppress(Exception):  # of a full disk, say, which was spoken of already
                mlflow.end_run("KILLED")

    def _end(self, status: str) -> None:
        import mlflow

        mlflow.end_run(status)
        (self._project / _RUN_FILE).unlink(missing_ok=True)

    def _experiment_id(self) -> str:
        import mlflow

        name = self._settings["experiment"]
        # A tracking server knows where its artifacts are; the embedded store would take the caller's folder.
        embedded = mlflow.get_tracking_uri().startswith("sqlite:")
        place = (self._project / self._settings["artifact_path"]).as_uri() if embedded else None
        found = mlflow.get_experiment_by_name(name)
        if found and place and found.artifact_location != place:
            logger.warning(
                "MLflow keeps the files of its experiment %r in %s, where the project was when it was made, and puts "
                "new models there too. For a copy with models of its own name another experiment in "
                "conf/local/mlflow.yml.", name, found.artifact_location,
            )  # fmt: skip
        return found.experiment_id if found else mlflow.create_experiment(name, artifact_location=place)

    def _joint_run(self, name: str) -> str | None:
        """The run that an earlier process of that name has begun."""
        import mlflow

        if not re.fullmatch(r"[\w.:/+-]{1,250}", name):
            raise UserError(f"{JOINT_RUN}={name}: expected at most 250 letters, digits and any of . _ : / + -")
        ids = [self._experiment_id()]
        found = mlflow.search_runs(ids, f"tags.joint_run = '{name}'", max_results=1, output_format="list")
        return found[0].info.run_id if found else None

    def _left_run(self) -> dict[str, str] | None:
        """Id and command of the run that an interrupted process left."""
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            content = json.loads((self._project / _RUN_FILE).read_text())
            left = {name: content[name] for name in ("run_id", "command")}
            status = mlflow.get_run(left["run_id"]).info.status
        except (OSError, ValueError, KeyError, TypeError, MlflowException):
            return None
        return left if status in ("RUNNING", "KILLED") else None

    def _command_hash(self, run_params: dict[str, Any]) -> str:
        content = json.dumps([_asked(run_params), self._parameters], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def _tags(self, run_params: dict[str, Any]) -> dict[str, str]:
        commit, changes = _code(self._project)
        return {
            "git_commit": commit,
            "git_changes": changes,
            "kedro_env": str(self._env),
            "command": _command(run_params),
            "pipelines": ", ".join(sorted(run_params.get("pipeline_names") or ["all"])),
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{f"version {name}": version(name) for name in _PACKAGES},
        }


def _asked(run_params: dict[str, Any]) -> dict[str, str | bool]:
    """The options that were given, their names sorted: Kedro has those of pipelines in any order, another each time."""
    given = {option: run_params.get(key) for option, key in _OPTIONS.items()}
    return {
        option: value if isinstance(value, bool | str) else ",".join(sorted(value))
        for option, value in given.items()
        if value
    }


def _command(run_params: dict[str, Any]) -> str:
    """What starts this run again, from the project's folder."""
    words = ["kedro", "run"]
    if env := run_params.get("env"):
        words += ["--env", env]
    for option, value in _asked(run_params).items():
        words += [option] if value is True else [option, str(value)]
    parameters = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in _flat(run_params.get("runtime_params") or {}).items()
    }
    if fitting := [f"{key}={value}" for key, value in parameters.items() if "," not in value]:
        words += ["--params", ",".join(fitting)]
    others = [key for key, value in parameters.items() if "," in value]
    return shlex.join(words) + (f"  # and {', '.join(others)}, whose commas --params cannot hold" if others else "")


def _code(project: Path) -> tuple[str, str]:
    """Commit, and whether there are changes since."""
    changed, unchanged = "uncommitted changes", "none"
    if (given := os.environ.get(_GIT_COMMIT) or _UNKNOWN) != _UNKNOWN:
        return given.removesuffix("-dirty"), changed if given.endswith("-dirty") else unchanged
    status = _git(project, "status", "--porcelain")
    return _git(project, "rev-parse", "HEAD"), {"": unchanged, _UNKNOWN: _UNKNOWN}.get(status, changed)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return _UNKNOWN
    return done.stdout.strip()


def _flat(parameters: dict[str, Any], prefix: str = "", whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values by their dotted names; those of the keys that are to stay `whole` as JSON."""
    flat = {}
    for key, value in parameters.items():
        if not isinstance(value, dict) or not value:
            flat[f"{prefix}{key}"] = value
        elif key in whole:
            content = json.dumps(value, ensure_ascii=False)
            if len(content) > _MOST_PARAMETER_CHARACTERS:
                content = f"{len(value)} entries, SHA-256 {hashlib.sha256(content.encode()).hexdigest()}"
            flat[f"{prefix}{key}"] = content
        else:
            flat |= _flat(value, f"{prefix}{key}.", whole)
    return flat


def _print_summary(catalog: DataCatalog, docs: Path, run_id: str) -> None:
    """The last lines of a whole run: what came out, where it is, what to do next."""
    metrics, registration = catalog.load("metrics"), catalog.load("registration")
    split, decoder = metrics["headline"]["split"], metrics["headline"]["decoder"]
    score = metrics["splits"][split][decoder]
    here = Path.cwd()

    def shown(path: Any) -> Path:
        path = Path(path)
        return path.relative_to(here) if path.is_relative_to(here) else path

    def place(name: str) -> Path:
        return shown(catalog[name]._describe()["filepath"])

    champion = f"alias {registration['alias']}: version {registration['champion_version']}"
    uri, model = registration["tracking_uri"], f"models:/{registration['name']}@{registration['alias']}"
    default = "models:/htr@champion"
    serve = "make serve" if model == default else f"make serve MODEL={shlex.quote(model)}"
    read = "kedro transcribe FOLDER --output out" + ("" if model == default else f" --model {shlex.quote(model)}")
    ui = "make ui    # runs and models in MLflow, on http://127.0.0.1:5000"
    if uri != "sqlite:///mlflow.db":
        serve, ui = f"MLFLOW_TRACKING_URI={uri} {serve}", f"{uri}    # runs and models in MLflow"
    lines = [
        "",
        f"CER {score['cer']:.2%} ({100 * metrics['confidence']:g} % interval over {score['interval_over']} "
        f"{score['cer_low']:.2%} to {score['cer_high']:.2%}), "
        f"WER {score['wer']:.2%} on {score['num_lines']} {split} lines, {decoder}",
        "CER by decoder: " + ", ".join(f"{name} {metrics['splits'][split][name]['cer']:.2%}" for name in DECODERS),
        "",
        f"  manifest       {place('manifest')}",
        f"  rejected       {place('rejected_lines')}",
        f"  validation     {shown(docs) / 'summary.html'}",
        f"  features       {place('features')}",
        f"  network        {place('model')}",
        f"  predictions    {place('predictions')}",
        f"  metrics        {place('metrics')}",
        f"  MLflow run     {run_id}",
        f"  model          {registration['model_uri']} ({champion}; {registration['reason']})",
        f"  report         {place('report')}",
        "",
        "Next:",
        f"  xdg-open {place('report')}    # look at it (macOS: open)",
        f"  {ui}",
        f"  {serve}    # the model as a service",
        "  .venv/bin/kedro run --env finetune --params source.path=FOLDER    # your lines",
        f"  .venv/bin/{read}    # new lines, read by the champion",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
