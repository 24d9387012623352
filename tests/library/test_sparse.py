"""Sparse momentum: the authors' numbers, NumPy, statistics of masks, sharded runs."""

import functools
import json
import math
import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import scipy.stats
from jax.sharding import PartitionSpec as P

import spam_optax
from numpy_reference import Spam
from spam_optax import _sparse_layout, _sparse_spam
from trainer import hlo

pytestmark = pytest.mark.one_python

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "spam_sparse.npz"
DENSITIES = (0.25, 0.3225, 0.4306, 0.5, 0.1, 0.01, 0.0025, 1.0)
# Rows not divisible by the lanes, fewer rows than lanes, attention kernels of 3
# dimensions, stacks of layers.
SHAPES = ((16, 6), (10, 7), (3, 5), (1, 4), (64, 2, 8), (4, 24, 6), (2, 3, 9, 4))


def everywhere(learning_rate=1e-3, density=0.25, **kwargs):
    """Makes `sparse_spam` with sparse momentum in every matrix."""
    kwargs = {"sparse_params": True} | kwargs
    return spam_optax.sparse_spam(learning_rate, density, **({"count": True} | kwargs))


def gradients_of(shape, steps, seed=0, p_spike=0.01, scale=1000.0):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((steps, *shape))
    gradients *= 1 + (scale - 1) * (rng.random(gradients.shape) < p_spike)
    return gradients.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def trajectory(tx, params, state, gradients):
    """Returns parameters, masks and states after each step."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        mask = spam_optax.momentum_mask(state, params)
        return (params, state), (params, mask, state)

    return jax.lax.scan(step, (params, state), gradients)[1]


# The published method.


def test_numpy_reference_equals_golden():
    with np.load(GOLDEN) as file:
        meta = json.loads(str(file["meta"]))
        for i, shape in enumerate(meta["shapes"]):
            steps = meta["steps"]
            masks = np.unpackbits(file[f"mask_{i}"])[: steps * math.prod(shape)]
            masks = masks.reshape(steps, *shape).astype(bool)
            assert 0.2 < masks.mean() < 0.3
            settings = dict(theta=50.0, interval=50, warmup=15, grace=20)
            reference = Spam(file[f"params0_{i}"], clip_unseen=True, **settings)
            for t in range(steps):
                ours = reference.step(file[f"grads_{i}"][t], on=masks[t])
                theirs = file[f"params_{i}"][t]
                error = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
                assert error.max() <= 2**-24, f"step {t + 1}"


MARCHES = {
    "defaults": dict(reset_interval=100),
    "short windows": dict(
        threshold=50.0, reset_interval=40, warmup_steps=15, grace_steps=8
    ),
    "unseen": dict(threshold=50.0, reset_interval=70, clip_unseen=True),
    "restarted correction": dict(reset_interval=60, restart_bias_correction=True),
    "no reset": dict(threshold=80.0, reset_interval=None),
    "decay": dict(threshold=80.0, reset_interval=50, weight_decay=0.1),
    "blocks": dict(reset_interval=45, row_blocks=4),
}
PAPER_NAMES = {
    "threshold": "theta",
    "reset_interval": "interval",
    "warmup_steps": "warmup",
    "grace_steps": "grace",
    "restart_bias_correction": "restart",
    "weight_decay": "decay",
    "clip_unseen": "clip_unseen",
}


def march(settings, density, shape, dtype="float32", steps=230):
    """Compares a run over resets with NumPy, which uses `momentum_mask`."""
    kwargs = MARCHES[settings]
    gradients = gradients_of(shape, steps, seed=len(settings))
    start = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tx = everywhere(density=density, mu_dtype=dtype, nu_dtype=dtype, **kwargs)
    params, masks, states = trajectory(
        tx, jnp.asarray(start), tx.init(jnp.asarray(start)), jnp.asarray(gradients)
    )
    moment_dtype = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    reference = Spam(
        start,
        dtype=np.float32,
        moment_dtypes=(moment_dtype, moment_dtype),
        **{PAPER_NAMES[k]: v for k, v in kwargs.items() if k in PAPER_NAMES},
    )
    masks, spikes = np.asarray(masks), []
    tolerance = 2e-5 if dtype == "float32" else 2**-5
    for t in range(steps):
        expected = reference.step(gradients[t], on=masks[t])
        spikes.append(reference.spikes)
        np.testing.assert_allclose(
            params[t], expected, rtol=tolerance, atol=tolerance, err_msg=f"step {t + 1}"
        )
    assert sum(spikes) > 0
    if dtype == "float32":
        counts = optax.tree.get(states, "clipped_count")
        np.testing.assert_array_equal(counts, spikes)


@pytest.mark.parametrize("settings", MARCHES)
def test_marches_beside_the_numpy_reference(settings):
    march(settings, 0.25, (24, 10))


@pytest.mark.parametrize("density", DENSITIES)
def test_marches_at_every_density(density):
    march("short windows", density, (70, 6), steps=130)


@pytest.mark.parametrize("shape", SHAPES)
def test_marches_in_every_shape(shape):
    march("short windows", 0.3225, shape, steps=130)


@pytest.mark.parametrize("settings", ["short windows", "decay"])
def test_marches_with_bfloat16_moments(settings):
    march(settings, 0.25, (24, 10), dtype="bfloat16")


def test_density_one_is_spam():
    gradients = gradients_of((9, 7), 130)
    start = jnp.ones((9, 7))
    kwargs = dict(threshold=50.0, reset_interval=50, weight_decay=0.1)
    sparse, dense = everywhere(density=1.0, **kwargs), spam_optax.spam(**kwargs)
    ours = theirs = start
    state, dense_state = sparse.init(start), dense.init(start)
    update, dense_update = jax.jit(sparse.update), jax.jit(dense.update)
    for g in gradients:
        updates, state = update(g, state, ours)
        ours = optax.apply_updates(ours, updates)
        updates, dense_state = dense_update(g, dense_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert spam_optax.momentum_mask(state, start).all()


def test_dense_leaves_follow_spam():
    """Tensors that are not chosen, vectors and scalars are updated as in `spam`."""
    params = {
        "kernel": jnp.ones((8, 4)),
        "embedding": jnp.ones((6, 4)),
        "bias": jnp.ones(4),
        "scale": jnp.ones(()),
    }
    sparse = spam_optax.sparse_spam(0.1, reset_interval=30, grace_steps=5)
    dense = spam_optax.spam(0.1, reset_interval=30, grace_steps=5)
    state, dense_state = sparse.init(params), dense.init(params)
    update, dense_update = jax.jit(sparse.update), jax.jit(dense.update)
    for t in range(70):
        g = optax.tree.random_like(jax.random.key(t), params)
        updates, state = update(g, state, params)
        expected, dense_state = dense_update(g, dense_state, params)
        for name in ("embedding", "bias", "scale"):
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
    assert (updates["kernel"] != 0).sum() == 8


def test_nonfinite_gradients_reach_no_parameter():
    """All faults are counted, with momentum or without. Other entries keep all bits."""
    shape, steps = (12, 6), 40
    rng = np.random.default_rng(2)
    gradients = gradients_of(shape, steps, p_spike=0)
    faulty = gradients.copy()
    columns = [0, 2, 3]
    for t in range(steps):
        hit = rng.random((12, 3)) < (1 if 8 <= t < 12 else 0.1)
        faults = rng.choice([np.nan, np.inf, -np.inf, 3e38, 2e19], (12, 3))
        faulty[t][:, columns] = np.where(hit, faults, faulty[t][:, columns])
    tx = everywhere(0.01, 0.25, reset_interval=10, grace_steps=4)
    params = jax.random.normal(jax.random.key(0), shape)
    after, _, states = trajectory(tx, params, tx.init(params), jnp.asarray(faulty))
    clean, _, _ = trajectory(tx, params, tx.init(params), jnp.asarray(gradients))
    for name in ("mu", "nu"):
        assert np.isfinite(optax.tree.get(states, name)).all()
    assert np.isfinite(after).all()
    untouched = [1, 4, 5]
    np.testing.assert_array_equal(after[..., untouched], clean[..., untouched])
    with np.errstate(over="ignore"):
        expected = (~np.isfinite(np.square(faulty))).sum(axis=(1, 2))
    counts = optax.tree.get(states, "nonfinite_count")
    np.testing.assert_array_equal(counts, expected)


# Where the momentum is.


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_entries_without_momentum_keep_every_bit(weight_decay):
    params = jax.random.normal(jax.random.key(0), (16, 8))
    tx = everywhere(0.1, weight_decay=weight_decay, reset_interval=10, grace_steps=2)
    gradients = jnp.asarray(gradients_of((16, 8), 25))
    after, masks, states = trajectory(tx, params, tx.init(params), gradients)
    before = jnp.concatenate([params[None], after[:-1]])
    np.testing.assert_array_equal(after[~masks], before[~masks])
    assert (after[masks] != before[masks]).mean() > 0.99
    changes = (masks[1:] != masks[:-1]).any(axis=(1, 2)).nonzero()[0].tolist()
    assert changes == [8, 18]


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_has_one_entry_a_group(shape):
    """Each density is tested with one of the numbers of blocks."""
    for i, density in enumerate(DENSITIES):
        check_groups(shape, density, [1, 3, 8][(i + SHAPES.index(shape)) % 3])


def check_groups(shape, density, row_blocks):
    """Checks the groups with plain loops."""
    tx = everywhere(density=density, row_blocks=row_blocks)
    params = jnp.zeros(shape)
    state = tx.init(params)
    mask = np.asarray(spam_optax.momentum_mask(state, params))
    moments = optax.tree.get(state, "mu")
    blocks = math.gcd(shape[-2], row_blocks)
    rows = shape[-2] // blocks
    kept = max(1, round(density * rows))
    assert moments.shape == (*shape[:-2], blocks * kept, shape[-1])
    blocked = mask.reshape(-1, blocks, rows, shape[-1])
    for r in range(kept):
        assert (blocked[:, :, r::kept].sum(axis=2) == 1).all()
    realised = spam_optax.momentum_density(state, params)
    assert realised == kept / rows == mask.mean()


def test_large_slabs_are_whole_tiles():
    """A tile of TPU memory has 8 rows. The reported density includes the rounding."""
    params = jax.ShapeDtypeStruct((8192, 128), jnp.float32)
    tx = everywhere(density=0.3225)
    state = jax.eval_shape(tx.init, params)
    assert optax.tree.get(state, "mu").shape == (2640, 128)
    assert abs(spam_optax.momentum_density(state, params) - 0.3225) < 0.001
    odd = jax.ShapeDtypeStruct((8191, 128), jnp.float32)
    state = jax.eval_shape(everywhere(density=1.0).init, odd)
    assert optax.tree.get(state, "mu").shape == odd.shape


def lanes_of(layout, seeds, name="kernel"):
    """Returns the selected members of one tensor after each of several resets."""
    moment = jnp.zeros(layout.moment_shape)

    def draw(seed):
        (salt,) = _sparse_layout.salts([name])
        return _sparse_layout.random_lanes(layout, seed, salt, moment)

    return np.asarray(jax.jit(jax.vmap(draw))(jnp.asarray(seeds, jnp.uint32)))


def window_seeds(n, key=0):
    masks = _sparse_spam._MaskSettings(0.25, None, key, 1).checked()
    return jax.vmap(masks.seeds)(jnp.arange(n))[:, 0]


@pytest.mark.parametrize("kept", [1, 8, 13, 20])
def test_every_lane_of_a_group_is_equally_likely(kept):
    """A chi-square test of each group over many resets."""
    layout = _sparse_layout.make((40, 30), 1, kept)
    lanes = lanes_of(layout, window_seeds(4000))[:, 0]
    last = kept - layout.missing_rows
    p_values = []
    for r in range(kept):
        choices = layout.lanes if r < last else layout.lanes - 1
        if choices == 1:
            assert not lanes[:, r].any()
            continue
        for column in lanes[:, r].T:
            counts = np.bincount(column, minlength=choices)
            assert len(counts) == choices
            p_values.append(scipy.stats.chisquare(counts).pvalue)
    # Uniform if the draws are fair: not too few small ones, nor too many.
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3


def agreement(ours, theirs, choices, axis):
    """Returns by how many standard errors the agreement exceeds chance."""
    same = (ours == theirs).mean(axis)
    p, n = 1 / choices, ours.size // same.size
    return (same - p) / math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("choices", [2, 3, 4, 10])
def test_groups_windows_and_tensors_are_independent(choices):
    """Any two rows, columns, resets and tensors agree as often as by chance.

    So do the differences of two rows in any two columns, and their differences in turn.
    """
    layout = _sparse_layout.make((256 * choices, 512), 1, 256)
    seeds = window_seeds(16)
    lanes = lanes_of(layout, seeds)[:, 0].astype(int)
    other = lanes_of(layout, seeds, "other")[:, 0].astype(int)
    rows = (lanes[:, 0::2] - lanes[:, 1::2]) % choices
    squares = (rows[..., 0::2] - rows[..., 1::2]) % choices
    scores = {
        "rows": agreement(lanes[:, 1:], lanes[:, :-1], choices, 2),
        "far rows": agreement(lanes[:, 100:], lanes[:, :-100], choices, 2),
        "columns": agreement(lanes[..., 1:], lanes[..., :-1], choices, 1),
        "diagonals": agreement(lanes[:, 1:, 1:], lanes[:, :-1, :-1], choices, 2),
        "windows": agreement(lanes[1:], lanes[:-1], choices, 2),
        "tensors": agreement(lanes, other, choices, 2),
        "squares": agreement(rows[..., 0::2], rows[..., 1::2], choices, 2),
        "eight": agreement(squares[:, 0::2], squares[:, 1::2], choices, 2),
    }
    for name, score in scores.items():
        assert np.abs(score).max() < 6, name
        error = math.sqrt(2 / score.size)
        assert abs((score**2).mean() - 1) < 5 * error, name


def test_masks_depend_on_key_and_blocks_alone():
    params = {"a": jnp.zeros((32, 6)), "b": jnp.zeros((32, 6))}

    def masks(**kwargs):
        tx = everywhere(**kwargs)
        return spam_optax.momentum_mask(tx.init(params), params)

    first = masks()
    jax.tree.map(np.testing.assert_array_equal, first, masks(key=jax.random.key(0)))
    assert (first["a"] != first["b"]).any()
    assert (first["a"] != masks(key=1)["a"]).any()
    assert (first["a"] != masks(row_blocks=4)["a"]).any()


def test_matrices_only():
    """Norms, biases and factors are dense, also if they are stacked or per head."""
    params = {
        "Embed_0": {"embedding": jnp.ones((9, 4))},
        "lm_head": {"kernel": jnp.ones((4, 9))},
        "MultiHeadAttention_0": {
            "query": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((2, 2))},
        },
        "layers": {
            "LayerNorm_1": {"scale": jnp.ones((3, 4))},
            "mlp": {"kernel": jnp.ones((3, 4, 8)), "bias": jnp.ones((3, 8))},
            "experts": {"kernel": jnp.ones((3, 2, 4, 4)), "alpha": jnp.ones((3, 2))},
        },
        "header": jnp.ones((2, 2)),
        "absent": None,
    }
    chosen = spam_optax.matrices_only()(params)
    names = spam_optax.tensor_names(params)
    is_sparse = dict(zip(names, jax.tree.leaves(chosen), strict=True))
    assert [name for name, sparse in is_sparse.items() if sparse] == [
        "MultiHeadAttention_0/query/kernel",
        "header",
        "layers/experts/kernel",
        "layers/mlp/kernel",
    ]
    only = spam_optax.matrices_only(exclude=("header", "MLP"))(params)
    assert not only["header"] and not only["layers"]["mlp"]["kernel"]
    assert only["Embed_0"]["embedding"]


DENSE = """
attention_norm/weight ffn_norm/weight layers/q_norm/weight layers/wq/b
LayerNorm_0/scale layers/0/input_layernorm/weight h/ln_1/bias RMSNorm_1/w conv/offset
h/scan_decoder/attention_norm/kernel
act/gamma act/beta mixer/decay experts/alpha output/weight decoder/output/kernel
params/output_layer/kernel embed_in embed_out/kernel unembed
decoder/logits_dense/kernel lm_head/weight/array LMHead_0/kernel lm_head_proj/w
decoder/logitdense/kernel cls/predictions/decoder/kernel qa_outputs/kernel
proj_out/kernel mixer/A_log value_head/kernel classifier/kernel tok_embeddings/weight
layers/mha/in_proj_bias embedder/input_embedding
emb/token_emb/weight wte/embedding positions pos_embed
"""
SPARSE = """
layers/wq/weight MultiHeadAttention_0/query/kernel multi_head/value/kernel
attention/kv_head/kernel attention/output/dense/kernel attention/output_proj/weight
layer/0/output/dense/kernel attention/out/kernel PreNorm_0/Dense_0/kernel wkv_b/kernel
blocks_0/proj_out/kernel ScaledDot_0/kernel header/kernel self_attn/q_proj/lora_b
num_heads/kernel b/kernel norm_proj/w scale/kernel adaLN_modulation/w
position_wise_ffn/kernel
"""


def test_names_of_many_trainers():
    """Words and places of parts count: `output` may be a head or attention's."""
    tree, dense, sparse = {}, DENSE.split(), SPARSE.split()
    for name in dense + sparse:
        *parts, last = name.split("/")
        node = functools.reduce(
            lambda node, part: node.setdefault(part, {}), parts, tree
        )
        node[last] = jnp.ones((2, 2))
    chosen = spam_optax.matrices_only()(tree)
    names = spam_optax.tensor_names(tree)
    is_sparse = dict(zip(names, jax.tree.leaves(chosen), strict=True))
    assert is_sparse == dict.fromkeys(dense, False) | dict.fromkeys(sparse, True)
    of_user = spam_optax.matrices_only(exclude=("output", "q_proj"))(tree)
    assert not of_user["attention"]["output"]["dense"]["kernel"]
    assert not of_user["self_attn"]["q_proj"]["lora_b"] and of_user["wte"]["embedding"]


