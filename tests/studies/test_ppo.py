"""Reinforcement learning: advantages, objective, episodes, and the program.

Most tests play a small game that needs no package.
"""

import importlib.util
import json
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo as program
from studies import ppo, task
from studies.ppo import Environment, Options
from trainer.config import RunConfig
from trainer.errors import UsageError

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

SMALL = Options(environments=2, rollout=8, width=4)


def steps_counted(length: int, is_cut_off: bool) -> Environment:
    """Makes a game of some steps, which observes their number and pays it, plus 1."""

    def step(key, state, action):
        after = state + 1
        ended = after >= length
        begun = jnp.where(ended, 0.0, after)
        terminated = ended & (not is_cut_off)
        return begun[None], begun, after, terminated, ended, after[None]

    def reset(key):
        return jnp.zeros(1), jnp.float32(0)

    return Environment(reset, step, 1, 2, continuous=False, longest=length)


@pytest.fixture
def game(monkeypatch):
    """Makes the task of a game."""

    def make(length=3, is_cut_off=False, options=SMALL):
        environment = steps_counted(length, is_cut_off)
        monkeypatch.setattr(ppo, "make_environment", lambda name: environment)
        return ppo.PPO(options)

    return make


# ----------------------------------------------------------- advantages and objective


def test_advantages_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 12, 2)).astype(np.float32)
    terminated = rng.random((12, 2)) < 0.2
    ended = terminated | (rng.random((12, 2)) < 0.2)
    assert (ended & ~terminated).any() and terminated.any()
    expected = np.zeros((12, 2))
    for place in range(2):
        later = 0.0
        for n in reversed(range(12)):
            value_after = 0.0 if terminated[n, place] else next_values[n, place]
            error = rewards[n, place] + 0.99 * value_after - values[n, place]
            later = error + (0.0 if ended[n, place] else 0.99 * 0.95 * later)
            expected[n, place] = later
    found = ppo.advantages(rewards, values, next_values, terminated, ended)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_objective_is_that_by_hand(game):
    """The first of two actions is inside of the clip, and the second one is outside."""
    of_task = game()
    params = of_task.init(0)
    policy = of_task.policy(0)
    observation = jnp.array([[0.3], [-0.8]])
    action = np.array([0, 1])
    scores = np.asarray(policy.actor(observation), np.float64)
    log_all = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    chosen = log_all[[0, 1], action]
    ratios = np.array([1.1, 0.5])
    part = ppo.Steps(
        observation,
        jnp.array(action),
        jnp.float32(chosen - np.log(ratios)),
        advantage=jnp.array([5.0, 1.0]),  # 1 and -1 after standardization
        target=jnp.array([2.0, -3.0]),
    )
    gradient = jax.grad(of_task.objective)(params, part)
    p = np.exp(log_all)
    entropy = -(p * log_all).sum(1, keepdims=True)
    of_policy = -ratios[0] * (np.eye(2)[action[0]] - p[0]) / 2
    of_entropy = (p * (log_all + entropy)).mean(axis=0)
    np.testing.assert_allclose(
        gradient["actor"]["layers"][4]["bias"],
        of_policy + ppo.ENTROPY_WEIGHT * of_entropy,
        rtol=1e-4,
    )
    values = np.asarray(policy.value(observation))
    np.testing.assert_allclose(
        gradient["critic"]["layers"][4]["bias"],
        [ppo.VALUE_WEIGHT * (values - part.target).mean()],
        rtol=1e-4,
    )


def test_probability_and_entropy_of_continuous_actions_are_those_of_the_normal():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    environment = steps_counted(3, False)._replace(continuous=True)
    policy = ppo.Policy(environment, 4, rngs=ppo.nnx.Rngs(0))
    policy.log_deviation[...] = jnp.log(jnp.array([0.5, 2.0]))
    observation, action = jnp.array([[0.4]]), jnp.array([[0.3, -1.0]])
    found, entropy = policy.log_probability(observation, action)
    normal = stats.norm(np.asarray(policy.best(observation)), [0.5, 2.0])
    np.testing.assert_allclose(found, normal.logpdf(action).sum(1), rtol=1e-5)
    np.testing.assert_allclose(entropy, normal.entropy().sum(), rtol=1e-5)


