"""Makes ``optimizer: {type: spam}`` work in Levanter's YAML files.

Importing this module registers ``spam``, ``sparse_spam`` and ``stable_spam``. Import it
before Levanter reads the file.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import optax

import spam_optax

try:
    import levanter.tracker
    from levanter.optim.config import OptimizerConfig
except ModuleNotFoundError as error:
    if error.name != "levanter":
        raise
    raise ImportError(
        "spam_optax.integrations.levanter needs Levanter: see docs/trainers/levanter.md"
    ) from error


@dataclass(frozen=True)
class SkipSpikesConfig:
    """The arguments of :func:`spam_optax.skip_spikes`."""

    window: int = 128
    sigma: float = 6.0
    loss_share: float = 0.2
    norm_share: float = 2.0
    min_history: int = 32
    max_consecutive: int = 8
    robust: bool = True


@dataclass(frozen=True)
class _Config(OptimizerConfig):
    """What the optimizers have in common. The other fields are their arguments."""

    max_grad_norm: float | None = 1.0
    skip_spikes: SkipSpikesConfig | bool = False
    track_spikes: bool = False

    factory: ClassVar[str]

    def build(self, num_train_steps: int) -> optax.GradientTransformationExtraArgs:
        limit = self.max_grad_norm
        if limit is not None and not limit >= 0:
            raise ValueError(
                f"max_grad_norm must be a number >= 0, or null, got {limit}."
            )
        names = {field.name for field in dataclasses.fields(self)}
        names -= {field.name for field in dataclasses.fields(_Config)}
        arguments = {name: getattr(self, name) for name in names}
        arguments["weight_decay"] = self.weight_decay
        arguments["mask"] = self.build_weight_decay_mask()

        # Levanter logs the learning rate that it finds in the state.
        def make(
            learning_rate: optax.ScalarOrSchedule,
        ) -> optax.GradientTransformation:
            factory = getattr(spam_optax, self.factory)
            tx: optax.GradientTransformation = factory(learning_rate, **arguments)
            if self.max_grad_norm:
                tx = optax.chain(optax.clip_by_global_norm(self.max_grad_norm), tx)
            if self.skip_spikes:
                guard = self.skip_spikes
                if guard is True:
                    guard = SkipSpikesConfig()
                tx = spam_optax.skip_spikes(tx, **dataclasses.asdict(guard))
                tx = _log(tx, _skipped)
            if self.track_spikes:
                tx = _log(spam_optax.track_spikes(tx), _scores)
            return tx

        schedule = self.lr_scheduler(num_train_steps)
        return spam_optax.inject_hyperparams(make)(learning_rate=schedule)


@OptimizerConfig.register_subclass("spam")
@dataclass(frozen=True)
class SpamConfig(_Config):
    """``type: spam`` is :func:`spam_optax.spam`."""

    factory: ClassVar[str] = "spam"

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    threshold: float = 5000.0
    grace_steps: int = 20
    clip_unseen: bool = False
    count: bool = False
    reset_interval: int | None = 500
    warmup_steps: int = 150
    restart_bias_correction: bool = False
    mu_dtype: str | None = None
    nu_dtype: str | None = None


@OptimizerConfig.register_subclass("sparse_spam")
@dataclass(frozen=True)
class SparseSpamConfig(SpamConfig):
    """``type: sparse_spam`` is :func:`spam_optax.sparse_spam`."""

    factory: ClassVar[str] = "sparse_spam"

    density: float = 0.25
    key: int = 0
    row_blocks: int = 1


@OptimizerConfig.register_subclass("stable_spam")
@dataclass(frozen=True)
class StableSpamConfig(_Config):
    """``type: stable_spam`` is :func:`spam_optax.stable_spam`."""

    factory: ClassVar[str] = "stable_spam"

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    reset_interval: int | None = 1000
    total_steps: int | None = None
    count: bool = False
    mu_dtype: str | None = None
    nu_dtype: str | None = None


def _log(
    inner: optax.GradientTransformationExtraArgs, read: Any
) -> optax.GradientTransformationExtraArgs:
    """Sends what `read` finds in the new state to Levanter's tracker."""

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates, state = inner.update(updates, state, params, **extra_args)
        levanter.tracker.jit_log(read(state))
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _skipped(state: spam_optax.SkipSpikesState) -> dict[str, jax.Array]:
    return {
        "optim/skip_reason": state.skip_reason,
        "optim/skipped_total": state.skipped_total,
    }


def _scores(state: spam_optax.TrackSpikesState) -> dict[str, jax.Array]:
    return {
        "optim/max_spike_score": state.tensor_spike_score.max(),
        "optim/spike_steps": state.tensor_spike_steps.sum(),
    }
