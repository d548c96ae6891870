"""The bench's end of a worker: start it, ask it, and learn why it died."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import timing
from bench.peers.worker import Setup

LOAD_S = 1200.0  # torch.compile on two busy cores takes minutes
ANSWER_S = 300.0


class WorkerError(Exception):
    """A worker cannot be made, died or does not answer; the message is the row's reason."""


class Worker:
    """One process that times one row; `close` ends it.

    Args:
        python: Interpreter of the row's virtual environment.
        module: Dotted name of the module with ``open_peer``.
        setup: What it is told first.
        folder: An empty folder, its working directory: some packages write where they run.

    Raises:
        WorkerError: it did not get ready.
    """

    def __init__(self, python: Path, module: str, setup: Setup, folder: Path) -> None:
        threads = str(setup.threads)
        above = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(timing.ROOT), *([above] if above else [])]),
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
        }
        self._log = folder / "stderr.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "bench.peers.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment,
                encoding="utf-8",
            )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.about: dict[str, Any] = {}
        try:
            self.about = self._ask(asdict(setup), LOAD_S)["ready"]
        except BaseException:
            self.close()
            raise

    def run(self, count: int, images: str, start: int) -> dict[str, list[float]]:
        """``times_ms`` and ``scores`` of ``count`` images of a set from the ``start``-th on.

        Raises:
            WorkerError: the worker failed; later calls fail too.
        """
        answer: dict[str, list[float]] = self._ask(
            {"run": count, "images": images, "start": start}, ANSWER_S
        )
        return answer

    def close(self) -> None:
        """End the process; a second call does nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")  # the end: no line is empty

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"ended before it was asked: {self._last_words()}") from error
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerError(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            code = self._process.wait()
            raise WorkerError(f"ended with code {code}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it printed nothing"
