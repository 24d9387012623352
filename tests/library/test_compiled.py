"""The bytes that an optimizer step moves, from the TPU compiler. It needs no TPU.

The floor of an elementwise optimizer is to read every tensor once and to write every
new one once. Per float32 parameter that is 28 bytes for Adam: read the gradient, two
moments and the parameter, write the last three. With moments for a quarter it is 16;
there XLA makes two passes, since the moments have another shape than the parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spam_optax
from trainer import hlo

libtpu = pytest.importorskip(
    "libtpu", reason="the TPU compiler is in the libtpu wheel, which is not installed"
)
# A program for a device that is not here is stored in the suite's cache of compiled
# programs, cannot be loaded from it, and is then compiled again.
pytestmark = [
    pytest.mark.one_python,
    pytest.mark.tpu,
    pytest.mark.usefixtures("full_compilation"),
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
]
SHAPE = (8192, 8192)


@pytest.fixture(scope="module")
def devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_LIBRARY_PATH", libtpu.get_library_path())
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return np.array(topology.devices)


def compile_step(tx, mesh, spec):
    """Compiles update and apply for one sharded matrix, its buffers donated."""

    def shaped(x):
        sharding = NamedSharding(mesh, spec if len(x.shape) == 2 else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = shaped(jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    state = jax.tree.map(shaped, jax.eval_shape(tx.init, params))
    jitted = jax.jit(step, donate_argnums=(1, 2))
    return jitted.lower(params, state, params).compile()


BYTES = {
    "adam": (lambda: optax.adam(1e-3), 28),
    "spam": (lambda: spam_optax.spam(1e-3, count=True), 28),
    "spam_adam": (lambda: spam_optax.spam_adam(1e-3, count=True), 28),
    "spam_bfloat16_moments": (
        lambda: spam_optax.spam(
            1e-3, count=True, mu_dtype="bfloat16", nu_dtype="bfloat16"
        ),
        20,
    ),
    "spam_decayed": (lambda: spam_optax.spam(1e-3, count=True, weight_decay=0.1), 28),
    # One more moment to read and to write.
    "spam_clip_then_adam": (
        lambda: optax.chain(spam_optax.spam_clip(count=True), optax.adam(1e-3)),
        36,
    ),
    "spam_clip_then_spam_adam": (
        lambda: optax.chain(spam_optax.spam_clip(count=True), spam_optax.spam_adam()),
        36,
    ),
    # As much as a clip of the global norm: the choice of a state moves nothing.
    "clip_by_global_norm": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        32,
    ),
    "skip_spikes": (lambda: spam_optax.skip_spikes(optax.adam(1e-3)), 32),
    "reset_moments": (lambda: spam_optax.reset_moments(optax.adam(1e-3), 500), 28),
    # A pass over the gradient more for every statistic of it that the next one needs.
    "adaclip": (
        lambda: optax.chain(spam_optax.adaclip(count=True), optax.adam(1e-3)),
        32,
    ),
    "adagn": (lambda: optax.chain(spam_optax.adagn(count=True), optax.adam(1e-3)), 32),
    "gradient_stabilizer": (
        lambda: optax.chain(
            spam_optax.gradient_stabilizer(count=True), optax.adam(1e-3)
        ),
        32,
    ),
    "zclip": (lambda: optax.chain(spam_optax.zclip(count=True), optax.adam(1e-3)), 32),
    "adagc": (lambda: optax.chain(spam_optax.adagc(count=True), optax.adam(1e-3)), 32),
    "stable_spam": (lambda: spam_optax.stable_spam(1e-3, count=True), 36),
    # Gradient and second moment twice; which coordinates are finite, kept in between.
    "stable_adamw": (lambda: spam_optax.stable_adamw(1e-3, count=True), 38),
    # No second moment, 8 bytes less than Adam; the squares take a pass over the
    # gradient, and which coordinates are finite is kept in between.
    "adam_mini": (lambda: spam_optax.adam_mini(1e-3, count=True), 26),
}


# The matrix has no name.
@pytest.mark.filterwarnings("ignore:adam_mini_partition. the names")
@pytest.mark.parametrize("name", BYTES)
def test_bytes_accessed_are_at_the_floor(devices, name):
    """Counting, resets and the ramp need no further pass over memory."""
    make, floor = BYTES[name]
    compiled = compile_step(make(), Mesh(devices[:1], ("x",)), P())
    accessed = compiled.cost_analysis()["bytes accessed"] / np.prod(SHAPE)
    assert floor <= accessed < floor + 0.05
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * np.prod(SHAPE)


def test_clipping_queries_and_keys_moves_no_byte_more(devices):
    """The kernels are scaled in the pass that updates them."""
    mesh = Mesh(devices[:1], ("x",))

    def accessed(tx):
        def step(params, state, gradients, logits):
            updates, state = tx.update(
                gradients, state, params, attention_logits=logits
            )
            return optax.apply_updates(params, updates), state

        def shaped(x):
            return jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, P())
            )

        params = {k: jax.ShapeDtypeStruct(SHAPE, jnp.float32) for k in ("query", "key")}
        params, state = jax.tree.map(shaped, (params, jax.eval_shape(tx.init, params)))
        logits = shaped(jax.ShapeDtypeStruct((64,), jnp.float32))
        jitted = jax.jit(step, donate_argnums=(0, 1))
        compiled = jitted.lower(params, state, params, logits).compile()
        return compiled.cost_analysis()["bytes accessed"] / np.prod(SHAPE) / 2

    adam = optax.with_extra_args_support(optax.adam(1e-3))
    clipped = accessed(optax.chain(adam, spam_optax.qk_clip()))
    assert accessed(adam) <= clipped < accessed(adam) + 0.05


def sparse(**kwargs):
    return spam_optax.sparse_spam(1e-3, sparse_params=True, **kwargs)


SPARSE_BYTES = {
    "uncounted": dict(),
    "counted": dict(count=True),
    "decayed": dict(count=True, weight_decay=0.1),
}


@pytest.mark.parametrize("name", SPARSE_BYTES)
def test_bytes_of_sparse_momentum(devices, name):
    """At density 1/4 a step moves less than Adam's, with masks, counts and decay."""
    tx = sparse(**SPARSE_BYTES[name])
    compiled = compile_step(tx, Mesh(devices[:1], ("x",)), P())
    accessed = compiled.cost_analysis()["bytes accessed"] / np.prod(SHAPE)
    assert 16 <= accessed <= 20.6
    temporaries = compiled.memory_analysis().temp_size_in_bytes / np.prod(SHAPE)
    assert temporaries <= 1.05


SHARDED = {
    "spam": lambda: spam_optax.spam(1e-3, count=True),
    "sparse_spam": lambda: sparse(count=True, row_blocks=2),
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")], ids=str)
def test_collectives_are_scalar_all_reduces(devices, spec, name):
    mesh = Mesh(devices.reshape(2, 2), ("x", "y"))
    text = compile_step(SHARDED[name](), mesh, spec).as_text()
    found = hlo.collectives(text)
    assert found
    for collective in found:
        assert collective.kind == "all-reduce", collective
        assert all(array.shape == () for array in collective.results), collective
