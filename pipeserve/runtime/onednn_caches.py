"""Bounds what oneDNN keeps of the products of CPU stages, before the first of them is computed."""

from __future__ import annotations

import os

MOST_PRODUCTS = 64
"""Pairs of matrix shape and number of rows that stay compiled. There are 4 or 5 shapes in a model,
so that a dozen numbers of rows stay; compiling one anew takes 0.5 ms, 2 % of a step in which all
are new."""

_VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""The first is read by ideep, PyTorch's layer above oneDNN. By default each keeps 1024 products
with their working memory: 446 MB for 4 shapes of the demo model and 1 to 256 rows, against 28 MB
with 64. A daemon whose batches have ever other sizes grew by that for as long as sizes were new."""


def bound_onednn_caches() -> None:
    """For this process, unless its environment says otherwise."""
    for name in _VARIABLES:
        os.environ.setdefault(name, str(MOST_PRODUCTS))
