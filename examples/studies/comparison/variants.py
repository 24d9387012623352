"""Variants of the trainer's optimizers, as rows of the comparison's tables."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import spam_optax
from spam_optax import functional
from studies import lora
from trainer import optimizers
from trainer.config import RunConfig
from trainer.errors import UsageError
from trainer.optimizers import Entry


def spam_with(**changes) -> Entry:
    """Returns SPAM with other arguments.

    The interval between resets is a share of the run, and the warm-up after a reset is
    a share of the interval. If they are not given, the warm-up and the steps without
    clipping change with the interval.
    """

    def make(config, learning_rate):
        given = dict(changes)
        if given.get("reset_interval"):
            interval = round(given.pop("reset_interval") * config.steps)
            config = dataclasses.replace(config, reset_interval=interval)
        if "warmup_steps" in given:
            interval = config.spam_intervals["reset_interval"]
            given["warmup_steps"] = round(given["warmup_steps"] * interval)
        return optimizers.spam(config, learning_rate, **given)

    return Entry(make, resets=changes.get("reset_interval", True) is not None)


def chain_before(first: Callable[[], optax.GradientTransformation], name: str) -> Entry:
    """Returns the trainer's optimizer `name` with another transformation before it."""
    row = optimizers.TABLE[name]

    def make(config, learning_rate):
        return optax.chain(first(), row.make(config, learning_rate))

    return row._replace(make=make)


def guarded(name: str, **changes) -> Entry:
    """Returns the trainer's optimizer `name` inside `skip_spikes`."""
    row = optimizers.TABLE[name]

    def make(config, learning_rate):
        return spam_optax.skip_spikes(row.make(config, learning_rate), **changes)

    return row._replace(make=make)


def update_clipped(scale: Callable[[RunConfig], Any], resets: bool = False) -> Entry:
    """Returns an optimizer whose updates are clipped before the learning rate."""

    def make(config, learning_rate):
        return optax.chain(
            scale(config),
            spam_optax.clip_update_norm(),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Entry(make, resets=resets)


def with_history(threshold: float) -> Entry:
    """Returns SPAM with a clip that a reset does not interrupt.

    The clip keeps a second moment of its own.
    """

    def make(config, learning_rate):
        clip = spam_optax.spam_clip(threshold, b2=optimizers.B2, reset_interval=None)
        intervals = config.spam_intervals
        reset = {k: intervals[k] for k in ("reset_interval", "warmup_steps")}
        return optax.chain(clip, spam_optax.spam_adam(learning_rate, **reset))

    return Entry(make, resets=True)


def adam_with(name: str = "adam", **changes) -> Entry:
    """Returns Adam with other arguments; `name` is "adam" or "adam_clip"."""

    def make(config, learning_rate):
        arguments = {"b1": optimizers.B1, "b2": optimizers.B2} | changes
        adam = optax.adam(learning_rate, **arguments)
        if name == "adam":
            return adam
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)

    return Entry(make)


def with_spam_steps(name: str) -> Entry:
    """Returns Adam whose steps are as long as SPAM's: a control.

    A reset shortens SPAM's moments, because its bias correction goes on counting from
    the first step. Where the gradient is constant, that changes Adam's step by the
    factor :math:`(1 - b_1^k) / \\sqrt{1 - b_2^k}`, over the same of :math:`t`, in step
    :math:`t` with :math:`k` gradients in the moments. The ramp after a reset is another
    factor. The control has both factors and no reset.
    """
    adam = adam_with(name)

    def make(config, learning_rate):
        spam = config.spam_intervals
        interval, ramp_steps = spam["reset_interval"], spam["warmup_steps"]

        def as_long(count):
            step = count + 1
            position = functional.reset_position(step, interval)
            held = jnp.where(position < step, position + 1, step)

            def share(decay):
                whole = functional.bias_correction(decay, step)
                return functional.bias_correction(decay, held) / whole

            factor = share(optimizers.B1) / jnp.sqrt(share(optimizers.B2))
            ramp = functional.reset_ramp(step, interval, ramp_steps)
            return learning_rate(count) * ramp * factor

        return adam.make(config, as_long)

    return Entry(make, resets=True)


def sparse(density: float) -> Entry:
    """Returns sparse momentum for another fraction of each matrix."""

    def make(config, learning_rate):
        config = dataclasses.replace(config, density=density)
        return optimizers.sparse_spam(config, learning_rate)

    return Entry(make, resets=True)


