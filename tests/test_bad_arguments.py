"""Bad arguments: what is wrong, what was passed and what is allowed, in one line.

A table of every checked argument of every public function. A new function is an entry
in `FUNCTIONS`, a new sort of argument one in `SORTS`, anything else a `Case`.
"""

import functools
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spam_optax
from spam_optax import functional, testing

WRONG_TYPES = tuple(
    (value, TypeError)
    for value in ("high", True, [1.0], Fraction(1, 2), np.array("x"), float)
)
NONE = ((None, TypeError),)
ODD = ((math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError))


def outside(*values):
    return tuple((value, ValueError) for value in values)


class Sort(NamedTuple):
    """What an argument may be, said as the message does, and values that it is not."""

    allowed: str
    bad: tuple[tuple[Any, type[Exception]], ...]


SORTS = {
    "positive": Sort(
        "a finite number > 0",
        outside(0, 0.0, -1, -1e-9, 10**400, 1e39, 1e-40) + ODD + WRONG_TYPES + NONE,
    ),
    "not negative": Sort(
        "a finite number >= 0", outside(-1, -1e-9) + ODD + WRONG_TYPES + NONE
    ),
    "above one": Sort(
        "a finite number > 1", outside(1, 0.5, -3.0) + ODD + WRONG_TYPES + NONE
    ),
    "finite": Sort("a finite number", ODD + WRONG_TYPES + NONE),
    "decay": Sort(
        "a finite number >= 0 and < 1",
        outside(1, 1.0, -0.1, 1.5, np.float32(1)) + ODD + WRONG_TYPES + NONE,
    ),
    "share": Sort(
        "a finite number >= 0 and <= 1", outside(-0.1, 1.1) + ODD + WRONG_TYPES + NONE
    ),
    "interval": Sort(
        "a whole number >= 1 and <= 2147483647",
        outside(0, -1, 2.5, np.int32(0), 10**10) + ODD + WRONG_TYPES,
    ),
    "window": Sort(
        "a whole number >= 2", outside(1, 0, 2.5) + ODD + WRONG_TYPES + NONE
    ),
    "count": Sort("a whole number >= 0", outside(-1, 2.5) + ODD + WRONG_TYPES + NONE),
    "mu dtype": Sort(
        "None or a floating dtype",
        outside(
            "int32", jnp.int32, "nonsense", "complex64", bool, 3.5, "float8_e4m3fn"
        ),
    ),
    "nu dtype": Sort(
        "None or a floating dtype",
        outside("int32", "nonsense", "complex64", 3.5, "float8_e4m3fn", "float16"),
    ),
    "flag": Sort(
        "True or False", tuple((value, TypeError) for value in ("no", None, 0, 1.0))
    ),
}

CLIP = {
    "threshold": "positive",
    "b2": "decay",
    "reset_interval": "interval",
    "grace_steps": "count",
    "nu_dtype": "nu dtype",
    "clip_unseen": "flag",
    "count_spikes": "flag",
}
ADAM = {
    "b1": "decay",
    "b2": "decay",
    "eps": "positive",
    "reset_interval": "interval",
    "warmup_steps": "count",
    "restart_bias_correction": "flag",
    "mu_dtype": "mu dtype",
    "nu_dtype": "nu dtype",
}
COUNT = {"count_dropped": "flag"}
OPTIMIZER = {"learning_rate": "not negative", "weight_decay": "not negative"}
SPIKES = (jnp.ones(3), jnp.ones(3))

