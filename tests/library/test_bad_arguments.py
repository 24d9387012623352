"""Bad arguments: one line names the argument, its value and what is allowed.

A table of every checked argument of every public function. A new function is an entry
in `FUNCTIONS`, a new sort of argument one in `SORTS`, anything else a `Case`. All bad
values of a sort are tried on one argument, and one of them on every argument.
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
from spam_optax import functional, initializers, testing

# Of tensors whose names say nothing, as a and b.
pytestmark = pytest.mark.filterwarnings("ignore:adam_mini_partition. the names")

WRONG_TYPES = tuple(
    (value, TypeError)
    for value in ("high", True, [1.0], Fraction(1, 2), np.array("x"), float)
)
# What decides shapes may be no array at all, whatever is in it: rows of their own.
WRONG_SCALARS = tuple(x for x in WRONG_TYPES if not isinstance(x[0], np.ndarray))
NONE = ((None, TypeError),)
ODD = ((math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError))


def outside(*values):
    return tuple((value, ValueError) for value in values)


class Sort(NamedTuple):
    """What an argument may be, in the words of the message, and bad values."""

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
    "key": Sort(
        "a whole number >= 0 and <= 4294967295",
        outside(-1, 2.5, 2**32, np.int32(-3)) + ODD + WRONG_TYPES + NONE,
    ),
    "density": Sort(
        "a finite number > 0 and <= 1",
        outside(0, 0.0, -0.1, 1.1, 1e-40, np.float32(2)) + ODD + WRONG_SCALARS + NONE,
    ),
    "blocks": Sort(
        "a whole number >= 1 and <= 65536",
        outside(0, -1, 2.5, 2**16 + 1) + ODD + WRONG_SCALARS + NONE,
    ),
    "positive or None": Sort(
        "a finite number > 0", outside(0, -1, 1e-40) + ODD + WRONG_TYPES
    ),
    "ring": Sort(
        "a whole number >= 2 and <= 65536",
        outside(0, 1, 2.5, 2**16 + 1) + ODD + WRONG_SCALARS + NONE,
    ),
    "history": Sort(
        "a whole number >= 2 and <= 128", outside(0, 1, 2.5, 129) + ODD + WRONG_SCALARS
    ),
    "axis": Sort("a whole number >= 0", outside(-1, 2.5) + ODD + WRONG_SCALARS + NONE),
    "heads": Sort("a whole number >= 1", outside(0, -1, 2.5) + ODD + WRONG_SCALARS),
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
    "count": "flag",
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
COUNT = {"count": "flag"}
OPTIMIZER = {"learning_rate": "not negative", "weight_decay": "not negative"}
ZCLIP = {
    "threshold": "positive",
    "decay": "decay",
    "eps": "positive",
    "max_norm": "positive or None",
    "warmup_steps": "window",
    "count": "flag",
}
ADAGC = {
    "threshold": "above one",
    "decay": "decay",
    "max_norm": "positive",
    "warmup_steps": "count",
    "count": "flag",
}
NORM = {"gamma1": "decay", "gamma2": "decay", "count": "flag"}
ADAGN = NORM | {"eps": "positive", "total_steps": "interval"}
PLAIN_ADAM = {name: ADAM[name] for name in ("b1", "b2", "eps", "mu_dtype", "nu_dtype")}
PLAIN_ADAM |= COUNT
STABLE_SPAM = PLAIN_ADAM | ADAGN
STABLE_SPAM |= {"gamma3": "decay", "reset_interval": "interval"}
GUARD = {
    "window": "ring",
    "sigma": "positive",
    "min_history": "history",
    "robust": "flag",
}
LAYOUT = {"density": "density", "row_blocks": "blocks"}
LAYERS = {"a": jnp.ones((8, 4)), "b": jnp.ones(3)}
MASKS = LAYOUT | {"key": "key"}
SPIKES = (jnp.ones(3), jnp.ones(3))

# The function, its other arguments, and the sort of each argument that is checked.
FUNCTIONS = (
    (spam_optax.spam_clip, (), CLIP),
    (spam_optax.scale_by_spam_adam, (), ADAM | COUNT),
    (spam_optax.spam_adam, (), ADAM | COUNT | OPTIMIZER),
    (spam_optax.scale_by_spam, (), CLIP | ADAM),
    (spam_optax.spam, (), CLIP | ADAM | OPTIMIZER),
    (spam_optax.scale_by_sparse_spam, (), CLIP | ADAM | MASKS),
    (spam_optax.sparse_spam, (), CLIP | ADAM | MASKS | OPTIMIZER),
    (spam_optax.reset_moments, (optax.trace(0.9),), {"interval": "interval"}),
    (
        spam_optax.track_spikes,
        (optax.trace(0.9),),
        {"threshold": "above one", "decay": "decay"},
    ),
    (
        spam_optax.skip_spikes,
        (optax.trace(0.9),),
        GUARD
        | {"loss_share": "not negative", "norm_share": "not negative"}
        | {"max_consecutive": "interval", "needs_loss": "flag"},
    ),
    (spam_optax.clip_update_norm, (), GUARD | {"share": "not negative"}),
    (spam_optax.qk_clip, (), {"threshold": "positive or None", "balance": "share"}),
    (spam_optax.query_key_tensors, (), {"layer_axis": "axis"}),
    (spam_optax.adaclip, (), {"gamma3": "decay"} | COUNT),
    (spam_optax.adagn, (), ADAGN),
    (spam_optax.gradient_stabilizer, (), NORM),
    (spam_optax.scale_by_stable_spam, (), STABLE_SPAM),
    (spam_optax.stable_spam, (), STABLE_SPAM | OPTIMIZER),
    (spam_optax.zclip, (), ZCLIP),
    (spam_optax.adagc, (), ADAGC),
    (spam_optax.scale_by_stable_adamw, (), PLAIN_ADAM),
    (spam_optax.stable_adamw, (), PLAIN_ADAM | OPTIMIZER),
    (spam_optax.scale_by_adam_mini, (), PLAIN_ADAM),
    (spam_optax.adam_mini, (), PLAIN_ADAM | OPTIMIZER),
    (
        spam_optax.adam_mini_partition,
        (),
        {"num_heads": "heads", "num_kv_heads": "heads"},
    ),
    (initializers.wesar, (), {"target_std": "positive"}),
    (testing.inject_spikes, (), {"key": "key"}),
    (testing.inject_spikes, (0,), {"rate": "share", "scale": "finite"}),
    (functional.spike_mask, SPIKES, {"threshold": "positive"}),
    (functional.clip_spikes, SPIKES, {"threshold": "positive"}),
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
    (functional.jacobian_norm, (jnp.sin, jnp.ones(3)), {"iterations": "interval"}),
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
    tried = set()
    for function, arguments, sorts in FUNCTIONS:
        name = getattr(function, "func", function).__name__
        for argument, sort in sorts.items():
            bad = SORTS[sort].bad
            for value, error in bad[:1] if sort in tried else bad:
                call = functools.partial(function, *arguments, **{argument: value})
                label = f"{name}-{argument}-{value!r}"
                yield (
                    label,
                    Case(call, argument, repr(value), SORTS[sort].allowed, error),
                )
            tried.add(sort)


VECTOR, MATRIX = jnp.ones(3), jnp.ones((8, 4))
PARAMS = {"a": VECTOR, "b": [VECTOR, VECTOR]}
MATRICES = {"a": MATRIX, "b": [MATRIX, VECTOR]}


def update(tx, updates, params=None, start=PARAMS, first=None):
    """Returns a call of `tx.update` with a state for `start`, or for `first`."""
    return lambda: tx.update(updates, (first or tx).init(start), params)


SPARSE = (spam_optax.scale_by_sparse_spam, spam_optax.sparse_spam)
BOTH = (spam_optax.spam_clip, spam_optax.scale_by_spam, spam_optax.spam, *SPARSE)
RELATIVES = (
    *(spam_optax.scale_by_stable_spam, spam_optax.stable_spam),
    *(spam_optax.scale_by_stable_adamw, spam_optax.stable_adamw),
    *(spam_optax.scale_by_adam_mini, spam_optax.adam_mini),
)
MOMENTS = (*BOTH, spam_optax.scale_by_spam_adam, spam_optax.spam_adam, *RELATIVES)
CLIPS = (
    *(spam_optax.zclip, spam_optax.adagc, spam_optax.adaclip, spam_optax.adagn),
    spam_optax.gradient_stabilizer,
)
SCALES = (spam_optax.spam_clip, spam_optax.clip_update_norm) + tuple(
    function for function in MOMENTS if function.__name__.startswith("scale_by")
)
WITH_STATES = {function.__name__: function() for function in (*SCALES, *CLIPS)} | {
    "skip_spikes": spam_optax.skip_spikes(optax.adam(0.1)),
    "track_spikes": spam_optax.track_spikes(optax.adam(0.1)),
    "reset_moments": spam_optax.reset_moments(optax.adam(0.1), 5),
    "inject_spikes": testing.inject_spikes(0),
    "qk_clip": spam_optax.qk_clip(),
}
WITH_WINDOWS = {
    "skip_spikes": functools.partial(spam_optax.skip_spikes, optax.adam(0.1)),
    "clip_update_norm": spam_optax.clip_update_norm,
}


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
                "['a'] must have the shape (3,)",
                "(4,)",
            ),
            (
                "a shape that broadcasts",
                PARAMS | {"a": jnp.ones(1)},
                "['a'] must have the shape (3,)",
                "(1,)",
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
            f"{name}-a gradient of a parameter that is None",
            Case(
                update(tx, {"a": VECTOR}, start={"a": None}),
                "update",
                "has a leaf at ['a']",
                "where the optimizer state has none",
            ),
        )
        if function is not spam_optax.spam_clip:
            integers = PARAMS | {"a": VECTOR.astype("int32")}
            for params, argument, value, allowed, error in (
                ({"z": VECTOR}, "params", "{'z': *}", "like the updates", ValueError),
                ("params", "params", "(*)", "a tree like the updates", ValueError),
                (integers, "parameter at ['a']", "int32", "a floating", TypeError),
            ):
                yield (
                    f"{name}-an update with the parameters {value}",
                    Case(update(tx, PARAMS, params), argument, value, allowed, error),
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
    decayed = (spam_optax.stable_spam, spam_optax.stable_adamw, spam_optax.adam_mini)
    for function in (spam_optax.spam, spam_optax.spam_adam, *decayed):
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
    for function in (*decayed, *SPARSE[1:], spam_optax.spam, spam_optax.spam_adam):
        for mask, got, error in (
            ("kernel", "'kernel'", TypeError),
            (lambda p: {"a": 1}, "1 in it", TypeError),
            ({"a": True}, "{'a': *}", ValueError),
            (lambda p: None, "None", ValueError),
        ):
            tx = function(weight_decay=0.1, mask=mask)
            yield (
                f"{function.__name__}-a mask with {got}",
                Case(
                    functools.partial(tx.init, PARAMS),
                    "mask",
                    got,
                    "a tree of booleans",
                    error,
                ),
            )
    for name, tx in WITH_STATES.items():
        kind = type(tx.init(VECTOR)).__name__
        yield (
            f"{name}-a state of Adam",
            Case(
                update(tx, VECTOR, VECTOR, VECTOR, optax.adam(0.1)),
                "state",
                "got tuple",
                f"must be the {kind} that init returned",
                TypeError,
            ),
        )
    for name, function in WITH_WINDOWS.items():
        yield (
            f"{name}-a window that is not that of the state",
            Case(
                update(function(), VECTOR, VECTOR, VECTOR, function(window=32)),
                "window",
                "got 128",
                "the history in the state, which has shape (32,)",
            ),
        )
    yield (
        "inject_spikes-steps in an array",
        Case(
            lambda: testing.inject_spikes(0, steps=jnp.array([1.5])),
            "steps",
            "1.5)",
            "a whole number >= 1",
        ),
    )
    for name, init in (
        ("stable_kernel", initializers.stable_kernel(8)),
        ("wesar_kernel", initializers.wesar_kernel),
    ):
        for dtype in ("int32", jnp.int32, bool):
            yield (
                f"initializers-{name} of {dtype}",
                Case(
                    functools.partial(init, jax.random.key(0), (2, 2), dtype),
                    "dtype",
                    f"got {jnp.dtype(dtype)}",
                    "must be floating or complex",
                    TypeError,
                ),
            )
    for function in SPARSE:
        yield (
            f"{function.__name__}-two parameters with one name",
            Case(
                functools.partial(function().init, {"a/b": VECTOR, "a": {"b": VECTOR}}),
                "the tensors of a tree",
                "'a/b'",
                "rename one",
            ),
        )
    inject = testing.inject_spikes(0)
    yield (
        "inject_spikes-integers",
        Case(
            functools.partial(inject.update, jnp.arange(3), inject.init(VECTOR)),
            "the update at the root",
            "int32",
            "a floating or complex dtype",
            TypeError,
        ),
    )
    sgd = optax.sgd(0.1)
    for function, tx in (
        (spam_optax.track_spikes, spam_optax.track_spikes(sgd)),
        (spam_optax.skip_spikes, spam_optax.skip_spikes(sgd)),
        (spam_optax.clip_update_norm, spam_optax.clip_update_norm()),
    ):
        yield (
            f"{function.__name__}-integer updates",
            Case(
                update(tx, PARAMS | {"a": jnp.ones(3, jnp.int32)}),
                "update at ['a']",
                "int32",
                "a floating or complex dtype",
                TypeError,
            ),
        )
    skip = spam_optax.skip_spikes(sgd)
    for name in ("value", "loss", "grad_norm"):
        for value in ("high", [1.0], 1j, jnp.ones(2)):
            given = {name: value}
            yield (
                f"skip_spikes-{name}-{value!r}",
                Case(
                    functools.partial(skip.update, PARAMS, skip.init(PARAMS), **given),
                    name,
                    "shape (2,)" if isinstance(value, jax.Array) else repr(value),
                    "a real scalar",
                    TypeError,
                ),
            )
    reset_adam = spam_optax.reset_moments(optax.adam(0.1), 3)
    for name, updates, params in (
        ("updates", {"z": VECTOR}, None),
        ("params", PARAMS, {"z": VECTOR}),
    ):
        yield (
            f"reset_moments-another tree of {name}",
            Case(
                update(reset_adam, updates, params),
                "params",
                "{'z': *}",
                "trees like init's parameters",
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
    bad = (("mu", TypeError), ((), ValueError), (5, TypeError), (["mu", 1], TypeError))
    for value, error in bad:
        yield (
            f"reset_moments-fields-{value!r}",
            Case(
                functools.partial(reset, fields=value),
                "fields",
                repr(value),
                "a collection of names of state fields",
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
    for function in (functional.spike_mask, functional.clip_spikes):
        for value in ("high", None, 0.5, 1, [True]):
            yield (
                f"{function.__name__}-active-{value!r}",
                Case(
                    functools.partial(function, *SPIKES, active=value),
                    "active",
                    repr(value),
                    "booleans",
                    TypeError,
                ),
            )
    for function, argument, others in (
        (functional.nonfinite_mask, "gradient", ()),
        (functional.online_spike_score, "gradient", (VECTOR,)),
        (functional.gradient_spike_score, "gradients", ()),
        (functional.reset_position, "step", (3,)),
        (functional.spike_steps, "losses", ()),
        (functional.token_embedding_variability, "embedding", ()),
    ):
        name = function.__name__
        for value in ("high", {"a": 1.0}):
            yield (
                f"{name}-{argument}-{value!r}",
                Case(
                    functools.partial(function, value, *others),
                    f"{name}: {argument}",
                    repr(value),
                    "must be an array",
                    TypeError,
                ),
            )
        if function is not functional.spike_steps:
            wrong = np.ones(3, bool)
            yield (
                f"{name}-{argument}-booleans",
                Case(
                    functools.partial(function, wrong, *others),
                    f"{name}: {argument}",
                    "the dtype bool",
                    "numbers",
                    AssertionError,
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
        "qk_clip_factors-traced num_kv_heads",
        Case(
            lambda: jax.jit(functional.qk_clip_factors)(jnp.ones(4), num_kv_heads=2),
            "num_kv_heads",
            "Tracer",
            "under jit a static one",
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
    norms = functools.partial(functional.layer_gradient_norms, PARAMS)
    for value in ("a", b"a", None, 3, [1], ("a", None), iter(())):
        yield (
            f"layer_gradient_norms-stacked-{value!r:.20}",
            Case(
                functools.partial(norms, value),
                "stacked",
                repr(value),
                "a collection of names of parts of paths",
                TypeError,
            ),
        )
    for value in ("A", "b/0", ""):
        yield (
            f"layer_gradient_norms-stacked-[{value!r}]",
            Case(
                functools.partial(norms, ["a", value]),
                "stacked",
                repr(value),
                "names of parts of the tensors' paths",
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


def injected(function, argument, value):
    """`function` with an argument that `inject_hyperparams` makes an array of."""
    static = tuple(set(LAYOUT) - {argument})
    return optax.inject_hyperparams(function, static)(**{argument: value}).init(VECTOR)


def traced(function, argument, value):
    return jax.jit(lambda x: function(**{argument: x}).init(VECTOR))(value)


def init_on_a_mesh(tx):
    """Calls `init` for a matrix whose 16 rows are on 8 devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("x")
    with jax.set_mesh(mesh):
        tx.init({"a": jax.device_put(jnp.ones((16, 4)), spec)})


