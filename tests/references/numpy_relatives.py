"""Slow ZClip, AdaGC, StableAdamW and Adam-mini in NumPy, in the papers' notation.

Each is told here from its paper's formulas: Kumar et al., `ZClip
<https://arxiv.org/abs/2504.02507>`_, Wang et al., `AdaGC
<https://arxiv.org/abs/2502.11034>`_, Wortsman et al., `StableAdamW
<https://arxiv.org/abs/2304.13013>`_ and Zhang et al., `Adam-mini
<https://arxiv.org/abs/2406.16793>`_. Gradients are lists of arrays; a coordinate that
is not finite, or whose square overflows float32, is 0.
"""

import dataclasses

import numpy as np


def finite(g):
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.square(np.asarray(g, np.float32))
    return np.where(np.isfinite(square), g, 0).astype(np.float64)


def norm(arrays):
    return np.sqrt(sum(np.sum(np.abs(a) ** 2) for a in arrays))


@dataclasses.dataclass
class ZClip:
    """Clips all tensors by one factor; returns them and the factor."""

    z_thres: float = 2.5
    alpha: float = 0.97
    eps: float = 1e-6
    max_norm: float | None = 1.0
    warmup: int = 25

    def __post_init__(self):
        self.buffer = []
        self.mu = self.var = 0.0

    def step(self, gradients):
        gradients = [finite(g) for g in gradients]
        g = norm(gradients)
        if g == 0:
            return gradients, 1.0
        if len(self.buffer) < self.warmup:
            g_star = g
            self.buffer.append(g)
            self.mu, self.var = np.mean(self.buffer), np.var(self.buffer)
        else:
            sigma = np.sqrt(self.var)
            z = (g - self.mu) / (sigma + self.eps)
            g_star = g
            if z > self.z_thres:
                g_star = self.mu + self.z_thres**2 / z * sigma
            self.mu = self.alpha * self.mu + (1 - self.alpha) * g_star
            self.var = (
                self.alpha * self.var + (1 - self.alpha) * (g_star - self.mu) ** 2
            )
        out = g_star if self.max_norm is None else min(g_star, self.max_norm)
        return [a * (out / g) for a in gradients], out / g


@dataclasses.dataclass
class AdaGC:
    """Clips each tensor by a factor of its own; returns them and the factors."""

    tensors: int
    lambda_rel: float = 1.04
    beta: float = 0.99
    lambda_abs: float = 1.0
    t_start: int = 100

    def __post_init__(self):
        self.gamma = [None] * self.tensors
        self.t = [0] * self.tensors

    def step(self, gradients):
        gradients = [finite(g) for g in gradients]
        total = norm(gradients)
        factors = []
        for i, g in enumerate(gradients):
            n, gamma = norm([g]), self.gamma[i]
            if self.t[i] < self.t_start:
                h = min(self.lambda_abs / total, 1.0) if total > 0 else 1.0
                new = h * n if gamma is None else min(gamma, h * n)
            elif gamma is None:
                h, new = 1.0, n
            else:
                h = min(self.lambda_rel * gamma / n, 1.0) if n > 0 else 1.0
                new = self.beta * gamma + (1 - self.beta) * h * n
            if n > 0:
                self.t[i] += 1
                self.gamma[i] = new
            factors.append(h)
        return [h * g for h, g in zip(factors, gradients, strict=True)], factors


@dataclasses.dataclass
class StableAdamW:
    """StableAdamW on one array `p`, with the changing decays of the paper."""

    p: np.ndarray
    eta: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-6
    decay: float = 0.0

    def __post_init__(self):
        self.p = np.asarray(self.p, np.complex128 if np.iscomplexobj(self.p) else float)
        self.m, self.v, self.t = np.zeros_like(self.p), np.zeros(self.p.shape), 0

    def step(self, g):
        self.t += 1
        t = self.t
        b1 = self.beta1 * (1 - self.beta1 ** (t - 1)) / (1 - self.beta1**t)
        b2 = self.beta2 * (1 - self.beta2 ** (t - 1)) / (1 - self.beta2**t)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * np.abs(g) ** 2
        self.rms = np.sqrt(np.mean(np.abs(g) ** 2 / np.maximum(self.v, self.eps**2)))
        update = self.m / (np.sqrt(self.v) + self.eps) / max(1, self.rms)
        self.p = self.p - self.eta * (update + self.decay * self.p)
        return self.p


@dataclasses.dataclass
class AdamMini:
    """Adam-mini on one array `p`. `blocks` numbers the block of each coordinate."""

    p: np.ndarray
    blocks: np.ndarray
    eta: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0

    def __post_init__(self):
        self.p = np.asarray(self.p, float)
        self.m, self.v, self.t = np.zeros_like(self.p), {}, 0

    def step(self, g):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        m_hat = self.m / (1 - self.beta1**self.t)
        update = np.zeros_like(self.p)
        for b in np.unique(self.blocks):
            here = self.blocks == b
            v = self.beta2 * self.v.get(b, 0) + (1 - self.beta2) * np.mean(g[here] ** 2)
            v_hat = v / (1 - self.beta2**self.t)
            update[here] = m_hat[here] / (np.sqrt(v_hat) + self.eps)
            self.v[b] = v
        self.p = self.p - self.eta * (update + self.decay * self.p)
        return self.p
