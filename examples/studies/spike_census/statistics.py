"""Statistics of gradient spikes, computed from the records alone."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from studies.spike_census.study import Record

GRACE_STEPS = 20  # first steps, in which SPAM clips nothing
MEDIAN_STEPS = 50  # on either side of a step; their median is the expected loss
STEPS_AFTER = 5  # steps after a spike, in which the effect of its update shows
BUMP_DEVIATIONS = 2.0  # robust standard deviations above the expected loss
MANY_QUANTILE = 0.9  # of the numbers of spikes; a step above it has many spikes
SIGNIFICANCE = 0.05  # level of a test
FINAL_STEPS = 50  # steps whose mean is the final loss


# ------------------------------------------------------------------------- one run


def summarize(record: Record) -> dict[str, Any]:
    """Returns the numbers of one run.

    Rates are spikes per million gradient coordinates. A number is None if the run is
    too short for it.
    """
    warmup, size = record.warmup, sum(record.tensors.values())
    spikes, late = record.spikes(), record.spikes()[warmup:]
    others = record.spikes(embedding=False)[warmup:]
    online = record.counts["online_count"].sum(axis=1)[GRACE_STEPS:]
    return {
        "setting": dataclasses.asdict(record.setting),
        "parameters": size,
        "halted_at": record.halted_at,
        "final_loss": float(record.loss[-FINAL_STEPS:].mean()),
        "gss_rate": per_million(spikes, size),
        "gss_share_in_warmup": share(spikes[:warmup].sum(), spikes.sum()),
        "gss_rate_after_warmup": per_million(late, size),
        "gss_embedding_share_after_warmup": share(
            late.sum() - others.sum(), late.sum()
        ),
        "largest": largest(record, 0),
        "largest_after_warmup": largest(record, warmup),
        "online_rate_after_grace": per_million(online, size),
        "relation": relate(record.loss, spikes, warmup),
        "relation_outside_embedding": relate(
            record.loss, record.largest_outside_embedding(), warmup
        ),
    }


def per_million(counts: np.ndarray, size: int) -> float | None:
    return 1e6 * float(counts.mean()) / size if len(counts) else None


def share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def largest(record: Record, first: int) -> dict[str, Any] | None:
    """Returns size, tensor and step of the largest score from step `first` on."""
    scores = record.counts["gss_max"][first:]
    if not len(scores):
        return None
    step, tensor = np.unravel_index(np.argmax(scores), scores.shape)
    return {
        "score": float(scores[step, tensor]),
        "tensor": list(record.tensors)[tensor],
        "step": int(first + step + 1),
    }


# ------------------------------------------------------------------ spikes and losses


def relate(loss: np.ndarray, spikes: np.ndarray, warmup: int) -> dict | None:
    """Relates spikes to bumps of the loss, after the warm-up.

    The excess loss of a step is its loss minus the median of the 50 steps before it and
    the 50 after it, which removes the descent. A bump is an excess of more than 2
    robust standard deviations. The tenth of the steps with the most spikes has many
    spikes.

    Returns:
      None if the run is too short, or if no step has many spikes. Else a dictionary:

      - `same_rho`: the rank correlation of the number of spikes with the excess loss of
        the batch they come from.
      - `after_rho`: the same with the mean excess of the next 5 batches, whose losses
        are computed after the update.
      - `after_change`: that mean excess after steps with many spikes minus that after
        other steps, in nats.
      - `same_bump_rate_many` and `same_bump_rate_others`: how often steps with many
        spikes, and other steps, are bumps. `after_...`: the same within the 5 steps
        after them.
      - A name with `p` is the p-value of `shift_test`.
    """
    excess = loss - median_around(loss)
    steps = np.arange(warmup, len(loss) - STEPS_AFTER)
    if len(steps) < 5 * STEPS_AFTER:
        return None
    spikes = spikes[steps]
    many = spikes > np.quantile(spikes, MANY_QUANTILE)
    if not many.any():
        return None
    bump = excess > BUMP_DEVIATIONS * robust_deviation(excess[warmup:])
    ahead = steps[:, None] + np.arange(1, STEPS_AFTER + 1)[None, :]
    same, after = excess[steps], excess[ahead].mean(axis=1)
    bumps = {"same": bump[steps], "after": bump[ahead].any(axis=1)}
    result = {
        "steps": len(steps),
        "steps_with_many_spikes": int(many.sum()),
        "steps_with_bump": int(bumps["same"].sum()),
    }
    for name, values in (("same", same), ("after", after)):
        rho, p = shift_test(ranks(spikes), ranks(values))
        result |= {f"{name}_rho": rho, f"{name}_rho_p": p}
    result["after_change"] = float(after[many].mean() - after[~many].mean())
    result["after_change_p"] = shift_test(many, after)[1]
    for name, values in bumps.items():
        result |= {
            f"{name}_bump_rate_many": float(values[many].mean()),
            f"{name}_bump_rate_others": float(values[~many].mean()),
            f"{name}_bump_p": shift_test(many, values)[1],
        }
    return result


def median_around(loss: np.ndarray) -> np.ndarray:
    """Returns the median loss around each step. It takes fewer steps at both ends."""
    return np.array(
        [
            np.median(loss[max(0, i - MEDIAN_STEPS) : i + MEDIAN_STEPS + 1])
            for i in range(len(loss))
        ]
    )


def robust_deviation(values: np.ndarray) -> float:
    """Returns the standard deviation of a normal distribution with this spread.

    The spread is the median of the absolute deviations from the median.
    """
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1. Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def shift_test(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the correlation of two series and its two-sided p-value.

    The p-value is the share of rotations of one series against the other with at least
    this correlation. Rotations by a few steps are left out, because effects last that
    long. Unlike shuffling, a rotation keeps slow drifts, and two unrelated drifts would
    look related without them. The result is None for a constant series.
    """
    x, y = standardized(x), standardized(y)
    if x is None or y is None:
        return None, None
    rotated = np.fft.irfft(np.fft.rfft(x).conj() * np.fft.rfft(y), len(x)) / len(x)
    chance = np.abs(rotated[2 * STEPS_AFTER : len(x) - 2 * STEPS_AFTER + 1])
    as_large = np.sum(chance >= abs(rotated[0]) - 1e-12)
    return float(rotated[0]), float((1 + as_large) / (1 + len(chance)))


