"""Train a small language model under injected faults, with five optimizers.

    python examples/pretrain.py

takes two to three minutes on two CPU cores. It trains a LLaMA-style transformer on
bytes of Shakespeare five times, from the same parameters, on the same batches, with the
same faults. Four times in the run, for three steps in a row, every tensor's gradient
gets normal noise of 1000 x its own RMS. Twice, for three steps in a row, the batch is
replaced by random bytes. The optimizers are

    adam              Adam
    adam_clip         optax.chain(optax.clip_by_global_norm(1.0), adam)
    spam              spam_optax.spam
    clip_spam         optax.chain(optax.clip_by_global_norm(1.0), spam)
    guard_clip_spam   spam_optax.skip_spikes(clip_spam)

This is a demonstration with one seed, and one learning rate for all. Under Adam the
faults enter the moments, and the loss stops falling. The faults hit every coordinate at
once, so they raise the global norm, and clipping that norm stops them. SPAM in addition
changes little. A guard skips the corrupted steps, and no others. SPAM alone lies in
between: its threshold of 5000 limits a coordinate to 70.7 x sqrt(v). v is not bias
corrected, it is small after a reset, and it grows with what passes. So a burst still
reaches the moments at 10 to 150 x the usual gradient norm. With --threshold 100 less
passes.

The folder of the run is runs/<date and time>, or --output. It holds

    metrics.jsonl           a line for every step and evaluation, written at once
    summary.json            the table at the end
    report.md               the tables of the run, with the tensors that spiked most
    spike_suppression.png   loss, gradient norms and clipped coordinates
    tensorboard/            the same numbers: tensorboard --logdir runs
    config.json             the settings
    checkpoints/            for --resume; the last one has the trained parameters

The same program trains the LLaMA shapes of 9M to 1B parameters on TPUs and GPUs, on one
host or many: see examples/tpu and examples/gpu. --compile-only compiles the training
step for a TPU or GPU that you need not have, and prints how much memory it takes.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import json
import os
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence

import grain
import jax

from trainer import (
    cli,
    compile_only,
    data,
    files,
    hosts,
    loop,
    model,
    optimizers,
    run_folder,
    sharding,
    show_batch,
    train_step,
)
from trainer.checkpoints import Checkpoints, place_of_host
from trainer.config import RunConfig
from trainer.errors import UsageError
from trainer.output import console, figure, report, sinks, summary
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
  the text of a step's batch         pretrain.py --show-batch 120 --output runs/book
  does 1B fit 16 chips of TPU v5e?   pretrain.py --compile-only --target tpu:v5e:4x4
                                       --preset 1b --fsdp 16
"""


CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Returns the parser, for its error messages, and the options."""
    parser = cli.make_parser("pretrain.py", __doc__, EXAMPLES)
    cli.add_run_flags(parser)
    cli.add_device_flags(parser)
    add_output_flags(parser)
    compile_only.add_flags(parser)
    return parser, parser.parse_args(arguments)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=cli.folder,
        metavar="FOLDER",
        help="folder of the run (default: runs/<date and time>)",
    )
    group.add_argument(
        "--checkpoints",
        type=cli.folder_or_bucket,
        metavar="PATH",
        help="folder or bucket (gs://...) for the checkpoints, which every host can"
        " write to (default: checkpoints in --output)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output with its settings; on the same mesh the"
        " result is the same, bit for bit",
    )
    group.add_argument(
        "--skip-bad-data",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="if a file of a streamed data set cannot be read, leave out the rest of"
        " it, for up to N files on each host; may change on --resume (default: 0)",
    )
    show_batch.add_flag(group, cli.whole)
    group.add_argument(
        "--wandb", metavar="PROJECT", help="also send the metrics to Weights & Biases"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code.

    The code is 0 when done or after SIGTERM, 1 if training failed, 2 for a mistake in
    the command, and 130 after Ctrl-C.
    """
    parser, options = parse(arguments)
    given = cli.run_settings(options)
    if options.show_batch:
        return print_batch(parser, options, given)
    cluster = cli.cluster(parser, options)
    if options.output is None and (options.resume or cluster.given):
        flag = "--resume" if options.resume else "a run on several hosts"
        parser.error(f"{flag} needs --output, the folder of the run")
    if options.target and not options.compile_only:
        parser.error("--target is for --compile-only")
    try:
        if options.compile_only:
            return compile_only.run(given, cli.parallelism(options), options)
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


