"""Time of one compiled optimizer step against `optax.adam`'s, as ratios.

    python benchmarks/optimizer_step.py --report benchmarks/optimizer_step.md

The optimizers take turns, round after round, and every round gives one ratio to Adam,
so that a drift of the machine's speed cancels; the median of the ratios is reported.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import spam_optax

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-3),
    "clip_by_global_norm, adam": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(1e-3)
    ),
    "adamw": lambda: optax.adamw(1e-3),
    "spam": lambda: spam_optax.spam(1e-3),
    "spam, count_spikes=False": lambda: spam_optax.spam(1e-3, count_spikes=False),
    "spam_clip, spam_adam": lambda: optax.chain(
        spam_optax.spam_clip(), spam_optax.spam_adam(1e-3)
    ),
    "track_spikes(spam)": lambda: spam_optax.track_spikes(spam_optax.spam(1e-3)),
}


def make_step(tx, params, gradients):
    """Returns a function that takes one step, in place, and waits for it."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def step():
        carry[:] = jax.block_until_ready(update(*carry, gradients))

    return step


def seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(width, layers, rounds):
    """Median seconds of Adam, and per optimizer quartiles of the ratio to it."""
    shapes = {f"layer{i}": (width, 4 * width) for i in range(layers)}
    key = jax.random.key(0)
    params = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    steps = {
        name: make_step(make(), params, params) for name, make in OPTIMIZERS.items()
    }
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in track(range(rounds), description="rounds"):
        for name, step in steps.items():
            times[name].append(seconds(step))
    ratios = {
        name: statistics.quantiles(
            [x / adam for x, adam in zip(values, times["adam"], strict=True)], n=4
        )
        for name, values in times.items()
    }
    return statistics.median(times["adam"]), ratios


def table(width, layers, rounds, adam, ratios):
    parameters = layers * 4 * width**2
    device = jax.devices()[0]
    lines = [
        "# Time of an optimizer step",
        "",
        f"{parameters / 1e6:.1f}M float32 parameters in {layers} matrices, "
        f"{device.platform} ({device.device_kind}), jax {jax.__version__}, "
        f"optax {optax.__version__}, {rounds} interleaved rounds. "
        f"Adam took {adam * 1e3:.1f} ms (median). Ratios to Adam's step of the same "
        "round:",
        "",
        "| optimizer | lower quartile | median | upper quartile |",
        "|---|---|---|---|",
    ]
    for name, (low, median, high) in ratios.items():
        lines.append(f"| {name} | {low:.2f} | {median:.2f} | {high:.2f} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512, help="width (default 512)")
    parser.add_argument("--layers", type=int, default=4, help="matrices (default 4)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds (default 100)")
    parser.add_argument("--report", type=pathlib.Path, help="Markdown file to write")
    args = parser.parse_args()
    adam, ratios = measure(args.width, args.layers, args.rounds)
    report = table(args.width, args.layers, args.rounds, adam, ratios)
    print(report)
    if args.report:
        args.report.write_text(report)


if __name__ == "__main__":
    main()
