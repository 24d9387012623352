"""The model: its shape, its outputs, and its options against instability.

The options are compared with a forward pass written out in NumPy.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pretrain
from spam_optax.nnx import fold_wesar
from trainer import cli, config, model, run_folder, sharding, train_step
from trainer.config import RunConfig
from trainer.errors import UsageError

pytestmark = pytest.mark.one_python

# Whole forward and backward passes, each compiled and run once or twice.

LAYERS, WIDTH, HEADS, TOKENS = 8, 32, 2, 12
SHAPE = model.ModelConfig(LAYERS, WIDTH, HEADS, ffn_width=64, vocabulary=256)
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
IDS = jax.random.randint(jax.random.key(0), (2, TOKENS), 0, 256)


def build(**options):
    """The structure of a model, and parameters whose norms have scales of their own."""
    shape = dataclasses.replace(SHAPE, **options)
    graphdef, _ = model.abstract(shape)
    # Drawn once for all that does not change them, since drawing is compiled.
    parameters = ("gated_attention", "initialization", "untied_head")
    drawn = {name: getattr(shape, name) for name in parameters}
    return graphdef, dict(draw(dataclasses.replace(SHAPE, **drawn)))


@functools.cache
def draw(shape):
    params = train_step.initial_params(shape, 0)
    for number, name in enumerate(("attention_norm", "ffn_norm")):
        norm = params["blocks"][name]
        noise = np.random.default_rng(number).normal(size=norm["scale"].shape)
        norm["scale"] = norm["scale"] + np.float32(0.3 * noise)
    return params


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params):
    return model.forward(graphdef, params, IDS)[0]


@functools.partial(jax.jit, static_argnums=0)
def gradient(graphdef, params):
    return jax.grad(train_step.loss_fn)(params, IDS, graphdef)


# ------------------------------------------------------------ written out, in NumPy


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attention_scores(p, x):
    heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
    query, key = ((x @ p[name]["kernel"]).reshape(heads) for name in ("query", "key"))
    if "query_norm" in p:
        query = normed(query, p["query_norm"]["scale"])
        key = normed(key, p["key_norm"]["scale"])
    query, key = (
        np.float64(model.rotate(jnp.asarray(y), SHAPE.rotary_base))
        for y in (query, key)
    )
    return np.einsum("bqhk,bthk->bhqt", query, key) / math.sqrt(WIDTH // HEADS)


def attention(p, x, cap=None):
    heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
    value = (x @ p["value"]["kernel"]).reshape(heads)
    scores = attention_scores(p, x)
    if cap:
        scores = cap * np.tanh(scores / cap)
    seen = np.exp(scores) * np.tri(TOKENS)
    seen /= seen.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqt,bthk->bqhk", seen, value)
    if "gate" in p:
        out *= sigmoid(x @ p["gate"]["kernel"]).reshape(heads)
    return out.reshape(x.shape) @ p["out"]["kernel"]


def feed_forward(p, x):
    gate = x @ p["gate"]["kernel"]
    return (gate * sigmoid(gate) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]


def written_out(params, norm, post_layers, attention=attention):
    """The whole forward pass, one layer after the other, in float64."""
    params = jax.tree.map(np.float64, params)
    table = params["embed"]["embedding"]
    x = table[np.asarray(IDS)]
    for number in range(1, len(params["blocks"]["ffn_norm"]["scale"]) + 1):
        p = jax.tree.map(lambda leaf, n=number: leaf[n - 1], params["blocks"])
        factor = 1 / math.sqrt(number) if norm == "scaled" else 1
        for part, apply in (("attention", attention), ("ffn", feed_forward)):
            scale = p[f"{part}_norm"]["scale"]
            if norm == "mixed" and number <= post_layers:
                x = normed(x + apply(p[part], x), scale)
            else:
                x = x + apply(p[part], factor * normed(x, scale))
    return normed(x, params["norm"]["scale"]) @ table.T


@pytest.mark.parametrize(
    ("norm", "gated"),
    [("pre", True), ("scaled", False), ("mixed", False), ("mixed", True)],
)
def test_forward_pass_is_the_one_written_out(norm, gated):
    """A quarter of eight layers is two."""
    graphdef, params = build(norm=norm, gated_attention=gated)
    want = written_out(params, norm, post_layers=2)
    got = logits_of(graphdef, params)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-4)
    assert want.std() > 0.1


def large_logits(**options):
    """A model and parameters with attention logits of about 10, and scales of norms."""
    graphdef, params = build(**options)
    attention = dict(params["blocks"]["attention"])
    for number, name in enumerate(("query", "key")):
        attention[name] = {"kernel": 8 * attention[name]["kernel"]}
        if options.get("qk_norm"):
            noise = np.random.default_rng(number).normal(size=(LAYERS, WIDTH // HEADS))
            attention[f"{name}_norm"] = {"scale": jnp.asarray(1 + 0.3 * noise)}
    return graphdef, params | {"blocks": params["blocks"] | {"attention": attention}}


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"attention_softcap": 2.0}, {"qk_clip": 100.0}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_attention_are_those_written_out(options):
    graphdef, params = large_logits(**options)
    cap = options.get("attention_softcap")
    written = functools.partial(attention, cap=cap)
    want = written_out(params, "pre", 0, written)
    got = logits_of(graphdef, params)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    # The option matters, except QK-clip, which changes no forward pass.
    without, plain = build()
    blocks = params["blocks"]["attention"]
    kept = {name: blocks[name] for name in plain["blocks"]["attention"]}
    plain = params | {"blocks": params["blocks"] | {"attention": kept}}
    difference = np.abs(logits_of(without, plain) - want).max()
    assert (difference > 0.1) == ("qk_clip" not in options)


def test_logits_of_the_next_token_stay_below_their_cap():
    graphdef, params = build(logit_softcap=0.2)
    plain, _ = build()
    want = 0.2 * np.tanh(logits_of(plain, params) / 0.2)
    np.testing.assert_allclose(logits_of(graphdef, params), want, rtol=1e-5, atol=1e-6)
    assert np.abs(want).max() > 0.15


def test_largest_attention_logits_are_those_of_every_layer_and_head():
    graphdef, params = large_logits(qk_clip=100.0, remat="full")

    def objective(params):
        logits, largest = model.forward(graphdef, params, IDS)
        return logits.sum(), largest

    gradient, got = jax.jit(jax.grad(objective, has_aux=True))(params)
    largest = []

    def record(p, x):
        scores = attention_scores(p, x)
        seen = np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf)
        largest.append(seen.max((0, 2, 3)))
        return attention(p, x)

    written_out(params, "pre", 0, record)
    np.testing.assert_allclose(got, largest, rtol=1e-3)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


def test_measuring_attention_logits_takes_no_memory():
    """At a length where attention's logits are most of the memory."""
    tokens = jax.ShapeDtypeStruct((2, 513), jnp.int32)

    def temporaries(**options):
        graphdef, shapes = model.abstract(dataclasses.replace(SHAPE, **options))

        def objective(params, tokens):
            logits, largest = model.forward(graphdef, params, tokens)
            return logits.sum(), largest

        gradient = jax.jit(jax.grad(objective, has_aux=True))
        compiled = gradient.lower(shapes, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(qk_clip=100.0) <= 1.01 * temporaries()


@pytest.mark.parametrize(
    "options", [{"qk_norm": True}, {"attention_softcap": 30.0}, {"norm": "mixed"}]
)
def test_options_that_qk_clip_does_not_go_with_are_refused(options):
    with pytest.raises(UsageError, match="qk-clip and --.* must not be combined"):
        RunConfig.from_settings(qk_clip=100.0, **options)


@pytest.mark.parametrize(("layers", "post_layers"), [(2, 1), (7, 1)])
def test_a_quarter_of_the_layers_is_rounded_down_to_at_least_one(layers, post_layers):
    graphdef, params = build(norm="mixed", layers=layers, scan_unroll=2)
    params["blocks"] = jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])
    want = written_out(params, "mixed", post_layers)
    np.testing.assert_allclose(logits_of(graphdef, params), want, rtol=1e-3, atol=2e-4)