# --------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_an_episode_begins_again_and_its_return_is_kept(is_cut_off, game):
    of_task = game(3, is_cut_off)
    params = of_task.init(0)
    state = of_task.start(params, 0)
    assert np.isnan(state.finished).all()
    after = of_task.collect(params, state, False)
    np.testing.assert_array_equal(after.finished, [6, 6])  # 1 + 2 + 3
    np.testing.assert_array_equal(after.running, [3, 3])  # 1 + 2
    seen = after.steps.observation.reshape(8, 2)[:, 0]
    np.testing.assert_array_equal(seen, [0, 1, 2, 0, 1, 2, 0, 1])
    # An episode that was cut off goes on with the value of its own last state.
    value = of_task.policy(0).value
    ended = np.tile(seen == 2, (2, 1)).T
    advantage = ppo.advantages(
        np.tile(seen + 1, (2, 1)).T,
        np.tile(value(seen[:, None]), (2, 1)).T,
        np.tile(value(seen[:, None] + 1), (2, 1)).T,
        ended & (not is_cut_off),
        ended,
    )
    np.testing.assert_allclose(
        after.steps.advantage, advantage.reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_faults_change_the_rewards_of_three_iterations(game):
    of_task = game()
    config = RunConfig(steps=16 * 8 + 5, bursts=0)
    is_faulty, _ = of_task.inputs(task.Run("adam", "rewards", config))
    starts = np.flatnonzero(np.diff(is_faulty.astype(int)) == 1) + 1
    assert len(is_faulty) == config.steps and is_faulty.sum() == 3 * 16
    assert (starts % 16 == 0).all() and len(starts) == 3
    assert not of_task.inputs(task.Run("adam", "clean", config))[0].any()


@pytest.mark.parametrize("steps", [1, 16, 40])
def test_a_short_run_has_its_faults_inside(steps, game):
    run = task.Run("adam", "rewards", RunConfig(steps=steps, bursts=0))
    assert len(game().inputs(run)[0]) == steps


def test_faulty_rewards_are_not_in_the_returns(game):
    of_task = game()
    params = of_task.init(0)
    state = of_task.start(params, 0)
    clean, faulty = (of_task.collect(params, state, x) for x in (False, True))
    np.testing.assert_array_equal(clean.finished, faulty.finished)
    large = np.abs(faulty.steps.advantage).min()
    assert large > 100 * np.abs(clean.steps.advantage).max()


def test_each_epoch_uses_every_step_once(game):
    of_task = game()
    params = of_task.init(0)
    state = of_task.start(params, 0)
    used = []
    of_task.objective = lambda params, part: (
        used.append(part.advantage) or jnp.sum(params["critic"]["layers"][4]["bias"])
    )
    for _ in range(ppo.UPDATES):
        _, _, state, _ = of_task.gradient(params, state, False)
    expected = np.sort(state.steps.advantage)
    for epoch in np.array(used).reshape(ppo.EPOCHS, -1):
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert (used[0] != used[ppo.PARTS]).any()


def test_the_score_is_minus_the_return_of_the_first_episodes(game):
    of_task = game(5)
    assert of_task.evaluate(of_task.init(0), jnp.uint32(0)) == -(1 + 2 + 3 + 4 + 5)


# ------------------------------------------------------------------- the environments


class FakeState(NamedTuple):
    obs: Any
    reward: Any
    done: Any
    info: Any


class FakeEnvironment:
    """Has brax's interface: falls after 3 steps forward, and is cut off after 5."""

    observation_size, action_size = 1, 1

    def reset(self, key):
        zero = jnp.float32(0)
        return FakeState(zero[None], zero, zero, {"steps": zero, "truncation": zero})

    def step(self, state, action):
        place = state.obs + (action > 0)
        steps = state.info["steps"] + 1
        has_fallen = jnp.float32(place[0] >= 3)
        is_late = jnp.float32(steps >= 5)
        info = {"steps": steps, "truncation": is_late * (1 - has_fallen)}
        return FakeState(place, place[0], jnp.maximum(has_fallen, is_late), info)


@pytest.fixture
def fake_brax(monkeypatch):
    envs = types.ModuleType("brax.envs")
    envs._envs = {"hopper": FakeEnvironment}
    asked = []
    envs.create = lambda name, **kwargs: asked.append(kwargs) or envs._envs[name]()
    module = types.ModuleType("brax")
    module.envs = envs
    monkeypatch.setitem(sys.modules, "brax", module)
    monkeypatch.setitem(sys.modules, "brax.envs", envs)
    return asked


def play(environment, action, steps):
    observation, state = environment.reset(jax.random.key(0))
    rows = []
    for _ in range(steps):
        observation, state, reward, *rest = environment.step(None, state, action)
        rows.append([float(np.squeeze(x)) for x in (observation, reward, *rest)])
    return np.array(rows)


def test_episodes_of_brax_end_for_good_or_are_cut_off(fake_brax):
    environment = ppo.make_environment("brax:hopper")
    assert fake_brax == [{"episode_length": environment.longest, "auto_reset": False}]
    assert (environment.observations, environment.actions) == (1, 1)
    falls = play(environment, jnp.ones(1), 4)
    after, reward, terminated, ended, final = falls.T
    np.testing.assert_array_equal(after, [1, 2, 0, 1])
    np.testing.assert_array_equal(final, [1, 2, 3, 1])
    np.testing.assert_array_equal(reward, [1, 2, 3, 1])
    np.testing.assert_array_equal([terminated, ended], [[0, 0, 1, 0]] * 2)
    _, _, terminated, ended, _ = play(environment, -jnp.ones(1), 11).T
    assert not terminated.any() and np.flatnonzero(ended).tolist() == [4, 9]


def test_an_unknown_environment_of_brax(fake_brax):
    with pytest.raises(UsageError, match="no environment 'walker', only hopper"):
        ppo.make_environment("brax:walker")


# Brax is no longer maintained, and reads fields that a newer MuJoCo warns about.
@pytest.mark.filterwarnings("ignore:Brax System", "ignore:Accessing:DeprecationWarning")
def test_hopper_of_brax():
    pytest.importorskip("brax.envs", reason="brax is not installed")
    environment = ppo.make_environment("brax:hopper")
    observation, state = jax.jit(environment.reset)(jax.random.key(0))
    assert observation.shape == (11,)
    after = jax.jit(environment.step)(jax.random.key(1), state, jnp.zeros(3))
    assert np.isfinite(after[0]).all() and not after[3]


needs_gymnax = pytest.mark.skipif(
    importlib.util.find_spec("gymnax") is None,
    reason="gymnax is not installed: it cannot be beside JAX 0.12",
)


@needs_gymnax
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("CartPole-v1", (4, 2, False, 500)),
        ("Acrobot-v1", (6, 3, False, 500)),
        ("Pendulum-v1", (3, 1, True, 200)),
    ],
)
def test_environments_of_gymnax(name, shape):
    environment = ppo.make_environment(name)
    assert environment[2:] == shape
    observation, state = environment.reset(jax.random.key(0))
    assert observation.shape == shape[:1]
    action = jnp.zeros(1) if environment.continuous else jnp.int32(0)
    after, _, _, _, ended, _ = environment.step(jax.random.key(1), state, action)
    assert after.shape == observation.shape and not ended