def sparse_cases():
    for function in SPARSE:
        name = function.__name__
        everywhere = functools.partial(function, sparse_params=True)
        tx = everywhere()
        for argument, value in (("density", 0.5), ("row_blocks", 2)):
            build = functools.partial(function, **{argument: jnp.asarray(value)})
            for key, call, got in (
                ("array", build, "got Array("),
                (
                    "NumPy array",
                    lambda b=build: b.func(**jax.device_get(b.keywords)),
                    "got array(",
                ),
                (
                    "traced",
                    functools.partial(traced, function, argument, value),
                    "Tracer",
                ),
                (
                    "injected",
                    functools.partial(injected, function, argument, value),
                    "got Array(",
                ),
            ):
                needed = (
                    f"{argument} must be a Python number, because it decides shapes"
                )
                remedy = "use spam_optax.inject_hyperparams"
                yield (
                    f"{name}-{argument}-{key}",
                    Case(call, needed, got, remedy, TypeError),
                )
        for value, got, error in (
            (1, "got 1 in", TypeError),
            ({"a": True, "b": 0}, "got 0 in", TypeError),
            ({"a": True, "b": "no"}, "got 'no' in", TypeError),
            (np.array(True), "an array of shape () in", TypeError),
            (lambda params: 1.0, "got 1.0 in", TypeError),
            (lambda params: None, "None", ValueError),
            ({"a": True}, "{'a': *}", ValueError),
            ({"a": True, "b": [True]}, "[*]", ValueError),
            ({"a": [True], "b": True}, "'a': [*]", ValueError),
            ({"a": True, "b": (True, True)}, "(*, *)", ValueError),
        ):
            yield (
                f"{name}-sparse_params-{got}",
                Case(
                    functools.partial(function(sparse_params=value).init, MATRICES),
                    "sparse_params",
                    got,
                    "a tree of booleans shaped like the parameters or a prefix of them",
                    error,
                ),
            )
        for shape in ((8, 5), (40, 4), (4,), (), (8, 1), (1, 8, 4)):
            got = MATRICES | {"a": jnp.ones(shape)}
            yield (
                f"{name}-a matrix of shape {shape}",
                Case(
                    update(tx, got, start=MATRICES),
                    "update at ['a']",
                    f"got {shape}",
                    "cannot have the shape (2, 4) with density 0.25 and row_blocks 1",
                ),
            )
        for density in (0.1, 0.5):
            yield (
                f"{name}-a state of density {density}",
                Case(
                    update(
                        tx, MATRICES, start=MATRICES, first=everywhere(density=density)
                    ),
                    "['a']",
                    "(8, 4)",
                    "with density 0.25",
                ),
            )
        for ours, theirs in ((1, 2), (2, 1), (3, 1)):
            yield (
                f"{name}-a state of {theirs} row_blocks, not {ours}",
                Case(
                    update(
                        everywhere(row_blocks=ours),
                        MATRICES,
                        start=MATRICES,
                        first=everywhere(row_blocks=theirs),
                    ),
                    "row_blocks",
                    f"got {ours}",
                    f"must be {theirs}, with which the state was made",
                ),
            )
        for dtype in ("complex64", "int32", "bool"):
            yield (
                f"{name}-a matrix of {dtype}",
                Case(
                    functools.partial(tx.init, {"a": MATRIX.astype(dtype)}),
                    "parameter at ['a']",
                    dtype,
                    "a floating ",
                    TypeError,
                ),
            )
        yield (
            f"{name}-too few blocks of rows on a mesh",
            Case(
                functools.partial(init_on_a_mesh, tx),
                "row_blocks",
                "['a'] has the shape (16, 4) in 1 blocks",
                "a multiple of the number of shards of the rows",
            ),
        )
    of_layers = spam_optax.sparse_spam().init(LAYERS)
    for key, call, argument, value, allowed in (
        (
            "an update shaped like the moments",
            lambda: spam_optax.sparse_spam().update(
                LAYERS | {"a": jnp.ones((2, 4))}, of_layers, LAYERS
            ),
            "update at ['a']",
            "(2, 4)",
            f"the shape {LAYERS['a'].shape} of its parameter",
        ),
        (
            "a mask of other trees",
            lambda: spam_optax.momentum_mask(of_layers, {"z": VECTOR}),
            "params",
            "{'z': *}",
            "a tree like those of opt_state",
        ),
        (
            "a mask of several runs",
            lambda: spam_optax.momentum_mask(
                jax.vmap(spam_optax.sparse_spam().init)({"a": jnp.ones((3, 8, 4))}),
                {"a": jnp.ones((3, 8, 4))},
            ),
            "opt_state",
            "(3,) runs",
            "the state of one run",
        ),
    ):
        yield f"sparse_spam-{key}", Case(call, argument, value, allowed)
    for key in (jnp.zeros(3), jnp.zeros(()), jax.random.split(jax.random.key(0))):
        yield (
            f"sparse_spam-key-{key.dtype}{key.shape}",
            Case(
                functools.partial(spam_optax.sparse_spam, key=key),
                "key",
                f"of shape {key.shape}",
                "one PRNG key or a whole number",
                TypeError,
            ),
        )
    yield (
        "sparse_spam-decay without parameters",
        Case(
            update(spam_optax.sparse_spam(weight_decay=0.1), PARAMS),
            "weight_decay",
            "got None",
            "needs params",
        ),
    )
    for value in ("head", b"head", None, 3, [1], ("head", None), iter(())):
        yield (
            f"matrices_only-exclude-{value!r:.20}",
            Case(
                functools.partial(spam_optax.matrices_only, value),
                "exclude",
                repr(value),
                "a collection of names of parts of paths",
                TypeError,
            ),
        )
    state = spam_optax.sparse_spam(sparse_params=True).init(MATRICES)
    for function in (spam_optax.momentum_mask, spam_optax.momentum_density):
        name = function.__name__
        for other, got in (
            (optax.adam(0.1).init(VECTOR), "ScaleByAdamState"),
            (spam_optax.spam().init(VECTOR), "ScaleBySpamState"),
            (None, "None"),
            ((), "()"),
        ):
            yield (
                f"{name}-no state but {got}",
                Case(
                    functools.partial(function, other, VECTOR),
                    "opt_state",
                    got,
                    "a state of sparse_spam",
                ),
            )
        for shape in ((8, 5), (1, 4), (4,), (), (2, 8, 4)):
            yield (
                f"{name}-a parameter of shape {shape}",
                Case(
                    functools.partial(
                        function, state, MATRICES | {"a": jnp.ones(shape)}
                    ),
                    "params must be those of opt_state",
                    f"the shape {shape} at ['a']",
                    "moments have (2, 4)",
                ),
            )


