"""A slow Stable-SPAM in NumPy, in the paper's notation.

It follows Huang et al., `Stable-SPAM <https://arxiv.org/abs/2502.17055v2>`_, 2025, and
the numbers of the authors' implementation in `golden/`; `test_stable_spam.py` checks it
against those before anything else is checked against it. One object is one tensor.
"""

import dataclasses

import numpy as np


def screened(g):
    """Returns the gradient without non-finite coordinates, and whether any is left."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(np.square(np.asarray(g, np.float32)))
    g = np.where(bad, 0.0, np.asarray(g, np.float64))
    return g, not bad.any() or bool(np.any(g != 0)), int(bad.sum())


@dataclasses.dataclass
class AdaClip:
    gamma3: float = 0.999

    def __post_init__(self):
        self.k, self.M, self.limited = 0, 0.0, 0

    def step(self, g):
        g, says_something, _ = screened(g)
        gmax = np.max(np.abs(g), initial=0.0)
        if says_something:
            self.k += 1
            self.M = self.gamma3 * self.M + (1 - self.gamma3) * gmax
        if self.k == 0:
            return g
        M_hat = self.M / (1 - self.gamma3**self.k)
        above = np.abs(g) > M_hat
        self.limited = int(above.sum())
        return np.where(above, g / (gmax or 1.0) * M_hat, g)


@dataclasses.dataclass
class AdaGN:
    gamma1: float = 0.7
    gamma2: float = 0.9
    eps: float = 1e-8

    def __post_init__(self):
        self.k, self.n1, self.n2 = 0, 0.0, 0.0

    def step(self, g, scale=1.0):
        g, says_something, _ = screened(g)
        n = np.linalg.norm(g)
        gamma1 = self.gamma1 * scale
        if says_something:
            self.k += 1
            self.n1 = gamma1 * self.n1 + (1 - gamma1) * n
            self.n2 = self.gamma2 * self.n2 + (1 - self.gamma2) * n**2
        if n == 0 or self.k == 0:
            return g
        n1_hat = self.n1 / (1 - gamma1**self.k)
        n2_hat = self.n2 / (1 - self.gamma2**self.k)
        return g / n * (n1_hat / (np.sqrt(n2_hat) + self.eps))


@dataclasses.dataclass
class GradientStabilizer:
    gamma1: float = 0.6
    gamma2: float = 0.999

    def __post_init__(self):
        self.m = self.v = 0.0

    def step(self, g):
        g, says_something, _ = screened(g)
        R = np.linalg.norm(g)
        if says_something:
            self.m = self.gamma1 * self.m + (1 - self.gamma1) * R
            self.v = self.gamma2 * self.v + (1 - self.gamma2) * R**2
        if R == 0 or self.v == 0:
            return g
        return g / R * (self.m / np.sqrt(self.v))


@dataclasses.dataclass
class StableSpam:
    """Stable-SPAM on one tensor, changed by :meth:`step`."""

    p: np.ndarray
    eta: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    interval: int | None = 1000
    total: int | None = None
    decay: float = 0.0
    reference_resets: bool = False

    def __post_init__(self):
        self.p = np.asarray(self.p, np.float64)
        self.m = np.zeros_like(self.p)
        self.v = np.zeros_like(self.p)
        self.t = self.k = 0
        self.clip = AdaClip(self.gamma3)
        self.norm = AdaGN(self.gamma1, self.gamma2, self.eps)

    def step(self, g):
        g, says_something, _ = screened(g)
        self.t += 1
        scale = 1.0
        if self.total is not None:
            t = min(self.t, self.total)
            scale = 0.5 + 0.5 * (1 + np.cos(np.pi * t / (self.total + 1))) / 2
        if says_something:
            g = self.norm.step(self.clip.step(g), scale)

        is_reset = self.interval is not None and self.t % self.interval == 0
        if is_reset and not self.reference_resets:
            self.k, self.m, self.v = 0, 0 * self.m, 0 * self.v
        self.k += 1
        if is_reset and self.reference_resets:
            self.k = self.clip.k = self.norm.k = 1

        beta1 = self.beta1 * scale
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m_hat = self.m / (1 - beta1**self.k)
        root = np.sqrt(self.v / (1 - self.beta2**self.k)) + self.eps
        self.p = self.p - self.eta * (m_hat / root + self.decay * self.p)
        if is_reset and self.reference_resets:
            self.m, self.v = 0 * self.m, 0 * self.v
        return self.p
