"""How Sphinx builds the documentation: `make docs`, with warnings as errors."""

import pathlib
import sys
from typing import Any

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import measured_figures  # noqa: E402

import ckpt_kernels  # noqa: E402

project = "ckpt_kernels"
release = ckpt_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["measured/*", "reference/examples_begin.md"]
html_theme = "furo"
copyright = "2026, the authors of ckpt_kernels"
html_title = f"ckpt_kernels {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# In docstrings, as in Markdown, a name in single backticks is code.
default_role = "code"
napoleon_use_ivar = True
napoleon_custom_sections = ["Shape", "Kept for backward", "Source"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True


def setup(app: Any) -> None:
    measured_figures.write_layers()
    # After napoleon, so that the docstring's sections are reStructuredText already.
    app.connect("autodoc-process-docstring", measured_figures.add_figures, priority=900)
