"""The processes of one training run: who starts them, who writes, what they tell each other.

`fastad.train(devices=2)` starts the others itself, as fresh interpreters that run this package and
never the caller's script; under `torchrun` all are there already. Process 0 is the caller: it
checks, reports and writes. All processes run on one machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # C++ names
from torch.distributed.rendezvous import rendezvous

from fastad.errors import EngineError, FastadError, InputError, UnsupportedError

HOST = "127.0.0.1"
PATIENCE = timedelta(days=7)  # for process 0: reading images or a mean training map can take long
END_S = 60.0  # for the others to leave once process 0 is done
ERRORS: dict[str, type[FastadError]] = {
    error.__name__: error for error in (InputError, UnsupportedError, EngineError)
}
FOLLOW = "from fastad.training.fit import follow; follow()"


class Processes:
    """One process's place among ``size`` processes that train one model.

    Owns the group's connection between `join` and `leave`; ``store`` is None for a single process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self._told = 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: its own GPU, or the CPU."""
        return torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")

    def first(self, work: Callable[[], str]) -> str:
        """Text that process 0 makes by ``work`` while the others wait; all get it, or its error."""
        if self.size == 1:
            return work()
        self._told += 1
        key = f"told/{self._told}"
        if self.rank == 0:
            try:
                text = work()
            except FastadError as error:
                self.store.set(key, json.dumps([type(error).__name__, str(error)]))
                raise
            self.store.set(key, json.dumps(["", text]))
            return text
        kind, text = json.loads(self.store.get(key))
        if kind:
            raise ERRORS.get(kind, EngineError)(text)
        return str(text)

    def join(self) -> None:
        """Connect with the other processes for `sum` and for gradients."""
        if self.size == 1:
            return
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(self.rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
        )

    def leave(self) -> None:
        """Close the connection."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes of a tensor on the CPU, the same bits in each; waits for all."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            dist.broadcast(values, 0)
        return values


@contextmanager
def processes(devices: int, request: Mapping[str, Any]) -> Iterator[Processes]:
    """This process's place among those that train together; they end with the block.

    Args:
        devices: Processes to train with, 1 for this one alone. Under torchrun: 1, or its number.
        request: JSON arguments of `fit.follow`'s training, for the processes started here.

    Raises:
        InputError: ``devices`` cannot be had; inside the block, what another process refused.
        UnsupportedError: torchrun on several machines.
        EngineError: inside the block: another process died.
    """
    if devices < 1:
        raise InputError(f"devices: expected at least 1, got {devices}")
    elastic = _is_elastic()
    size = int(os.environ["WORLD_SIZE"]) if elastic else devices
    if elastic and devices not in (1, size):
        raise InputError(f"devices: torchrun started {size} processes, got {devices}; drop it")
    if elastic and os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        raise UnsupportedError("torchrun: expected all processes on one machine, got several")
    if size > 1 and torch.cuda.is_available() and size > torch.cuda.device_count():
        raise InputError(
            f"devices: expected at most {torch.cuda.device_count()}, one GPU each, got {size}"
        )
    if size == 1:
        yield Processes()
    elif dist.is_initialized():
        raise InputError("devices: torch.distributed is in use here; run fastad in its own process")
    elif elastic:
        with _connected(Processes(int(os.environ["RANK"]), size, _elastic_store())) as group:
            yield group
    else:
        with _started(size, request) as group:
            yield group


def is_first() -> bool:
    """Whether this process is the one that reports and prints; under torchrun others are not."""
    return not _is_elastic() or os.environ["RANK"] == "0"


def _is_elastic() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


_runs = 0  # trainings of this process under torchrun, which share one store


def _elastic_store() -> Any:
    global _runs
    _runs += 1
    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    return PrefixStore(f"fastad/{_runs}", store)


@contextmanager
def _connected(group: Processes) -> Iterator[Processes]:
    try:
        yield group
    finally:
        group.leave()


@contextmanager
def _started(size: int, request: Mapping[str, Any]) -> Iterator[Processes]:
    """Start ``size - 1`` further processes, and see them end whatever happens."""
    store = TCPStore(HOST, 0, size, True, timeout=PATIENCE, wait_for_workers=False)
    before = torch.get_num_threads()
    threads = max(1, before // size)
    # Modules are found as here, also from a script whose own folder is on the path.
    path = os.pathsep.join(str(Path(p).resolve()) for p in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    asked = json.dumps(dict(request))
    others = [
        subprocess.Popen(
            [sys.executable, "-c", FOLLOW, str(store.port), str(rank), str(size), asked],
            stdin=subprocess.PIPE,  # its end tells them that this process is gone
            stdout=subprocess.DEVNULL,  # results come from process 0
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        for rank in range(1, size)
    ]
    torch.set_num_threads(threads)
    try:
        with _connected(Processes(0, size, store)) as group:
            yield group
        with suppress(subprocess.TimeoutExpired):  # all is written: whoever lingers is killed
            for process in others:
                process.wait(END_S)
    except FastadError:
        raise
    except Exception as error:  # whatever gloo, NCCL or the store says when its peer is gone
        raise _cause(store, others) or error from None
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.kill()
            process.wait()
            assert process.stdin
            process.stdin.close()


def _cause(store: Any, others: list[subprocess.Popen[bytes]]) -> FastadError | None:
    """Why another process left, if one did: then an error of this one is only its echo."""
    if store.check(["failed"]):
        kind, text = json.loads(store.get("failed"))
        return ERRORS.get(kind, EngineError)(text)
    for rank, process in enumerate(others, 1):
        try:
            code = process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
        if code:
            return EngineError(f"training: process {rank} ended with code {code}; see its output")
    return None


@contextmanager
def following(port: int, rank: int, size: int) -> Iterator[Processes]:
    """The place of a process that `processes` started; tells process 0 what went wrong."""
    # Process 0 may be killed at any time, and nobody would stop a process that waits for it.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = TCPStore(HOST, port, size, False, timeout=PATIENCE)
    with _connected(Processes(rank, size, store)) as group:
        try:
            yield group
        except FastadError as error:
            store.set("failed", json.dumps([type(error).__name__, str(error)]))
            raise SystemExit(1) from None


def _end_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock the interpreter wants when it ends
    os._exit(1)


def trainer_arguments(group: Processes) -> dict[str, Any]:
    """Arguments of Lightning's trainer for where it runs and with whom."""
    if group.size == 1:
        return {"accelerator": "auto", "devices": 1}
    return {
        "accelerator": group.device.type,
        "devices": group.size,
        "strategy": DDPStrategy(cluster_environment=_Place(group)),
    }


class _Place(LightningEnvironment):
    """Tells Lightning about processes that are there and connected already."""

    def __init__(self, group: Processes) -> None:
        super().__init__()
        self.group = group

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self.group.size

    def global_rank(self) -> int:
        return self.group.rank

    def local_rank(self) -> int:
        return self.group.rank

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Leave torchrun's variables alone; a next training reads them again."""
