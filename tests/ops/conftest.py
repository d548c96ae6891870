"""Processes in which triton interprets, or compiles for absent GPUs.

Triton decides between the two when it is imported, so neither can share the process of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from ops_processes import start


def _process(interpret: bool) -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton")
    # A spawned process takes its environment when it starts, which is at the first task.
    before = os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(1, context, start, (interpret,))
        with pool:
            pool.submit(len, ()).result()
            os.environ.pop("TRITON_INTERPRET", None)
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    yield from _process(interpret=True)


@pytest.fixture(scope="session")
def compiler() -> Iterator[ProcessPoolExecutor]:
    yield from _process(interpret=False)
