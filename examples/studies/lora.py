"""LoRA (Hu et al., arXiv 2106.09685) as a gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spam_optax


class LoraState(NamedTuple):
    adapters: dict[str, dict[str, jax.Array]]  # by the name of their matrix
    inner: optax.OptState  # of the adapters


def lora(
    inner: optax.GradientTransformation, rank: int, key: Any
) -> optax.GradientTransformation:
    """Trains low-rank adapters of the attention and feed-forward matrices, alone.

    A matrix becomes its first value plus ``down @ up``. `up` begins at zero. The
    adapters are in the state, and the updates are the changes of their products. So the
    model needs no other code, and its parameters are always merged. The state has all
    memory that LoRA adds to that of a frozen model.

    Args:
      inner: The optimizer of the adapters.
      rank: The inner width of the adapters.
      key: The seed of `down`, whose deviation is 1 over the square root of its inputs.
    """

    def init(params):
        adapters = {}
        names, leaves = spam_optax.tensor_names(params), jax.tree.leaves(params)
        is_matrix = jax.tree.leaves(spam_optax.matrices_only()(params))
        for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
            if is_matrix[number]:
                *stack, inputs, outputs = leaf.shape
                own_key = jax.random.fold_in(jax.random.key(key), number)
                down = jax.random.normal(own_key, (*stack, inputs, rank), leaf.dtype)
                up = jnp.zeros((*stack, rank, outputs), leaf.dtype)
                adapters[name] = {"down": down / inputs**0.5, "up": up}
        return LoraState(adapters, inner.init(adapters))

    def update(updates, state, params=None):
        del params
        names = spam_optax.tensor_names(updates)
        leaves, structure = jax.tree.flatten(updates)
        gradients = dict(zip(names, leaves, strict=True))
        before, pull_back = jax.vjp(products, state.adapters)
        (gradient,) = pull_back({name: gradients[name] for name in before})
        steps, inner_state = inner.update(gradient, state.inner, state.adapters)
        adapters = optax.apply_updates(state.adapters, steps)
        after = products(adapters)
        changes = [
            after[name] - before[name] if name in after else jnp.zeros_like(leaf)
            for name, leaf in gradients.items()
        ]
        return structure.unflatten(changes), LoraState(adapters, inner_state)

    return optax.GradientTransformation(init, update)


def products(adapters: dict[str, dict[str, jax.Array]]) -> dict[str, jax.Array]:
    return {name: pair["down"] @ pair["up"] for name, pair in adapters.items()}
