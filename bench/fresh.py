"""One graph in a process of its own: load to first result, and peak memory batch by batch.

    python -m bench.fresh ENGINE --member model.onnx --runtime openvino --precision fp32 --batch 1
    python -m bench.fresh RUN --runtime pytorch --batch 1

Prints one JSON line. Its clock is the system's, so the process that started this one can subtract
when it did so: `measure` does, once with an empty cache of compiled models and once with its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Start:
    """What a fresh process took; seconds from its start to its first result."""

    first_s: float  # nothing compiled before
    again_s: float  # with what the first start left in the cache
    peak_bytes: dict[int, int]  # high-water mark of resident memory after each batch size


def rss_bytes() -> int:
    """Resident memory of this process now, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most resident memory that this program has had.

    Linux counts it per program in VmHWM. ``ru_maxrss`` there also holds what the parent had when
    it started the child, which is why it serves elsewhere only.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        found = next(line for line in lines if line.startswith("VmHWM"))
        return int(found.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    path: Path, runtime: str, precision: str, batches: Sequence[int], member: str = ""
) -> Start:
    """Start twice; raises CalledProcessError with the child's words on stderr if it fails."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "bench.fresh", str(path.resolve()), "--member", member]
        command += ["--runtime", runtime, "--precision", precision]
        command += [word for batch in batches for word in ("--batch", str(batch))]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        first_s, first = _start(command, environment)
        again_s, _ = _start(command, environment)
    return Start(first_s, again_s, {int(b): peak for b, peak in first["peak_bytes"].items()})


def _start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    told = json.loads(done.stdout)
    return told["first_result"] - began, told


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--member", default="model.onnx")
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, action="append", required=True)
    options = parser.parse_args(arguments)
    opened, images = _open(options.path, options.member, options.runtime, options.precision)
    opened.run(images[:1])
    first = time.monotonic()
    peaks = {}
    for batch in sorted(options.batch):
        opened.run(_repeated(images, batch))
        peaks[batch] = peak_bytes()
    print(json.dumps({"first_result": first, "peak_bytes": peaks}))
    return 0


def _open(path: Path, member: str, name: str, precision: str) -> tuple[Any, Any]:
    """The runtime, and images [N, H, W, 3] to run it on; each needs imports of its own."""
    import numpy as np

    if name == "pytorch":
        from fastad.engine.pytorch import PyTorchRuntime
        from fastad.training.checkpoint import load_checkpoint

        method = load_checkpoint(path).method
        return PyTorchRuntime(method), np.zeros((1, *method.input.size, 3), np.uint8)
    from fastad.engine.container import read_engine
    from fastad.engine.select import open_runtime

    with read_engine(path) as engine:
        return open_runtime(engine.member(member), name, precision, "cpu"), engine.golden().images


def _repeated(images: Any, batch: int) -> Any:
    import numpy as np

    return np.resize(images, (batch, *images.shape[1:]))


if __name__ == "__main__":
    sys.exit(main())
