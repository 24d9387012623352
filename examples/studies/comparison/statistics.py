"""Statistics of the comparison's runs, computed from their records alone."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spam_optax import functional
from studies.comparison.study import FAULTLESS
from studies.engine import Record
from trainer.config import BURST_LENGTH, RunConfig
from trainer.model import PRESETS
from trainer.output import summary

SPIKE_WINDOW = 100  # steps before a loss, which decide whether it is a spike
DEVIATION_WINDOW, SHORTEST_HISTORY = 128, 32  # steps, as in skip_spikes
RECOVERY_WINDOW = 10  # steps whose mean loss shows that a run has recovered
USABLE_MARGIN = 0.2  # nats above the lowest loss, at a learning rate that is usable
HIGH_RATE_FACTOR = 4  # of the high rate in the table, times the best one
LIMITS = {"attention_softcap": "attention softcap", "qk_clip": "QK-clip"}
BATCHES = (8, 4)  # sequences in a batch of the small and of the deep models
QUANTIZATIONS = {"none": "", "fp4": "fp4 E2M1", "fp4_e1m2": "fp4 E1M2"}
NORMS = {"scaled": "LayerNorm Scaling", "mixed": "Mix-LN"}


class Result(NamedTuple):
    """One row of a table: the runs of one optimizer with one scenario and one model.

    A number that was not measured is None. A number that is not finite is infinite.
    """

    label: str
    scenario: str
    model: str
    # Peak learning rate with the lowest mean final loss, of the rates with all seeds.
    best_rate: float
    is_at_edge: bool  # whether it is the lowest or the highest rate of the sweep
    final_loss: float  # evaluation loss at the best rate, mean over the seeds
    low: float  # lowest final loss of the seeds
    high: float  # highest final loss of the seeds
    seeds: int
    far_loss: float | None  # final loss at HIGH_RATE_FACTOR times the best rate
    sensitivity: float | None  # mean over the rates of the final loss, minus the best
    spike_score: float  # percent of steps whose loss spikes, at the best rate
    worst_jump: float | None  # after a burst, at the best rate: mean over the seeds
    recovery: float | None  # steps after the worst burst: median over the seeds
    diverged: int  # runs, of all rates, that ended no better than they began
    runs: int
    bytes_per_parameter: float  # of the optimizer's state
    # Of the fastest run, which was disturbed least. None: it was not measured alone.
    seconds_per_step: float | None
    curve: dict[float, list[float]]  # rate -> final losses of the seeds, capped
    gradient_spikes: dict[float, float]  # rate -> steps that spike, mean over the seeds
    # Fault steps and other steps that a guard skipped, at the best rate, mean over the
    # seeds. None: there is no guard.
    skipped: list[float] | None = None
    # Rate -> the largest gradient norm of a run in robust deviations, mean over the
    # seeds. None: it was not computed.
    deviations: dict[float, float] | None = None
    # The shape of the model, which `model` leaves out.
    layers: int = PRESETS["tiny"].layers
    width: int = PRESETS["tiny"].width
    # Other numbers of a task, at the best rate: means over the seeds.
    more: dict[str, float | None] | None = None

    @property
    def largest_rate(self) -> float:
        """Returns the largest rate, from the best one on, that keeps the loss low.

        The mean final loss at this rate, and at all rates between, is at most
        USABLE_MARGIN above the lowest.
        """
        higher = sorted(rate for rate in self.curve if rate >= self.best_rate)
        limit = self.final_loss + USABLE_MARGIN
        return max(
            itertools.takewhile(lambda rate: np.mean(self.curve[rate]) <= limit, higher)
        )

    @property
    def panel(self) -> tuple[Any, ...]:
        """Returns what the rows of one table have in common, as `panel_of`."""
        return self.scenario, self.layers, self.width, self.model

    @property
    def spikes_from(self) -> float | None:
        """Returns the lowest rate at which a gradient spikes in any of the seeds."""
        return min((r for r, n in self.gradient_spikes.items() if n), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values. JSON has no infinity, so "inf" stands for it.

        The numbers that only some tasks have are left out if there are none.
        """
        values = self._asdict()
        if values["more"] is None:
            del values["more"]
        return {k: "inf" if value == np.inf else value for k, value in values.items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Result":
        """Returns the result that `to_json` converted."""
        values = {k: np.inf if v == "inf" else v for k, v in content.items()}
        for name in ("curve", "gradient_spikes", "deviations"):  # JSON's keys are texts
            if values.get(name) is not None:
                values[name] = {float(rate): x for rate, x in values[name].items()}
        return cls(**values)


def results(records: Iterable[Record]) -> list[Result]:
    """Returns a result for each scenario, model and optimizer, the best one first."""

    groups = {}
    for record in records:
        key = (*panel_of(record), record["label"])
        groups.setdefault(key, []).append(record)
    found = [result(group) for group in groups.values()]
    return sorted(found, key=lambda x: (x.panel, x.final_loss))


def result(records: Sequence[Record]) -> Result:
    """Returns the statistics of runs that differ in learning rate and seed."""
    by_rate = {}
    for record in sorted(records, key=lambda r: (r["learning_rate"], r["seed"])):
        by_rate.setdefault(record["learning_rate"], []).append(record)
    curve = {rate: [capped_loss(r) for r in rs] for rate, rs in by_rate.items()}
    means = {rate: float(np.mean(losses)) for rate, losses in curve.items()}
    seeds = max(map(len, curve.values()))
    best = min((r for r in curve if len(curve[r]) == seeds), key=means.get)
    at_best = by_rate[best]
    high = HIGH_RATE_FACTOR * best
    first = records[0]
    jumps = [worst_jump(r) for r in at_best]
    recoveries = [recovery_steps(r) for r in at_best]
    return Result(
        label=first["label"],
        scenario=first["scenario"],
        model=model_of(first),
        best_rate=best,
        is_at_edge=best in (min(means), max(means)),
        final_loss=means[best],
        low=min(curve[best]),
        high=max(curve[best]),
        seeds=len(at_best),
        far_loss=next((means[rate] for rate in means if np.isclose(rate, high)), None),
        sensitivity=sensitivity(means),
        spike_score=float(np.mean([spike_percent(r) for r in at_best])),
        worst_jump=None if None in jumps else float(np.mean(jumps)),
        recovery=None if None in recoveries else float(np.median(recoveries)),
        diverged=sum(map(diverged, records)),
        runs=len(records),
        bytes_per_parameter=first["optimizer_bytes"] / first["parameters"],
        seconds_per_step=min(r["seconds_per_step"] for r in records),
        curve=curve,
        gradient_spikes={
            rate: float(np.mean([gradient_spikes(r) for r in rs]))
            for rate, rs in by_rate.items()
        },
        skipped=skipped_steps(at_best),
        deviations={
            rate: float(np.mean([largest_deviation(r) for r in rs]))
            for rate, rs in by_rate.items()
        },
        **shape_of(first),
        more=first.get("more") and {x: mean_of(x, at_best) for x in first["more"]},
    )


def mean_of(name: str, records: Sequence[Record]) -> float | None:
    """Returns the mean of one of the other numbers; None if one is not finite."""
    values = [record["more"][name] for record in records]
    return None if None in values else float(np.mean(values))


def panel_of(record: Record) -> tuple[Any, ...]:
    """Returns what the rows of one table have in common: all but the optimizer."""
    shape = shape_of(record) or shape_of({"preset": "tiny"})
    return (record["scenario"], *shape.values(), model_of(record))


def shape_of(record: Record) -> dict[str, int]:
    """Returns layers and width of a language model, if they are not the preset's."""
    if "preset" not in record:
        return {}
    preset = PRESETS[record["preset"]]
    return {x: record.get(x, getattr(preset, x)) for x in ("layers", "width")}


def model_of(record: Record) -> str:
    """Returns the settings of model and data that the experiments change.

    Layers and width are not part of it. Other tasks have none of these settings.
    """
    get = record.get
    changed = [get("initialization"), get("embedding")]
    changed += ["untied head" if get("untied_head") else None]
    changed += ["QK-norm" if get("qk_norm") else None, NORMS.get(get("norm"))]
    if "initialization" in record:
        steps, batch = get("warmup_steps"), get("batch_size")
        changed += [None if steps is None else f"warm-up {steps}"]
        changed += [None if batch in BATCHES else f"batch {batch}"]
    quantize = get("quantize", "none")
    changed += [QUANTIZATIONS.get(quantize, quantize) or None]
    changed += ["bfloat16" if get("compute_dtype") == "bfloat16" else None]
    for name, text in LIMITS.items():
        changed += [f"{text} {get(name):g}" if get(name) else None]
    changed += [pathlib.Path(get("data")).name if get("data") else None]
    return ", ".join(filter(None, changed))


def skipped_steps(records: Sequence[Record]) -> list[float] | None:
    """Counts the skipped steps, those with a fault and the others: means over runs."""
    if any(record["skip_reasons"] is None for record in records):
        return None
    counts = []
    for record in records:
        is_skipped = np.array(record["skip_reasons"]) > 0
        in_faults = is_skipped[fault_steps(record)].sum()
        counts.append((in_faults, is_skipped.sum() - in_faults))
    return np.mean(counts, axis=0).tolist()


def sensitivity(means: dict[float, float]) -> float | None:
    """Returns the mean loss over the rates minus the lowest; None for a single rate."""
    losses = list(means.values())
    return float(np.mean(losses)) - min(losses) if len(losses) > 1 else None


# ------------------------------------------------------------------------- of one run


def capped_loss(record: Record) -> float:
    """Returns the final evaluation loss, at most the loss before training."""
    final, first = record["final_eval_loss"], record["first_eval_loss"]
    return first if final is None else min(final, first)


def diverged(record: Record) -> bool:
    final = record["final_eval_loss"]
    return final is None or final >= record["first_eval_loss"]


def burst_starts(record: Record) -> tuple[int, ...]:
    """Returns the first steps of the bursts, counted from 1."""
    if record["scenario"] in FAULTLESS:
        return ()
    return RunConfig(steps=record["steps"], bursts=record["bursts"]).burst_starts


def fault_steps(record: Record) -> np.ndarray:
    """Returns the steps with a fault, counted from 0."""
    starts = np.array(burst_starts(record), int)
    return np.add.outer(starts - 1, range(BURST_LENGTH)).ravel()


def losses_of(record: Record) -> np.ndarray:
    return np.array(record["losses"], np.float64)


def has_corrupted_batches(record: Record) -> bool:
    """Returns whether the losses of the bursts are losses on random tokens."""
    return record["scenario"] == "batches"


def recovery_steps(record: Record) -> float | None:
    """Counts the steps from the end of the worst burst to the run's recovery.

    A run has recovered when the mean loss of 10 steps is no higher than the mean loss
    of the 20 steps before the burst. The result is infinite if that does not happen
    before the next burst or the end. It is None if there is no burst, or if no burst
    has enough steps after it.
    """
    losses, starts = losses_of(record), burst_starts(record)
    steps = []
    for start, next_start in itertools.pairwise([*starts, len(losses) + 1]):
        before = losses[max(0, start - 1 - summary.STEPS_BEFORE_FAULT) : start - 1]
        after = losses[start - 1 + BURST_LENGTH : next_start - 1]
        if len(after) < RECOVERY_WINDOW or not len(before):
            continue
        means = np.lib.stride_tricks.sliding_window_view(after, RECOVERY_WINDOW)
        back = np.flatnonzero(means.mean(axis=1) <= before.mean())
        steps.append(float(back[0]) if len(back) else np.inf)
    return max(steps, default=None)


def spike_percent(record: Record) -> float:
    """Returns the percentage of steps whose loss spikes.

    Steps with a corrupted batch are left out.
    """
    losses = np.nan_to_num(losses_of(record), nan=np.inf).astype(np.float32)
    if has_corrupted_batches(record):
        losses = np.delete(losses, fault_steps(record))
    window = min(SPIKE_WINDOW, len(losses) // 2)
    return float(functional.spike_score(losses, window=window))


def gradient_spikes(record: Record) -> int:
    """Counts steps whose gradient norm is 10 times its running median.

    Steps with a fault are left out.
    """
    norms = np.array(record["gradient_norms"], np.float64)
    return int(np.delete(summary.find_spikes(norms), fault_steps(record)).sum())


def largest_deviation(record: Record) -> float:
    """Returns the largest gradient norm in robust deviations from those before it.

    A robust deviation is 1.4826 times the median distance from the median, of up to
    DEVIATION_WINDOW norms. Steps with a fault are left out, and the first
    SHORTEST_HISTORY steps, and norms that are not finite.
    """
    norms = np.array(record["gradient_norms"], np.float64)
    norms = np.delete(norms, fault_steps(record))
    norms = norms[np.isfinite(norms)]
    largest = 0.0
    for step in range(SHORTEST_HISTORY, len(norms)):
        before = norms[max(0, step - DEVIATION_WINDOW) : step]
        median = np.median(before)
        deviation = 1.4826 * np.median(np.abs(before - median))
        largest = max(largest, (norms[step] - median) / max(deviation, 1e-12))
    return largest


def worst_jump(record: Record) -> float | None:
    """Returns the largest rise of the loss after a burst.

    It is infinite if a loss before or after the burst is not finite, and None if there
    is no burst.
    """
    skipped = BURST_LENGTH if has_corrupted_batches(record) else 1
    jump = summary.worst_loss_jump(losses_of(record), burst_starts(record), skipped)
    return np.inf if jump is not None and np.isnan(jump) else jump
