"""Virtual environments of the peers: made once, found again by the versions they hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from bench.peers.process import WorkerError

# Asks an environment for versions; packages it lacks are left out.
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Environment:
    """What a peer needs beside Python.

    ``requirements`` go to pip as they stand; the environment counts as complete when ``package``
    is in it, which pip installs after everything it depends on. Versions of ``reported`` are
    written to the result.
    """

    name: str
    package: str
    requirements: tuple[str, ...]
    reported: tuple[str, ...]
    free_gb: float  # disk that making it takes


ANOMALIB = Environment(
    "anomalib",
    "anomalib",
    # Its extra names no torch; torchvision has to come with the torch it was built for.
    ("anomalib[openvino]", "torch", "torchvision"),
    ("anomalib", "torch", "torchvision", "openvino", "timm", "lightning", "numpy"),
    free_gb=8.0,
)


def prepare(environment: Environment, folder: Path) -> Path:
    """Python of an environment below ``folder``, which is made if it is not there.

    Raises:
        WorkerError: it cannot be made: no network, no disk; the message ends with pip's reason.
    """
    place = folder / environment.name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and environment.package in versions(python, (environment.package,)):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < environment.free_gb:
        raise WorkerError(
            f"{place}: {environment.name} needs {environment.free_gb:.0f} GB of disk, "
            f"{free_gb:.1f} are free; name another disk with --environments"
        )
    print(f"making {place}: pip install {' '.join(environment.requirements)}", file=sys.stderr)
    venv.create(place, with_pip=True, clear=False)
    command = [str(python), "-m", "pip", "install", "--quiet", *environment.requirements]
    done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        raise WorkerError(
            f"{place}: pip install {' '.join(environment.requirements)} failed: "
            f"{_reason(done.stderr)}"
        )
    return python


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that an interpreter finds; none if it does not start."""
    command = [str(python), "-c", _VERSIONS, *packages]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _reason(text: str) -> str:
    """The last line in which pip says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it printed nothing"])[-1]
