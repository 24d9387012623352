"""Train a small language model under injected gradient spikes, with four optimizers.

    python examples/pretrain.py

takes two to three minutes on two CPU cores. It trains a LLaMA-style transformer on
bytes of Shakespeare four times, from the same parameters, on the same batches, with the
same faults: four times in the run, for three steps in a row, every tensor's gradient
gets normal noise of 1000 x its own RMS. The optimizers are

    adam        Adam
    adam_clip   optax.chain(optax.clip_by_global_norm(1.0), adam)
    spam        spam_optax.spam
    clip_spam   optax.chain(optax.clip_by_global_norm(1.0), spam)

It is a demonstration: one seed, one learning rate for all. What it shows: under Adam
the faults enter the moments and the loss stops falling. They hit every coordinate at
once, so the global norm sees them, and clipping it stops them; SPAM added to that
changes little. SPAM alone lies between: its threshold of 5000 limits a coordinate to
70.7 x sqrt(v), v is not bias corrected, small after a reset, and grows with what
passes, so a burst still reaches the moments at 10 to 150 x the usual gradient norm.
--threshold 100 lets less through.

The run's folder, runs/<date and time> unless --output says otherwise, holds

    metrics.jsonl           a line for every step and evaluation, written at once
    summary.json            the table at the end
    report.html             the run on one page, with the tensors that spiked most
    spike_suppression.png   loss, gradient norms and clipped coordinates
    tensorboard/            the same numbers: tensorboard --logdir runs
    config.json             the settings
    checkpoints/            for --resume; the last one has the trained parameters

The same program trains the LLaMA shapes of 9M to 1B parameters on TPUs and GPUs, one
host or many: examples/tpu and examples/gpu say how. --compile-only asks the compiler
for a target beforehand what a step takes in memory, with no such device at hand.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import json
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence

import grain
import jax

from trainer import (
    ahead_of_time,
    command_line,
    data,
    hosts,
    loop,
    model,
    optimizers,
    run_folder,
    sharding,
    training,
)
from trainer.checkpoints import Checkpoints
from trainer.config import UsageError
from trainer.output import analysis, console, picture, records, report
from trainer.run_folder import Run, RunFolder

EXAMPLES = """\
examples:
  everything, two to three minutes   pretrain.py
  one optimizer, a longer run        pretrain.py --optimizer spam --steps 2000
  a lower threshold                  pretrain.py --optimizer spam --threshold 100
  faults in one coordinate of 1000   pretrain.py --spike-rate 0.001
  no faults                          pretrain.py --no-spikes
  your own text, a named folder      pretrain.py --data book.txt --output runs/book
  after Ctrl-C or a preemption       pretrain.py --resume --output runs/book
  60M parameters on C4, 8 devices    pretrain.py --preset 60m --data hf:allenai/c4:en
                                       --tokenizer t5-base --fsdp 8 --output runs/60m
  does 1B fit 16 chips of TPU v5e?   pretrain.py --compile-only --target tpu:v5e:4x4
                                       --preset 1b --fsdp 16
