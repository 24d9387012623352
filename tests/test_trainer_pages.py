"""The programs of docs/trainers run with the trainers that they are for.

Each trainer is installed in an environment of its own. The code of its page, word for
word, is the module `page` there. A driver of tests/trainer_pages runs and checks it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DRIVERS = ROOT / "tests" / "trainer_pages"
PAGES = ROOT / "docs" / "trainers"
TIMEOUT = 3600  # seconds
PACKAGES = {
    "equinox": ["equinox==0.13.8"],
    "keras": ["keras==3.15.1"],
    # Levanter needs a development version of finelog, and does not say so to pip.
    "levanter": [
        "marin-levanter==0.2.227.dev40316220070",
        "marin-finelog>=0.2.10.dev0",
    ],
    # MaxText declares no requirements but those of its containers for TPUs and GPUs.
    "maxtext": [
        "maxtext==0.2.5",
        "aqtp",
        "datasets",
        "drjax",
        "flax>=0.12.9",
        "grain",
        "jax>=0.11.1",
        "jinja2",
        "jsonlines",
        "ml-collections",
        "omegaconf",
        "orbax-checkpoint>=0.12.4",
        "pathwaysutils",
        "pillow",
        "psutil",
        "pydantic",
        "qwix",
        "requests",
        "sentencepiece",
        "sympy",
        "tensorboardx",
        "tiktoken",
        "tokamax",
        "transformers",
    ],
    "netket": ["netket==3.23.0"],
    "numpyro": ["numpyro==0.22.0"],
    "tunix": ["google-tunix==0.1.7"],
}


def run(command, folder):
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PYTEST", "JAX", "XLA"))
        }
        | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def install(folder, packages):
    """Returns the Python of a new environment, or skips if pip finds no solution."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-compile"]
    pip += ["--disable-pip-version-check", ROOT]
    own = run(pip, folder)
    assert own.returncode == 0, own.stderr
    done = run([*pip, *packages], folder)
    if done.returncode:
        reason = done.stderr.strip() or "pip failed"
        pytest.skip(f"not installed: {reason.splitlines()[-1]}")
    return python


def write_page(name, folder):
    """Writes the code of a page as a module, and its YAML."""
    text = (PAGES / f"{name}.md").read_text()
    for language, file in (("py", "page.py"), ("yaml", "page.yaml")):
        blocks = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.M)
        (folder / file).write_text("\n\n".join(blocks))


def test_every_page_is_run_and_names_the_version_that_is_run():
    pages = {page.stem: page.read_text() for page in PAGES.glob("*.md")}
    assert {name for name in pages if "```py\n" in pages[name]} == PACKAGES.keys()
    table = (PAGES.parent / "in-your-trainer.md").read_text()
    for name, (pinned, *_) in PACKAGES.items():
        version = pinned.partition("==")[2].partition(".dev")[0]
        (row,) = re.findall(rf"^.*\(trainers/{name}\.md\).*$", table, re.M)
        assert version in row and version in pages[name], name
    assert all(f'"{x}"' in pages["levanter"] for x in PACKAGES["levanter"])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", PACKAGES)
def test_page(name, tmp_path):
    python = install(tmp_path / "environment", PACKAGES[name])
    write_page(name, tmp_path)
    shutil.copy(DRIVERS / "checks.py", tmp_path)
    driver = shutil.copy(DRIVERS / f"{name}.py", tmp_path / f"check_{name}.py")
    done = run([python, driver], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
