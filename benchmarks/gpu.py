"""Times of optimizer steps, and throughput and memory of the trainer, on one GPU.

    python -m benchmarks.gpu FOLDER

writes FOLDER/gpu.json and FOLDER/gpu.md. The results of one H100 are in
benchmarks/results. Every optimizer runs in turn with `optax.adamw`; a turn is many
steps, which are dispatched without waiting, so that the device is never idle. The
trainer's step is that of examples/pretrain.py, with bfloat16 activations.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import optax

import spam_optax
from benchmarks import environment, optimizers, shapes, steps

STEPS, ROUNDS = 20, 7
COMPILE_SECONDS = 150  # No further optimizer is compiled after this time.
RATE = 1e-3
CASES = [
    *(("60m", name, 128, "none") for name in ("adamw_clip", "spam", "sparse_spam")),
    ("60m", "guard_clip_spam", 128, "none"),
    *(("350m", name, 64, "none") for name in ("adamw_clip", "spam", "sparse_spam")),
    ("350m", "guard_clip_spam", 64, "none"),
    ("60m", "spam", 256, "none"),
    ("350m", "spam", 128, "full"),
]

GUARDS = {
    "skip_spikes(adam)": lambda: spam_optax.skip_spikes(optax.adam(RATE)),
    "skip_spikes(spam)": lambda: spam_optax.skip_spikes(spam_optax.spam(RATE)),
    "skip_spikes(clip_by_global_norm, adam)": lambda: spam_optax.skip_spikes(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE))
    ),
    "adam, clip_update_norm": lambda: optax.chain(
        optax.scale_by_adam(),
        spam_optax.clip_update_norm(),
        optax.scale_by_learning_rate(RATE),
    ),
}
RELATIVES = {
    "stable_spam": lambda: spam_optax.stable_spam(RATE),
    "gradient_stabilizer, adam": lambda: optax.chain(
        spam_optax.gradient_stabilizer(), optax.adam(RATE)
    ),
    "stable_adamw": lambda: spam_optax.stable_adamw(RATE),
    "adam_mini": lambda: spam_optax.adam_mini(
        RATE, partition=spam_optax.adam_mini_partition(8)
    ),
    "zclip, adam": lambda: optax.chain(spam_optax.zclip(), optax.adam(RATE)),
    "adagc, adam": lambda: optax.chain(spam_optax.adagc(), optax.adam(RATE)),
    "stable_spam, counts": lambda: spam_optax.stable_spam(RATE, count=True),
    "track_spikes(adam)": lambda: spam_optax.track_spikes(optax.adam(RATE)),
}


def measure_steps(params, makers, compile_seconds):
    """Returns one row per optimizer, with its time as a ratio to that of AdamW."""
    began, contenders = time.perf_counter(), []
    for name, make in makers.items():
        if time.perf_counter() - began < compile_seconds:
            contenders.append(steps.compile_contender(name, make, params))
            print(name, f"{contenders[-1].compile_seconds:.1f} s", flush=True)
    arrays = [
        jax.tree.map(
            lambda x, k=k: 0.1 * jax.random.normal(jax.random.key(k), x.shape, x.dtype),
            params,
        )
        for k in range(2)
    ]
    weights, gradients = arrays
    states = {x.name: makers[x.name]().init(weights) for x in contenders}
    seconds = {x.name: [] for x in contenders}
    for turn in range(ROUNDS + 1):
        for x in contenders:
            jax.block_until_ready(states[x.name])
            start = time.perf_counter()
            for _ in range(STEPS):
                weights, states[x.name] = x.run(weights, states[x.name], gradients)
            jax.block_until_ready((weights, states[x.name]))
            if turn:  # The first turn warms up.
                seconds[x.name].append((time.perf_counter() - start) / STEPS)
    size = shapes.size(params)
    return [
        {
            "optimizer": x.name,
            "milliseconds": 1e3 * statistics.median(seconds[x.name]),
            "ratio": statistics.median(
                own / base
                for own, base in zip(
                    seconds[x.name], seconds[optimizers.BASELINE], strict=True
                )
            ),
            "moved_bytes": x.moved_bytes / size,
            "state_bytes": x.state_bytes / size,
            "temporary_bytes": x.temporary_bytes / size,
            "compile_seconds": x.compile_seconds,
        }
        for x in contenders
    ]


def measure_trainer(preset, name, batch, remat, rounds=15):
    """Returns tokens per second, FLOPs utilization and memory of the trainer's step."""
    from benchmarks import trainer_jax
    from trainer import hardware

    return trainer_jax.measure_on_device(preset, name, batch, remat, rounds, hardware)


