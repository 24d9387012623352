"""Gradients and Jacobians by layer, and the program that draws them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradient_flow
from studies import gradient_flow as study
from trainer import model
from trainer.config import RunConfig

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

SHAPE = {"layers": 2, "width": 16, "heads": 2, "ffn_width": 24}
FLAGS = ["--layers=2", "--width=16", "--heads=2", "--ffn-width=24", "--steps=12"]
FLAGS += ["--batch-size=2", "--sequence-length=8", "--workers=1"]


def decoder_of(name):
    config = RunConfig.from_settings(**SHAPE, **study.MODELS[name]).model
    config = model.for_platform(config, 256, "cpu")
    return model.Decoder(config, rngs=nnx.Rngs(0))


def stream_of(decoder):
    return decoder.look_up(jnp.arange(4)[None])


@pytest.mark.parametrize("name", study.MODELS)
def test_sub_layers_in_turn_are_the_model(name):
    decoder = decoder_of(name)
    x_BTD = stream_of(decoder)
    want = model.through_blocks(decoder.config, x_BTD, decoder.blocks)
    got, seen = study.through_sub_layers(
        decoder, x_BTD, lambda name, block, factor, x_BTD: study.rms(x_BTD)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert seen["attention"][0] == pytest.approx(float(study.rms(x_BTD)))
    assert seen["attention"].shape == seen["ffn"].shape == (2,)


def test_the_jacobian_is_that_of_the_first_feed_forward_layer():
    decoder = decoder_of("standard")
    x_BTD = stream_of(decoder)
    graphdef, state = nnx.split(decoder)
    windows = jnp.arange(5)[None]
    measured = study.measure(nnx.to_pure_dict(state), windows, graphdef)
    graphdef, state = nnx.split(decoder.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
    x_BTD += study.sub_layer("attention", block, 1.0)(x_BTD)
    jacobian = jax.jacobian(study.sub_layer("ffn", block, 1.0))(x_BTD)
    want = np.linalg.norm(np.reshape(jacobian, (x_BTD.size, x_BTD.size)), ord=2)
    assert measured["ffn"][0] == pytest.approx(want, rel=1e-3)
    assert measured["gradient_norm"].shape == (2,)


def test_the_program_writes_numbers_and_a_picture_and_continues(tmp_path, capsys):
    flags = [*FLAGS, f"--output={tmp_path}", "--model", "stable"]
    assert gradient_flow.main(flags) == 0
    (record,) = json.loads((tmp_path / "summary.json").read_text()).values()
    assert record["steps"] == [0, 10, 12]
    for name in ("gradient_norm", "attention", "ffn", "stream_rms"):
        assert np.shape(record[name]) == (3, 2)
    assert record["loss"][2] < record["loss"][0]
    # The bound of attention holds at initialization.
    assert np.all(np.array(record["attention"][0]) < record["attention_bound"])
    (made,) = (tmp_path / "runs").iterdir()
    before = made.stat().st_mtime_ns
    assert gradient_flow.main([*flags, "standard"]) == 0
    assert made.stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 2
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "mixed"], "invalid choice: 'mixed'"),
        (["--heads", "3"], "width"),
        (["--learning-rate", "0"], "must be"),
        (["--data", "nowhere.txt"], "cannot read the data file nowhere.txt"),
    ],
)
def test_mistakes_take_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        gradient_flow.main([*FLAGS, *flags, f"--output={tmp_path}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
