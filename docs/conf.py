"""How Sphinx builds the documentation: `make docs`, with warnings as errors."""

import json
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import ckpt_kernels  # noqa: E402
from benchmarks import report  # noqa: E402

project = "ckpt_kernels"
release = ckpt_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["measured/*"]
html_theme = "furo"
html_show_copyright = False
html_title = f"ckpt_kernels {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# In docstrings, as in Markdown, a name in single backticks is code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def write_measured_tables() -> None:
    """docs/measured/FAMILY.md: the figures of benchmarks/results/cpu, which the pages of the reference include."""
    measured = json.loads((DOCS.parent / "benchmarks" / "results" / "cpu" / "results.json").read_text())
    about = measured["machine"]
    folder = DOCS / "measured"
    folder.mkdir(exist_ok=True)
    for family in dict.fromkeys(result["family"] for result in measured["results"]):
        own = [result for result in measured["results"] if result["family"] == family]
        where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}"
        text = f"`{about['command']}` on {where}.\n\n{report.summary(own)}"
        (folder / f"{family.replace(' ', '_')}.md").write_text(text)
    layers = (DOCS.parent / "benchmarks" / "results" / "cpu" / "layers.md").read_text()
    (folder / "layers.md").write_text(layers.partition("\n\n")[2])


write_measured_tables()