def relative_cases():
    for function in CLIPS:
        name, tx = function.__name__, function()
        for dtype in ("int32", "bool", "float8_e4m3fn"):
            tree = PARAMS | {"a": VECTOR.astype(dtype)}
            allowed = "a floating or complex dtype"
            for key, call, where in (
                ("parameters", functools.partial(tx.init, tree), "parameter at ['a']"),
                ("gradients", update(tx, tree), "update at ['a']"),
            ):
                yield (
                    f"{name}-{dtype} {key}",
                    Case(call, where, dtype, allowed, TypeError),
                )
    yield (
        "adagc-a leaf missing",
        Case(
            update(spam_optax.adagc(), {"a": VECTOR}),
            "updates",
            "got 1",
            "the 3 leaves of init's parameters",
        ),
    )
    for function in (spam_optax.adam_mini, spam_optax.scale_by_adam_mini):
        name = function.__name__
        for value in ("heads", 4, {"a": (1, 1)}):
            yield (
                f"{name}-partition-{value!r}",
                Case(
                    functools.partial(function, partition=value),
                    "partition",
                    repr(value),
                    "None or a function from parameters to a tree of numbers of blocks",
                    TypeError,
                ),
            )
        for blocks in ((1,), (1, 3), (0, 1), (1, 2.0), [1, 1], None, 1, (1, 8)):
            tx = function(partition=lambda _, blocks=blocks: {"a": blocks})
            yield (
                f"{name}-blocks-{blocks!r}",
                Case(
                    functools.partial(tx.init, {"a": MATRIX}),
                    "partition must give the parameter at ['a']",
                    repr(blocks),
                    "a tuple of whole numbers that divide its shape (8, 4)",
                ),
            )
        yield (
            f"{name}-complex parameters",
            Case(
                functools.partial(function().init, {"a": VECTOR.astype("complex64")}),
                "parameter at ['a']",
                "complex64",
                "a floating dtype",
                TypeError,
            ),
        )
        yield (
            f"{name}-a query and no heads",
            Case(
                functools.partial(function().init, {"query": MATRIX}),
                "num_heads",
                "got None",
                "a whole number >= 1 for the kernel at ['query']",
            ),
        )
    for heads, kernel in (((3,), "query"), ((4, 3), "key")):
        yield (
            f"adam_mini_partition-{kernel} of {heads} heads",
            Case(
                lambda heads=heads, kernel=kernel: spam_optax.adam_mini_partition(
                    *heads
                )({kernel: MATRIX}),
                "number of heads",
                "got 3",
                f"divide the 4 outputs of the kernel at ['{kernel}']",
            ),
        )


