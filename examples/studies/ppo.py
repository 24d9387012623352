"""Reinforcement learning with PPO (Schulman et al., 2017, arXiv 1707.06347).

Environments, policy and update are one compiled program. An iteration lets all
environments make some steps, and then makes several updates on parts of these steps.

Letters in shape comments: E environments, T steps of a rollout, A actions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from studies import engine, pictures, task
from studies.task import Run, Score, setting
from trainer.errors import UsageError

SCENARIOS = ("clean", "rewards")
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2  # gamma and lambda of GAE, epsilon of PPO
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01
EPOCHS, PARTS = 4, 4  # updates of an iteration: each epoch uses each part once
UPDATES = EPOCHS * PARTS
REWARD_FACTOR = 1000.0  # of a fault
FAULTS = 3  # iterations
TEST_EPISODES = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What is played, and how much in each iteration."""

    environment: str = setting(
        "CartPole-v1",
        "an environment of gymnax, such as CartPole-v1, Acrobot-v1 or Pendulum-v1, or"
        " of brax, such as brax:hopper",
        str,
        "NAME",
    )
    environments: int = setting(16, "environments side by side")  # E
    rollout: int = setting(128, "steps of each in an iteration")  # T
    width: int = setting(64, "width of both hidden layers")

    def __post_init__(self):
        if self.batch % PARTS:
            raise UsageError(
                f"--environments times --rollout must be a multiple of {PARTS}, not"
                f" {self.batch}"
            )

    @property
    def batch(self) -> int:
        """Returns the steps of all environments in an iteration."""
        return self.environments * self.rollout


class Environment(NamedTuple):
    """Functions of one environment, which begins again by itself after an episode."""

    reset: Callable[[jax.Array], tuple[jax.Array, Any]]  # key -> observation, state
    # key, state, action -> observation, state, reward, whether the episode ended for
    # good, whether it ended at all, and the last observation of the old episode.
    step: Callable[
        ..., tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, jax.Array]
    ]
    observations: int
    actions: int  # choices, or numbers of a continuous action
    continuous: bool
    longest: int  # steps of an episode


def make_environment(name: str) -> Environment:
    """Makes an environment of gymnax, or of brax if the name begins with `brax:`.

    Raises:
      UsageError: If the package is not installed or has no such environment.
    """
    kind, _, rest = name.rpartition(":")
    try:
        if kind == "brax":
            return from_brax(rest)
        if kind:
            raise UsageError(f"--environment must be NAME or brax:NAME, not {name!r}")
        return from_gymnax(name)
    except ImportError as error:
        package = "brax" if kind else "gymnax six"
        raise UsageError(
            f"{name} needs another package: pip install {package} ({error})"
        ) from error


def from_gymnax(name: str) -> Environment:
    import gymnax

    if name not in gymnax.registered_envs:
        known = ", ".join(sorted(gymnax.registered_envs))
        raise UsageError(f"gymnax has no environment {name!r}, only {known}")
    environment, params = gymnax.make(name)
    space = environment.action_space(params)
    observations = environment.observation_space(params).shape
    if len(observations) != 1:
        raise UsageError(f"{name} has images, and the policy takes vectors")
    continuous = not hasattr(space, "n")

    def step(key, state, action):
        if continuous:
            action = jnp.clip(action, space.low, space.high)
        after, state, reward, terminated, truncated, info = environment.step(
            key, state, action, params
        )
        ended = terminated | truncated
        return after, state, reward, terminated, ended, info["final_observation"]

    return Environment(
        reset=lambda key: environment.reset(key, params),
        step=step,
        observations=observations[0],
        actions=space.shape[0] if continuous else int(space.n),
        continuous=continuous,
        longest=params.max_steps_in_episode,
    )


def from_brax(name: str) -> Environment:
    from brax import envs

    if name not in envs._envs:
        raise UsageError(
            f"brax has no environment {name!r}, only {', '.join(sorted(envs._envs))}"
        )
    longest = 1000
    environment = envs.create(name, episode_length=longest, auto_reset=False)

    def reset(key):
        first = environment.reset(key)
        return first.obs, (first, first)

    def step(key, state, action):
        del key
        first, now = state
        after = environment.step(now, jnp.tanh(action))
        ended = after.done > 0
        terminated = ended & (after.info["truncation"] == 0)
        # As in brax's own wrapper, an episode begins where the first one did.
        begun = jax.tree.map(lambda x, y: jnp.where(ended, x, y), first, after)
        return begun.obs, (first, begun), after.reward, terminated, ended, after.obs

    return Environment(
        reset,
        step,
        environment.observation_size,
        environment.action_size,
        continuous=True,
        longest=longest,
    )


# -------------------------------------------------------------------------- the policy


