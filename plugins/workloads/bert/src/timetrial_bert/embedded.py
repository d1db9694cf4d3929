"""The embedded data set: 106 articles of a real Wikipedia dump that the gensim wheel carries for its own tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from core.api.errors import DataError

FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
"""Of the file in gensim 4.3 and 4.4."""

EVERY = 10
"""Each tenth article is held out for evaluation. The split is the same for every seed."""


def find() -> Path:
    """The file inside the installed wheel, found without importing gensim (which would import scipy and more)."""
    spec = importlib.util.find_spec("gensim")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the package gensim, which carries the articles, is not installed: run `pip install gensim`")
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise DataError(f"{path} is missing: run `pip install --force-reinstall gensim`")
    return path