def test_tensors_are_described():
    """The descriptions are found in chains and wrappers, and print as a table."""
    params = {"embed": jnp.ones((16, 8)), "mlp": {"kernel": jnp.ones((8, 4))}}
    sparse = spam_optax.sparse_spam(1e-3)
    chain = optax.chain(optax.clip(1.0), spam_optax.track_spikes(sparse))
    for tx in (sparse, chain):
        embed, kernel = spam_optax.describe_tensors(tx.init(params), params)
        assert embed == ("embed", (16, 8), "embedding", 1.0, (16, 8))
        assert kernel == ("mlp/kernel", (8, 4), "feed-forward", 0.25, (2, 4))
    partition = optax.partition(
        {"a": spam_optax.adam_mini(), "b": optax.lion(1e-3), "c": optax.sgd(1e-3)},
        {"embed": "a", "mlp": {"kernel": "b", "bias": "c"}},
    )
    params["mlp"]["bias"] = jnp.ones(4)
    state = jax.eval_shape(partition.init, params)
    rows = spam_optax.describe_tensors(state, params)
    assert [row.density for row in rows] == [1.0, 0.0, 1.0]
    assert [row.second_moments for row in rows] == [(16, 1), None, None]
    assert str(rows).splitlines()[2].split() == [
        "mlp/bias",
        "(4,)",
        "vector",
        "0%",
        "none",
    ]
    with pytest.raises(ValueError, match="must hold first moments mu"):
        spam_optax.describe_tensors(optax.sgd(1e-3).init(params), params)
    with pytest.raises(ValueError, match="must be those of the moments mu"):
        spam_optax.describe_tensors(state, {"embed": jnp.ones((16, 8))})
    for other in (None, {name: {} for name in params}, dict.fromkeys(params, params)):
        with pytest.raises(ValueError, match="must be those of the moments mu"):
            spam_optax.describe_tensors(spam_optax.spam(1e-3).init(params), other)


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-3), spam_optax.spam(), optax.novograd(1.0)]
)
def test_layers_called_mu_are_no_moments(tx):
    params = {"vae": {"mu": {"kernel": jnp.ones((4, 2))}, "nu": jnp.ones(2)}}
    first = tx.init(params)
    # MaxText keeps a state as dictionaries.
    for state in (first, flax.serialization.to_state_dict(first)):
        rows = spam_optax.describe_tensors(state, params)
        assert [row.name for row in rows] == ["vae/mu/kernel", "vae/nu"]
        assert [row.density for row in rows] == [1.0, 1.0]