"""


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error message, and what it read."""
    parser = command_line.Parser(
        prog="pretrain.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command_line.add_run_flags(parser)
    command_line.add_device_flags(parser)
    add_output_flags(parser)
    ahead_of_time.add_flags(parser)
    given = sys.argv[1:] if arguments is None else arguments
    for argument in given:
        try:
            argument.encode()
        except UnicodeEncodeError:  # then no checkpoint could be written, or report
            parser.error(f"{argument!r} must be UTF-8")
    return parser, parser.parse_args(given)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=command_line.folder,
        metavar="FOLDER",
        help="folder of the run (default: runs/<date and time>)",
    )
    group.add_argument(
        "--checkpoints",
        metavar="PATH",
        help="folder or bucket (gs://...) for the checkpoints, which every host must"
        " reach (default: checkpoints in --output)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, bit for bit, with the settings it has",
    )
    group.add_argument(
        "--skip-bad-data",
        type=command_line.whole(0),
        default=0,
        metavar="N",
        help="if a file of a streamed data set cannot be read, leave out the rest of it"
        " and go on, for up to N files on each host; may change on --resume"
        " (default: 0)",
    )
    group.add_argument(
        "--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases too"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code.

    0 when done or after SIGTERM, 1 if training came to a bad end, 2 for a mistake in
    the command, 130 after Ctrl-C.
    """
    parser, options = parse(arguments)
    given = command_line.run_settings(options)
    cluster = command_line.cluster(parser, options)
    if options.output is None and (options.resume or cluster.given):
        flag = "--resume" if options.resume else "a run on several hosts"
        parser.error(f"{flag} needs --output, the folder of the run")
    if options.target and not options.compile_only:
        parser.error("--target is for --compile-only")
    try:
        if options.compile_only:
            return ahead_of_time.run(given, command_line.parallelism(options), options)
        hosts.connect(cluster)
        return run(given, options)
    except UsageError as error:
        parser.error(str(error))
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = error.filename or options.output
        parser.exit(
            1, f"{parser.prog}: error: cannot write {where}: {error.strerror}\n"
        )


def run(given: dict, options: argparse.Namespace) -> int:
    """Begins or continues a run, to its end or until it is stopped."""
    if options.wandb:
        records.import_wandb()  # so that its absence shows before the work
    folder = RunFolder(options.output or default_output())
    open_run = run_folder.resume if options.resume else run_folder.begin
    with contextlib.closing(folder), hosts.StopRequest().listening() as stop:
        opened = hosts.from_main(
            lambda: open_run(folder, given, options.checkpoints).to_json()
        )
        this_run = Run.from_json(opened)
        task, loaded = make_task(
            this_run, command_line.parallelism(options), options.skip_bad_data
        )
        entered = hosts.from_main(
            lambda: run_folder.enter(folder, this_run, loaded.digest).to_json()
        )
        if hosts.is_main():
            print(f"Data: {loaded.files}")
        with jax.set_mesh(task.mesh):
            halted = train_all(
                task, folder, Run.from_json(entered), stop, options.wandb
            )
        left_out = left_out_anywhere(loaded)
        done = hosts.from_main(lambda: str(show_report(task, folder, left_out)))
    command = command_to_go_on(folder, options.skip_bad_data)
    for message in halted:
        console.warn(message)
    if stop.signal is not None and done != "True":
        console.say(f"Interrupted. Continue with: {command}")
        return 130 if stop.signal == signal.SIGINT else 0
    if done != "True" and not halted:
        console.warn(f"what the run wrote is no longer in {folder.path}")
    return 1 if halted or done != "True" else 0


def command_to_go_on(folder: RunFolder, skip_bad_data: int) -> str:
    """What to type to continue the run in `folder`."""
    command = ["python", sys.argv[0], "--resume", "--output", str(folder.path)]
    if skip_bad_data:
        command += ["--skip-bad-data", str(skip_bad_data)]
    return shlex.join(command)


def left_out_anywhere(loaded: data.Data) -> list[str]:
    """The shards that any host left out in part, each once."""
    told = hosts.gather(json.dumps(sorted(loaded.left_out)))
    return sorted({name for names in told for name in json.loads(names)})


def default_output() -> pathlib.Path:
    return pathlib.Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def make_task(
    this_run: Run, parallelism: sharding.Parallelism, skip_bad_data: int = 0
) -> tuple[training.Task, data.Data]:
    """What the optimizers have in common, and the data."""
    config = this_run.config
    for name in config.optimizers:
        optimizers.make(name, config)  # so that a mistake shows before the work
    host = data.Host(jax.process_index(), jax.process_count())
    loaded = hosts.everywhere(
        lambda: data.load(config, host, skip_bad_data=skip_bad_data)
    )
    if len(set(hosts.gather(loaded.digest))) > 1:
        raise UsageError("the hosts do not see the same data and tokenizer")
    mesh = sharding.make_mesh(parallelism, config.batch_size // config.accumulate)
    platform = mesh.devices.flat[0].platform
    model_config = model.configure(config, loaded.tokenizer.vocabulary, platform)
    task = training.make_task(
        config, model_config, mesh, loaded.train, loaded.validation
    )
    return task, loaded


def train_all(
    task: training.Task,
    folder: RunFolder,
    this_run: Run,
    stop: hosts.StopRequest,
    wandb_project: str | None,
) -> list[str]:
    """Trains each optimizer from where its newest checkpoint left it.

    Returns what there is to say of those that halted.
    """
    config = task.config
    checkpoints = this_run.checkpoints or str(folder.checkpoints)
    halted = []
    if hosts.is_main():
        console.announce(task)
        console.describe(task)
        folder.write_tensor_names(training.tensor_names(task))
    with console.Progress(config) as progress:
        for name in config.optimizers:
            if stop.signal is not None:
                break
            with Checkpoints(f"{checkpoints}/{name}", config.keep_checkpoints) as saved:
                try:
                    train_one(task, name, folder, saved, progress, stop, wandb_project)
                except loop.Halted as error:
                    halted.append(str(error))
                except loop.DataLost as error:
                    go_on = command_to_go_on(folder, 0)
                    halted.append(f"{error}. Continue with: {go_on}")
                    break  # the other optimizers would meet the same error
    return halted


def train_one(
    task: training.Task,
    name: str,
    folder: RunFolder,
    checkpoints: Checkpoints,
    progress: console.Progress,
    stop: hosts.StopRequest,
    wandb_project: str | None,
) -> None:
    """Trains the optimizer called `name` to the end, or until it is stopped."""
    optimizer = optimizers.make(name, task.config)
    recorded = hosts.from_main(
        lambda: str(records.recorded(folder.metrics, name, task.config))
    )
    state, batches = begin_or_continue(task, optimizer, checkpoints, int(recorded))
    step = int(state.step)
    if hosts.is_main():
        records.cut(folder.metrics, name, step)
    if step == task.config.steps:
        return
    progress.start(name, state)
    writers = records.Writers(folder, task, name, step, progress, wandb_project)
    with writers, contextlib.closing(batches):

        def save(state, place):
            writers.sync()
            checkpoints.save(state, place)

        loop.train(
            state,
            task,
            optimizer,
            batches,
            record=writers.write,
            save=save,
            stop=stop.seen,
        )


def begin_or_continue(
    task: training.Task,
    optimizer: optimizers.Optimizer,
    checkpoints: Checkpoints,
    recorded: int,
) -> tuple[training.TrainState, grain.DatasetIterator]:
    """The state to train from, and the batches that come after it."""
    batches = iter(task.train)
    make = functools.partial(
        training.initial_state, task.config, task.model, optimizer, task.faults
    )
    like = sharding.abstract(jax.eval_shape(make), task.mesh)
    restored = checkpoints.restore(like, recorded, console.warn)
    if restored is None:
        # The second checkpoint waits for the first one to be complete.
        if recorded > 2 * task.config.checkpoint_every:
            raise UsageError(
                f"there is no checkpoint in {checkpoints.folder}, but metrics.jsonl has"
                f" {recorded} steps of {optimizer.name}: say where they are with"
                " --checkpoints, or start again in another folder with --output"
            )
        if recorded:
            console.warn(
                f"{optimizer.name}: {recorded} steps are recorded, but there is no"
                f" checkpoint in {checkpoints.folder} yet: beginning again"
            )
        return make(), batches
    state, place = restored
    hosts.everywhere(lambda: batches.set_state(place))
    # What halted once is tried again: the batch or the mesh may have been to blame.
    return state._replace(halted=jax.numpy.zeros_like(state.halted)), batches


def show_report(
    task: training.Task, folder: RunFolder, left_out: Sequence[str] = ()
) -> bool:
    """Writes and shows what the optimizers did; True if all came to an end.

    `left_out` names the shards that were left out in part.
    """
    if not folder.path.is_dir():
        return False
    config = task.config
    rows = records.read(folder.metrics)
    summary = {
        name: {**values, "bad_data_skipped": len(left_out)}
        for name, values in analysis.summarize(rows, config).items()
    }
    records.replace(folder.summary, json.dumps(summary, indent=2) + "\n")
    if summary:
        picture.draw(folder.picture, rows, summary, config)
        report.write(folder, rows, summary, config)
        console.show(summary, config)
        print(f"Metrics, summary and report are in {folder.path}")
    if left_out:
        print(f"Files whose data was left out in part: {len(left_out)}")
    return len(summary) == len(config.optimizers)


if __name__ == "__main__":
    sys.exit(main())
