"""The site: the reference is complete, links lead somewhere, and Sphinx builds it."""

import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts),
]
MODULES = ("", ".functional", ".initializers", ".linen", ".nnx", ".testing")


def public_names(module):
    """Returns ``__all__``, or the public names that are not modules."""
    named = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, type(pytest))
    ]
    return {f"{module.__name__}.{name}" for name in named}


def test_reference_has_every_public_name_once():
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    listed = re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE)
    modules = [importlib.import_module(f"spam_optax{name}") for name in MODULES]
    assert sorted(listed) == sorted(set().union(*map(public_names, modules)))


def anchors(page):
    """Returns the anchors that GitHub and MyST give to the titles of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in plain}


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)
def test_links_lead_to_files_and_titles(page):
    links = re.findall(r"\]\(\s*(?!https?:)([^)\s]+)\)", page.read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    def pages_of(index):
        links = re.findall(r"^- \[[^\]]*\]\(([^)#]*\.md)\)", index.read_text(), re.M)
        return [(index.parent / link).resolve() for link in links]

    linked = pages_of(DOCS / "index.md") + pages_of(DOCS / "api" / "index.md")
    assert sorted(linked) == [page for page in PAGES[1:] if page != DOCS / "index.md"]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo"))),
    reason="Sphinx and its theme are not installed: pip install -e '.[docs]'",
)
def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    subprocess.run([*command, "-b", "html", DOCS, tmp_path], cwd=ROOT, check=True)
    assert (tmp_path / "api" / "optimizers.html").exists()
