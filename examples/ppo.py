"""Train policies with PPO: the return that several optimizers reach.

    python examples/ppo.py

plays CartPole with 16 environments side by side. Environments, policy and update are
one compiled program. An iteration collects 2048 steps, and then makes 16 updates:

    clean    no faults
    rewards  in three of the iterations, the rewards are 1000 times as large

Every optimizer is trained with every learning rate, scenario and seed. A run leaves a
record and is not repeated: after Ctrl-C the same command continues. The environments
are those of gymnax: pip install gymnax six. Its version 1.0.1 cannot be installed
beside JAX 0.12. Those of brax need another package: pip install brax. The program
writes to the folder --output:

    runs/*.json   settings, returns, losses and gradient norms of every run
    ppo.md        the return at the best learning rate, and its spread
    summary.json  the same numbers; a loss there is minus a return
    ppo.png       return during training, with its spread over the seeds; dotted lines
                  mark the iterations with faults
"""

from collections.abc import Sequence

from studies import ppo, program
from trainer import cli
from trainer.config import RunConfig

EXAMPLE = program.Example(
    title="PPO",
    description=__doc__,
    examples="""
examples:
  a sweep with five seeds  ppo.py --seeds 5 --learning-rate 1e-3 4e-3 1.6e-2 6.4e-2
  a continuous action      ppo.py --environment Pendulum-v1 --steps 2400
  the published task       ppo.py --environment brax:hopper --environments 512
                             --rollout 64 --width 256 --steps 4800
""",
    question="Which optimizer reaches the highest return, without and with faults?",
    study=ppo.PPOStudy,
    options=ppo.Options,
    base=RunConfig(steps=640, bursts=0),
    optimizers=("adam", "adam_clip", "spam", "stable_spam"),
    rates=(4e-3,),
    scenarios=program.scenario_flag(ppo.SCENARIOS, "which faults there are"),
    numbers={"steps": f"updates of each run; {ppo.UPDATES} make an iteration"},
    seeds=3,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return program.main(EXAMPLE, arguments)


if __name__ == "__main__":
    cli.exit_with(main)