def layers(widths: list[int], last_scale: float, rngs: nnx.Rngs) -> nnx.Sequential:
    """Makes linear layers with tanh between them, with orthogonal matrices."""
    made = []
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        is_last = number == len(widths) - 2
        scale = last_scale if is_last else 2**0.5
        init = nnx.initializers.orthogonal(scale)
        made.append(nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs))
        made += [] if is_last else [nnx.tanh]
    return nnx.Sequential(*made)


class Policy(nnx.Module):
    """Two networks: the distribution of actions, and the value of a state."""

    def __init__(self, environment: Environment, width: int, *, rngs: nnx.Rngs):
        inputs, actions = environment.observations, environment.actions
        self.continuous = environment.continuous
        self.actor = layers([inputs, width, width, actions], 0.01, rngs)
        self.critic = layers([inputs, width, width, 1], 1.0, rngs)
        if self.continuous:
            self.log_deviation = nnx.Param(jnp.zeros(actions))

    def value(self, observations: jax.Array) -> jax.Array:
        return self.critic(observations)[..., 0]

    def best(self, observations: jax.Array) -> jax.Array:
        """Returns the likeliest actions."""
        scores = self.actor(observations)
        return scores if self.continuous else scores.argmax(-1)

    def log_deviations(self, scores: jax.Array) -> jax.Array:
        return jnp.broadcast_to(self.log_deviation[...], scores.shape)

    def sample(self, key: jax.Array, observations: jax.Array) -> jax.Array:
        scores = self.actor(observations)
        if self.continuous:
            noise = jax.random.normal(key, scores.shape)
            return scores + jnp.exp(self.log_deviations(scores)) * noise
        return jax.random.categorical(key, scores)

    def log_probability(
        self, observations: jax.Array, actions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the log-probability of the actions, and the entropy."""
        scores = self.actor(observations)
        if self.continuous:
            log_deviation = self.log_deviations(scores)
            z = (actions - scores) * jnp.exp(-log_deviation)
            per_action = -0.5 * (z**2 + jnp.log(2 * jnp.pi)) - log_deviation
            entropy = 0.5 * (1 + jnp.log(2 * jnp.pi)) + log_deviation
            return per_action.sum(-1), entropy.sum(-1).mean()
        log_all = nnx.log_softmax(scores)
        chosen = jnp.take_along_axis(log_all, actions[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_all) * log_all, axis=-1).mean()


# ---------------------------------------------------------------------------- the task


class Steps(NamedTuple):
    """Steps of all environments; each array begins with (T, E), or with their parts."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    advantage: jax.Array
    target: jax.Array  # of the value


class State(NamedTuple):
    """What goes from update to update."""

    key: jax.Array
    updates: jax.Array  # so far
    observation: jax.Array  # (E, ...)
    environments: Any
    running: jax.Array  # (E,) the return of the episode so far
    finished: jax.Array  # (E,) the return of the last finished episode, NaN at first
    steps: Steps  # of the iteration, flat


def advantages(rewards, values, next_values, terminated, ended):
    """Returns the generalized advantage estimates (Schulman et al., 2016), (T, E).

    An episode that was cut off counts with the value of its last state.
    """
    errors = rewards + DISCOUNT * next_values * ~terminated - values

    def add(later, now):
        error, end = now
        here = error + DISCOUNT * TRACE * ~end * later
        return here, here

    last = jnp.zeros_like(errors[0])
    return jax.lax.scan(add, last, (errors, ended), reverse=True)[1]


def faulty_iterations(iterations: int) -> np.ndarray:
    """Returns the iterations with faults, counted from 0, in even distances."""
    return np.arange(1, FAULTS + 1) * iterations // (FAULTS + 1)


class PPO(task.Task):
    """Minimizes PPO's clipped objective. It is compared by minus the mean return."""

    def __init__(self, options: Options):
        self.options = options
        self.environment = make_environment(options.environment)
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: self.policy(0)))

    def policy(self, seed: jax.typing.ArrayLike) -> Policy:
        rngs = nnx.Rngs(jax.random.key(seed))
        return Policy(self.environment, self.options.width, rngs=rngs)

    def inputs(self, run: Run):
        """Returns whether the rewards are too large in each update's iteration."""
        is_faulty = np.zeros(-(-run.config.steps // UPDATES), bool)
        if run.scenario == "rewards":
            is_faulty[faulty_iterations(len(is_faulty))] = True
        return is_faulty.repeat(UPDATES)[: run.config.steps], jnp.uint32(0)

    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(self.policy(seed)))

    def start(self, params, seed) -> State:
        options = self.options
        key = jax.random.fold_in(jax.random.key(seed), 1)
        keys = jax.random.split(key, options.environments)
        observation, environments = jax.vmap(self.environment.reset)(keys)
        zeros = jnp.zeros(options.environments)
        unknown = jnp.full_like(zeros, jnp.nan)
        size = options.batch
        policy = nnx.merge(self.graphdef, params)
        action = jax.eval_shape(policy.sample, key, observation)
        empty = Steps(
            jnp.zeros((size, *observation.shape[1:]), observation.dtype),
            jnp.zeros((size, *action.shape[1:]), action.dtype),
            *(jnp.zeros(size) for _ in range(3)),
        )
        return State(
            *(key, jnp.int32(0), observation, environments, zeros, unknown, empty)
        )

    def collect(self, params: optax.Params, state: State, is_faulty) -> State:
        """Lets all environments make steps with the current policy."""
        policy = nnx.merge(self.graphdef, params)
        step_all = jax.vmap(self.environment.step)
        factor = jnp.where(is_faulty, REWARD_FACTOR, 1.0)

        def step(carry, key):
            observation, environments, running, finished = carry
            key, action_key = jax.random.split(key)
            action = policy.sample(action_key, observation)
            log_probability, _ = policy.log_probability(observation, action)
            keys = jax.random.split(key, len(observation))
            after, environments, reward, terminated, ended, final = step_all(
                keys, environments, action
            )
            running = running + reward
            finished = jnp.where(ended, running, finished)
            running = jnp.where(ended, 0, running)
            record = (
                *(observation, action, log_probability, reward * factor),
                *(policy.value(observation), policy.value(final), terminated, ended),
            )
            return (after, environments, running, finished), record

        key, rollout_key = jax.random.split(state.key)
        keys = jax.random.split(rollout_key, self.options.rollout)
        carry = state.observation, state.environments, state.running, state.finished
        carry, (observation, action, log_probability, *rest) = jax.lax.scan(
            step, carry, keys
        )
        advantage = advantages(*rest)
        steps = Steps(
            observation, action, log_probability, advantage, advantage + rest[1]
        )
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        return State(key, state.updates, *carry, flat)

    def objective(self, params: optax.Params, part: Steps) -> jax.Array:
        policy = nnx.merge(self.graphdef, params)
        log_probability, entropy = policy.log_probability(part.observation, part.action)
        ratio = jnp.exp(log_probability - part.log_probability)
        gain = part.advantage - part.advantage.mean()
        gain = gain / (part.advantage.std() + 1e-8)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        policy_loss = -jnp.minimum(ratio * gain, clipped * gain).mean()
        value_loss = 0.5 * jnp.mean((policy.value(part.observation) - part.target) ** 2)
        return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * entropy

    def gradient(self, params, state: State, batch):
        position = state.updates % UPDATES
        state = jax.lax.cond(
            position == 0,
            functools.partial(self.collect, params),
            lambda state, _: state,
            *(state, batch),
        )
        size = len(state.steps.advantage)
        epoch_key = jax.random.fold_in(state.key, position // PARTS)
        order = jax.random.permutation(epoch_key, size)
        chosen = order.reshape(PARTS, -1)[position % PARTS]
        part = jax.tree.map(lambda x: x[chosen], state.steps)
        loss, gradient = jax.value_and_grad(self.objective)(params, part)
        return loss, gradient, state._replace(updates=state.updates + 1), {}

    def curves(self, state: State) -> dict[str, jax.Array]:
        return {"returns": jnp.nanmean(state.finished)}

    def evaluate(self, params, test):
        """Returns minus the mean return of the likeliest actions."""
        policy = nnx.merge(self.graphdef, params)
        keys = jax.random.split(jax.random.key(test), TEST_EPISODES)
        observation, states = jax.vmap(self.environment.reset)(keys)

        def step(carry, number):
            observation, states, total, is_over = carry
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            observation, states, reward, _, ended, _ = jax.vmap(self.environment.step)(
                step_keys, states, policy.best(observation)
            )
            total = total + jnp.where(is_over, 0, reward)
            return (observation, states, total, is_over | ended), None

        zeros = jnp.zeros(TEST_EPISODES)
        carry = observation, states, zeros, zeros > 0
        carry, _ = jax.lax.scan(step, carry, jnp.arange(self.environment.longest))
        return -carry[2].mean()


class PPOStudy(task.TaskStudy):
    """Trains policies under several optimizers, without and with faults."""

    score = Score(
        "return",
        f"the return of the likeliest actions over {TEST_EPISODES} episodes",
        digits=1,
        sign=-1,
    )

    def decode(self, record: engine.Record) -> engine.Record:
        return super().decode(record) | {"returns": record["returns"]}

    def draw(self, results, records):
        """Draws the return of the episodes during training."""
        thousands = self.options.batch / 1000  # of steps, in each iteration
        iterations = -(-records[0]["steps"] // UPDATES)
        return pictures.curves(
            results,
            records,
            "returns",
            UPDATES,
            thousands / UPDATES,
            (f"thousand steps in {self.options.environment}", "return in training"),
            thousands * faulty_iterations(iterations),
        )

    def task(self, run: Run) -> PPO:
        del run
        return PPO(self.options)
