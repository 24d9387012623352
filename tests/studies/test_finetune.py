"""Fine-tuning: pre-trained checkpoints, LoRA, the study, and the program."""

import dataclasses
import json
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import finetune as program
import spam_optax
from studies import finetune, lora, pretrained, task
from studies.comparison import variants
from studies.finetune import FineTuneStudy, Options
from trainer import model, optimizers, train_step
from trainer.checkpoints import Checkpoints
from trainer.config import RunConfig
from trainer.data import text_files
from trainer.errors import UsageError
from trainer.run_folder import Run, RunFolder
from trainer_in_process import make_task

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

BASE = RunConfig(steps=12, batch_size=2, sequence_length=16, eval_sequences=4, bursts=0)


def make_run(folder, text, tokenizer="bytes"):
    """Writes what a run of pretrain.py leaves: its settings and a checkpoint."""
    config = RunConfig.from_settings(
        preset="nano",
        batch_size=2,
        sequence_length=16,
        optimizers=("adam",),
        data=str(text),
        tokenizer=tokenizer,
    )
    files = RunFolder(folder)
    files.create(Run(config, None, 1, text_files.load(config.data, tokenizer)[2]))
    optimizer = optimizers.make("adam", config)
    state = train_step.initial_state(make_task(config), optimizer)
    with Checkpoints(str(files.checkpoints / "adam"), 1) as saved:
        saved.save(state._replace(step=jnp.int32(3)), {"next_index": 3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with two texts, and a run on the first of them."""
    path = tmp_path_factory.mktemp("finetune")
    text = text_files.SHAKESPEARE.read_bytes()
    (path / "old.txt").write_bytes(text[:4000])
    (path / "new.txt").write_bytes(text[90_000:94_000].upper())
    make_run(path / "run", path / "old.txt")
    return path


@pytest.fixture(scope="module")
def study(folder):
    options = Options(checkpoint=str(folder / "run"), data=str(folder / "new.txt"))
    return FineTuneStudy(options)


@pytest.fixture(scope="module")
def records(study):
    """Returns the records of two rates, the first of which changes no parameter."""
    runs = task.grid(BASE, ["adam"], ["clean"], [1e-30, 1e-2], [0])
    train = study.compile(runs[0])
    return [train(run, lambda fraction: None) for run in runs]


# ------------------------------------------------------------------- the checkpoint


def test_the_newest_checkpoint_of_a_run_is_read(folder, study):
    params = make_task(RunFolder(folder / "run").read().config)
    expected = train_step.initial_params(params.model, 0)
    jax.tree.map(np.testing.assert_array_equal, study.base.params, expected)
    again = pretrained.read(folder / "run" / "checkpoints" / "adam")
    assert again.digest == study.base.digest
    assert study.old_text == str(folder / "old.txt")
    assert study.base.model.vocabulary == 256


def test_one_of_several_optimizers_is_named(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["optimizers"] = ["adam", "adamw"]
    (run / "config.json").write_text(json.dumps(content))
    shutil.copytree(run / "checkpoints" / "adam", run / "checkpoints" / "adamw")
    with pytest.raises(
        UsageError, match="must have one checkpoint, not these: .*adamw"
    ):
        pretrained.read(run)
    assert pretrained.read(run / "checkpoints" / "adam").params


def test_a_bpe_is_that_of_the_old_text(folder, tmp_path):
    make_run(tmp_path / "run", folder / "old.txt", tokenizer="bpe:300")
    options = Options(str(tmp_path / "run"), str(folder / "new.txt"))
    study = FineTuneStudy(options)
    assert study.base.tokenizer.endswith(".json")
    (run,) = task.grid(BASE, ["adam"], ["clean"], [0.1], [0])
    batches, _ = study.task(run).inputs(run)
    tokenizer, _, _ = text_files.load(str(folder / "old.txt"), "bpe:300")
    new = (folder / "new.txt").read_text()
    assert tokenizer.decode(batches[0, 0]) in new


def test_a_name_of_a_record_follows_what_was_read(folder, study, tmp_path):
    (run,) = task.grid(BASE, ["adam"], ["clean"], [0.1], [0])
    copied = tmp_path / "copied.txt"
    copied.write_bytes((folder / "new.txt").read_bytes())
    same = FineTuneStudy(dataclasses.replace(study.options, data=str(copied)))
    assert same.name(run) == study.name(run)
    copied.write_bytes((folder / "old.txt").read_bytes())
    other = FineTuneStudy(dataclasses.replace(study.options, data=str(copied)))
    assert other.name(run) != study.name(run)


# --------------------------------------------------------------------- Hugging Face

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}


def llama_tensors(config, seed=0):
    """Draws the tensors of a LLaMA, with the names and shapes of Hugging Face."""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], width)}
    shapes |= {"model.norm": (width,), "lm_head": (config["vocab_size"], width)}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.self_attn.{x}_proj": (width, width) for x in "qo"}
        shapes |= {f"{layer}.self_attn.{x}_proj": (keys, width) for x in "kv"}
        shapes |= {f"{layer}.mlp.{x}_proj": (ffn, width) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (width, ffn)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{layer}.{x}": (width,) for x in norms}
    rng = np.random.default_rng(seed)
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32) / 3
        for name, shape in shapes.items()
    }


def llama_logits(tensors, config, tokens):
    """Computes a LLaMA of one sequence with NumPy, as its paper describes it."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    angle = np.arange(len(tokens))[:, None] / config["rope_theta"] ** (
        np.arange(0, size, 2) / size
    )

    def norm(x, name):
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        scaled = x / np.sqrt(mean_square + config["rms_norm_eps"])
        return scaled * tensors[f"{name}.weight"]

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    def rotated(x):  # one head: the first half of the features with the second
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(x, name):
        query, key, value = (
            linear(x, f"{name}.{y}_proj").reshape(len(tokens), -1, size) for y in "qkv"
        )
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            logits = rotated(query[:, head]) @ rotated(key[:, group]).T / size**0.5
            logits[np.triu_indices(len(tokens), 1)] = -np.inf
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            outputs.append(weights @ value[:, group])
        return linear(np.concatenate(outputs, axis=-1), f"{name}.o_proj")

    def feed_forward(x, name):
        gate = linear(x, f"{name}.gate_proj")
        return linear(
            gate / (1 + np.exp(-gate)) * linear(x, f"{name}.up_proj"),
            f"{name}.down_proj",
        )

    x = tensors["model.embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + feed_forward(
            norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp"
        )
    x = norm(x, "model.norm")
    if config.get("tie_word_embeddings"):
        return x @ tensors["model.embed_tokens.weight"].T
    return linear(x, "lm_head")


def write_llama(folder, tensors, config):
    """Writes a folder of Hugging Face with two safetensors files."""
    numpy = pytest.importorskip("safetensors.numpy")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    half = len(tensors) // 2
    parts = list(tensors.items())[:half], list(tensors.items())[half:]
    for number, part in enumerate(parts, 1):
        numpy.save_file(dict(part), folder / f"model-{number}-of-2.safetensors")
    return folder


def write_flax_llama(folder, tensors, config):
    """Writes a folder of Hugging Face with the parameters of its Flax model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    renamed = {}
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        if name == "model.embed_tokens.weight":
            renamed[f"{stem}.embedding"] = value
        elif value.ndim == 2:
            renamed[f"{stem}.kernel"] = value.T
        else:
            renamed[name] = value
    tree = flax.traverse_util.unflatten_dict(renamed, sep=".")
    content = flax.serialization.msgpack_serialize(tree)
    (folder / "flax_model.msgpack").write_bytes(content)
    return folder


@pytest.mark.parametrize("write", [write_llama, write_flax_llama])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_a_llama_has_the_logits_of_its_paper(changes, write, tmp_path):
    config = LLAMA | changes
    tensors = llama_tensors(config)
    folder = write(tmp_path / "llama", tensors, config)
    read = pretrained.read(folder, "bytes")
    tokens = np.random.default_rng(1).integers(256, size=(1, 9))
    graphdef, _ = model.abstract(read.model)
    logits, _ = model.forward(graphdef, read.params, tokens)
    expected = llama_logits(tensors, config, tokens[0])
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)
    assert read.data is None and read.tokenizer == "bytes"


def test_half_precision_is_read_as_float32():
    tensors = {k: jnp.asarray(x, "bfloat16") for k, x in llama_tensors(LLAMA).items()}
    shape = pretrained.shape_of(LLAMA)
    params = pretrained.from_llama(tensors, shape, 2, "here")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        params["embed"]["embedding"],
        np.asarray(tensors["model.embed_tokens.weight"], np.float32),
    )


def test_a_flax_checkpoint_that_is_cut_off_takes_one_line(tmp_path):
    folder = write_flax_llama(tmp_path / "llama", llama_tensors(LLAMA), LLAMA)
    file = folder / "flax_model.msgpack"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="flax_model.msgpack cannot be read: "):
        pretrained.read(folder, "bytes")


def test_a_flax_checkpoint_with_other_leaves_is_refused(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = {name: np.zeros(16, np.float32)} | llama_tensors(LLAMA)
    folder = write_flax_llama(tmp_path / "llama", tensors, LLAMA)
    with pytest.raises(UsageError, match=f"unknown: {name}$"):
        pretrained.read(folder, "bytes")
    content = flax.serialization.msgpack_serialize({"model": {"norm": "text"}})
    (folder / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(UsageError, match="model.norm is not an array"):
        pretrained.read(folder, "bytes")


def test_tensors_that_do_not_fit_are_named():
    tensors = llama_tensors(LLAMA)
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    tensors["model.layers.0.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 16), np.float32)
    del tensors["model.norm.weight"]
    with pytest.raises(UsageError) as raised:
        pretrained.from_llama(tensors, pretrained.shape_of(LLAMA), 2, "here")
    assert str(raised.value) == (
        "the tensors in here do not fit its config.json; missing:"
        " model.norm.weight; unknown: model.layers.1.self_attn.q_proj.bias; of another"
        " shape: model.layers.1.mlp.up_proj.weight (16, 16)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be 'llama', not 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', not 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type must be 'default'"),
        ({"head_dim": 64}, "head_dim must be 4, not 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be 4, not 3"),
        ({"num_attention_heads": 16}, "width must be a multiple of twice the heads"),
    ],
)
def test_models_that_compute_otherwise_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        pretrained.shape_of(LLAMA | changes)


# -------------------------------------------------------------------------- training


def test_nothing_is_forgotten_at_a_rate_of_zero(records):
    record, _ = records
    assert record["forgetting"] == 0
    assert record["final_eval_loss"] == record["first_eval_loss"]


def test_training_begins_at_the_checkpoint_and_lowers_the_loss(folder, study, records):
    _, record = records
    graphdef, _ = model.abstract(study.base.model)
    _, new, _ = text_files.load(str(folder / "new.txt"), "bytes")
    windows = text_files.evaluation_batches(new.validation, 16, 2, 4)
    loss = train_step.evaluate(study.base.params, windows, graphdef=graphdef)
    assert record["first_eval_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert record["final_eval_loss"] < record["first_eval_loss"]
    decoded = study.decode(record | {"settings": {}})
    assert decoded["more"]["forgetting"] == record["forgetting"] != 0
    assert decoded["more"]["temporaries"] > 8


def state_of(label, params, rate=0.1):
    config = dataclasses.replace(BASE, model=model.PRESETS["nano"])
    transform = variants.make(label, config, rate)
    return transform, jax.jit(transform.init)(params)


@pytest.mark.parametrize("density", [0.25, 0.05, 0.01, 0.0025])
def test_the_state_of_a_density_has_exact_bytes(study, density):
    params = study.base.params
    _, state = state_of(f"sparse_spam, density {density:g}", params)
    moments = 0
    is_matrix = jax.tree.leaves(spam_optax.matrices_only()(params))
    for leaf, sparse in zip(jax.tree.leaves(params), is_matrix, strict=True):
        *stack, rows, columns = leaf.shape if sparse else (*leaf.shape, 1)
        kept = max(1, round(density * rows)) if sparse else rows
        moments += 2 * 4 * int(np.prod(stack)) * kept * columns
    arrays = [x for x in jax.tree.leaves(state) if x.ndim and x.dtype == jnp.float32]
    assert sum(x.nbytes for x in arrays) == moments


def test_lora_trains_its_adapters_alone(study):
    params = jax.tree.map(jnp.asarray, study.base.params)
    transform, state = state_of("lora, rank 2", params)
    trained = params
    rng = np.random.default_rng(0)

    @jax.jit
    def update(gradient, state, trained):
        updates, state = transform.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(3):
        gradient = jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32), params
        )
        trained, state = update(gradient, state, trained)
    adapters = jax.device_get(state.adapters)
    trained, first = jax.device_get((trained, params))
    changes = jax.tree.map(np.subtract, trained, first)
    names = spam_optax.tensor_names(params)
    for name, change in zip(names, jax.tree.leaves(changes), strict=True):
        if name not in adapters:
            assert not change.any()
            continue
        product = adapters[name]["down"] @ adapters[name]["up"]
        np.testing.assert_allclose(change, product, atol=1e-6)
        assert change.any() and np.linalg.matrix_rank(change[0], tol=1e-4) == 2
    sizes = [x.size for x in jax.tree.leaves(adapters)]
    matrices = jax.tree.leaves(spam_optax.matrices_only()(params))
    leaves = jax.tree.leaves(params)
    assert sum(sizes) == sum(
        2 * (x.shape[1] + x.shape[2]) * x.shape[0]
        for x, is_matrix in zip(leaves, matrices, strict=True)
        if is_matrix
    )


def test_lora_is_the_gradient_of_the_adapters():
    """Its first step equals that of the adapters as parameters of a loss."""
    params = {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (5, 4))}}
    target = jax.random.normal(jax.random.key(1), (5, 4))
    transform = lora.lora(optax.sgd(0.1), 3, 7)
    state = transform.init(params)

    def loss(adapters):
        merged = params["mlp"]["kernel"] + lora.products(adapters)["mlp/kernel"]
        return jnp.sum((merged - target) ** 2)

    def full_loss(params):
        return jnp.sum((params["mlp"]["kernel"] - target) ** 2)

    adapters, merged = state.adapters, params
    for _ in range(3):
        adapters = jax.tree.map(
            lambda x, g: x - 0.1 * g, adapters, jax.grad(loss)(adapters)
        )
        updates, state = transform.update(jax.grad(full_loss)(merged), state)
        merged = optax.apply_updates(merged, updates)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        state.adapters,
        adapters,
    )


def test_lora_and_galore_take_memory_by_rank(study):
    def size(label):
        config = dataclasses.replace(BASE, model=model.PRESETS["nano"])
        transform = variants.make(label, config, 0.1)
        state = jax.eval_shape(transform.init, study.base.params)
        return sum(4 * x.size for x in jax.tree.leaves(state) if x.ndim)

    full = size("adam")
    for name in ("lora", "galore"):
        ranks = [size(f"{name}, rank {rank}") for rank in (1, 2, 4)]
        assert ranks[2] - ranks[1] == 2 * (ranks[1] - ranks[0]) > 0
        assert ranks[2] < full


# ------------------------------------------------------------------------ the program


def test_the_program_writes_its_files_and_resumes(folder, tmp_path, monkeypatch):
    """It pre-trains a model first, and only once."""
    small = {"--steps": "8", "--data": str(folder / "old.txt"), "--preset": "nano"}
    small |= {"--batch-size": "2", "--sequence-length": "16"}
    monkeypatch.setattr(program, "PRETRAINING", program.PRETRAINING | small)
    flags = ["--output", str(tmp_path), "--workers", "1", "--steps", "12"]
    flags += ["--batch-size", "2", "--sequence-length", "16", "--eval-sequences", "4"]
    flags += ["--data", str(folder / "new.txt"), "--learning-rate", "0.01"]
    flags += ["--optimizer", "adamw"]
    assert program.main([*flags, "lora, rank 4"]) == 0
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == [
        "finetune.md",
        "finetune.png",
        "pretrained",
        "runs",
        "summary.json",
    ]
    page = (tmp_path / "finetune.md").read_text()
    assert "| forgetting |" in page and "| temporaries/param |" in page
    rows = json.loads((tmp_path / "summary.json").read_text())["finetune"]
    assert len(rows) == 2 and all(row["more"]["forgetting"] != 0 for row in rows)
    first = {x: x.stat().st_mtime_ns for x in tmp_path.glob("*/*.json*")}
    assert program.main([*flags, "--seeds", "2"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert all(x.stat().st_mtime_ns == time for x, time in first.items())


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stopped:
        program.main(list(flags))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_missing_checkpoint_takes_one_line(folder, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    line = refused(capsys, "--checkpoint", str(tmp_path / "none"), *out)
    assert "there is no checkpoint in" in line and "No such file" in line
    line = refused(capsys, "--checkpoint", str(folder), *out)
    assert "there is no checkpoint in" in line


def test_a_run_that_does_not_fit_takes_one_line(folder, tmp_path, capsys):
    config = shutil.copytree(folder / "run", tmp_path / "run") / "config.json"
    content = json.loads(config.read_text())
    out = ["--output", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "run")]
    config.write_text(json.dumps(content | {"width": 64}))
    assert "can be used" in refused(capsys, *out)
    config.write_text(json.dumps(content | {"data_digest": "0"}))
    assert "the text or the tokenizer of the checkpoint" in refused(capsys, *out)
    config.write_text("{}")
    assert "is damaged" in refused(capsys, *out)


def test_a_tokenizer_that_does_not_fit_takes_one_line(study, monkeypatch):
    small = dataclasses.replace(study.base.model, vocabulary=100)
    base = study.base._replace(model=small)
    (run,) = task.grid(BASE, ["adam"], ["clean"], [0.1], [0])
    with pytest.raises(UsageError, match="has 256 tokens, and the model only 100"):
        finetune.FineTuning(run, base, study.old_text, study.new_text)


def test_flags_that_are_wrong_take_one_line(capsys):
    assert "invalid choice" in refused(capsys, "--optimizer", "lora, rank 3")
    assert "invalid choice" in refused(capsys, "--scenario", "rain")
