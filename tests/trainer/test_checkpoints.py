"""Checkpoints without a program around them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.checkpoints import Checkpoints
from trainer.errors import UsageError
from trainer.train_step import TrainState


def make_state(step, value):
    params = {"kernel": jnp.full((4, 4), value)}
    return TrainState(jnp.int32(step), jnp.array(False), params, (), ())


def save(folder, *states):
    with Checkpoints(str(folder), keep=2) as checkpoints:
        for state in states:
            checkpoints.save(state, {"next_index": int(state.step)})


def restore(folder, warnings):
    like = jax.eval_shape(lambda: make_state(0, 0.0))
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), like
    )
    with Checkpoints(str(folder), keep=2) as checkpoints:
        return checkpoints.restore(like, 9, warnings.append)


@pytest.mark.parametrize("name", ["state", "rest"])
def test_a_readable_checkpoint_with_other_contents_is_refused(tmp_path, name):
    """The arrays or the place in the data are replaced by those of another run."""
    ours, theirs, warnings = tmp_path / "ours", tmp_path / "theirs", []
    save(ours, make_state(1, 1.0), make_state(2, 2.0))
    with Checkpoints(str(theirs), keep=2) as checkpoints:
        checkpoints.save(make_state(2, 3.0), {"next_index": 7})
    shutil.rmtree(ours / "2" / name)
    shutil.copytree(theirs / "2" / name, ours / "2" / name)
    state, place = restore(ours, warnings)
    assert place == {"next_index": 1}
    np.testing.assert_array_equal(state.params["kernel"], np.ones((4, 4)))
    (line,) = warnings
    assert "step 2" in line and "damaged (it is not what was saved)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ours",
        "ours-set-aside-2",
        "theirs",
    ]


def test_no_good_checkpoint_is_one_line(tmp_path):
    save(tmp_path, make_state(1, 1.0))
    shutil.rmtree(tmp_path / "1" / "state")
    with pytest.raises(UsageError, match="no checkpoint in .* can be used") as error:
        restore(tmp_path, [])
    assert str(error.value).count("\n") == 0
    assert (tmp_path / "1").exists()