def test_layernorm_scaling_is_a_smaller_scale_in_each_layers_norms():
    """The same numbers as pre-norm, with scales divided by the roots of 1 to 8."""
    graphdef, params = build(norm="scaled")
    plain, _ = build(norm="pre")
    roots = np.sqrt(np.arange(1, LAYERS + 1, dtype=np.float32))[:, None]
    smaller = {
        name: {"scale": params["blocks"][name]["scale"] / roots}
        for name in ("attention_norm", "ffn_norm")
    }
    same = params | {"blocks": params["blocks"] | smaller}
    np.testing.assert_allclose(
        logits_of(graphdef, params), logits_of(plain, same), rtol=1e-4, atol=1e-5
    )


def test_a_gate_of_zeros_halves_what_attention_adds():
    graphdef, params = build(gated_attention=True)
    plain, _ = build()

    def with_attention(**parts):
        attention = {**params["blocks"]["attention"], **parts}
        attention = {name: part for name, part in attention.items() if part}
        return params | {"blocks": params["blocks"] | {"attention": attention}}

    attention = params["blocks"]["attention"]
    closed = with_attention(
        gate={"kernel": jnp.zeros_like(attention["gate"]["kernel"])}
    )
    half = with_attention(gate=None, out={"kernel": attention["out"]["kernel"] / 2})
    np.testing.assert_allclose(
        logits_of(graphdef, closed), logits_of(plain, half), rtol=1e-5, atol=1e-6
    )


