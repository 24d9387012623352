"""The summary of a run, computed from its metrics.jsonl alone."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trainer.config import RunConfig
from trainer.output.sinks import (
    Row,
    evaluations_of,
    finite,
    is_halt,
    rewinds_of,
    steps_of,
)

SPIKE_FACTOR = 10.0  # times the running median of the gradient norm
SPIKE_SCORE = 10.0  # the same for one tensor, over its running mean: track_spikes'
MEDIAN_WINDOW = 100  # steps
STEPS_BEFORE_FAULT = 20
STEPS_AFTER_FAULT = 40
POINTS = 2000  # of a curve at most: more than a picture has pixels in a row


def column(rows: list[Row], name: str) -> np.ndarray:
    """Returns a column as float64, with NaN for values that were not finite."""
    return np.array([row[name] for row in rows], np.float64)


def losses_of(steps: list[Row]) -> np.ndarray:
    """Returns the training losses; a batch of random tokens has that of the one before.

    Its own is high for any model.
    """
    losses = column(steps, "loss")
    for i in range(1, len(losses)):
        if steps[i]["fault"] == "batch":
            losses[i] = losses[i - 1]
    return losses


def running_median(values: np.ndarray, window: int = MEDIAN_WINDOW) -> np.ndarray:
    """Returns the median of up to `window` finite values before each, or NaN."""
    known = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(window, np.nan), known])
    before = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(values)]
    ordered = np.sort(before, axis=1)  # NaN comes last
    counts = np.sum(np.isfinite(ordered), axis=1)
    middle = np.stack([np.maximum(counts - 1, 0) // 2, counts // 2], axis=1)
    return np.take_along_axis(ordered, middle, axis=1).mean(axis=1)


def find_spikes(grad_norms: np.ndarray) -> np.ndarray:
    """Returns whether each step's gradient norm exceeds 10 times its running median.

    A norm that is not finite is a spike.
    """
    spikes = grad_norms > SPIKE_FACTOR * running_median(grad_norms)
    return spikes | ~np.isfinite(grad_norms)


def worst_loss_jump(
    losses: np.ndarray, burst_starts: tuple[int, ...], skipped: int = 1
) -> float | None:
    """Returns the largest rise of the training loss within 40 steps after a burst.

    The rise is over the mean loss of the 20 steps before the burst. The `skipped` first
    steps of a burst belong to neither: the loss of the first is computed before its
    update, and that of a corrupted batch is no loss of the model's. NaN if a loss in a
    window is not finite, None without a burst.
    """
    jumps = []
    for start in burst_starts:
        before = losses[max(0, start - 1 - STEPS_BEFORE_FAULT) : start - 1]
        first = start - 1 + skipped
        after = losses[first : first + STEPS_AFTER_FAULT]
        if len(before) and len(after):
            jumps.append(np.max(after) - np.mean(before))
    return float(np.max(jumps)) if jumps else None


def worst_burst(steps: list[Row]) -> float | None:
    """Returns the largest fault after clipping, in units of the usual gradient norm."""
    usual = running_median(column(steps, "grad_norm"))
    ratio = column(steps, "clipped_grad_norm") / usual
    ratio = ratio[[bool(row["fault"]) for row in steps]]
    return float(np.max(ratio)) if len(ratio) else None


def halted_at(steps: list[Row]) -> int | None:
    """Returns the step whose loss or update was not finite, or None."""
    return next((row["step"] for row in steps[-1:] if is_halt(row)), None)


def summarize(rows: list[Row], config: RunConfig) -> dict[str, dict]:
    """Returns the summary of every optimizer that has finished or halted.

    Each has `halted_at`, the step that was not finite, `final_eval_loss`,
    `final_eval_perplexity`, `worst_loss_jump`, `worst_burst`, `spikes_seen`,
    `spikes_clipped`, `skipped_steps`, `rewinds`, and of the median step
    `tokens_per_second` and
    `flops_utilization`. A value that is not finite, not known, or that the run does not
    have, is None.
    """
    summaries = {}
    for name in config.optimizers:
        steps, evaluations = steps_of(rows, name), evaluations_of(rows, name)
        final = next((row for row in evaluations if row["step"] == config.steps), None)
        halt = halted_at(steps)
        if final is None and halt is None:
            continue
        values = {
            "halted_at": halt,
            "final_eval_loss": final and final["eval_loss"],
            "final_eval_perplexity": final and final["eval_perplexity"],
            "worst_loss_jump": worst_loss_jump(
                losses_of(steps), config.burst_starts + config.bad_batch_starts
            ),
            "worst_burst": worst_burst(steps),
            "spikes_seen": int(find_spikes(column(steps, "grad_norm")).sum()),
            "spikes_clipped": sum(row["spikes_clipped"] for row in steps),
            "skipped_steps": steps[-1]["skipped_steps"],
            "rewinds": len(rewinds_of(rows, name)),
            "tokens_per_second": median(column(steps, "tokens_per_second")),
            "flops_utilization": median(column(steps, "flops_utilization")),
        }
        summaries[name] = finite(values)
    return summaries


def median(values: np.ndarray) -> float | None:
    """Returns the median of the finite values, or None if there are none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


