"""The documentation as a site: Sphinx reads the Markdown files where they are (`make docs`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sparity import __version__

project = "Sparity"
copyright = "the authors of Sparity, Apache-2.0"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "recipe_pages"]

# The source folder is the repository, so that links between the README, the pages and the recipes lead where they say.
root_doc = "docs/site/contents"
include_patterns = ["*.md", "docs/**", "src/sparity/zoo/*/README.md", "zoo/*/README.md"]
exclude_patterns = [".*", "build", "demo-out", "docs/site/templates"]

myst_heading_anchors = 6  # as GitHub names them
default_role = "code"  # a word in single backticks, as in Markdown
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "Sparity"
html_additional_pages = {"index": "redirect.html"}  # the site begins with the README
html_copy_source = False
html_show_sourcelink = False
templates_path = ["templates"]