def test_rematerialization_changes_no_gradient():
    """The model has LayerNorm Scaling, whose factors are scanned with the layers."""
    want, got = (
        gradient(*build(norm="scaled", gated_attention=True, remat=remat))
        for remat in ("none", "full")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, want
    )


def test_every_parameter_of_every_layer_has_a_gradient():
    """The model has Mix-LN, which divides the stack of layers in two."""
    graphdef, params = build(norm="mixed", gated_attention=True, remat="full")
    for leaf in jax.tree.leaves(gradient(graphdef, params)["blocks"]):
        assert (np.abs(leaf).reshape(LAYERS, -1).max(axis=1) > 0).all()


def test_half_precision_is_close():
    options = {"norm": "scaled", "gated_attention": True}
    exact = logits_of(*build(**options))
    got = logits_of(*build(**options, compute_dtype="bfloat16"))
    difference = np.abs(got - exact).max() / np.abs(exact).max()
    assert 0.001 < difference < 0.1


# ------------------------------------------------------------------------------ WeSaR


def test_wesar_draws_matrices_alike_and_scales_them_as_spike_no_more_does():
    _, params = build(initialization="wesar", gated_attention=True, untied_head=True)
    std = math.sqrt(2 / (5 * WIDTH))
    small = {"out", "down"}
    blocks = params["blocks"]
    layers = blocks["attention"] | blocks["ffn"] | {"head": params["head"]}
    assert layers.keys() == {*MATRICES, "head"}
    for name, layer in layers.items():
        kernel, alpha = layer["kernel"], layer["alpha"]
        assert kernel.std() == pytest.approx(math.sqrt(4e-5), rel=0.03), name
        target = std / math.sqrt(2 * LAYERS) if name in small else std
        assert alpha.shape == kernel.shape[:-2]
        np.testing.assert_allclose(alpha * math.sqrt(4e-5), target, rtol=1e-6)
    assert params["embed"]["embedding"].std() == pytest.approx(std, rel=0.03)


def test_wesar_folds_into_a_standard_model():
    options = {"gated_attention": True, "untied_head": True}
    graphdef, params = build(initialization="wesar", **options)
    plain, like = model.abstract(dataclasses.replace(SHAPE, **options))
    folded = fold_wesar(params)
    assert jax.tree.structure(folded) == jax.tree.structure(like)
    want = logits_of(plain, folded)
    np.testing.assert_allclose(logits_of(graphdef, params), want, atol=1e-6)
    assert want.std() > 0.1


# -------------------------------------------------------------- sizes, sharding, flags


@pytest.mark.parametrize("preset", model.PRESETS)
@pytest.mark.parametrize("initialization", ["standard", "wesar"])
def test_matrix_parameters_count_the_gate_and_no_scale(preset, initialization):
    """The head is here the embedding. The shapes of the matrices are those of LLaMA."""
    shape = dataclasses.replace(
        model.PRESETS[preset], gated_attention=True, initialization=initialization
    )
    attention, feed_forward = 5 * shape.width**2, 3 * shape.width * shape.ffn_width
    matrices = shape.layers * (attention + feed_forward)
    assert shape.matrix_parameters == matrices + shape.vocabulary * shape.width


def test_every_matrix_is_split_on_a_mesh():
    mesh = sharding.make_mesh(sharding.Parallelism(data=2, fsdp=2, tensor=2), 4)
    _, params = build(initialization="wesar", gated_attention=True, untied_head=True)
    abstract = sharding.abstract(params, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        axes = set(leaf.sharding.spec) - {None}
        is_matrix = path[-1].key in ("kernel", "embedding")
        assert axes == ({"fsdp", "tensor"} if is_matrix else set()), path
    attention = abstract["blocks"]["attention"]
    assert attention["gate"]["kernel"].sharding == attention["query"]["kernel"].sharding


def test_loss_on_a_mesh_is_that_of_one_device():
    """The model has Mix-LN, which divides the stack of sharded layers in two."""
    graphdef, params = build(
        norm="mixed", gated_attention=True, untied_head=True, initialization="wesar"
    )
    windows = jax.random.randint(jax.random.key(2), (4, TOKENS + 1), 0, 256)
    loss = jax.jit(train_step.loss_fn, static_argnums=2)
    want = loss(params, windows, graphdef)
    mesh = sharding.make_mesh(sharding.Parallelism(data=2, fsdp=2, tensor=2), 4)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, sharding.abstract(params, mesh)
        )
        placed = jax.device_put(jax.device_get(params), shardings)
        batch = sharding.put_batch(np.asarray(windows)[None], mesh)[0]
        assert loss(placed, batch, graphdef) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("initialization", ["stable", "wesar"])
