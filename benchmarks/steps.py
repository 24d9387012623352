"""One optimizer step, compiled with its buffers donated, and its time.

A step is update and apply_updates in one jitted function. Its arguments come in one of
two orders. JAX pairs each output with the first donated argument of its shape and
dtype. The function returns (params, state), so with the parameters first every result
is paired with the buffer it is computed from. With the gradients first the state comes
before the parameters, and new parameters are to be written where an old moment is still
needed.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from benchmarks import optimizers, shapes

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
    state_bytes: int
    temporary_bytes: int
    seconds: list[float] = dataclasses.field(default_factory=list)


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


def interleave(contenders, arena, rounds, budget=20.0):
    """Contenders take turns; yields after each round, the untimed first one included.

    One that has had `budget` seconds leaves, so that none takes most of the time.
    """
    for contender in contenders:
        arena.seconds(contender)
    yield
    for _ in range(rounds):
        for contender in contenders:
            if sum(contender.seconds) < budget:
                contender.seconds.append(arena.seconds(contender))
        yield


def summary(contenders, parameters):
    """A row for each contender, with its ratio to AdamW in the same order and round."""
    baselines = {x.order: x for x in contenders if x.name == optimizers.BASELINE}
    return [_row(x, baselines[x.order], parameters) for x in contenders]


def _row(contender, baseline, parameters):
    ratios = [
        mine / base
        for mine, base in zip(contender.seconds, baseline.seconds, strict=False)
    ]
    return {
        "optimizer": contender.name,
        "order": contender.order,
        "rounds": len(contender.seconds),
        "milliseconds": 1e3 * statistics.median(contender.seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "state_bytes": contender.state_bytes / parameters,
        "temporary_bytes": contender.temporary_bytes / parameters,
        "compile_seconds": contender.compile_seconds,
    }


def quartiles(values):
    """The lower and the upper quartile; of a single value that one."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