def galore(rank: int) -> Entry:
    """Returns GaLore with another rank."""

    def make(config, learning_rate):
        return optimizers.galore(config, learning_rate, rank)

    return Entry(make)


def lora_adam(rank: int) -> Entry:
    """Returns Adam of low-rank adapters; all other parameters are frozen."""

    def make(config, learning_rate):
        return lora.lora(optimizers.adam(config, learning_rate), rank, config.seed)

    return Entry(make)


NEVER_CLIPS = 1e30  # a threshold
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)

SWEPT = {
    **{f"spam, threshold {x:g}": spam_with(threshold=x) for x in (50.0, 500.0)},
    **{
        f"spam, interval {x:g} of the run": spam_with(reset_interval=x)
        for x in (0.13, 0.25, 0.67)
    },
    **{
        f"spam, warm-up {x:g} of the interval": spam_with(warmup_steps=x)
        for x in (0, 0.9)
    },
}
GUARDED = {
    f"guard, {x}": guarded(x) for x in ("adam", "adam_clip", "spam", "clip_spam")
}
# As published: mean and standard deviation of all finite values, with no share.
PUBLISHED = {
    f"published guard, {x}": guarded(x, robust=False, loss_share=0, norm_share=0)
    for x in ("adam_clip", "clip_spam")
}
HISTORIES = {
    f"spam, kept history, threshold {x:g}": with_history(x)
    for x in (50.0, 500.0, 5000.0)
}
UPDATES = {
    "update clip, adam": update_clipped(
        lambda config: optax.scale_by_adam(optimizers.B1, optimizers.B2)
    ),
    "update clip, spam": update_clipped(
        lambda config: spam_optax.scale_by_spam(
            threshold=config.threshold, **config.spam_intervals
        ),
        resets=True,
    ),
}
CONTROLS = {
    "adam, b2 0.95": adam_with(b2=0.95),
    "adam, b2 0.99": adam_with(b2=0.99),
    "adam, SPAM's steps": with_spam_steps("adam"),
    "adam_clip, b2 0.95": adam_with("adam_clip", b2=0.95),
    "adam_clip, b2 0.99": adam_with("adam_clip", b2=0.99),
    "adam_clip, SPAM's steps": with_spam_steps("adam_clip"),
}
MOMENTS = {
    "adam, b1 0.95": adam_with(b1=0.95),
    "adam, b1 0.98": adam_with(b1=0.98),
    "adam, b2 0.9": adam_with(b2=0.9),
    "adam, eps 1e-15": adam_with(eps=1e-15),
    "adam, eps 1e-4": adam_with(eps=1e-4),
}
RANKED = {
    **{f"galore, rank {x}": galore(x) for x in RANKS},
    **{f"lora, rank {x}": lora_adam(x) for x in RANKS},
}
VARIANTS = {
    **CONTROLS,
    **MOMENTS,
    **GUARDED,
    **PUBLISHED,
    **UPDATES,
    **HISTORIES,
    "spam: neither": spam_with(threshold=NEVER_CLIPS, reset_interval=None),
    "spam: reset": spam_with(threshold=NEVER_CLIPS),
    "spam: clip": spam_with(reset_interval=None),
    "spam: reset, restarted correction": spam_with(
        threshold=NEVER_CLIPS, restart_bias_correction=True
    ),
    "spam, restarted correction": spam_with(restart_bias_correction=True),
    "spam, clip unseen": spam_with(clip_unseen=True),
    **SWEPT,
    **{
        f"sparse_spam, density {x:g}": sparse(x)
        for x in (0.5, 0.25, 0.05, 0.01, 0.0025)
    },
    **RANKED,
    "adaclip, adam": chain_before(spam_optax.adaclip, "adam"),
    "adaclip, spam": chain_before(spam_optax.adaclip, "spam"),
    "stabilizer, spam": chain_before(spam_optax.gradient_stabilizer, "spam"),
}


def row_of(label: str) -> Entry:
    return VARIANTS.get(label) or optimizers.TABLE[label]


def make(
    label: str, config: RunConfig, learning_rate: Any
) -> optax.GradientTransformation:
    """Returns the transformation for a peak learning rate, which may be traced."""
    unit = optimizers.schedule(dataclasses.replace(config, learning_rate=1.0))
    try:
        transform = row_of(label).make(config, lambda step: learning_rate * unit(step))
        return optimizers.limit_logits(transform, config)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error
