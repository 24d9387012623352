"""What a census of gradient spikes shows, computed from the runs' records alone."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from studies.spike_census.census import GSS_THRESHOLD, ONLINE_THRESHOLD, Setting

GRACE_STEPS = 20  # at first, in which SPAM clips nothing
AROUND = 50  # steps on either side, whose median loss is what was to be expected
AHEAD = 5  # steps after one, in which its update shows
BUMP = 2.0  # robust standard deviations above the expected loss
SPIKY = 0.9  # quantile above which a step has many spikes
LEVEL = 0.05  # of a test
EMBEDDING = "embed/embedding"
END = 50  # steps, over which the final loss is averaged


class Record(NamedTuple):
    """One finished run, as its file has it."""

    setting: Setting
    digest: str  # of text and tokenizer
    tensors: dict[str, int]  # coordinates of each
    halted_at: int | None
    loss: np.ndarray  # steps
    counts: dict[str, np.ndarray]  # steps x tensors: gss_count, gss_max, online_...

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": dataclasses.asdict(self.setting),
            "digest": self.digest,
            "tensors": self.tensors,
            "halted_at": self.halted_at,
            "loss": self.loss.tolist(),
            **{name: table.tolist() for name, table in self.counts.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Record":
        """Raises KeyError, TypeError or ValueError if it is none."""
        tables = [f"{kind}_{what}" for kind in KINDS for what in ("count", "max")]
        record = cls(
            Setting(**content["setting"]),
            content["digest"],
            dict(content["tensors"]),
            content["halted_at"],
            np.array(content["loss"], np.float64),
            {name: np.array(content[name]) for name in tables},
        )
        shape = len(record.loss), len(record.tensors)
        if any(table.shape != shape for table in record.counts.values()):
            raise ValueError("its tables do not have a row for every step")
        return record

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return max(1, self.setting.steps // 10)

    def spikes(self, *, embedding: bool = True) -> np.ndarray:
        """Coordinates above the threshold of the gradient spike score, step by step."""
        chosen = [embedding or name != EMBEDDING for name in self.tensors]
        return self.counts["gss_count"][:, chosen].sum(axis=1)

    def largest_outside_embedding(self) -> np.ndarray:
        """The largest gradient spike score of each step, in any other tensor.

        Of what may be no spike: most steps have none there to count.
        """
        chosen = [name != EMBEDDING for name in self.tensors]
        return self.counts["gss_max"][:, chosen].max(axis=1)


KINDS = {"gss": GSS_THRESHOLD, "online": ONLINE_THRESHOLD}


def rounded(values: np.ndarray) -> np.ndarray:
    """To four significant digits, so that a file of them is not mostly digits."""
    shorter = np.array([float(f"{value:.4g}") for value in values.flat])
    return shorter.reshape(values.shape)


# ------------------------------------------------------------------------- one run


def summarize(record: Record) -> dict[str, Any]:
    """The numbers of one run; rates are in spikes per million gradient coordinates.

    What cannot be told of so short a run is None.
    """
    warmup, size = record.warmup, sum(record.tensors.values())
    spikes, late = record.spikes(), record.spikes()[warmup:]
    others = record.spikes(embedding=False)[warmup:]
    online = record.counts["online_count"].sum(axis=1)[GRACE_STEPS:]
    return {
        "setting": dataclasses.asdict(record.setting),
        "parameters": size,
        "halted_at": record.halted_at,
        "final_loss": float(record.loss[-END:].mean()),
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
    """The largest gradient spike score from a step on: its size, tensor and step."""
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
    """Whether steps with many spikes go with loss bumps, after the warm-up.

    A step's excess loss is over the median of the 50 steps before it and the 50 after,
    so that the descent does not count; a bump is an excess of more than 2 robust
    standard deviations. `same_rho` is the rank correlation of the spikes with the
    excess of the very batch they come from; `after_rho` that with the mean excess of
    the next 5 batches, which have seen the update; `after_change` is how much larger
    that is, in nats, after steps with many spikes, the top tenth, than after others.
    Bump rates are of steps with many spikes and of others, at the step itself and
    within the 5 steps after it. Each `p` is `shift_test`'s.

    None if the run is too short or no step has more spikes than most.
    """
    excess = loss - median_around(loss)
    steps = np.arange(warmup, len(loss) - AHEAD)
    if len(steps) < 5 * AHEAD:
        return None
    spikes = spikes[steps]
    many = spikes > np.quantile(spikes, SPIKY)
    if not many.any():
        return None
    bump = excess > BUMP * robust_deviation(excess[warmup:])
    ahead = steps[:, None] + np.arange(1, AHEAD + 1)[None, :]
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
    """The median of each step's neighborhood, which is cut off at the ends."""
    return np.array(
        [np.median(loss[max(0, i - AROUND) : i + AROUND + 1]) for i in range(len(loss))]
    )


def robust_deviation(values: np.ndarray) -> float:
    """The standard deviation of a normal distribution with this median deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def shift_test(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Correlation of two series of steps, and how likely it is by chance, two-sided.

    Chance is the same series, one rotated against the other by more steps than any
    effect lasts. Unlike shuffling, that keeps how each resembles itself a few steps
    later, without which two slow drifts would look related. None for a constant series.
    """
    x, y = standardized(x), standardized(y)
    if x is None or y is None:
        return None, None
    rotated = np.fft.irfft(np.fft.rfft(x).conj() * np.fft.rfft(y), len(x)) / len(x)
    chance = np.abs(rotated[2 * AHEAD : len(x) - 2 * AHEAD + 1])
    as_large = np.sum(chance >= abs(rotated[0]) - 1e-12)
    return float(rotated[0]), float((1 + as_large) / (1 + len(chance)))


def standardized(values: np.ndarray) -> np.ndarray | None:
    values = values - np.mean(values)
    deviation = np.sqrt(np.mean(values**2))
    return values / deviation if deviation > 0 else None


# ------------------------------------------------------------------------ many runs


def kind_of(tensor: str) -> str:
    """A tensor's name without its layer."""
    return re.sub(r"^blocks\.\d+/", "", tensor).removesuffix("/kernel")


def by_kind(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Spikes of each kind of tensor, over all layers and runs; the worst come first."""
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
    """How the runs agree: medians, and how many show a relation beyond chance."""
    known = [relation for relation in relations if relation is not None]
    result: dict[str, Any] = {"runs": len(known)}
    for name in ("same_rho", "after_rho"):
        pairs = [(r[name], r[f"{name}_p"]) for r in known if r[name] is not None]
        result[name] = float(np.median([rho for rho, _ in pairs])) if pairs else None
        result[f"{name}_positive"] = sum(rho > 0 and p < LEVEL for rho, p in pairs)
        result[f"{name}_negative"] = sum(rho < 0 and p < LEVEL for rho, p in pairs)
    return result