@needs_gymnax
def test_a_fallen_pole_ends_the_episode_for_good():
    environment = ppo.make_environment("CartPole-v1")
    _, state = environment.reset(jax.random.key(0))
    step = jax.jit(environment.step)
    for number in range(50):
        key = jax.random.key(number)
        after, state, reward, terminated, ended, final = step(key, state, 1)
        if ended:
            break
    assert terminated and np.abs(after).max() < 0.06 < np.abs(final).max()


@needs_gymnax
def test_cartpole_is_learned():
    of_task = ppo.PPO(Options())
    (run,) = task.grid(program.EXAMPLE.base, ["adam_clip"], ["clean"], [4e-3], [0])
    record = task.Program(of_task, run)(run, lambda fraction: None)
    assert record["first_eval_loss"] > -100 and record["final_eval_loss"] < -300


# ------------------------------------------------------------------------ the program


def test_the_program_is_resumable_and_writes_its_files(game, tmp_path):
    game()
    flags = ["--environments", "2", "--rollout", "8", "--width", "4"]
    flags += ["--steps", "64", "--seeds", "2"]
    flags += ["--optimizer", "adam", "--output", str(tmp_path), "--workers", "1"]
    assert program.main(flags) == 0
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == ["ppo.md", "ppo.png", "runs", "summary.json"]
    page = (tmp_path / "ppo.md").read_text()
    assert "| return |" in page and "| 6.0 | 6.0 to 6.0 (2) |" in page
    assert "final loss" not in page
    clean, rewards = json.loads((tmp_path / "summary.json").read_text())["ppo"]
    assert clean["final_loss"] == -6 and rewards["scenario"] == "rewards"
    first = {x: x.stat().st_mtime_ns for x in (tmp_path / "runs").iterdir()}
    assert len(first) == 4
    (record, *_) = [json.loads(x.read_text()) for x in first]
    assert len(record["returns"]) == 64 and record["returns"][-1] == 6
    assert program.main(flags) == 0
    assert all(x.stat().st_mtime_ns == time for x, time in first.items())


@pytest.mark.parametrize(
    ("name", "package"), [("CartPole-v1", "gymnax six"), ("brax:hopper", "brax")]
)
def test_a_missing_package_takes_one_line(name, package, tmp_path, monkeypatch, capsys):
    for module in ("gymnax", "brax"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        program.main(["--environment", name, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{name} needs another package: pip install {package} (" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--environment", "gym:Hopper"],
            "must be NAME or brax:NAME, not 'gym:Hopper'",
        ),
        (["--environments", "1", "--rollout", "3"], "must be a multiple of 4, not 3"),
        (["--seeds", "0"], "must be a whole number >= 1"),
        pytest.param(
            ["--environment", "Chess"], "no environment 'Chess'", marks=needs_gymnax
        ),
        pytest.param(
            ["--environment", "Breakout-MinAtar"], "has images", marks=needs_gymnax
        ),
    ],
)
def test_a_mistake_takes_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main([*flags, "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
