"""Adaptive sweeps of the learning rate, on losses that are known."""

import math

import pytest

from studies import engine, sweep, task
from trainer.config import RunConfig

RATES = (1e-3, 2e-3, 4e-3)


def finish(loss, rates=RATES, seeds=(0, 1, 2)):
    """Runs a whole sweep; returns its points."""
    losses = {(rate, seeds[0]): loss(rate, seeds[0]) for rate in rates}
    while points := sweep.next_points(losses, seeds):
        assert not set(points) & set(losses)
        losses |= {point: loss(*point) for point in points}
    return sorted(losses)


def valley(best):
    return lambda rate, seed: 2 + math.log2(rate / best) ** 2 + seed / 100


@pytest.mark.parametrize("best", [2.5e-4, 1e-3, 2e-3, 4e-3, 1.6e-2])
def test_the_best_rate_is_enclosed_and_has_all_seeds(best):
    points = finish(valley(best))
    near = {best / 2, best, best * 2}
    assert {(r, s) for r, s in points if s} == {(r, s) for r in near for s in (1, 2)}
    assert [r for r, s in points if not s] == sorted({*RATES, *near, *between(best)})


def between(best):
    """Returns the rates that a sweep passes on its way from the grid to the best."""
    steps = (best * 2.0**k for k in range(-6, 7))
    return {r for r in steps if min(best, 1e-3) <= r <= max(best, 4e-3)}


def test_a_rate_that_was_best_by_luck_does_not_end_the_sweep():
    """With seed 0 alone, 0.001 is the best; with all seeds it is the worst."""

    def loss(rate, seed):
        if rate == 1e-3:
            return 9.0 if seed else 0.0
        return abs(rate - 4e-3)

    points = finish(loss, rates=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3))
    assert {r for r, s in points if s == 2} == {5e-4, 1e-3, 2e-3, 4e-3, 8e-3}


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_sweep_without_a_lowest_loss_ends(sign):
    points = finish(lambda rate, seed: sign * rate, seeds=(0,))
    assert len(points) == sweep.MOST_RATES


@pytest.mark.parametrize("rates", [(1e-3, 1.0000001e-3), (1e-300, 1e-150)])
def test_a_sweep_ends_where_no_further_rate_can_be_told_apart(rates):
    points = finish(lambda rate, seed: rate, rates=rates)
    assert {(rates[0], seed) for seed in (0, 1, 2)} <= set(points)


def test_one_rate_gets_all_seeds():
    assert finish(valley(1.0), rates=(1e-3,)) == [(1e-3, 0), (1e-3, 1), (1e-3, 2)]


def test_added_rates_are_those_of_other_grids():
    assert (5e-4, 0) in finish(valley(5e-4)) and (8e-3, 0) in finish(valley(8e-3))


class Valley(engine.Study):
    """Every run ends with the loss of a valley whose lowest point is at rate 0.008."""

    def settings(self, run):
        config = run.config
        return {"rate": config.learning_rate, "seed": config.seed, "label": run.label}

    def compile(self, run):
        def train(run, progress):
            if run.label == "lion":
                raise ValueError("broken")
            loss = valley(8e-3)(run.config.learning_rate, run.config.seed)
            return {"final_eval_loss": loss, "first_eval_loss": 99.0}

        return train


def test_sweeps_are_extended_in_place_and_the_others_stay(tmp_path):
    grids = {
        name: task.grid(RunConfig(), labels, ["clean"], RATES, [0])
        for name, labels in {"all": ["adam", "lion"], "fixed": ["spam"]}.items()
    }
    failures = sweep.run_all(Valley(), grids, {"all": (0, 1)}, tmp_path)
    assert len(failures) == len(RATES)  # a row with a failure gets no more runs
    points = [(r.label, r.config.learning_rate, r.config.seed) for r in grids["all"]]
    rates = (*RATES, 8e-3, 1.6e-2)
    added = {("adam", rate, 0) for rate in rates} | {
        ("adam", rate, 1) for rate in rates[2:]
    }
    assert {point for point in points if point[0] == "adam"} == added
    assert len(points) == len(added) + len(RATES) and len(grids["fixed"]) == len(RATES)
