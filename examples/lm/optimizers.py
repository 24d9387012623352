"""The optimizers under comparison; all share one learning-rate schedule."""

from typing import NamedTuple

import optax

import spam_optax
from lm.config import RunConfig

B1 = 0.9
B2 = 0.999
CLIP_NORM = 1.0


class Optimizer(NamedTuple):
    """A transformation, and what a trainer must know to read its state."""

    name: str
    transform: optax.GradientTransformation
    schedule: optax.Schedule
    reset_interval: int | None  # steps after which the moments are zeroed; None: never


def schedule(config: RunConfig) -> optax.Schedule:
    """Linear warm-up over a tenth of the run, then a cosine to a tenth of the peak."""
    warmup_steps = max(1, config.steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(config.steps, warmup_steps + 1),
        end_value=0.1 * config.learning_rate,
    )


def make(name: str, config: RunConfig) -> Optimizer:
    """The optimizer called `name`, one of `config.OPTIMIZERS`."""
    learning_rate = schedule(config)
    intervals = config.spam_intervals
    clip = optax.clip_by_global_norm(CLIP_NORM)
    adam = optax.adam(learning_rate, b1=B1, b2=B2)
    spam = spam_optax.spam(
        learning_rate, b1=B1, b2=B2, threshold=config.threshold, **intervals
    )
    transforms = {
        "adam": adam,
        "adam_clip": optax.chain(clip, adam),
        "spam": spam,
        "clip_spam": optax.chain(clip, spam),
    }
    resets = intervals["reset_interval"] if "spam" in name else None
    return Optimizer(name, transforms[name], learning_rate, resets)