def print_batch(
    parser: argparse.ArgumentParser, options: argparse.Namespace, given: dict
) -> int:
    """Prints the batch of one step; returns the exit code."""
    if options.output is None:
        parser.error("--show-batch needs --output, the folder of the run")
    names = given.get("optimizers", ())
    try:
        return show_batch.run(
            RunFolder(options.output), options.show_batch, names, options.skip_bad_data
        )
    except UsageError as error:
        parser.error(str(error))


def run(given: dict, options: argparse.Namespace) -> int:
    """Begins or resumes a run, and trains until it ends or is stopped."""
    if options.wandb:
        sinks.import_wandb()  # so that a missing package is reported before the work
    folder = RunFolder(options.output or default_output())
    with contextlib.closing(folder), hosts.StopRequest().listening() as stop:
        this_run = Run.from_json(
            hosts.broadcast(lambda: find_run(folder, given, options).to_json())
        )
        task, loaded = prepare(
            this_run.config, cli.parallelism(options), options.skip_bad_data
        )
        hosts.broadcast(lambda: folder.open(this_run, loaded.digest))
        if hosts.is_main():
            print(f"Data: {loaded.files}")
        with jax.set_mesh(task.mesh):
            halted = train_all(task, folder, this_run, stop, options.wandb)
        left_out = left_out_on_any_host(loaded)
        done = hosts.broadcast(lambda: show_report(task, folder, left_out))
    for message in halted:
        console.warn(message)
    if stop.signal is not None and not done:
        command = resume_command(folder, options.skip_bad_data)
        console.log(f"Interrupted. Continue with: {command}")
        return 130 if stop.signal == signal.SIGINT else 0
    if not done and not halted:
        console.warn(f"the files of the run are no longer in {folder.path}")
    return 1 if halted or not done else 0


def find_run(folder: RunFolder, given: dict, options: argparse.Namespace) -> Run:
    """Returns the run to resume, or a new one."""
    if options.resume:
        return run_folder.load_run(folder, given, options.checkpoints)
    return run_folder.new_run(given, options.checkpoints)


def resume_command(folder: RunFolder, skip_bad_data: int) -> str:
    """Returns the command that continues the run in `folder`."""
    command = ["python", sys.argv[0], "--resume", "--output", str(folder.path)]
    if skip_bad_data:
        command += ["--skip-bad-data", str(skip_bad_data)]
    return shlex.join(command)


def left_out_on_any_host(loaded: data.Data) -> list[str]:
    """Returns the shards that any host left out in part, each once."""
    return sorted(
        {name for names in hosts.gather([*loaded.left_out]) for name in names}
    )