EVERY_CASE = [
    *cases_of_the_table(),
    *other_cases(),
    *sparse_cases(),
    *relative_cases(),
]
CASES = dict(EVERY_CASE)


def test_every_case_has_a_name_of_its_own():
    names = [name for name, _ in EVERY_CASE]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("function", sorted({name.split("-")[0] for name in CASES}))
def test_bad_arguments_are_named_with_their_value_and_what_is_allowed(function):
    for name, case in CASES.items():
        if name.split("-")[0] == function:
            print(name)  # The last line of a failure's output tells which case it is.
            with pytest.raises(case.error) as error:
                case.call()
            message = str(error.value)
            assert error.type is case.error, name
            assert "\n" not in message and message == message.strip(" :"), name
            for part in (case.argument, case.value, case.allowed):
                assert part in message, name


@pytest.mark.parametrize("function", [*MOMENTS, *CLIPS], ids=lambda f: f.__name__)
def test_every_argument_of_the_transformations_is_in_the_table(function):
    """An argument that is added later must be in the table, or it must be a flag."""
    (sorts,) = (sorts for f, _, sorts in FUNCTIONS if f is function)
    trees = {"mask", "sparse_params", "partition"}
    assert set(inspect.signature(function).parameters) - trees == set(sorts)


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
    "decay": 0.9,
    "max_norm": 3.0,
}


