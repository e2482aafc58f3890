"""One Ray for all tests of a process that need one: a few logical cores, a small store, nothing left behind."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

STORE_BYTES = 200 << 20


def started() -> Iterator[Any]:
    """The module `ray`, with a cluster of this machine alone that ends with the generator."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own start
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=STORE_BYTES,
        )
    yield ray
    ray.shutdown()