def standardized(values: np.ndarray) -> np.ndarray | None:
    values = values - np.mean(values)
    deviation = np.sqrt(np.mean(values**2))
    return values / deviation if deviation > 0 else None


# ------------------------------------------------------------------------ many runs


def kind_of(tensor: str) -> str:
    """Returns a tensor's name without its layer."""
    return re.sub(r"^blocks\.\d+/", "", tensor).removesuffix("/kernel")


def by_kind(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Counts spikes per kind of tensor, over all layers and runs, the worst first."""
    kinds: dict[str, np.ndarray] = {}
    for record in records:
        count, score = record.counts["gss_count"], record.counts["gss_max"]
        for i, (name, size) in enumerate(record.tensors.items()):
            late = record.warmup
            sums = kinds.setdefault(kind_of(name), np.zeros(5))
            sums[:4] += (
                size * len(count),
                count[:, i].sum(),
                size * len(count[late:]),
                count[late:, i].sum(),
            )
            sums[4] = max(sums[4], score[:, i].max())
    whole = sum(kinds.values())
    rows = [
        {
            "kind": kind,
            "coordinates": share(sums[0], whole[0]),
            "spikes": share(sums[1], whole[1]),
            "rate": 1e6 * share(sums[1], sums[0]),
            "rate_after_warmup": 1e6 * (share(sums[3], sums[2]) or 0),
            "largest": float(sums[4]),
        }
        for kind, sums in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row["rate"])


def pooled(relations: list[dict | None]) -> dict[str, Any]:
    """Returns medians over the runs, and how many runs have significant relations."""
    known = [relation for relation in relations if relation is not None]
    result: dict[str, Any] = {"runs": len(known)}
    for name in ("same_rho", "after_rho"):
        pairs = [(r[name], r[f"{name}_p"]) for r in known if r[name] is not None]
        result[name] = float(np.median([rho for rho, _ in pairs])) if pairs else None
        result[f"{name}_positive"] = sum(
            rho > 0 and p < SIGNIFICANCE for rho, p in pairs
        )
        result[f"{name}_negative"] = sum(
            rho < 0 and p < SIGNIFICANCE for rho, p in pairs
        )
    return result