def render(results):
    """Returns the results as a page of Markdown."""
    about = results["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    lines = [
        "# Measurements on a GPU",
        "",
        f"Device: {about['device']}. Date: {about['date']}. Versions: {versions}.",
        "",
        "## Steps of the optimizers",
        "",
        "A step is `update` and `apply_updates` in one jitted function with",
        f"donated buffers, in float32. A turn is {STEPS} steps. The optimizers take",
        f"turns, and each number is the median of {ROUNDS} turns. The ratio is to",
        "`optax.adamw` in the same round. The other columns but the last are bytes per",
        "parameter: those that a step reads and writes, as the compiler counts them,",
        "those of the state, and those of the temporaries.",
    ]
    for title in ("matrices", "60M"):
        part = results[title]
        lines += [
            "",
            f"### {part['arrays']} arrays, {part['parameters'] / 1e6:.0f}M parameters",
            "",
            "| optimizer | ms | ratio | read and written | state | temporaries "
            "| seconds to compile |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            lines.append(
                f"| {row['optimizer']} | {row['milliseconds']:.2f} "
                f"| {row['ratio']:.2f} | {row['moved_bytes']:.1f} "
                f"| {row['state_bytes']:.2f} "
                f"| {row['temporary_bytes']:.2f} | {row['compile_seconds']:.1f} |"
            )
    lines += [
        "",
        "## The trainer's step",
        "",
        "Sequences have 256 tokens. Activations are bfloat16; parameters and moments",
        "are float32. Every optimizer has `track_spikes` around it, as in the trainer.",
        "`FLOPs` is the share of the device's dense bfloat16 peak that the model's own",
        "products use. `compiled` is the memory that the compiler computes before the",
        "run, and `measured` is the allocator's peak after it.",
        "",
        "| shape | optimizer | batch | remat | ms | tokens/s | FLOPs | compiled GiB "
        "| measured GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["trainer"]:
        lines.append(
            f"| {row['preset']} | {row['optimizer']} | {row['batch']} | {row['remat']} "
            f"| {row['milliseconds']:.1f} | {row['tokens_per_second']:,.0f} "
            f"| {row['flops_utilization']:.1%} | {row['total_bytes'] / 2**30:.2f} "
            f"| {row['measured_peak_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--case", nargs=4, help="one case of the trainer, as JSON")
    parser.add_argument("--only-steps", action="store_true", help="no trainer")
    args = parser.parse_args()
    if args.case:
        preset, name, batch, remat = args.case
        print(json.dumps(measure_trainer(preset, name, int(batch), remat)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "gpu.json"
    trainer = []
    for case in () if args.only_steps else CASES:
        command = [sys.executable, "-m", "benchmarks.gpu", str(args.folder), "--case"]
        done = subprocess.run(
            command + list(map(str, case)), stdout=subprocess.PIPE, text=True
        )
        if done.returncode == 0:
            trainer.append(json.loads(done.stdout.splitlines()[-1]))
            print(trainer[-1], flush=True)
        file.write_text(json.dumps({"trainer": trainer}, indent=1) + "\n")
    results = {
        "environment": environment.describe(),
        "trainer": trainer,
    }
    makers = {
        k: v for k, v in optimizers.ELEMENTWISE.items() if not k.startswith("sparse")
    }
    makers |= GUARDS | RELATIVES
    makers |= {
        k: v for k, v in optimizers.ELEMENTWISE.items() if k.startswith("sparse")
    }
    for title, params, limit in (
        ("matrices", shapes.matrices(12, 2048), 60),
        ("60M", shapes.MODELS["60M"].params(), COMPILE_SECONDS),
    ):
        results[title] = {
            "parameters": shapes.size(params),
            "arrays": len(jax.tree.leaves(params)),
            "rows": measure_steps(params, makers, limit),
        }
        file.write_text(json.dumps(results, indent=1) + "\n")
    file.with_suffix(".md").write_text(render(results))


if __name__ == "__main__":
    main()
