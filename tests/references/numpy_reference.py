"""A slow SPAM in NumPy, in the paper's notation. The JAX code must agree with it.

One coordinate-wise rule a line, no trees, no tricks. It follows Huang et al., `SPAM
<https://arxiv.org/abs/2501.06842>`_, 2025, and the numbers of the authors'
implementation in `golden/`; `test_spam.py` checks it against those before anything
else is checked against it.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Spam:
    """SPAM on one array, changed in place by :meth:`step`.

    Attributes:
      p: Parameters.
      dtype: Dtype of the arithmetic.
      moment_dtypes: Dtypes the moments m and v are rounded to after every step.
    """

    p: np.ndarray
    eta: float = 1e-3  # learning rate
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    theta: float = 5000.0  # spike threshold
    interval: int | None = 500  # D, steps between resets
    warmup: int = 150  # N, length of the ramp
    grace: int = 20  # G, steps without clipping
    decay: float = 0.0  # weight decay
    clip_unseen: bool = False
    restart: bool = False  # whether a reset restarts the bias correction
    dtype: type = np.float64
    moment_dtypes: tuple = (np.float64, np.float64)

    def __post_init__(self):
        self.p = np.asarray(self.p, self.dtype)
        self.m = np.zeros(self.p.shape, self.moment_dtypes[0])
        self.v = np.zeros(self.p.shape, self.moment_dtypes[1])
        self.t = 0
        self.spikes = 0
        self.nonfinite = 0

    def clip(self, g, v, c, on):
        """Limits spikes; returns the clipped gradient."""
        active = c >= self.grace
        # Squares overflow where float32's do: that is what the library works in.
        with np.errstate(over="ignore"):
            square = np.square(g.astype(np.float32))
        bad = ~np.isfinite(square)
        seen = (v > 0) | self.clip_unseen
        spike = on & ~bad & (g * g > self.theta * v) & seen & active
        limit = np.sqrt(self.theta * v)
        self.spikes = int(spike.sum())
        self.nonfinite = int(bad.sum())
        g = np.where(spike, np.sign(g) * limit, g)
        replacement = np.where(np.isnan(g) | (not active), 0.0, np.sign(g) * limit)
        return np.where(bad, replacement, g)

    def step(self, g, on=True):
        """One step with gradient `g`, which may hold spikes, NaN and infinities.

        Sparse momentum: `on` says which entries have momentum, the same ones from one
        reset to the next. The others do not move, and their moments are 0.
        """
        g = np.asarray(g, self.dtype)
        self.t += 1
        t, D, N = self.t, self.interval, self.warmup
        c = t % D if D else t
        was_reset = D is not None and t >= D
        m, v = self.m.astype(self.dtype), self.v.astype(self.dtype)
        if c == 0:
            m, v = np.zeros_like(m), np.zeros_like(v)

        with np.errstate(invalid="ignore", over="ignore"):
            g = self.clip(g, v, c, on)
        m = np.where(on, self.beta1 * m + (1 - self.beta1) * g, 0)
        v = np.where(on, self.beta2 * v + (1 - self.beta2) * g * g, 0)

        warm = 1.0
        if was_reset and c < N:
            warm = 1 - 0.99 * (1 + np.cos(np.pi * c / (N + 1))) / 2
        k = c + 1 if self.restart and was_reset else t
        correction = np.sqrt(1 - self.beta2**k) / (1 - self.beta1**k)
        update = warm * correction * m / (np.sqrt(v) + self.eps)
        self.p = np.where(
            on, self.p - self.eta * (update + self.decay * self.p), self.p
        )

        self.m = m.astype(self.moment_dtypes[0])
        self.v = v.astype(self.moment_dtypes[1])
        return self.p