def test_two_ways_to_scale_with_depth_are_refused(initialization, capsys):
    flags = ["--norm", "scaled", "--initialization", initialization]
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(flags)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"pretrain.py: error: --norm scaled and --initialization {initialization}"
    )
    with pytest.raises(UsageError):
        config.RunConfig.from_settings(norm="scaled", initialization=initialization)
    for norm in ("pre", "mixed"):
        config.RunConfig.from_settings(norm=norm, initialization=initialization)


def test_flags_reach_the_model_and_the_folder_of_a_run():
    flags = ["--norm=mixed", "--gated-attention", "--initialization=wesar"]
    _, options = pretrain.parse(flags)
    given = cli.run_settings(options)
    run = run_folder.Run(config.RunConfig.from_settings(**given), None, 1)
    assert run_folder.Run.from_json(run.to_json()) == run
    shape = model.for_platform(run.config.model, 256, "cpu")
    got = shape.norm, shape.gated_attention, shape.initialization
    assert got == ("mixed", True, "wesar")
    usual = model.for_platform(RunConfig().model, 256, "cpu")
    assert (usual.norm, usual.gated_attention) == ("pre", False)
    with pytest.raises(UsageError, match="norm must be one of .*, not 'post'"):
        run_folder.Run.from_json(run.to_json() | {"norm": "post"})


# ----------------------------------------------------------- shape and computation


def test_flags_give_a_preset_another_shape():
    shape = {"layers": 5, "width": 48, "heads": 3, "ffn_width": 100}
    flags = [f"--{name.replace('_', '-')}={x}" for name, x in shape.items()]
    _, options = pretrain.parse(flags)
    ours = RunConfig.from_settings(**cli.run_settings(options))
    run = run_folder.Run(ours, None, 1)
    assert run_folder.Run.from_json(run.to_json()) == run
    assert ours.settings().items() >= shape.items()
    leaves = jax.tree.leaves(abstract_model(ours.model))
    assert sum(leaf.size for leaf in leaves) == parameter_count(ours.model)
    assert ours.with_settings(seed=1).model == ours.model
    assert ours.with_settings(preset="nano").model == model.PRESETS["nano"]
    older = {name: x for name, x in run.to_json().items() if name not in shape}
    assert run_folder.Run.from_json(older).config == RunConfig()


@nnx.jit
def run_decoder(decoder, tokens):
    return decoder(tokens)


@pytest.fixture(scope="module")
def decoder():
    return model.Decoder(model.PRESETS["nano"], rngs=nnx.Rngs(0))


def parameter_count(shape):
    """Counts by hand: attention, gated feed-forward, norms, embedding, head."""
    block = 4 * shape.width**2 + 3 * shape.width * shape.ffn_width + 2 * shape.width
    tables = (1 + shape.untied_head) * shape.vocabulary * shape.width
    return shape.layers * block + tables + shape.width


def abstract_model(shape):
    decoder = nnx.eval_shape(lambda: model.Decoder(shape, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(decoder))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("preset", model.PRESETS)
def test_model_has_the_parameters_of_its_shape(preset, untied):
    shape = dataclasses.replace(model.PRESETS[preset], untied_head=untied)
    leaves = jax.tree.leaves(abstract_model(shape))
    assert sum(leaf.size for leaf in leaves) == parameter_count(shape)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("preset", "millions"), [("9m", 9), ("60m", 58), ("130m", 134), ("350m", 368)]
)
def test_published_shapes_have_their_size(preset, millions):
    """The shapes have an untied head, as in LLaMA."""
    shape = RunConfig.from_settings(preset=preset).model
    assert shape.untied_head
    assert round(parameter_count(shape) / 1e6) == millions


def test_half_precision_keeps_parameters_in_float32():
    shape = dataclasses.replace(model.PRESETS["nano"], compute_dtype="bfloat16")
    leaves = jax.tree.leaves(abstract_model(shape))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize("embedding", model.EMBEDDINGS)
