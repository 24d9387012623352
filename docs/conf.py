"""Configuration of the site. `sphinx-build -W -b html docs docs/_build` builds it."""

import pathlib
import re

import spam_optax

DOCS = pathlib.Path(__file__).parent

project = "spam_optax"
version = release = spam_optax.__version__
extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "spam_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False

# The pages name the sections of other pages as GitHub does.
myst_heading_anchors = 4

# Docstrings write the names of arguments between single backquotes.
default_role = "code"
# The docstrings describe the types, and the aliases of JAX are long unions.
autodoc_typehints = "none"
python_maximum_signature_line_length = 72
napoleon_use_ivar = True
napoleon_use_rtype = False


def add_toctrees(app, docname, source):
    """Adds the links of an index page to the navigation, a group for each section.

    The page itself stays a plain list of links, which GitHub can show.
    """
    if not docname.endswith("index"):
        return
    toctrees = []
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
        caption, _, text = section.partition("\n")
        pages = re.findall(r"^- \[[^\]]*\]\(([^)#]*)\.md\)", text, re.MULTILINE)
        lines = [f":caption: {caption}", ":hidden:", "", *pages]
        toctrees.append("\n".join(["```{toctree}", *lines, "```", ""]))
    source[0] += "\n\n" + "\n".join(toctrees)


def make_downloads(app, docname, source):
    """Turns links to Markdown files outside of docs/ into downloads."""
    folder = (DOCS / docname).parent

    def link(match):
        target = (folder / match[1]).resolve()
        inside = target.is_relative_to(DOCS.resolve())
        return match[0] if inside else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)#]*\.md)(?:#[^)]*)?\)", link, source[0])


def setup(app):
    app.connect("source-read", add_toctrees)
    app.connect("source-read", make_downloads)
