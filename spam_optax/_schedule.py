"""The clock of momentum resets, the ramp after a reset, and bias correction.

The arguments are those of the functions of these names in `functional`, which check
them and explain them. Optimizers check them once, when they are made.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def reset_position(step: jax.Array, interval: jax.typing.ArrayLike | None) -> jax.Array:
    if interval is None:
        return step
    # Steps are positive, and `%` adds six operations for negative numbers.
    return jnp.fmod(step, jnp.asarray(interval, jnp.int32))


def reset_ramp(
    step: jax.Array,
    interval: jax.typing.ArrayLike | None,
    warmup_steps: jax.typing.ArrayLike,
) -> jax.Array:
    position = reset_position(step, interval)
    ramping = (position < warmup_steps) & (position < step)
    length = jnp.asarray(warmup_steps).astype(float) + 1.0
    angle = jnp.pi * position.astype(float) / length
    ramp = 1 - 0.99 * (1 + jnp.cos(angle)) / 2
    return jnp.where(ramping, ramp, 1.0)


def bias_correction(decay: Any, step: jax.Array) -> jax.Array:
    log_decay: jax.typing.ArrayLike
    if isinstance(decay, (jax.Array, np.ndarray)):
        log_decay = jnp.log(jnp.asarray(decay).astype(float))
    else:
        # Computed in float64, because rounding 0.999 to float32 first loses digits.
        log_decay = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(step.astype(float) * log_decay)