# The function, its other arguments, and the sort of each argument that is checked.
FUNCTIONS = (
    (spam_optax.spam_clip, (), CLIP),
    (spam_optax.scale_by_spam_adam, (), ADAM | COUNT),
    (spam_optax.spam_adam, (), ADAM | COUNT | OPTIMIZER),
    (spam_optax.scale_by_spam, (), CLIP | ADAM),
    (spam_optax.spam, (), CLIP | ADAM | OPTIMIZER),
    (spam_optax.reset_moments, (optax.trace(0.9),), {"interval": "interval"}),
    (
        spam_optax.track_spikes,
        (optax.trace(0.9),),
        {"threshold": "above one", "decay": "decay"},
    ),
    (testing.inject_spikes, (), {"key": "count"}),
    (testing.inject_spikes, (0,), {"rate": "share", "scale": "finite"}),
    (functional.spike_limit, SPIKES[:1], {"threshold": "positive"}),
    (functional.spike_mask, SPIKES, {"threshold": "positive"}),
    (functional.clip_spikes, SPIKES, {"threshold": "positive"}),
    (functional.clipped_square, SPIKES, {"threshold": "positive"}),
    (functional.reset_position, (1,), {"interval": "interval"}),
    (functional.reset_ramp, (1, 5), {"warmup_steps": "count"}),
    (
        functools.partial(functional.reset_ramp, warmup_steps=2),
        (1,),
        {"interval": "interval"},
    ),
    (functools.partial(functional.bias_correction, step=1), (), {"decay": "decay"}),
    (
        functional.spike_score,
        (jnp.ones(9),),
        {"window": "window", "deviations": "positive"},
    ),
    *(
        (functools.partial(function, **others), (), sorts)
        for function, good, sorts in (
            (
                functional.ffn_jacobian_bound,
                {
                    "width": 4,
                    "ffn_width": 16,
                    "std_in": 0.1,
                    "std_out": 0.1,
                    "residual_std": 1.0,
                },
                {},
            ),
            (
                functional.attention_jacobian_bound,
                {"width": 4, "std_out": 0.1, "residual_std": 1.0, "attention_norm": 1},
                {"attention_norm": "not negative"},
            ),
        )
        for others, sorts in [
            (good, {name: "positive" for name in good if name not in sorts} | sorts)
        ]
    ),
)


class Case(NamedTuple):
    """A call that must fail, and what its message must name."""

    call: Callable[[], Any]
    argument: str
    value: str
    allowed: str
    error: type[Exception] = ValueError


def cases_of_the_table():
    for function, arguments, sorts in FUNCTIONS:
        name = getattr(function, "func", function).__name__
        for argument, sort in sorts.items():
            for value, error in SORTS[sort].bad:
                call = functools.partial(function, *arguments, **{argument: value})
                label = f"{name}-{argument}-{value!r}"
                yield (
                    label,
                    Case(call, argument, repr(value), SORTS[sort].allowed, error),
                )


def update(tx, updates, params=None):
    """A call of `tx.update` on the state for `PARAMS`."""
    return lambda: tx.update(updates, tx.init(PARAMS), params)


BOTH = (spam_optax.spam_clip, spam_optax.scale_by_spam, spam_optax.spam)
MOMENTS = (*BOTH, spam_optax.scale_by_spam_adam, spam_optax.spam_adam)
VECTOR = jnp.ones(3)
PARAMS = {"a": VECTOR, "b": [VECTOR, VECTOR]}


