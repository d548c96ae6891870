"""Processes in which triton interprets, or compiles for absent GPUs.

Triton decides between the two when it is imported, so neither can share the process of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


def _start(interpret: bool) -> None:
    torch.set_num_threads(1)
    import triton

    if not interpret or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    # Before 3.7 a loop's bound became an int by int(array of one element): numpy 2.4 refuses.
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def _process(interpret: bool) -> Iterator[ProcessPoolExecutor]:
    pytest.importorskip("triton")
    # A spawned process takes its environment when it starts, which is at the first task.
    before = os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(1, context, _start, (interpret,))
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
