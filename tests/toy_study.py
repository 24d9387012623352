"""A study of a few lines, with which the tests run the engine.

Run as a program it makes the records of the rates 1, 2, 3 and so on:

    python toy_study.py FOLDER RUNS WORKERS SECONDS_PER_RUN
"""

import argparse
import os
import pathlib
import sys
import time

from studies import engine
from trainer import cli


class Toy(engine.Study):
    """Records the square of each rate; the program is the sign of the rate."""

    def __init__(self, seconds=0.0, data="data", bad=()):
        self.seconds, self.data, self.bad = seconds, data, bad
        self.compiled, self.trained = [], []

    def settings(self, run):
        return {"rate": run}

    def name(self, run):
        return f"rate_{run}"

    def program(self, run):
        return run > 0

    def data_digest(self, run):
        return self.data

    def compile(self, run):
        self.compiled.append(run)

        def train(run, progress):
            self.trained.append(run)
            if run in self.bad:
                raise self.bad[run]
            progress(0.5)
            time.sleep(self.seconds)
            return {"square": run**2, "process": os.getpid()}

        return train

    def decode(self, record):
        return record["square"]


def main(arguments=None):
    folder, runs, workers, seconds = arguments or sys.argv[1:]
    parser = argparse.ArgumentParser(prog="toy_study.py")
    grid = range(1, int(runs) + 1)
    study = Toy(float(seconds))
    return engine.exit_code(
        parser,
        lambda: engine.run_all(study, grid, pathlib.Path(folder), int(workers)),
    )


if __name__ == "__main__":
    # In the processes that train, the class is found by the name of its module.
    import toy_study

    cli.exit_with(toy_study.main)