def other_cases():
    for function in BOTH:
        name = function.__name__
        for interval, grace in ((20, 20), (5, 20), (3.0, 4)):
            yield (
                f"{name}-interval {interval} in the grace of {grace}",
                Case(
                    functools.partial(
                        function, reset_interval=interval, grace_steps=grace
                    ),
                    "reset_interval",
                    repr(interval),
                    f"None or > grace_steps ({grace})",
                ),
            )
    for function in MOMENTS:
        name, tx = function.__name__, function()
        for key, updates, where, allowed in (
            ("a leaf missing", {"b": [VECTOR] * 2}, "['a']", "shaped like the param"),
            (
                "a leaf too many",
                PARAMS | {"c": VECTOR},
                "['c']",
                "shaped like the para",
            ),
            ("a list too short", PARAMS | {"b": [VECTOR]}, "['b'][1]", "shaped like"),
            ("a leaf for a list", PARAMS | {"b": VECTOR}, "['b']", "shaped like"),
            (
                "another shape",
                PARAMS | {"a": jnp.ones(4)},
                "(4,)",
                "['a'] must have the shape (3,)",
            ),
            (
                "a shape that broadcasts",
                PARAMS | {"a": jnp.ones(1)},
                "(1,)",
                "['a'] must have the shape (3,)",
            ),
            (
                "another container",
                PARAMS | {"b": (VECTOR,) * 2},
                "{'a': *, 'b': (*, *)}",
                "{'a': *, 'b': [*, *]}",
            ),
        ):
            yield (
                f"{name}-{key}",
                Case(update(tx, updates, PARAMS), "update", where, allowed),
            )
        yield (
            f"{name}-integer gradients",
            Case(
                update(tx, PARAMS | {"a": jnp.ones(3, jnp.int32)}, PARAMS),
                "update at ['a']",
                "int32",
                "a floating or complex dtype",
                TypeError,
            ),
        )
        if function is not spam_optax.spam_clip:
            yield (
                f"{name}-complex gradients of real parameters",
                Case(
                    update(tx, PARAMS | {"a": jnp.ones(3, jnp.complex64)}, PARAMS),
                    "update at ['a']",
                    "complex64",
                    "a floating dtype like its parameter",
                    TypeError,
                ),
            )
        for dtype in ("int32", "bool", "float8_e4m3fn"):
            yield (
                f"{name}-{dtype} parameters",
                Case(
                    functools.partial(tx.init, {"a": VECTOR.astype(dtype)}),
                    "parameter at ['a']",
                    dtype,
                    "a floating or complex dtype",
                    TypeError,
                ),
            )
    for function in (spam_optax.spam, spam_optax.spam_adam):
        yield (
            f"{function.__name__}-decay without parameters",
            # The message is Optax's own.
            Case(
                update(function(weight_decay=0.1), PARAMS),
                "params",
                "not passing",
                "requires the current value of parameters",
            ),
        )
    yield (
        "track_spikes-a leaf missing",
        Case(
            update(spam_optax.track_spikes(optax.sgd(0.1)), {"a": VECTOR}),
            "updates",
            "got 1",
            "the 3 leaves of init's parameters",
        ),
    )
    for wrap in (
        lambda inner: spam_optax.reset_moments(inner, 3),
        spam_optax.track_spikes,
    ):
        for key, value in (("1.0", 1.0), ("None", None), ("a factory", optax.adam)):
            yield (
                f"{wrap.__name__}-inner-{key}",
                Case(
                    functools.partial(wrap, value),
                    "inner",
                    repr(value),
                    "a gradient transformation",
                    TypeError,
                ),
            )
    reset = functools.partial(spam_optax.reset_moments, optax.trace(0.9), 3)
    for value, error in (("mu", TypeError), ((), ValueError), (5, TypeError)):
        yield (
            f"reset_moments-fields-{value!r}",
            Case(
                functools.partial(reset, fields=value),
                "fields",
                repr(value),
                "a sequence of names of state fields",
                error,
            ),
        )
    yield (
        "reset_moments-fields of no state",
        Case(
            lambda: reset(fields=("mu", "nu")).init(VECTOR),
            "fields",
            "('mu', 'nu')",
            "at least one field of the inner state",
        ),
    )
    for kind in ("spike", "", None, 3):
        yield (
            f"inject_spikes-kind-{kind!r}",
            Case(
                functools.partial(testing.inject_spikes, 0, kind=kind),
                "kind",
                repr(kind),
                "one of 'scale', 'noise', 'nan', 'inf'",
            ),
        )
    for steps, value, error in (
        ([0], "0", ValueError),
        ([3, -1], "-1", ValueError),
        ((2.5,), "2.5", ValueError),
        (["first"], "'first'", TypeError),
        ([True], "True", TypeError),
        (5, "5", TypeError),
    ):
        yield (
            f"inject_spikes-steps-{steps!r}",
            Case(
                functools.partial(testing.inject_spikes, 0, steps=steps),
                "steps",
                value,
                "whole number",
                error,
            ),
        )
    yield (
        "spike_score-window 3.0",
        Case(
            functools.partial(functional.spike_score, jnp.ones(9), window=3.0),
            "window",
            "3.0",
            "a Python whole number >= 2",
            TypeError,
        ),
    )
    yield (
        "spike_score-traced window",
        Case(
            lambda: jax.jit(functional.spike_score)(jnp.ones(9), window=3),
            "window",
            "Tracer",
            "under jit a static one",
            TypeError,
        ),
    )
    yield (
        "spike_score-window of all values",
        Case(
            functools.partial(functional.spike_score, jnp.ones(9), window=9),
            "window",
            "9",
            "< the number of values (9)",
        ),
    )