def default_output() -> pathlib.Path:
    return pathlib.Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def prepare(
    config: RunConfig, parallelism: sharding.Parallelism, skip_bad_data: int = 0
) -> tuple[train_step.Task, data.Data]:
    """Loads the data and makes the task that the optimizers have in common."""
    for name in config.optimizers:
        optimizers.make(name, config)  # so that a mistake is reported before the work
    host = data.Host(jax.process_index(), jax.process_count())
    loaded = hosts.on_all_hosts(
        lambda: data.load(config, host, skip_bad_data=skip_bad_data)
    )
    if len(set(hosts.gather(loaded.digest))) > 1:
        raise UsageError("the hosts do not see the same data and tokenizer")
    mesh = sharding.make_mesh(parallelism, config.batch_size // config.accumulate)
    platform = mesh.devices.flat[0].platform
    shape = model.for_platform(config.model, loaded.tokenizer.vocabulary, platform)
    task = train_step.make_task(config, shape, mesh, loaded.train, loaded.validation)
    return task, loaded


def train_all(
    task: train_step.Task,
    folder: RunFolder,
    this_run: Run,
    stop: hosts.StopRequest,
    wandb_project: str | None,
) -> list[str]:
    """Trains each optimizer from its newest checkpoint on.

    Returns a message for each optimizer that halted.
    """
    config = task.config
    checkpoints = this_run.checkpoints or str(folder.checkpoints)
    halted = []
    if hosts.is_main():
        console.print_run(task)
        console.print_moments(task)
        folder.write_tensor_names(task.tensor_names)
    chosen = [optimizers.make(name, config) for name in config.optimizers]
    is_new = jax.process_count() == 1 and not folder.metrics.exists()
    if is_new and stop.signal is None:
        compile_together(task, chosen)
    with console.Progress(config) as progress:
        for optimizer in chosen:
            if stop.signal is not None:
                break
            path = f"{checkpoints}/{optimizer.name}"
            with Checkpoints(path, config.keep_checkpoints) as saved:
                try:
                    train_one(
                        task, optimizer, folder, saved, progress, stop, wandb_project
                    )
                except loop.Halted as error:
                    halted.append(str(error))
                except loop.DataLost as error:
                    go_on = resume_command(folder, 0)
                    halted.append(f"{error}. Continue with: {go_on}")
                    break  # the other optimizers would meet the same error
    return halted


def compile_together(
    task: train_step.Task, chosen: Sequence[optimizers.Optimizer]
) -> None:
    """Compiles the steps of several optimizers at once, since each takes one core."""
    if len(chosen) > 1:
        dtype = task.validation.dtype
        steps = [train_step.lower_step(task, optimizer, dtype) for optimizer in chosen]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda step: step.compile(), steps))


def train_one(
    task: train_step.Task,
    optimizer: optimizers.Optimizer,
    folder: RunFolder,
    checkpoints: Checkpoints,
    progress: console.Progress,
    stop: hosts.StopRequest,
    wandb_project: str | None,
) -> None:
    """Trains one optimizer to the end, or until it is stopped."""
    while True:
        try:
            return train_from_checkpoint(
                task, optimizer, folder, checkpoints, progress, stop, wandb_project
            )
        except loop.Rewind as rewind:
            record_rewind(rewind, task, optimizer, folder)


def record_rewind(
    rewind: loop.Rewind,
    task: train_step.Task,
    optimizer: optimizers.Optimizer,
    folder: RunFolder,
) -> None:
    """Writes a rewind down; to go back is then to resume."""
    last, places = rewind.row["step"], hosts.gather(json.dumps(rewind.place))
    if not hosts.is_main():
        return
    earlier = sinks.rewinds_of(sinks.read(folder.metrics), optimizer.name)
    above = rewind.row["steps_above_band"]
    reason = (
        f"the loss was above its band for {above} steps"
        if above == task.config.rewind_after
        else "it was not finite"
    )
    row = {
        "optimizer": optimizer.name,
        "step": rewind.step,
        "rewind": len(earlier) + 1,
        "rewound_from": last,
        "reason": reason,
        "batches_left_out": last - rewind.step,
        "places": places,
    }
    sinks.rewind(folder.metrics, row)
    console.log(
        f"{optimizer.name}: back from step {last} to step {rewind.step}, because"
        f" {reason}; the {last - rewind.step} batches since are left out (rewind"
        f" {row['rewind']} of {task.config.rewind})"
    )


