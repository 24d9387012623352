"""The trainer's own step on the 60M shape, timed in a process of its own."""

import argparse
import json
import time

import jax
import numpy as np

from trainer import config, model, optimizers, sharding, train_step


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
                watch=task.watch,
                optimizer=optimizer,
            )
            losses.append(float(metrics["loss"]))  # waits for the step
            seconds.append(time.perf_counter() - began)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"seconds": seconds[1:], "losses": losses[1:], "parameters": parameters}


def measure_on_device(preset, name, batch, remat, steps, hardware):
    """Returns speed and memory of one optimizer's step, with bfloat16 activations."""
    settings = config.RunConfig.from_settings(
        preset=preset,
        optimizers=(name,),
        untied_head=True,
        steps=1000,
        batch_size=batch,
        sequence_length=256,
        compute_dtype="bfloat16",
        remat=remat,
        bursts=0,
    )
    device = jax.devices()[0]
    mesh = sharding.make_mesh(sharding.Parallelism(data=1), batch, [device])
    shape = model.for_platform(
        settings.model, settings.model.vocabulary, device.platform
    )
    optimizer = optimizers.make(name, settings)
    tokens = np.random.default_rng(0).integers(0, 32_000, (1, batch, 257), np.uint16)
    with jax.set_mesh(mesh):
        task = train_step.make_task(settings, shape, mesh)
        state = train_step.initial_state(task, optimizer)
        on_device = sharding.put_batch(tokens, mesh)
        began = time.perf_counter()
        step = train_step.train_step.lower(
            state,
            on_device,
            graphdef=task.graphdef,
            faults=task.faults,
            watch=task.watch,
            optimizer=optimizer,
        ).compile()
        compile_seconds = time.perf_counter() - began
        memory = step.memory_analysis()
        for _ in range(3):
            state, metrics = step(state, on_device)
        first = float(metrics["loss"])
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, on_device)
        last = float(metrics["loss"])  # Waits for the last step.
        seconds = (time.perf_counter() - began) / steps
    speed = batch * 256 / seconds
    found = hardware.find(device.device_kind)
    return {
        "preset": preset,
        "optimizer": name,
        "device": device.device_kind,
        "batch": batch,
        "remat": remat,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": speed,
        "flops_utilization": speed * shape.flops_per_token(256) / found.flops
        if found
        else None,
        "compile_seconds": compile_seconds,
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "measured_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "losses": [first, last],
    }


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