CASES = dict([*cases_of_the_table(), *other_cases()])


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_are_named_with_their_value_and_what_is_allowed(name):
    case = CASES[name]
    with pytest.raises(case.error) as error:
        case.call()
    message = str(error.value)
    assert error.type is case.error
    assert "\n" not in message and message == message.strip()
    for part in (case.argument, case.value, case.allowed):
        assert part in message


@pytest.mark.parametrize("function", MOMENTS, ids=lambda f: f.__name__)
def test_every_argument_of_the_transformations_is_in_the_table(function):
    """Guards the table: an argument added later must be listed or be a flag."""
    (sorts,) = (sorts for f, _, sorts in FUNCTIONS if f is function)
    assert set(inspect.signature(function).parameters) - {"mask"} == set(sorts)


NUMBERS = {
    "learning_rate": 0.01,
    "b1": 0.8,
    "b2": 0.999,
    "eps": 1e-5,
    "threshold": 30.0,
    "grace_steps": 3,
    "weight_decay": 0.1,
    "reset_interval": 7,
    "warmup_steps": 2,
}


@pytest.mark.parametrize("function", MOMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_may_be_traced(function, dtype):
    """Through `inject_hyperparams`: the updates are those of the plain numbers.

    Over bfloat16 parameters too, where ``b2`` would be 1 without `hyperparam_dtype`.
    The state's dtypes are stable, or the second step would not compile the same.
    """
    names = set(inspect.signature(function).parameters) & set(NUMBERS)
    numbers = {name: NUMBERS[name] for name in names}
    plain = function(**numbers)
    injected = optax.inject_hyperparams(function, hyperparam_dtype=jnp.float32)(
        **numbers
    )
    params = {"w": jnp.ones((2, 3), dtype)}
    states = plain.init(params), injected.init(params)
    assert names <= set(states[1].hyperparams)
    updates = [jax.jit(tx.update) for tx in (plain, injected)]
    rng = np.random.default_rng(0)
    for step in range(1, 10):
        gradient = rng.normal(size=(2, 3))
        gradient[0, 0] *= 1e4 if step == 6 else 1
        gradient = {"w": jnp.asarray(gradient, dtype)}
        results = [u(gradient, s, params) for u, s in zip(updates, states, strict=True)]
        (want, _), (got, _) = results
        states = tuple(state for _, state in results)
        assert got["w"].dtype == want["w"].dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got["w"], np.float64),
            np.asarray(want["w"], np.float64),
            rtol=1e-4 if dtype == "float32" else 1e-2,
        )
    assert all(update._cache_size() == 1 for update in updates)


@pytest.mark.parametrize("value", [-1.0, 2, math.nan])
def test_arrays_pass_unchecked(value):
    """What a tracer holds is unknown, and an array is treated like one."""
    for array in (jnp.asarray(value), np.asarray(value)):
        for function, arguments, sorts in FUNCTIONS:
            if inspect.isfunction(function) and function in MOMENTS:
                numbers = [
                    n
                    for n, sort in sorts.items()
                    if not sort.endswith((" dtype", "flag"))
                ]
                function(*arguments, **dict.fromkeys(numbers, array))


@pytest.mark.parametrize("b1", [0, 0.0])
def test_whole_numbers_may_be_injected(b1):
    """``b1=0`` becomes an integer array: momentum off, not an error."""
    numbers = {"b1": b1, "threshold": 5000, "learning_rate": 1, "weight_decay": 1}
    plain = spam_optax.spam(**numbers)
    injected = optax.inject_hyperparams(spam_optax.spam)(**numbers)
    params = jnp.ones(2)
    want, _ = jax.jit(plain.update)(params, plain.init(params), params)
    got, _ = jax.jit(injected.update)(params, injected.init(params), params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