def test_density_of_a_number_among_the_parameters():
    state = spam_optax.sparse_spam().init({"a": 1.0})
    assert spam_optax.momentum_density(state, {"a": 1.0}) == {"a": 1.0}


def test_sparse_params_of_an_nnx_model():
    """The `value` at the end of NNX paths is not part of a name."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.value = nnx.Linear(8, 8, rngs=rngs)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, spam_optax.sparse_spam(0.1), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # Before Flax 0.12.7.
    state = as_pure(optimizer.opt_state)
    mask = spam_optax.momentum_mask(state, as_pure(params))
    after = nnx.to_pure_dict(params)
    moved = jax.tree.map(lambda x, y: x != y, after, before)
    assert mask["value"]["kernel"].sum() == 16
    np.testing.assert_array_equal(moved["value"]["kernel"], mask["value"]["kernel"])
    assert moved["embed"]["embedding"].all()


def test_momentum_mask_finds_states_in_wrappers():
    params = {"a": jnp.ones((8, 3)), "b": jnp.ones((8, 3))}
    partition = optax.partition(
        {"sparse": everywhere(), "adam": optax.adam(0.1)}, {"a": "sparse", "b": "adam"}
    )
    for tx in (partition, optax.chain(optax.clip_by_global_norm(1.0), partition)):
        state = tx.init(params)
        mask = spam_optax.momentum_mask(state, params)
        assert (mask["a"].sum(), mask["b"].sum()) == (6, 0)
        assert spam_optax.momentum_density(state, params) == {"a": 0.25, "b": 0.0}


def test_momentum_mask_of_sparse_and_dense_parameters():
    params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    state = spam_optax.sparse_spam().init(params)
    mask = spam_optax.momentum_mask(state, params)
    assert (mask["kernel"].sum(), mask["bias"].sum()) == (6, 3)


# Memory.


def test_state_bytes():
    """At density 1/4 the state takes 2 bytes per parameter. Masks take none."""
    params = jax.ShapeDtypeStruct((8192, 1024), jnp.float32)

    def state_bytes(**kwargs):
        state = jax.eval_shape(everywhere(**kwargs).init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    counters = 4 + 16 + 4
    assert state_bytes() == 2 * params.size + counters
    assert state_bytes(count=False) == 2 * params.size + counters - 16
    assert state_bytes(mu_dtype="bfloat16", nu_dtype="bfloat16") == (
        params.size + counters
    )


# Checkpoints.


def state_midway(tx, params, steps=7):
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        g = optax.tree.random_like(jax.random.key(t), params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("library", ["orbax", "flax"])
def test_a_restored_state_continues_bit_for_bit(tmp_path, library):
    """The state is saved between resets, and later masks are the same too."""
    params = {"kernel": jnp.ones((16, 4)), "bias": jnp.ones(4)}
    tx = everywhere(0.1, reset_interval=10, grace_steps=2)
    saved = state_midway(tx, params)
    if library == "flax":
        target = jax.tree.map(jnp.zeros_like, saved)
        restored = flax.serialization.from_bytes(
            target, flax.serialization.to_bytes(saved)
        )
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", saved)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(
                tmp_path / "state", jax.eval_shape(lambda: saved)
            )
    update = jax.jit(tx.update)
    runs = []
    for params, state in (saved, restored):
        for t in range(7, 25):
            g = optax.tree.random_like(jax.random.key(t), params)
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        runs.append((params, state))
    jax.tree.map(np.testing.assert_array_equal, *runs)


# Meshes.


def sharded_run(tx, params, spec, mesh, steps=range(25), state=None):
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: jax.device_put(x, P(*spec[: x.ndim])), params)
        fresh = jax.jit(tx.init)(params)
        state = fresh if state is None else jax.device_put(state, shardings(fresh))
        update = jax.jit(tx.update)
        for t in steps:
            g = optax.tree.random_like(jax.random.key(t), params)
            g = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), g, params)
            updates, state = update(g, state, params)
            params = jax.jit(optax.apply_updates)(params, updates)
        mask = jax.jit(spam_optax.momentum_mask)(state, params)
        text = update.lower(g, state, params).compile().as_text()
        return jax.device_get((params, state, mask)), text


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


AXIS_TYPES = {
    "explicit": jax.sharding.AxisType.Explicit,
    "auto": jax.sharding.AxisType.Auto,
}


@pytest.mark.parametrize("kind", AXIS_TYPES)
def test_sharded_run_equals_one_device(kind):
    """Results and masks are equal, and all collectives are of scalars."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AXIS_TYPES[kind],) * 2)
    params = {"kernel": jnp.ones((64, 16)), "stack": jnp.ones((8, 32, 8))}
    tx = everywhere(
        0.1,
        row_blocks=8,
        reset_interval=10,
        grace_steps=2,
        weight_decay=0.1,
    )
    alone = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    expected, _ = sharded_run(tx, params, P(), alone)
    ours, text = sharded_run(tx, params, P("x", "y"), mesh)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        ours,
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, ours[2], expected[2])
    assert_scalar_all_reduces(text)


def assert_scalar_all_reduces(text):
    found = hlo.collectives(text)
    assert found
    for collective in found:
        assert collective.kind == "all-reduce", collective
        assert all(array.shape == () for array in collective.results), collective


def test_a_state_saved_on_one_mesh_continues_on_another(tmp_path):
    """First 8 devices share the rows, then 4 x 2 share both axes, over a reset."""
    tx = everywhere(0.1, row_blocks=8, reset_interval=10, grace_steps=2)
    params = {"kernel": jnp.ones((64, 16))}
    first = jax.make_mesh((8,), ("x",))
    second = jax.make_mesh((4, 2), ("x", "y"))
    expected, _ = sharded_run(tx, params, P("x", None), first)
    (*saved, _), _ = sharded_run(tx, params, P("x", None), first, range(7))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "state", saved)
    ours, _ = sharded_run(tx, params, P("x", "y"), second, range(7, 25), state)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        ours,
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, ours[2], expected[2])
