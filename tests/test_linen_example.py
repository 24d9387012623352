"""The Linen example, with a small model and few steps, in this process."""

import functools
import logging
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

import linen_pretrain
import spam_optax

STEPS, RATE = 60, 0.01
FLAGS = (f"--steps={STEPS}", f"--learning-rate={RATE}")
SIZES = {"WIDTH": 32, "HEADS": 2, "NUM_LAYERS": 1}


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """Uses a small model that compiles in seconds, and only once."""
    make_optimizer = functools.cache(linen_pretrain.make_optimizer)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SIZES.items():
            patch.setattr(linen_pretrain, name, value)
        patch.setattr(linen_pretrain, "make_optimizer", make_optimizer)
        yield


@pytest.fixture
def run(capsys):
    """Runs the program in this process and returns what it printed."""

    def run(*flags):
        linen_pretrain.main([*FLAGS, *flags])
        return capsys.readouterr().out

    return run


def training_losses(output):
    """The losses printed on the way, by step."""
    lines = re.findall(r"^step +(\d+)/60  loss (\S+)$", output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


def validation(output):
    """Loss and perplexity at the end."""
    pattern = r"^validation loss (\S+), perplexity (\S+) per byte$"
    ((loss, perplexity),) = re.findall(pattern, output, re.MULTILINE)
    return float(loss), float(perplexity)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        name if name == "spam" else pytest.param(name, marks=pytest.mark.nightly)
        for name in linen_pretrain.OPTIMIZERS
    ],
)
def test_run(optimizer, run, caplog):
    """The model learns, the step compiles once, and a second run is equal."""
    flag = f"--optimizer={optimizer}"
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        output = run(flag)
    compiled = re.findall(r"^Compiling jit\((\w+)\)", "\n".join(caplog.messages), re.M)
    assert compiled.count("train_step") == 1

    losses = training_losses(output)
    assert list(losses) == [1, *range(6, STEPS + 1, 6)]
    assert losses[1] > math.log(256) - 0.3  # before the first update: guessing
    loss, perplexity = validation(output)
    assert loss < 3.2  # knowing how often each byte occurs gives 3.3
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-2)
    assert ("coordinates clipped as spikes: " in output) == (optimizer != "adam")

    assert run(flag) == output
    assert training_losses(run(flag, "--seed=1")) != losses


def test_later_bytes_do_not_change_earlier_logits():
    """The loss of a model that reads its targets would fall too."""
    params = linen_pretrain.first_params(0)
    tokens = jnp.arange(64)[None]
    logits = jax.jit(lambda x: linen_pretrain.MODEL.apply({"params": params}, x))
    changed = logits(tokens.at[0, 40].set(200)) != logits(tokens)
    np.testing.assert_array_equal(changed.any(axis=(0, 2)), np.arange(64) >= 40)


def test_parameters_are_drawn_after_spike_no_more():
    """Guards that each initializer reaches its matrices, and the table its factor."""
    params = linen_pretrain.first_params(0)
    std = (2 / (5 * SIZES["WIDTH"])) ** 0.5
    block = params["block_0"]
    attention = block["attention"]
    small = {name: attention[name]["kernel"] for name in ("query", "key", "value")}
    small |= {"ffn_in": block["ffn_in"]["kernel"], **params["embed"]}
    smaller = {"out": attention["out"]["kernel"], "ffn_out": block["ffn_out"]["kernel"]}
    for name, kernel in small.items():
        assert kernel.std() == pytest.approx(std, rel=0.1), name
    for name, kernel in smaller.items():
        assert kernel.std() == pytest.approx(std / 2**0.5, rel=0.1), name


def test_sparse_spam_finds_the_matrices():
    """Guards the names of the modules, which tell sparse_spam what is a matrix."""
    params = linen_pretrain.first_params(0)
    tx = linen_pretrain.make_optimizer("sparse_spam", RATE, STEPS)
    density = spam_optax.momentum_density(tx.init(params), params)
    names = spam_optax.tensor_names(params)
    sparse = {
        name for name, x in zip(names, jax.tree.leaves(density), strict=True) if x < 1
    }
    layers = ("ffn_in", "ffn_out", *(f"attention/{x}" for x in ("query", "key")))
    layers += ("attention/value", "attention/out")
    assert sparse == {f"block_0/{layer}/kernel" for layer in layers}


def test_report_names_the_tensor_that_spiked_most(capsys):
    """Guards the index arithmetic: steps count from 1, tensors in `names`' order."""
    params = linen_pretrain.first_params(0)
    tx = linen_pretrain.make_optimizer("adam", RATE, STEPS)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    names = spam_optax.tensor_names(params)
    tensor = names.index("block_0/ffn_in/kernel")
    counts = jnp.zeros(len(names), jnp.int32).at[tensor].set(7)
    opt_state = state.opt_state._replace(tensor_spike_steps=counts)
    scores = np.ones((20, len(names)))
    scores[4, tensor] = 33
    text = np.frombuffer(linen_pretrain.TEXT.read_bytes(), np.uint8)[-2000:]
    linen_pretrain.report(state.replace(opt_state=opt_state), scores, text)
    out = capsys.readouterr().out
    assert "largest spike score 33.0: block_0/ffn_in/kernel in step 5\n" in out
    assert "above 10: 7 of 20\n" in out


@pytest.mark.slow
def test_bar_is_for_terminals(run, monkeypatch):
    """Guards logs: on a terminal a bar joins the lines, a file gets the lines alone."""
    monkeypatch.setenv("TERM", "xterm")
    plain = run()
    assert "\x1b" not in plain and "%" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run()
    assert "\x1b" in shown and "100%" in shown
    assert f"step   {STEPS}/{STEPS}  loss" in shown


def test_help_has_every_flag_and_default(capsys):
    """Guards the help against flags and defaults it does not mention."""
    with pytest.raises(SystemExit, match="^0$"):
        linen_pretrain.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--optimizer", "--steps", "--learning-rate", "--seed"):
        default = getattr(linen_pretrain.parse([]), flag[2:].replace("-", "_"))
        assert re.search(rf"{flag} [^-].*?\(default: {default}\)", text), flag
    assert "spam_optax.spam(schedule)" in text


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--steps=0", "--steps must be from 1 to 2147483647, not 0"),
        ("--steps=3000000000", "--steps must be from 1 to 2147483647"),
        ("--steps=some", "--steps: invalid int value: 'some'"),
        ("--learning-rate=0", "--learning-rate must be above 0, not 0.0"),
        ("--learning-rate=nan", "--learning-rate must be above 0, not nan"),
        ("--seed=-1", "--seed must be from 0 to 2147483647, not -1"),
        ("--optimizer=sgd", "invalid choice: 'sgd' (choose from"),
        ("--step=3", "unrecognized arguments: --step=3"),
    ],
)
def test_mistakes_take_one_line(flag, words, capsys):
    """Guards against tracebacks, and against a usage that hides the message."""
    with pytest.raises(SystemExit, match="^2$"):
        linen_pretrain.main([flag])
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err and err.startswith("linen_pretrain.py: error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_script_stands_alone(tmp_path):
    """Guards the file by itself: a copy without its neighbors still starts."""
    script = tmp_path / "linen_pretrain.py"
    script.write_text(pathlib.Path(linen_pretrain.__file__).read_text())
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: linen_pretrain.py")
