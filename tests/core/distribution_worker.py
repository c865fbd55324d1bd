"""One process of a training on several replicas; test_distribution starts it with its task as JSON."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np


def main(kind, folder, cpus=1, poison=False, die_at_step=None, **settings):
    """Trains; leaves model.keras, and what came out in results.json and weights.npz."""
    import tensorflow as tf

    if cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * cpus)

    from htr_pipeline.core.distribution import Distribution
    from htr_pipeline.io.checkpoints import FileCheckpoints
    from tests.core.test_distribution import configured, train
    from tests.core.test_training import Silent

    class Mortal(Silent):
        def step(self, done, figures):
            super().step(done, figures)
            if self.steps == die_at_step:
                os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(folder)
    progress, distribution = Mortal(), Distribution(kind)
    checkpoints = FileCheckpoints(folder.parent / "checkpoint.npz", "test")
    with distribution.lost_workers_in_words():
        trained = train(configured(**settings), distribution, poison, checkpoints, progress)
    folder.mkdir(exist_ok=True)
    trained.model.save(folder / "model.keras")
    np.savez(folder / "weights.npz", *trained.model.get_weights())
    results = {"num_replicas": distribution.num_replicas, "history": trained.history, "warnings": progress.warnings}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
