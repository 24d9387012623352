"""Numbers that describe a training step: norms, clipped coordinates, FLOPs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import spam_optax
from trainer import hardware
from trainer.model import ModelConfig
from trainer.optimizers import Optimizer

Metrics = dict[str, Any]


def of_step(
    step: jax.Array,
    gradient: optax.Updates,
    params: optax.Params,
    old_state: optax.OptState,
    state: optax.OptState,
    optimizer: Optimizer,
) -> Metrics:
    """Returns the metrics of a step, global ones and those of every tensor.

    Args:
      step: Number of the step, from 1.
      gradient: The gradient that the optimizer was given.
      params: The parameters after the step.
      old_state: The optimizer's state before the step.
      state: The optimizer's state after the step.
      optimizer: The optimizer.

    The lists of the tensors are in the order of `spam_optax.tensor_names`.
    """
    skip_reason = optax.tree.get(state, "skip_reason", jnp.int32(0))
    skipped_steps = optax.tree.get(state, "skipped_total", jnp.int32(0))
    is_taken = skip_reason == 0
    statistics = {
        name: optax.tree.get(state, f"tensor_{name}")
        for name in ("grad_norm", "update_norm", "spike_score", "spike_steps")
    }
    nonfinite = optax.tree.get(state, "tensor_nonfinite") > 0
    # The optimizer inside a guard counts only the steps that were taken.
    taken_step = jnp.maximum(step - skipped_steps, 1)
    clipped = gradient_behind_mu(taken_step, gradient, old_state, state, optimizer)
    norms = {
        "grad_norm": jnp.where(nonfinite, jnp.nan, statistics["grad_norm"]),
        "clipped_grad_norm": jnp.where(is_taken, tensor_norms(clipped), 0),
        "update_norm": statistics["update_norm"],
        "param_norm": tensor_norms(params),
    }
    totals = {name: jnp.sqrt(jnp.sum(norm**2)) for name, norm in norms.items()}
    scores = {name: statistics[name] for name in ("spike_score", "spike_steps")}
    return {
        "learning_rate": optimizer.schedule(taken_step - 1),
        "spikes_clipped": jnp.where(is_taken, clipped_in_step(state), 0),
        **attention_of(state),
        "skipped": skip_reason,
        "skipped_steps": skipped_steps,
        **totals,
        "tensors": {**norms, **scores},
    }


def attention_of(state: optax.OptState) -> Metrics:
    """Returns QK-clip's largest attention logit and number of clipped heads."""
    names = {
        "max_attention_logit": "max_attention_logit",
        "heads_clipped": "qk_clip_clipped_count",
    }
    found = {name: optax.tree.get(state, field) for name, field in names.items()}
    return {name: x for name, x in found.items() if x is not None}


def clipped_in_step(opt_state: optax.OptState) -> jax.typing.ArrayLike:
    """Returns how many coordinates SPAM clipped in the last step; 0 without SPAM."""
    return _clipped(opt_state, "count")


def clipped_so_far(opt_state: optax.OptState) -> int:
    """Returns how many coordinates SPAM clipped in all steps; 0 without SPAM."""
    return int(_clipped(opt_state, "total"))


def _clipped(opt_state: optax.OptState, which: str) -> jax.typing.ArrayLike:
    names = f"clipped_{which}", f"spam_clip_clipped_{which}"
    counters = [optax.tree.get(opt_state, name) for name in names]
    return next((counter for counter in counters if counter is not None), 0)


def reason_text(code: int) -> str | None:
    """Describes why a step was skipped; None for a step that was taken."""
    names = [reason.name for reason in spam_optax.SkipReason if code & reason]
    return ", ".join(names).lower().replace("_", " ") or None


def tensor_norms(tree: Any) -> jax.Array:
    """Returns the norm of every tensor."""
    return jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(tree)])


def gradient_behind_mu(
    step: jax.Array,
    gradient: optax.Updates,
    old_state: optax.OptState,
    state: optax.OptState,
    optimizer: Optimizer,
) -> optax.Updates:
    """Returns the gradient that entered the first moment, after all clipping.

    It is computed from ``mu_new = b1 * mu_old + (1 - b1) * g``, where ``mu_old`` is 0
    in a reset step. This holds for every optimizer with a first moment, wherever it
    clips, and repeats none of the library's clipping rules. It costs a few digits: with
    plain Adam the norm agrees with that of the raw gradient to about 1e-4. For a tensor
    with sparse momentum it is the part of the gradient that has momentum.

    The function returns `gradient` if the optimizer has no `mu`, or several, as muon
    and galore do: each of theirs belongs to a part of the parameters.
    """
    old_mu, mu = (
        [moment for _, moment in optax.tree.get_all_with_path(opt_state, "mu")]
        for opt_state in (old_state, state)
    )
    if len(mu) != 1:
        return gradient
    b1 = optimizer.momentum_decay
    position = spam_optax.functional.reset_position(step, optimizer.reset_interval)
    decay = jnp.where(position == 0, 0.0, b1)
    return jax.tree.map(
        lambda old, new: (new - decay * old) / (1.0 - b1),
        *old_mu,
        *mu,
    )


def flops_utilization(
    model: ModelConfig, tokens: int, mesh: Mesh
) -> Callable[[float], float | None]:
    """Makes a function from tokens per second to the share of the devices' peak.

    The function returns None if the peak of the devices is not known. `tokens` is the
    length of a sequence.
    """
    device = hardware.find(mesh.devices.flat[0].device_kind)
    flops_per_token = model.flops_per_token(tokens)
    if device is None:
        return lambda tokens_per_second: None
    peak = device.flops * mesh.size
    return lambda tokens_per_second: tokens_per_second * flops_per_token / peak
