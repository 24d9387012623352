"""One optimizer step, compiled with its buffers donated, and its time.

A step is update and apply_updates in one jitted function. Its arguments come in one of
two orders. JAX pairs each output with the first donated argument of its shape and
dtype. The function returns (params, state), so with the parameters first every result
is paired with the buffer it is computed from. With the gradients first the state comes
before the parameters, and new parameters are to be written where an old moment is still
needed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import optimizers, shapes, turns

PARAMS_FIRST = "params, state, gradients"
GRADIENTS_FIRST = "gradients, state, params"
ORDERS = (PARAMS_FIRST, GRADIENTS_FIRST)


def jit_step(tx, order=PARAMS_FIRST):
    """The step as a jitted function of its arguments in this order."""

    def params_first(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def gradients_first(gradients, state, params):
        return params_first(params, state, gradients)

    if order == PARAMS_FIRST:
        return jax.jit(params_first, donate_argnums=(0, 1))
    return jax.jit(gradients_first, donate_argnums=(1, 2))


@dataclasses.dataclass
class Contender:
    """An optimizer's compiled step, in one order of its arguments."""

    name: str
    order: str
    run: Callable
    compile_seconds: float
    moved_bytes: float  # read and written, as the compiler counts them
    state_bytes: int
    temporary_bytes: int


def compile_contender(name, make, params, order=PARAMS_FIRST):
    """Compiles the step of an optimizer for parameters of these shapes."""
    tx = make()
    state = jax.eval_shape(tx.init, params)
    arguments = (params, state, params)
    start = time.perf_counter()
    run = jit_step(tx, order).lower(*arguments).compile()
    return Contender(
        name,
        order,
        run,
        compile_seconds=time.perf_counter() - start,
        moved_bytes=run.cost_analysis()["bytes accessed"],
        state_bytes=shapes.nbytes(state),
        temporary_bytes=run.memory_analysis().temp_size_in_bytes,
    )


class Arena:
    """Parameters and gradients that contenders share, and a state for each optimizer.

    So many optimizers fit into memory side by side.
    """

    def __init__(self, params, makers):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(0), 2 * len(leaves))
        values = [
            jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves * 2, strict=True)
        ]
        self._params = jax.tree.unflatten(tree, values[: len(leaves)])
        self._gradients = jax.tree.unflatten(tree, values[len(leaves) :])
        self._states: dict[str, Any] = {
            name: make().init(self._params) for name, make in makers.items()
        }

    def seconds(self, contender):
        """Takes one step in place; how long it took."""
        carry = self._params, self._states[contender.name]
        if contender.order == PARAMS_FIRST:
            arguments = (*carry, self._gradients)
        else:
            arguments = (self._gradients, carry[1], carry[0])
        start = time.perf_counter()
        carry = jax.block_until_ready(contender.run(*arguments))
        elapsed = time.perf_counter() - start
        self._params, self._states[contender.name] = carry
        return elapsed


def compete(contenders, params, makers, rounds, track):
    """Contenders take turns; a row for each, with its ratio to AdamW in that order."""
    arena = Arena(params, makers)
    timed = {(x.name, x.order): functools.partial(arena.seconds, x) for x in contenders}
    *_, seconds = track(turns.interleave(timed, rounds))
    parameters = shapes.size(params)
    return [
        {
            "optimizer": x.name,
            "order": x.order,
            **turns.compare(
                seconds[x.name, x.order], seconds[optimizers.BASELINE, x.order]
            ),
            "state_bytes": x.state_bytes / parameters,
            "temporary_bytes": x.temporary_bytes / parameters,
            "compile_seconds": x.compile_seconds,
        }
        for x in contenders
    ]
