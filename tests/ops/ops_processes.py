"""How the processes of the operator tests start.

A module of its own, since a spawned process imports its first function by the module's name, and
there are two modules called conftest.
"""

from __future__ import annotations

from typing import Any

import torch


def start(interpret: bool) -> None:
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
