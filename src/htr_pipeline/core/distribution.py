"""Training on several devices or machines: each replica computes its rows of a batch, and all take the same step.

Every replica holds a copy of all variables. The copies stay equal because sums and gathered results, which are the same
everywhere, are all that a change may depend on. On one device every function here hands back what it is given.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from htr_pipeline.core.batching import Batch
from htr_pipeline.core.config import UserError

_TF_CONFIG_EXAMPLE = (
    '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'
)


class Distribution:
    """The replicas of a training, and which rows of a batch this process makes for its own.

    Args:
        kind: none; mirrored: all GPUs of this machine; multi_worker: the machines of TF_CONFIG, with their GPUs. A
            machine without a GPU counts with its CPU. Must be the first use of TensorFlow in a process of multi_worker.

    Attributes:
        num_replicas: devices that share a batch.
        is_chief: whether this process writes for all.

    Raises:
        UserError: TF_CONFIG does not name the machines, or they have not equally many devices.
    """

    def __init__(self, kind: str = "none") -> None:
        self._num_workers, self._worker_index = _read_tf_config() if kind == "multi_worker" else (1, 0)
        self._strategy = {
            "none": tf.distribute.get_strategy,
            "mirrored": tf.distribute.MirroredStrategy,
            "multi_worker": tf.distribute.MultiWorkerMirroredStrategy,
        }[kind]()
        self.num_replicas = self._strategy.num_replicas_in_sync
        self.is_chief = self._worker_index == 0
        if self.num_replicas % self._num_workers:
            raise UserError(
                f"training.distribution is multi_worker: {self.num_replicas} devices on {self._num_workers} machines. "
                "Expected equally many on each; CUDA_VISIBLE_DEVICES chooses which GPUs a machine uses."
            )

    def scope(self) -> AbstractContextManager:
        """Where network and optimizer must be made."""
        return self._strategy.scope()

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that belong to the replicas of this process.

        Raises:
            UserError: the replicas cannot have equally many.
        """
        missing = -batch_size % self.num_replicas
        if missing:
            raise UserError(
                f"training.batch_size = {batch_size}: expected a multiple of {self.num_replicas}: so many devices "
                f"share each batch. Set it to {batch_size + missing}."
            )
        count = batch_size // self._num_workers
        return slice(self._worker_index * count, (self._worker_index + 1) * count)

    def compiled(self, step: Callable[..., Any], signature: list[tf.TensorSpec]) -> Callable[..., Any]:
        """A step as a graph: takes the rows of this process, runs on each replica with its own and returns the first's.

        Args:
            step: of equally many rows on every replica; its results must be the same on all of them.
            signature: of its arguments, each with the rows first.
        """
        if self.num_replicas == 1:
            return tf.function(step, input_signature=signature)
        num_local = self.num_replicas // self._num_workers

        def run(*arrays: tf.Tensor) -> Any:
            parts = list(zip(*(tf.split(array, num_local) for array in arrays), strict=True))
            own = self._strategy.experimental_distribute_values_from_function(
                lambda context: parts[context.replica_id_in_sync_group % num_local]
            )
            results = self._strategy.run(step, args=own)
            return tf.nest.map_structure(lambda result: self._strategy.experimental_local_results(result)[0], results)

        return tf.function(run, input_signature=signature, autograph=False)

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes, which must all ask at the same point."""
        if self._num_workers == 1:
            return values
        rows = self._gathered_rows(tf.constant([values], tf.float64))
        return tuple(rows.numpy().max(axis=0).tolist())

    def require_equal(self, content: str, error: str) -> None:
        """Workers that do not do the same would wait for each other for ever, or train together in silence.

        Args:
            content: what must be equal on all processes, which must all ask at the same point.
            error: what to say where it is not.

        Raises:
            UserError: it is not.
        """
        mark = zlib.crc32(content.encode())
        last, first = self.largest(mark, -mark)
        if last != -first:
            raise UserError(error)

    @contextmanager
    def lost_workers_in_words(self) -> Iterator[None]:
        """Around a training.

        Raises:
            UserError: another worker was lost on the way.
        """
        try:
            yield
        except (tf.errors.UnavailableError, tf.errors.InternalError, tf.errors.AbortedError) as exc:
            if self._num_workers == 1:
                raise
            raise UserError(
                "Another worker of this training was lost or has stopped with an error, which it shows itself. Start "
                "all of them again with the same commands: they go on from the checkpoint. "
                f"({exc.message.splitlines()[0]})"
            ) from exc

    def as_wide_as_others(self, batch: Batch) -> Batch:
        """The batch of this process, padded to the width of the widest: the normalisations count padding too."""
        width = int(self.largest(batch.pixels.shape[1])[0])
        missing = width - batch.pixels.shape[1]
        return batch._replace(pixels=np.pad(batch.pixels, [(0, 0), (0, missing), (0, 0)])) if missing else batch

    @tf.function(input_signature=[tf.TensorSpec((1, None), tf.float64)], autograph=False)
    def _gathered_rows(self, row: tf.Tensor) -> tf.Tensor:
        return self._strategy.experimental_local_results(self._strategy.run(gathered, args=(row,)))[0]


def summed(tensors: Any) -> Any:
    """Within a step: a structure of tensors, each summed over all replicas; its gradient is summed likewise."""
    context = tf.distribute.get_replica_context()
    return tensors if context.num_replicas_in_sync == 1 else context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def gathered(tensor: tf.Tensor) -> tf.Tensor:
    """Within a step: the rows of all replicas, in the order of the global batch."""
    context = tf.distribute.get_replica_context()
    # A copy, since an argument of the step is on no device yet, and TensorFlow asks for one.
    return tensor if context.num_replicas_in_sync == 1 else context.all_gather(tf.identity(tensor), axis=0)


def change_copies(change: Callable[..., None], arguments: Any, variable: tf.Variable) -> None:
    """Within a step: lets each replica change its own copies of the variables.

    There, unlike in the rest of a step, a change may stand within tf.cond.

    Args:
        change: called with the arguments.
        arguments: structure of tensors that are the same on all replicas.
        variable: any variable that all replicas have a copy of.
    """
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync == 1:
        change(*arguments)
    else:
        strategy.extended.update(variable, lambda _, *own: change(*own), args=arguments, group=False)


def _read_tf_config() -> tuple[int, int]:
    """Number of workers, and which of them this is; the chief, where there is one, comes first."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        content = json.loads(text)
        workers = [(kind, i) for kind in ("chief", "worker") for i in range(len(content["cluster"].get(kind, [])))]
        return len(workers), workers.index((content["task"]["type"], content["task"]["index"]))
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(
            f"training.distribution is multi_worker, and the environment variable TF_CONFIG is {text!r}. Expected the "
            f"addresses of all workers and which of them this process is, such as {_TF_CONFIG_EXAMPLE}."
        ) from None
