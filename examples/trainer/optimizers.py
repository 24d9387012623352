"""The table of optimizers, which share one learning-rate schedule."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spam_optax
from trainer.config import RunConfig
from trainer.errors import UsageError

B1 = 0.9
B2 = 0.999
LION_B2 = 0.99


class Optimizer(NamedTuple):
    """A transformation, and what the metrics need from its state."""

    name: str
    transform: optax.GradientTransformation  # inside spam_optax.track_spikes
    schedule: optax.Schedule
    momentum_decay: float  # of `mu` in its state, if there is one
    reset_interval: int | None  # steps after which the moments are zeroed; None: never
    is_guarded: bool  # whether it is inside spam_optax.skip_spikes


class Entry(NamedTuple):
    """An entry of the table of optimizers."""

    make: Callable[[RunConfig, optax.Schedule], optax.GradientTransformation]
    color: str = "#999999"  # in the figure
    line: str = "-"  # its style in the figure
    momentum_decay: float = B1  # of `mu` in the state, if there is one
    resets: bool = False  # whether its moments are reset every `reset_interval` steps
    guarded: bool = False  # whether it is inside spam_optax.skip_spikes in any case


def schedule(config: RunConfig) -> optax.Schedule:
    """Returns a linear warm-up, followed by a cosine to a tenth of the peak."""
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = max(1, config.steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(config.steps, warmup_steps + 1),
        end_value=0.1 * config.learning_rate,
    )


def decay(config: RunConfig, default: float = 0.0) -> float:
    return default if config.weight_decay is None else config.weight_decay


def adam(config, learning_rate):
    return optax.adam(learning_rate, b1=B1, b2=B2)


def adamw(config, learning_rate):
    return optax.adamw(learning_rate, b1=B1, b2=B2, weight_decay=decay(config, 0.1))


def adafactor(config, learning_rate):
    # The other defaults are those of its paper. Here the rate is not relative to a
    # tensor's scale, so that one sweep of rates suits all optimizers.
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=config.weight_decay or None,
    )


def lion(config, learning_rate):
    return optax.lion(learning_rate, B1, LION_B2, weight_decay=decay(config, 0.1))


def spam(config, learning_rate, make=spam_optax.spam, **kwargs):
    settings = {
        "b1": B1,
        "b2": B2,
        "threshold": config.threshold,
        "weight_decay": decay(config),
        "count": True,
        **config.spam_intervals,
    }
    return make(learning_rate, **(settings | kwargs))


def spam_chain(config, learning_rate):
    intervals = config.spam_intervals
    clip = spam_optax.spam_clip(
        config.threshold,
        b2=B2,
        reset_interval=intervals["reset_interval"],
        grace_steps=intervals["grace_steps"],
        count=True,
    )
    adam = spam_optax.spam_adam(
        learning_rate,
        b1=B1,
        b2=B2,
        weight_decay=decay(config),
        reset_interval=intervals["reset_interval"],
        warmup_steps=intervals["warmup_steps"],
    )
    return optax.chain(clip, adam)


def sparse_spam(config, learning_rate):
    """Keeps momentum for a fraction of the attention and feed-forward matrices."""
    return spam(
        config,
        learning_rate,
        spam_optax.sparse_spam,
        density=config.density,
        row_blocks=config.row_blocks,
        key=config.seed,
    )


def stable_spam(config, learning_rate):
    return spam_optax.stable_spam(
        learning_rate,
        b1=B1,
        b2=B2,
        reset_interval=config.spam_intervals["reset_interval"],
        weight_decay=decay(config),
    )


def stabilizer_adam(config, learning_rate):
    return optax.chain(spam_optax.gradient_stabilizer(), adam(config, learning_rate))


def clipped(make):
    """Puts a limit on the global norm of the gradient before an optimizer."""

    def make_clipped(config, learning_rate):
        clip = optax.clip_by_global_norm(config.clip_norm)
        return optax.chain(clip, make(config, learning_rate))

    return make_clipped


def adam_mini(config, learning_rate):
    return spam_optax.adam_mini(
        learning_rate,
        b1=B1,
        b2=B2,
        partition=spam_optax.adam_mini_partition(config.model.heads),
        weight_decay=decay(config),
    )


def stable_adamw(config, learning_rate):
    return spam_optax.stable_adamw(
        learning_rate, b1=B1, b2=B2, weight_decay=decay(config)
    )


def zclip_adam(config, learning_rate):
    """Warms up for 25 steps, or fewer in a short run."""
    clip = spam_optax.zclip(
        max_norm=config.clip_norm, warmup_steps=min(25, max(2, config.steps // 4))
    )
    return optax.chain(clip, adam(config, learning_rate))


def adagc_adam(config, learning_rate):
    """Warms up for 100 steps, or fewer in a short run."""
    clip = spam_optax.adagc(
        max_norm=config.clip_norm, warmup_steps=min(100, config.steps // 4)
    )
    return optax.chain(clip, adam(config, learning_rate))


def galore(config, learning_rate, rank=None):
    """Runs Adam in a subspace of the attention and feed-forward matrices.

    By default the rank is a quarter of the width, as in the paper's larger models. The
    subspace is chosen anew every 200 steps, or ten times in a short run.
    """
    projected = optax.contrib.scale_by_galore(
        rank=rank or max(1, config.model.width // 4),
        update_proj_gap=min(200, max(1, config.steps // 10)),
        scale=0.25,
        base_optimizer=optax.scale_by_adam(B1, B2),
    )
    labels = label_matrices("galore", "adam")
    scale = {"galore": for_each_layer(projected), "adam": optax.scale_by_adam(B1, B2)}
    return optax.chain(
        optax.partition(scale, labels),
        optax.add_decayed_weights(decay(config)),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(config, learning_rate):
    """Runs Muon on the attention and feed-forward matrices, Adam on the rest.

    The updates are scaled to the size of Adam's, so that one sweep of rates suits all
    optimizers.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.contrib.muon(
        learning_rate,
        weight_decay=decay(config),
        adam_b1=B1,
        adam_b2=B2,
        adam_weight_decay=decay(config),
        muon_weight_dimension_numbers=label_matrices(matrix, None),
        consistent_rms=0.2,
    )


