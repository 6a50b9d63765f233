"""Sphinx: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmexpand import __version__

project = 'mmexpand'
copyright = '2026, the mmexpand authors'
version = release = __version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'furo'
html_title = f'mmexpand {__version__}'
html_static_path = []
myst_heading_anchors = 3
exclude_patterns = ['_build']
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autoclass_content = 'both'