def train_from_checkpoint(
    task: train_step.Task,
    optimizer: optimizers.Optimizer,
    folder: RunFolder,
    checkpoints: Checkpoints,
    progress: console.Progress,
    stop: hosts.StopRequest,
    wandb_project: str | None,
) -> None:
    """Trains one optimizer on from its newest checkpoint, or from the beginning."""
    name = optimizer.name
    recorded, rewinds = hosts.broadcast(
        lambda: [
            sinks.recorded(folder.metrics, name, task.config),
            sinks.rewinds_of(sinks.read(folder.metrics), name),
        ]
    )
    state, batches = begin_or_resume(task, optimizer, checkpoints, recorded, rewinds)
    step = int(state.step)
    rewinds = [row for row in rewinds if row["step"] <= step]
    if hosts.is_main():
        sinks.cut(folder.metrics, name, step)
    if step == task.config.steps:
        return
    progress.start(name, state)
    writers = sinks.MetricSinks(folder, task, name, step, progress, wandb_project)
    with writers, contextlib.closing(batches):

        def save(state, place):
            writers.sync()
            checkpoints.save(state, place)

        def rewind_to(step):
            left = len(rewinds) < task.config.rewind
            return checkpoints.newest_before(step) if left else None

        loop.train(
            state,
            task,
            optimizer,
            batches,
            record=writers.write,
            save=save,
            stop=stop.seen,
            rewind_to=rewind_to,
            left_out=sum(row["batches_left_out"] for row in rewinds),
        )


def begin_or_resume(
    task: train_step.Task,
    optimizer: optimizers.Optimizer,
    checkpoints: Checkpoints,
    recorded: int,
    rewinds: Sequence[sinks.Row],
) -> tuple[train_step.TrainState, grain.DatasetIterator]:
    """Returns the state to train from, and the batches that come after it.

    If a rewind went back to the checkpoint, the batches are those after the rewind.
    """
    batches = iter(task.train)
    make = functools.partial(train_step.initial_state, task, optimizer)
    like = sharding.abstract(jax.eval_shape(make), task.mesh)
    restored = checkpoints.restore(like, recorded, console.warn)
    if restored is None:
        # The second checkpoint waits for the first one to be complete.
        if recorded > 2 * task.config.checkpoint_every:
            raise UsageError(
                f"there is no checkpoint in {checkpoints.folder}, but metrics.jsonl has"
                f" {recorded} steps of {optimizer.name}: name their folder with"
                " --checkpoints, or start again in another folder with --output"
            )
        if recorded:
            console.warn(
                f"{optimizer.name}: {recorded} steps are recorded, but there is no"
                f" checkpoint in {checkpoints.folder} yet: beginning again"
            )
        state, place = make(), None
    else:
        state, place = restored
    for row in rewinds:
        if row["step"] == int(state.step):
            place = json.loads(place_of_host(row["places"]))
    if place is not None:
        hosts.on_all_hosts(lambda: batches.set_state(place))
    # A halted step is tried again, because the batch or the mesh may have caused it.
    return state._replace(halted=jax.numpy.zeros_like(state.halted)), batches


def show_report(
    task: train_step.Task, folder: RunFolder, left_out: Sequence[str] = ()
) -> bool:
    """Writes and prints the results; returns whether all optimizers came to an end.

    `left_out` names the shards that were left out in part.
    """
    if not folder.path.is_dir():
        return False
    config = task.config
    rows = sinks.read(folder.metrics)
    summaries = {
        name: {**values, "bad_data_skipped": len(left_out)}
        for name, values in summary.summarize(rows, config).items()
    }
    files.replace(folder.summary, json.dumps(summaries, indent=2) + "\n")
    if summaries:
        figure.draw(folder.figure, rows, summaries, config)
        report.write(folder, rows, summaries, config)
        console.print_summaries(summaries, config)
        print(f"Metrics, summary and report are in {folder.path}")
    if left_out:
        print(f"Files whose data was left out in part: {len(left_out)}")
    return len(summaries) == len(config.optimizers)


if __name__ == "__main__":
    cli.exit_with(main)
