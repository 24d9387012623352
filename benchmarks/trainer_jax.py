"""The trainer's own step on the 60M shape, timed in a process of its own."""

import argparse
import json
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from trainer import config, model, optimizers, sharding, train_step  # noqa: E402


def measure(batch: np.ndarray, steps: int) -> dict[str, list[float] | int]:
    """Seconds and losses of `steps` steps on `batch`, after one that compiles.

    It is the step that examples/pretrain.py runs, its norms and spike statistics
    included: AdamW behind a limit on the global norm, float32, nothing rematerialized.
    """
    rows, length = batch.shape
    settings = config.RunConfig.from_settings(
        preset="60m",
        optimizers=("adamw_clip",),
        untied_head=True,
        steps=1000,
        warmup_steps=0,
        learning_rate=1e-3,
        batch_size=rows,
        sequence_length=length - 1,
        bursts=0,
    )
    mesh = sharding.make_mesh(sharding.Parallelism(data=1), rows)
    shape = model.for_platform(settings.model, settings.model.vocabulary, "cpu")
    optimizer = optimizers.make("adamw_clip", settings)
    with jax.set_mesh(mesh):
        task = train_step.make_task(settings, shape, mesh)
        state = train_step.initial_state(task, optimizer)
        on_device = sharding.put_batch(batch[None], mesh)
        seconds, losses = [], []
        for _ in range(steps + 1):
            began = time.perf_counter()
            state, metrics = train_step.train_step(
                state,
                on_device,
                graphdef=task.graphdef,
                faults=task.faults,
                optimizer=optimizer,
            )
            losses.append(float(metrics["loss"]))  # waits for the step
            seconds.append(time.perf_counter() - began)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"seconds": seconds[1:], "losses": losses[1:], "parameters": parameters}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_jax")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = args.batch_size, args.sequence_length + 1
    batch = np.random.default_rng(args.seed).integers(0, 32_000, shape)
    print(json.dumps(measure(batch, args.steps)))


if __name__ == "__main__":
    main()
