"""Timing in turns, so that a drift of the machine's speed cancels in the ratios."""

import statistics


def interleave(timed, rounds, budget=10.0):
    """Yields the seconds so far, by name, after each round.

    `timed` has functions that take a step and return its seconds. The first round is
    for warming up and is not kept. Who has had `budget` seconds takes no more turns,
    so that nothing slow takes most of the time.
    """
    for run in timed.values():
        run()
    seconds = {name: [] for name in timed}
    yield seconds
    for _ in range(rounds):
        for name, run in timed.items():
            if sum(seconds[name]) < budget:
                seconds[name].append(run())
        yield seconds


def compare(mine, baseline):
    """Median, and median and quartiles of the ratio in each round."""
    ratios = [x / base for x, base in zip(mine, baseline, strict=False)]
    return {
        "rounds": len(mine),
        "milliseconds": 1e3 * statistics.median(mine),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": _quartiles(ratios),
    }


def _quartiles(values):
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