def label_matrices(matrix: Any, other: Any) -> Callable[[optax.Params], Any]:
    """Labels the attention and feed-forward matrices, and the rest."""

    def label(params):
        is_matrix = spam_optax.matrices_only()(params)
        return jax.tree.map(lambda x: matrix if x else other, is_matrix)

    return label


def for_each_layer(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Applies `inner`, which takes matrices, to each matrix of a stack.

    Scalars in the state, such as the step, are shared by all layers rather than
    vmapped, so that a `lax.cond` on the step stays a branch.
    """

    def axes(state):
        return jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, state)

    def init(params):
        first = jax.tree.map(lambda x: x[0], params)
        of_layer = axes(jax.eval_shape(inner.init, first))
        return jax.vmap(inner.init, out_axes=of_layer)(params)

    def update(updates, state, params=None):
        del params
        return jax.vmap(
            inner.update, in_axes=(0, axes(state)), out_axes=(0, axes(state))
        )(updates, state)

    return optax.GradientTransformation(init, update)


# To add an optimizer, add an entry. The colors are Okabe and Ito's, without the yellow
# of the faults, which can be told apart with any color vision. Optimizers that share a
# color differ in the style of their lines.
TABLE = {
    "adam": Entry(adam, "#D55E00", "-"),
    "adam_clip": Entry(clipped(adam), "#0072B2", "--"),
    "adamw": Entry(adamw, "#E69F00", "-"),
    "adamw_clip": Entry(clipped(adamw), "#E69F00", "--"),
    "adafactor": Entry(adafactor, "#56B4E9", "-"),
    "lion": Entry(lion, "#56B4E9", ":", momentum_decay=LION_B2),
    "spam": Entry(spam, "#009E73", "-", resets=True),
    "clip_spam": Entry(clipped(spam), "#000000", "--", resets=True),
    "guard_clip_spam": Entry(clipped(spam), "#CC79A7", "-", resets=True, guarded=True),
    "spam_chain": Entry(spam_chain, "#CC79A7", "--", resets=True),
    "sparse_spam": Entry(sparse_spam, "#CC79A7", "-.", resets=True),
    "stable_spam": Entry(stable_spam, "#009E73", "--", resets=True),
    "stabilizer_adam": Entry(stabilizer_adam, "#009E73", ":"),
    "adam_mini": Entry(adam_mini, "#D55E00", ":"),
    "stable_adamw": Entry(stable_adamw, "#E69F00", ":"),
    "zclip_adam": Entry(zclip_adam, "#0072B2", "-."),
    "adagc_adam": Entry(adagc_adam, "#0072B2", ":"),
    "galore": Entry(galore, "#000000", "-."),
    "muon": Entry(muon, "#000000", "-"),
}


def limit_logits(
    transform: optax.GradientTransformation, config: RunConfig
) -> optax.GradientTransformation:
    """Puts QK-clip behind an optimizer, if the run has it."""
    if config.model.qk_clip is None:
        return transform
    return optax.chain(transform, spam_optax.qk_clip(config.model.qk_clip))


def make(name: str, config: RunConfig) -> Optimizer:
    """Makes the optimizer called `name`, with spike statistics in its state.

    Raises:
      UsageError: If it is not in TABLE, or a setting does not suit it.
    """
    if name not in TABLE:
        raise UsageError(f"optimizer must be one of {', '.join(TABLE)}, not {name!r}")
    entry = TABLE[name]
    learning_rate = schedule(config)
    try:
        transform = limit_logits(entry.make(config, learning_rate), config)
        is_guarded = config.guard or entry.guarded
        if is_guarded:
            transform = spam_optax.skip_spikes(transform, needs_loss=True)
    except ValueError as error:
        raise UsageError(f"optimizer {name}: {error}") from error
    return Optimizer(
        name,
        spam_optax.track_spikes(transform),
        learning_rate,
        entry.momentum_decay,
        config.spam_intervals["reset_interval"] if entry.resets else None,
        is_guarded,
    )
