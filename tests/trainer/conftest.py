"""A small task and a finished run, which several files of tests share."""

import pytest

from trainer import train_step
from trainer.config import RunConfig
from trainer.data import text_files
from trainer_in_process import PAIR, SMALL_FLAGS, make_task
from trainer_process import Trainer


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "part.txt"
    text.write_bytes(text_files.SHAKESPEARE.read_bytes()[:20_000])
    settings = {"preset": "nano", "steps": 24, "batch_size": 4, "sequence_length": 16}
    return make_task(RunConfig.from_settings(**settings, data=str(text)))


@pytest.fixture(scope="session")
def params(task):
    return train_step.initial_params(task.model, task.config.seed)


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    """Starts the program in processes of its own."""
    with Trainer(tmp_path_factory.mktemp("cache")) as trainer:
        yield trainer


@pytest.fixture(scope="session")
def finished_run(trainer, tmp_path_factory):
    """Two optimizers in a process of their own, from an empty folder."""
    folder = tmp_path_factory.mktemp("finished")
    code, output, errors = trainer.run(*SMALL_FLAGS, *PAIR, "--output=run", cwd=folder)
    assert code == 0, errors
    return folder / "run", output, errors
