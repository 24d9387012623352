"""Tokens per second of the trainer's step beside a plain PyTorch loop, 60M shape."""

import importlib.util
import json
import statistics
import subprocess
import sys

from benchmarks import environment

BATCH = {"batch-size": 4, "sequence-length": 256}
ENGINES = ("trainer_jax", "trainer_torch")


def measure(quick, track):
    """Seconds a step of each, in processes that take turns; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    rounds, steps = (1, 1) if quick else (3, 4)
    turns = [(n, engine) for n in range(rounds) for engine in ENGINES]
    runs = [
        (engine, _run(engine, steps))
        for _, engine in track(turns, description="trainer")
    ]
    results = {}
    for engine in ENGINES:
        own = [run for name, run in runs if name == engine]
        results[engine] = {
            "parameters": own[0]["parameters"],
            "seconds": [statistics.median(run["seconds"]) for run in own],
        }
    tokens = BATCH["batch-size"] * BATCH["sequence-length"]
    ratios = [
        theirs / ours
        for ours, theirs in zip(
            *(results[engine]["seconds"] for engine in ENGINES), strict=True
        )
    ]
    return {"tokens": tokens, "ratio": statistics.median(ratios), **results}


def _run(engine, steps):
    command = [sys.executable, "-m", f"benchmarks.{engine}", "--steps", str(steps)]
    for name, value in BATCH.items():
        command += [f"--{name}", str(value)]
    if engine == "trainer_torch":
        command += ["--threads", str(environment.cores())]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])
