"""The site: `make docs` builds it into build/docs. Examples of its pages run in tests/test_pages.py."""

import re
from typing import Any

import jax_paged_attn

project = "jax_paged_attn"
author = "The jax_paged_attn authors"
copyright = author
release = jax_paged_attn.__version__
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

# Pages are Markdown. Signs of arithmetic are written as characters, so no extension for mathematics is needed.
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings are in Google's style, with code between single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
# Docstrings give shapes and dtypes. With hints, every overload would be listed with all its unions.
autodoc_typehints = "none"
maximum_signature_line_length = 88
add_module_names = False

# The prompt of examples in docstrings is not copied.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = project
html_theme_options = {"light_css_variables": {"code-font-size": "0.8em"}}  # so that 90 columns of code fit
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "monokai"


def end_code(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Lets a letter follow code, as in `Array`s, which reStructuredText allows after an escaped space only."""
    lines[:] = [re.sub(r"`([^`]+)`(?=\w)", r"`\1`\\ ", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", end_code)
