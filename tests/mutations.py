"""Puts deliberate mistakes into the project, one at a time: tests must find each.

    python tests/mutations.py              all of them, about a minute each
    python tests/mutations.py reset grace  those whose name has one of these words

Each mistake replaces a piece of text in one file of a copy of the project. The tests
named with it run first, since they should see it; the other fast tests follow only if
these did not. The exit status is 0 if every mistake made a test fail.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("spam_optax", "tests", "examples", "benchmarks", "docs")


class Mistake(NamedTuple):
    """Text that occurs once in a file, its replacement, and the tests to run first."""

    file: str
    right: str
    wrong: str
    tests: str


MISTAKES = {
    "the second moment forgets the gradient": Mistake(
        "spam_optax/_arithmetic.py",
        "(decay * mean + (1 - decay) * value)",
        "(decay * mean + (1 - decay**2) * value)",
        "test_spam",
    ),
    "no reset of the moments": Mistake(
        "spam_optax/_moments.py",
        "jnp.where(is_reset, jnp.zeros_like(x), x)",
        "jnp.where(False, jnp.zeros_like(x), x)",
        "test_spam",
    ),
    "grace window one step longer": Mistake(
        "spam_optax/_spam.py",
        "position >= settings.grace_steps",
        "position > settings.grace_steps",
        "test_spam",
    ),
    "grace window of spam_clip one step longer": Mistake(
        "spam_optax/_spam_clip.py",
        "position >= grace_steps",
        "position > grace_steps",
        "test_spam",
    ),
    "clip limit without the margin for rounding": Mistake(
        "spam_optax/_spikes.py",
        "margin = 1 + 16 *",
        "margin = 1 - 16 *",
        "test_spam",
    ),
    "a spike's limit is read off the wrong moment": Mistake(
        "spam_optax/_spikes.py",
        "margin / (b2 / rule.threshold + (1 - b2))",
        "rule.threshold * margin",
        "test_spam",
    ),
    "ramp before the first reset": Mistake(
        "spam_optax/_schedule.py",
        "(position < warmup_steps) & (position < step)",
        "position < warmup_steps",
        "test_functional test_spam",
    ),
    "NaN reaches the moments": Mistake(
        "spam_optax/_spikes.py",
        "limited = jnp.where(has_limit & (square > limit), limit, 0)",
        "limited = jnp.where(has_limit & (square > limit), limit, jnp.nan)",
        "test_nonfinite test_functional",
    ),
    "unseen coordinates are clipped": Mistake(
        "spam_optax/_spikes.py",
        "has_limit = rule.active if rule.clip_unseen else",
        "has_limit = rule.active if not rule.clip_unseen else",
        "test_functional test_spam",
    ),
    "bias corrections swapped": Mistake(
        "spam_optax/_spam_adam.py",
        "return ramp * jnp.sqrt(second) / first",
        "return ramp * jnp.sqrt(first) / second",
        "test_spam",
    ),
    "updates keep the dtype of arithmetic": Mistake(
        "spam_optax/_moments.py",
        "lambda x, y: _arithmetic.cast(x, jnp.asarray(y).dtype), tree, like",
        "lambda x, y: x, tree, like",
        "test_conformance",
    ),
    "counters overflow": Mistake(
        "spam_optax/_arithmetic.py",
        "return total + jnp.minimum(count, _INT32_MAX - total)",
        "return total + count",
        "test_spam",
    ),
    "one mask for ever": Mistake(
        "spam_optax/_sparse_spam.py",
        "seeds = jnp.where(is_reset, fresh, seeds)",
        "seeds = jnp.where(is_reset, seeds, seeds)",
        "test_sparse",
    ),
    "tensors share their masks": Mistake(
        "spam_optax/_sparse_layout.py",
        "jnp.uint32(zlib.crc32(name.encode()))",
        "jnp.uint32(0)",
        "test_sparse",
    ),
    "decay of entries without momentum": Mistake(
        "spam_optax/_sparse_spam.py",
        "jnp.where(_sparse_layout.mask(layout, lanes), x, 0)",
        "x",
        "test_sparse",
    ),
    "sparse moments without their sharding": Mistake(
        "spam_optax/_sparse_spam.py",
        "return jax.ShapeDtypeStruct(shape, p.dtype, sharding=sharding)",
        "return jax.ShapeDtypeStruct(shape, p.dtype)",
        "test_conformance test_sparse",
    ),
    "AdaGC's running norm takes the unclipped norm": Mistake(
        "spam_optax/_adagc.py",
        "clipped = scale * norm",
        "clipped = norm",
        "test_relatives",
    ),
    "ZClip's deviation from the old mean": Mistake(
        "spam_optax/_zclip.py",
        "share = jnp.where(is_warm, keep, jnp.sqrt(keep))",
        "share = jnp.where(is_warm, 1.0, jnp.sqrt(keep))",
        "test_relatives",
    ),
    "a spike enters its own running mean": Mistake(
        "spam_optax/_monitor.py",
        "jnp.minimum(norm, threshold * mean), norm)",
        "norm, norm)",
        "test_monitor",
    ),
    "injected faults are the same in every step": Mistake(
        "spam_optax/testing.py",
        "jax.random.fold_in(step_key, i)",
        "jax.random.fold_in(_validate.make_key(key), i)",
        "test_testing",
    ),
    "embeddings unscaled": Mistake(
        "spam_optax/nnx.py",
        "math.sqrt(",
        "math.cbrt(",
        "test_nnx",
    ),
    "a step that is not finite is kept": Mistake(
        "examples/trainer/train_step.py",
        "going = (finite | (in_a_row > 0))",
        "going = (jnp.isfinite(loss) | (in_a_row > 0))",
        "test_program",
    ),
    "checkpoints without a fingerprint": Mistake(
        "examples/trainer/checkpoints.py",
        "total = total * 31 + bits.sum(dtype=jnp.uint32) + place",
        "total = total * 31 + place",
        "test_checkpoints",
    ),
    "the data begins anew after a resume": Mistake(
        "examples/trainer/loop.py",
        "save(state, places[step])",
        "save(state, places[max(places) - 1])",
        "test_mistakes",
    ),
    "the loss counts the first token": Mistake(
        "examples/trainer/train_step.py",
        "is_target = tokens[:, 1:, None]",
        "is_target = tokens[:, :-1, None]",
        "test_train_step",
    ),
    "gradients are summed over accumulated parts": Mistake(
        "examples/trainer/train_step.py",
        "means = jax.tree.map(lambda x: x / len(batch), sums)",
        "means = sums",
        "test_train_step",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="parts of the names of mistakes")
    words = parser.parse_args().words
    chosen = {
        name: mistake
        for name, mistake in MISTAKES.items()
        if not words or any(word in name for word in words)
    }
    unseen = []
    for number, (name, mistake) in enumerate(chosen.items(), 1):
        print(f"{number}/{len(chosen)} {name}: ", end="", flush=True)
        start = time.monotonic()
        failure = first_failure(mistake)
        print(failure or "NOT SEEN", f"({time.monotonic() - start:.0f} s)", flush=True)
        if not failure:
            unseen.append(name)
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} mistakes made a test fail.")
    return 1 if unseen else 0


def first_failure(mistake: Mistake) -> str | None:
    """Returns the first test that fails with a mistake, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name)
        for name in ("README.md", "conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        path = copy / mistake.file
        text = path.read_text(encoding="utf-8")
        if text.count(mistake.right) != 1:
            raise SystemExit(
                f"{mistake.file} must have once, and has {text.count(mistake.right)} "
                f"times: {mistake.right!r}"
            )
        path.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")
        names = mistake.tests.split()
        likely = [str(next(copy.glob(f"tests/**/{name}.py"))) for name in names]
        return failure_of(copy, likely) or failure_of(copy, ["-n2"])


def failure_of(folder: pathlib.Path, arguments: list[str]) -> str | None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + arguments,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if run.returncode in (0, 5):  # 5: no test was chosen
        return None
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return (
        failed[0].split(" - ")[0] if failed else f"pytest ended with {run.returncode}"
    )


if __name__ == "__main__":
    sys.exit(main())
