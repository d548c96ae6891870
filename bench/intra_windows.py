"""InTra as published, one image: seconds and memory for windows painted in one step.

    python -m bench.intra_windows [--windows 16 --windows 64 --windows 256] [--size 256]

Weights are random; each row is a process of its own, in PyTorch eager, the median of some images.
Memory is what one image adds to the resident high-water mark of the loaded model.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import timing
from bench.fresh import ROOT, peak_bytes, rss_bytes

IMAGES = 3


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--windows", type=int, action="append")
    parser.add_argument("--size", type=int, default=256, help="pixels of both sides")
    parser.add_argument("--inside", action="store_true", help="measure in this process, one row")
    options = parser.parse_args(arguments)
    windows = options.windows or [16, 64, 256]
    if options.inside:
        print(json.dumps(measure(windows[0], options.size)))
        return 0
    about = timing.machine()
    rows = []
    for count in windows:
        command = [sys.executable, "-m", "bench.intra_windows", "--inside"]
        command += ["--windows", str(count), "--size", str(options.size)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    timing.table(rows, title=f"intra.paper, {options.size} px, PyTorch eager")
    suite = timing.suite("intra-windows", options.name)
    payload = {"size": options.size, "images": IMAGES, "rows": rows}
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def measure(windows: int, size: int) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    from fastad.models import build
    from fastad.training.recipe import load_recipe

    config = load_recipe("intra.paper").config | {"size": [size, size], "windows_per_step": windows}
    method = build("intra", config, weights="random").eval()
    image = torch.randn(1, 3, size, size)
    before = rss_bytes()
    spent_s = []
    with torch.inference_mode():
        for _ in range(IMAGES):
            start = time.perf_counter()
            method(image)
            spent_s.append(time.perf_counter() - start)
    return {
        "windows per step": windows,
        "steps": len(method.steps),
        "s per image": round(statistics.median(spent_s), 2),
        "added MiB": round((peak_bytes() - before) / 2**20),
    }


if __name__ == "__main__":
    sys.exit(main())
