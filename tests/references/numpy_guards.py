"""A slow NumPy version of the rule by which steps are skipped."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class SpikeHistory:
    """The last accepted values of one series, as a Python list."""

    window: int
    sigma: float
    share: float
    min_history: int
    robust: bool = True
    values: list = dataclasses.field(default_factory=list)

    def limit(self):
        recent = np.asarray(self.values[-self.window :], np.float64)
        if len(recent) < self.min_history:
            return np.inf
        if not self.robust:
            return recent.mean() + self.sigma * recent.std()
        median = np.median(recent)
        deviation = 1.4826 * np.median(np.abs(recent - median))
        return median + max(self.sigma * deviation, self.share * abs(median))


@dataclasses.dataclass
class SkipSpikes:
    """Decides about each step, as `spam_optax.skip_spikes` does."""

    window: int = 128
    sigma: float = 6.0
    loss_share: float = 0.2
    norm_share: float = 2.0
    min_history: int = 32
    max_consecutive: int = 8
    robust: bool = True

    def __post_init__(self):
        common = self.window, self.sigma
        rest = self.min_history, self.robust
        self.losses = SpikeHistory(*common, self.loss_share, *rest)
        self.norms = SpikeHistory(*common, self.norm_share, *rest)
        self.in_a_row = 0

    def step(self, loss, norm):
        """Returns the reason for which this step is skipped; 0 if it is taken."""
        pairs = [(self.norms, norm, 2, 8)]
        if loss is not None:
            pairs.append((self.losses, loss, 1, 4))
        reason, is_finite = 0, True
        for history, value, spike, nonfinite in pairs:
            if not np.isfinite(value):
                reason, is_finite = reason + nonfinite, False
            elif value > history.limit():
                reason += spike
        if reason and is_finite and self.in_a_row >= self.max_consecutive:
            for history, *_ in pairs:
                history.values.clear()
            reason = 0
        if not reason or (is_finite and not self.robust):
            for history, value, *_ in pairs:
                history.values.append(value)
        self.in_a_row = self.in_a_row + 1 if reason else 0
        return reason