@pytest.mark.one_python
@pytest.mark.parametrize("function", [*MOMENTS, *CLIPS], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_may_be_traced(function, dtype):
    """With `inject_hyperparams` the updates are the same as with plain numbers.

    Over bfloat16 parameters too, where ``b2`` would be 1 without `hyperparam_dtype`.
    The state's dtypes are stable, or the second step would not compile the same.
    """
    arguments = set(inspect.signature(function).parameters)
    names = arguments & set(NUMBERS)
    numbers = {name: NUMBERS[name] for name in names}
    plain = function(**numbers)
    injected = spam_optax.inject_hyperparams(function)(**numbers)
    params = {"w": jnp.ones((2, 3), dtype)}
    states = plain.init(params), injected.init(params)
    assert names <= set(states[1].hyperparams)
    updates = [jax.jit(tx.update) for tx in (plain, injected)]
    rng = np.random.default_rng(0)
    for step in range(1, 10):
        # Of one sign, so that the terms of a moment do not cancel.
        gradient = rng.uniform(0.5, 1.5, size=(2, 3))
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
            atol=0 if dtype == "float32" else 1e-5,  # Decay may cancel a step.
        )
    assert all(update._cache_size() == 1 for update in updates)


@pytest.mark.parametrize("value", [-1.0, 2, math.nan])
def test_arrays_pass_unchecked(value):
    """The value of a tracer is unknown, and arrays are treated like tracers."""
    for array in (jnp.asarray(value), np.asarray(value)):
        for function, arguments, sorts in FUNCTIONS:
            if inspect.isfunction(function) and function in MOMENTS:
                numbers = [
                    n
                    for n, sort in sorts.items()
                    if not sort.endswith((" dtype", "flag")) and n not in MASKS
                ]
                function(*arguments, **dict.fromkeys(numbers, array))


def test_an_array_of_several_numbers_is_refused():
    for function, arguments, sorts in FUNCTIONS:
        if not inspect.isfunction(function):
            continue  # `bias_correction` takes several decays
        for name, sort in sorts.items():
            if sort != "key" and not sort.endswith((" dtype", "flag")):
                with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
                    function(*arguments, **{name: jnp.ones(2)})


@pytest.mark.parametrize("b1", [0, 0.0])
def test_whole_numbers_may_be_injected(b1):
    """``b1=0`` becomes an integer array. It turns momentum off and is no error."""
    numbers = {"b1": b1, "threshold": 5000, "learning_rate": 1, "weight_decay": 1}
    plain = spam_optax.spam(**numbers)
    injected = optax.inject_hyperparams(spam_optax.spam)(**numbers)
    params = jnp.ones(2)
    want, _ = jax.jit(plain.update)(params, plain.init(params), params)
    got, _ = jax.jit(injected.update)(params, injected.init(params), params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
