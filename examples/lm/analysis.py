"""What a run showed, computed from its records alone."""

import numpy as np

from lm.config import RunConfig
from lm.records import Row, evaluations_of, finite, steps_of

SPIKE_FACTOR = 10.0  # times the running median of the gradient norm
MEDIAN_WINDOW = 100  # steps
STEPS_BEFORE_FAULT = 20
STEPS_AFTER_FAULT = 40


def column(rows: list[Row], name: str) -> np.ndarray:
    """A column as float64; what was not finite is NaN."""
    return np.array([row[name] for row in rows], np.float64)


def running_median(values: np.ndarray, window: int = MEDIAN_WINDOW) -> np.ndarray:
    """Median of up to `window` values before each; NaN where there is none."""
    medians = np.full(len(values), np.nan)
    for i in range(len(values)):
        before = values[max(0, i - window) : i]
        before = before[np.isfinite(before)]
        if len(before):
            medians[i] = np.median(before)
    return medians


def count_spikes(grad_norms: np.ndarray) -> int:
    """Steps whose gradient norm exceeds 10 times its running median.

    A norm that is not finite is a spike.
    """
    spikes = grad_norms > SPIKE_FACTOR * running_median(grad_norms)
    return int(np.sum(spikes | ~np.isfinite(grad_norms)))


def worst_loss_jump(losses: np.ndarray, burst_starts: tuple[int, ...]) -> float | None:
    """The largest rise of the training loss within 40 steps after a burst began.

    The rise is over the mean loss of the 20 steps before the burst. The loss of a
    burst's first step is computed before its update and so belongs to neither. NaN if
    a loss in a window is not finite, None without a burst.
    """
    jumps = []
    for start in burst_starts:
        before = losses[max(0, start - 1 - STEPS_BEFORE_FAULT) : start - 1]
        after = losses[start : start + STEPS_AFTER_FAULT]
        if len(before) and len(after):
            jumps.append(np.max(after) - np.mean(before))
    return float(np.max(jumps)) if jumps else None


def worst_burst(steps: list[Row]) -> float | None:
    """The largest fault left after clipping, in units of the usual gradient norm."""
    usual = running_median(column(steps, "grad_norm"))
    ratio = column(steps, "clipped_grad_norm") / usual
    ratio = ratio[[row["fault"] for row in steps]]
    return float(np.max(ratio)) if len(ratio) else None


def summarize(rows: list[Row], config: RunConfig) -> dict[str, dict]:
    """The summary of every optimizer that has finished.

    Each has `final_eval_loss`, `worst_loss_jump`, `worst_burst`, `spikes_seen`,
    `spikes_clipped` and `tokens_per_second` (of the median step). A value that is not
    finite, or that a run without faults does not have, is None.
    """
    summary = {}
    for name in config.optimizers:
        steps, evaluations = steps_of(rows, name), evaluations_of(rows, name)
        if not evaluations or evaluations[-1]["step"] != config.steps:
            continue
        values = {
            "final_eval_loss": evaluations[-1]["eval_loss"],
            "worst_loss_jump": worst_loss_jump(
                column(steps, "loss"), config.burst_starts
            ),
            "worst_burst": worst_burst(steps),
            "spikes_seen": count_spikes(column(steps, "grad_norm")),
            "spikes_clipped": sum(row["spikes_clipped"] for row in steps),
            "tokens_per_second": median(column(steps, "tokens_per_second")),
        }
        summary[name] = {key: finite(value) for key, value in values.items()}
    return summary


def median(values: np.ndarray) -> float | None:
    """Median of the finite values; None if there are none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None