class TensorSpikes(NamedTuple):
    """The number and size of the spikes in one tensor's gradient."""

    name: str
    steps: int  # with a score above SPIKE_SCORE, or one that is not finite
    nonfinite: int  # steps with one that is not finite
    largest: float | None  # finite score; None if there is none
    largest_step: int | None


def tensor_spikes(steps: list[Row], names: Sequence[str]) -> list[TensorSpikes]:
    """Returns the spikes of every tensor in one optimizer's steps, the worst first.

    Those are the tensors with the most spikes, and of these the ones with the largest.
    """
    counts = steps[-1]["tensors"]["spike_steps"]
    scores = np.array([row["tensors"]["spike_score"] for row in steps], np.float64)
    found = []
    for name, count, score in zip(names, counts, scores.T, strict=True):
        known = np.flatnonzero(np.isfinite(score))
        at = known[np.argmax(score[known])] if len(known) else None
        found.append(
            TensorSpikes(
                name=name,
                steps=count,
                nonfinite=len(score) - len(known),
                largest=None if at is None else float(score[at]),
                largest_step=None if at is None else steps[at]["step"],
            )
        )
    return sorted(found, key=lambda t: (-t.steps, -t.nonfinite, -(t.largest or 0)))


# ------------------------------------------------------------------------- curves


def bucket_size(steps: int, points: int = POINTS) -> int:
    """Returns how many steps share a point, for a curve of at most `points`."""
    return max(1, -(-steps // points))


def thin(
    steps: np.ndarray,
    values: np.ndarray,
    reduce: Callable[[np.ndarray, np.ndarray], np.ndarray],
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Reduces a curve to one point per `size` steps, by `largest` or `mean`.

    It stands at the first of them, and is NaN only if none of them is finite.
    """
    starts = np.arange(0, len(values), size)
    return steps[starts], reduce(values, starts)


def largest(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the largest value of each part that begins at one of `starts`."""
    return np.fmax.reduceat(values, starts) if len(starts) else values


def mean(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the mean of the finite values of each part, which begin at `starts`."""
    if not len(starts):
        return values
    is_finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(is_finite, values, 0.0), starts)
    counts = np.add.reduceat(is_finite.astype(np.float64), starts)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


# ---------------------------------------------------------------- the summary's table


class Column(NamedTuple):
    """A column of the summary's table."""

    heading: str  # in two lines
    style: str  # for format
    meaning: str = ""


COLUMNS = {
    "final_eval_loss": Column("final\neval loss", ".3f"),
    "final_eval_perplexity": Column("final\nperplexity", ",.2f"),
    "worst_loss_jump": Column(
        "worst\nloss jump",
        "+.3f",
        f"the largest training loss within {STEPS_AFTER_FAULT} steps after a fault"
        f" began, minus the mean of the {STEPS_BEFORE_FAULT} steps before it",
    ),
    "worst_burst": Column(
        "worst\nburst",
        ".1f",
        "the largest corrupted gradient that entered the moments, after all clipping,"
        " in units of the running median of the gradient norm",
    ),
    "spikes_seen": Column(
        "spikes\nseen",
        ",",
        f"steps whose gradient norm was above {SPIKE_FACTOR:g} times its running median"
        f" of {MEDIAN_WINDOW} steps",
    ),
    "spikes_clipped": Column("coordinates\nclipped", ","),
    "skipped_steps": Column("steps\nskipped", ",", "by the guard"),
    "tokens_per_second": Column("\ntokens/s", ",.0f"),
    "flops_utilization": Column(
        "\nMFU",
        ".1%",
        "floating-point operations that the model needs, over the bfloat16 peak of the"
        " devices",
    ),
}


def loss_unit(config: RunConfig) -> str:
    return f"nats per {'byte' if config.tokenizer == 'bytes' else 'token'}"


def columns(summaries: dict[str, dict], config: RunConfig) -> dict[str, Column]:
    """Returns the columns that have values in this run."""
    left_out = set()
    if config.tokenizer == "bytes":
        left_out.add("final_eval_perplexity")
    if not config.burst_starts + config.bad_batch_starts:
        left_out.update(["worst_loss_jump", "worst_burst"])
    if not any(values["skipped_steps"] for values in summaries.values()):
        left_out.add("skipped_steps")
    if all(values["flops_utilization"] is None for values in summaries.values()):
        left_out.add("flops_utilization")
    return {key: column for key, column in COLUMNS.items() if key not in left_out}


def number(value: float | None, style: str) -> str:
    """Formats a number, or a dash for None."""
    return "-" if value is None else format(value, style)


def cells(values: dict, shown: dict[str, Column]) -> list[str]:
    """Returns one optimizer's line, with the step in place of the loss if it halted."""
    texts = {key: number(values[key], column.style) for key, column in shown.items()}
    if values["halted_at"] is not None:
        texts["final_eval_loss"] = f"halted at {values['halted_at']:,}"
    return list(texts.values())
