"""What a first use costs: size on disk, import, and a process from its start to its first result.

    python -m bench.cold [ENGINE] [--fastad PYTHON] [--python NAME=PYTHON] [--first NAME=SCRIPT]

fastad is measured in a fresh virtual environment with ``pip install .`` and nothing else (made here
unless ``--fastad`` names the interpreter of one); other packages in environments that exist, such
as ``--python anomalib=/envs/anomalib/bin/python``. "MB" are all files of site-packages without pip
and setuptools. "import" is the bare package, "ready" what a program imports to use a model; both
are medians of fresh processes. "first" is from the start of a process to its first result on a
1920 x 1080 frame: for fastad with nothing compiled before, "again" with its cache. For another
package it is the time until the script that ``--first`` names prints its first line; those of
`bench.cold_peers` say how their environments are made. It is the median of half as many processes,
at least one ("first starts"). What was not given is listed as missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import timing
from bench.fresh import ROOT

ENGINE = ROOT / "demo" / "textures.engine"
PROCESSES = 10
PEERS = ("anomalib", "ultralytics")  # asked for by the table; others may be given too
READY = {  # what a program imports to use a model
    "fastad": "from fastad import load; load",
    "anomalib": "from anomalib.deploy import OpenVINOInferencer",
    "ultralytics": "from ultralytics import YOLO",
}
SIZES = """
import importlib.metadata, json, os, sysconfig
places = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
files = (os.path.join(at, f) for p in places for at, _, names in os.walk(p) for f in names)
held = {f: os.lstat(f).st_size for f in files}
sizes = {}
for dist in importlib.metadata.distributions(path=list(places)):
    own = {os.path.normpath(dist.locate_file(f)) for f in dist.files or ()}
    sizes[dist.name] = sum(held.pop(f) for f in own if f in held)
print(json.dumps({**sizes, "unclaimed": sum(held.values())}))
"""
TOOLS = ("pip", "setuptools", "wheel", "unclaimed")  # what every environment has
FIRST = """
import sys
import numpy as np
import fastad
frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
print(fastad.load(sys.argv[1], device="cpu").predict(frame).raw_score, flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("engine", type=Path, nargs="?", default=ENGINE)
    parser.add_argument("--fastad", type=Path, help="interpreter that has fastad alone")
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--first", type=pair, action="append", default=[], metavar="NAME=SCRIPT")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args(arguments)
    if not options.engine.is_file():
        parser.error(f"{options.engine}: no such engine; `make demo` writes one")
    pythons, scripts = dict(options.python), dict(options.first)
    if unknown := sorted(scripts.keys() - pythons.keys()):
        parser.error(f"--first: no --python for {', '.join(unknown)}")
    about = timing.machine()
    packages: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        python = options.fastad or install(Path(folder) / "venv")
        rows = [measure("fastad", python, options.processes, packages)]
        starts = max(options.processes // 2, 1)
        rows[0] |= fastad_first(python, options.engine, starts)
        for name, path in pythons.items():
            row = measure(name, path, options.processes, packages)
            if name in scripts:
                row |= first_result(path, scripts[name], starts)
            rows.append(row)
    timing.table(rows, title="Cold start")
    parts = [(size / 1e6, name) for name, size in packages["fastad"].items() if name not in TOOLS]
    largest = sorted(parts, reverse=True)[:10]
    timing.table([{"package": name, "MB": size} for size, name in largest], "fastad")
    missing = [f"{name}: no --python {name}=PYTHON" for name in PEERS if name not in pythons]
    missing += [f"{name}: no --first {name}=SCRIPT" for name in pythons if name not in scripts]
    for sentence in missing:
        print(f"missing: {sentence}")
    payload = {"rows": rows, "package_bytes": packages, "missing": missing}
    suite = timing.suite("cold", options.name)
    print(timing.write_result(suite, payload, about=about, results=options.results))
    return 0


def pair(text: str) -> tuple[str, Path]:
    """``NAME=PATH``, the path of a file."""
    name, _, path = text.partition("=")
    if not name or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, an existing file, got {text!r}")
    # An environment's interpreter is a link, which must not be followed; but others run elsewhere.
    return name, Path(path).absolute()


def install(place: Path) -> Path:
    """The interpreter of a new environment with ``pip install .``."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([str(python), "-m", "pip", "install", *quiet, str(ROOT)], check=True)
    return python


def measure(
    name: str, python: Path, processes: int, packages: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Size and imports of one package; the sizes of all packages beside it go to ``packages``."""
    packages[name] = json.loads(output(python, SIZES))
    counted = {k: size for k, size in packages[name].items() if k not in TOOLS}
    return {
        "package": name,
        "version": output(
            python, f"from importlib.metadata import version as v; print(v({name!r}))"
        ),
        "packages": len(counted),
        "MB": sum(counted.values()) / 1e6,
        "import ms": import_ms(python, f"import {name}", processes),
        "ready ms": import_ms(python, READY.get(name, f"import {name}"), processes),
        "processes": processes,
        "first s": None,
        "again s": None,
        "first starts": None,
    }


def import_ms(python: Path, statement: str, processes: int) -> float:
    """Median over fresh processes of what ``statement`` takes, without the interpreter's start."""
    text = f"import time; a = time.perf_counter(); {statement}; print(time.perf_counter() - a)"
    return statistics.median(
        float(output(python, text).splitlines()[-1]) * 1000 for _ in range(processes)
    )


def first_result(python: Path, script: Path, starts: int) -> dict[str, float]:
    """Start to first line of a script, and of how many starts this is the median.

    Raises:
        CalledProcessError: no line, or it failed later; its words are on stderr.
    """
    command = [str(python), str(script)]
    first = [first_line_s(command, os.environ) for _ in range(starts)]
    return {"first s": statistics.median(first), "first starts": starts}


def fastad_first(python: Path, engine: Path, starts: int) -> dict[str, float]:
    """Start to first result: each first start has a cache folder of its own, the next one finds it.

    Raises:
        CalledProcessError: no result; its words are on stderr.
    """
    command = [str(python), "-c", FIRST, str(engine.resolve())]
    first, again = [], []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"XDG_CACHE_HOME": cache}
            first.append(first_line_s(command, environment))
            again.append(first_line_s(command, environment))
    return {
        "first s": statistics.median(first),
        "again s": statistics.median(again),
        "first starts": starts,
    }


def first_line_s(command: list[str], environment: Mapping[str, str]) -> float:
    """Seconds from the start of a process to the first line it prints."""
    # Elsewhere than in the checkout: what is measured is what is installed.
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            took = time.perf_counter() - began
            process.communicate()
    if process.returncode or not line:
        raise subprocess.CalledProcessError(process.returncode, command)
    return took


def output(python: Path, text: str) -> str:
    """What a program prints in a process of ``python``, started outside the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(python), "-c", text], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
        )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