@pytest.mark.parametrize("dtype", model.COMPUTE_DTYPES)
def test_stream_leaves_a_large_embedding_large(embedding, dtype):
    """Condition 2 of Spike No More: a deviation of 0.63 (scaled) or 1 (normed)."""
    shape = dataclasses.replace(
        model.PRESETS["nano"],
        embedding=embedding,
        initialization="stable",
        compute_dtype=dtype,
    )
    embed = model.Decoder(shape, rngs=nnx.Rngs(0)).embed
    expected = {"plain": (0.4 / 32) ** 0.5, "scaled": 0.4**0.5, "normed": 1.0}
    x = embed(jnp.arange(256))
    assert x.dtype == dtype
    assert x.astype(jnp.float32).std() == pytest.approx(expected[embedding], rel=0.05)


def test_stable_initialization_makes_small_sublayers():
    shape = dataclasses.replace(model.PRESETS["tiny"], initialization="stable")
    blocks = nnx.state(model.Decoder(shape, rngs=nnx.Rngs(0)).blocks)
    std = (2 / (5 * shape.width)) ** 0.5
    residual = std / (2 * shape.layers) ** 0.5
    for part, name, expected in (
        ("attention", "query", std),
        ("ffn", "gate", std),
        ("attention", "out", residual),
        ("ffn", "down", residual),
    ):
        kernel = blocks[part][name]["kernel"][...]
        assert kernel.std() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_does_not_change_the_gradient(params, task, remat):
    shape = dataclasses.replace(task.model, remat=remat)
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: model.Decoder(shape, rngs=nnx.Rngs(0)))
    )
    windows = next(iter(task.train))[0]
    gradient = jax.jit(jax.grad(train_step.loss_fn), static_argnums=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient(params, windows, graphdef),
        gradient(params, windows, task.graphdef),
    )


def test_loss_at_initialization_is_that_of_a_uniform_guess(task, params):
    loss = train_step.evaluate(params, task.validation, graphdef=task.graphdef)
    assert loss == pytest.approx(math.log(256), rel=0.03)


def test_model_is_causal(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 256)
    logits, other = run_decoder(decoder, tokens), run_decoder(decoder, changed)
    np.testing.assert_array_equal(logits[:, :7], other[:, :7])
    assert (np.abs(logits[:, 7:] - other[:, 7:]).max(axis=-1) > 0).all()


def test_model_sees_the_order_of_earlier_tokens(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    swapped = tokens.at[:, 2].set(tokens[:, 3]).at[:, 3].set(tokens[:, 2])
    last, other = (run_decoder(decoder, t)[:, -1] for t in (tokens, swapped))
    assert np.abs(last - other).max() > 1e-6


def test_layers_are_drawn_independently_and_all_used(task, params):
    windows = next(iter(task.train))[0]
    gradients = jax.jit(jax.grad(train_step.loss_fn), static_argnums=2)(
        params, windows, task.graphdef
    )
    layers = model.PRESETS["nano"].layers
    for leaf in jax.tree.leaves(gradients["blocks"]):
        assert len(leaf) == layers
        assert (np.abs(leaf).reshape(layers, -1).max(axis=1) > 0).all()
    kernel = params["blocks"]["ffn"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_scan_unrolling_does_not_change_the_model(decoder):
    config = dataclasses.replace(model.PRESETS["nano"], scan_unroll=2)
    unrolled = model.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    np.testing.assert_allclose(
        run_decoder(decoder, tokens), run_decoder(unrolled, tokens), atol=1e-5
    )


rotate = jax.jit(model.rotate)


def test_rotary_product_depends_on_the_distance_only():
    tokens = 10
    query, key = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    queries, keys = (
        np.asarray(rotate(np.tile(x, (1, tokens, 1, 1)), 100.0))[0, :, 0]
        for x in (query, key)
    )
    products = queries @ keys.T
    for distance in range(tokens):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len({round(float(x), 4) for x in products[0]}) == tokens


def test_rotation_keeps_norms_and_the_first_position():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    rotated = np.asarray(rotate(x, 10_000.0))
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_flat_dot_general_is_the_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 5))
    dimensions = (((2,), (0,)), ((), ()))
    np.testing.assert_allclose(
        model.flat_dot_general(x, kernel, dimensions), x @ kernel, rtol=1e-5
    )
    with pytest.raises(ValueError, match="last axis"):
        model.flat_dot_general(x, kernel, (((1,), (0,)), ((), ())))
