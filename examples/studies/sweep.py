"""Sweeps the learning rate where it matters.

A full grid spends most of its time on rates at which nothing is decided. An adaptive
sweep begins with the first seed at every rate of a grid. Then it adds

- rates, as long as the best one is the lowest or the highest of the sweep, and then
- the other seeds, at the best rate and at the rates next to it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from studies import engine
from studies.comparison import statistics
from studies.task import Run

MOST_RATES = 12  # in one sweep, should the loss fall for ever


def run_all(
    study: engine.Study,
    grids: dict[str, list[Run]],
    seeds: dict[str, Sequence[int]],
    folder: pathlib.Path,
    workers: int = 1,
) -> list[engine.Failure]:
    """Makes the missing records of several sweeps, as `engine.run_all` does.

    Args:
      study: The study that makes the records.
      grids: The runs of each sweep. The runs that an adaptive sweep adds are appended.
      seeds: All seeds of each adaptive sweep. Its grid begins with the first of them.
      folder: The folder of the records.
      workers: The number of runs side by side.

    Returns:
      The runs that ended with an exception.
    """
    runs = [run for grid in grids.values() for run in grid]
    failures = []
    while runs:
        failures += engine.run_all(study, runs, folder, workers)
        runs = []
        for name in seeds:
            added = next_runs(study, grids[name], folder, seeds[name])
            grids[name] += added
            runs += added
    return failures


def next_runs(
    study: engine.Study,
    runs: Sequence[Run],
    folder: pathlib.Path,
    seeds: Sequence[int],
) -> list[Run]:
    """Returns the runs that an adaptive sweep needs after `runs`, or none.

    Args:
      study: The study that makes the records.
      runs: The runs so far. A row whose records are not all there gets no more runs.
      folder: The folder of the records.
      seeds: All seeds. The runs began with the first of them.
    """
    rows = {}
    for run in runs:
        rows.setdefault(with_rate(run, 1.0, 0), []).append(run)
    added = []
    for row in rows.values():
        records = engine.read_all(study, row, folder)
        if None not in records:
            known = [(r.config.learning_rate, r.config.seed) for r in row]
            losses = [statistics.capped_loss(record) for record in records]
            wanted = next_points(dict(zip(known, losses, strict=True)), seeds)
            added += [with_rate(row[0], rate, seed) for rate, seed in wanted]
    return added


def with_rate(run: Run, rate: float, seed: int) -> Run:
    config = dataclasses.replace(run.config, learning_rate=rate, seed=seed)
    return run._replace(config=config)


def next_points(
    losses: dict[tuple[float, int], float], seeds: Sequence[int]
) -> list[tuple[float, int]]:
    """Returns the rates and seeds that one row needs next, from those it has."""
    by_rate = {}
    for (rate, _), loss in losses.items():
        by_rate.setdefault(rate, []).append(loss)
    rates = sorted(by_rate)
    best = min(rates, key=lambda rate: np.mean(by_rate[rate]))
    if 1 < len(rates) < MOST_RATES and best in (rates[0], rates[-1]):
        neighbor = rates[1] if best == rates[0] else rates[-2]
        further = rounded(best * (best / neighbor))
        if further not in by_rate and 0 < further < math.inf:
            return [(further, seeds[0])]
    at = rates.index(best)
    near = rates[max(0, at - 1) : at + 2]
    wanted = [(rate, seed) for rate in near for seed in seeds]
    return [point for point in wanted if point not in losses]


def rounded(rate: float) -> float:
    """Removes the noise of floating point, so that equal rates have equal names."""
    return float(f"{rate:.6g}")
