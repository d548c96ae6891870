"""`bench.cold` and the programs of other packages that it times, which are only pretended here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cold, cold_peers, readme, soak, timing

ENGINE = soak.ENGINE
PEERS = Path(cold_peers.__file__).parent
ULTRALYTICS = """
from types import SimpleNamespace

class YOLO:
    def __init__(self, name):
        assert name == "yolo11n.yaml"  # an architecture: weights would be downloaded

    def predict(self, frame, device, verbose):
        assert frame.shape == (1080, 1920, 3) and device == "cpu"
        return [SimpleNamespace(boxes=[1, 2, 3])]
"""
DEPLOY = """
from types import SimpleNamespace

class OpenVINOInferencer:
    def __init__(self, path, device):
        assert path.is_file() and path.with_suffix(".bin").is_file() and device == "CPU"

    def predict(self, frame):
        assert frame.shape == (1080, 1920, 3)
        return SimpleNamespace(pred_score=[[0.25]])
"""
MODELS = """
class ReverseDistillation:
    def __init__(self, pre_trained):
        assert not pre_trained

    def eval(self):
        return self

    def to_openvino(self, folder):
        path = folder / "weights" / "openvino" / "model.xml"
        path.parent.mkdir(parents=True)
        path.write_text("")
        path.with_suffix(".bin").write_text("")
        return path
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs in their place, whose Python finds pretended packages."""
    packages = tmp_path / "packages"
    (packages / "anomalib").mkdir(parents=True)
    (packages / "ultralytics.py").write_text(ULTRALYTICS)
    (packages / "anomalib" / "__init__.py").write_text("")
    (packages / "anomalib" / "deploy.py").write_text(DEPLOY)
    (packages / "anomalib" / "models.py").write_text(MODELS)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    place = tmp_path / "bench" / PEERS.name
    place.mkdir(parents=True)
    for path in PEERS.glob("first_*.py"):
        shutil.copy(path, place)
    return place


def ran(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_first_result_of_ultralytics_is_one_line(checkout: Path) -> None:
    done = ran(checkout / "first_ultralytics.py")
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_first_result_of_anomalib_uses_what_was_exported(checkout: Path) -> None:
    script = checkout / "first_anomalib.py"
    refused = ran(script)
    assert refused.returncode == 2
    assert "no such model; give `export` as argument first" in refused.stderr
    exported = ran(script, "export")
    assert exported.returncode == 0, exported.stderr
    done = ran(script)
    assert (done.returncode, done.stdout) == (0, "0.25\n"), done.stderr


@pytest.mark.parametrize("path", sorted(PEERS.glob("first_*.py")), ids=lambda path: path.stem)
def test_programs_of_other_packages_import_nothing_of_this_project(path: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert set(imported) <= {"__future__", "sys", "pathlib", "numpy", "anomalib", "ultralytics"}


def test_documented_command_names_the_programs() -> None:
    text = (cold_peers.__doc__ or "").replace("\\\n", " ")
    (line,) = re.findall(r"^ +python -m bench\.cold (.*)$", text, re.MULTILINE)
    words = shlex.split(line)
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert set(found) == {"--python", "--first"}
    scripts = [word.partition("=") for word in words if word.endswith(".py")]
    assert {name for name, _, _ in scripts} == set(cold.PEERS)
    assert {timing.ROOT / path for _, _, path in scripts} == set(PEERS.glob("first_*.py"))


def test_first_result_is_the_median_of_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s = iter([9.0, 1.0, 2.0])
    started: list[list[str]] = []

    def pretend(command: list[str], _: object) -> float:
        started.append(command)
        return next(took_s)

    monkeypatch.setattr(cold, "first_line_s", pretend)
    python, script = tmp_path / "python", tmp_path / "first.py"
    assert cold.first_result(python, script, 3) == {"first s": 2.0, "first starts": 3}
    assert started == [[str(python), str(script)]] * 3


def test_measures_what_is_given_and_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, starts = tmp_path / "first.py", tmp_path / "starts"
    script.write_text(
        f"import numpy\nprint(numpy.arange(3).sum())\nopen({str(starts)!r}, 'a').write('x')\n"
    )
    options = ["--fastad", sys.executable, "--python", f"numpy={sys.executable}"]
    options += ["--first", f"numpy={script}", "--processes", "4", "--results", str(tmp_path)]
    assert cold.main([str(ENGINE), *options]) == 0
    (path,) = timing.version_folder(tmp_path).glob("cold--*.json")
    assert "| first starts |" in readme.section("cold", tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))
    ours, other = found["rows"]
    assert (ours["package"], other["package"]) == ("fastad", "numpy")
    numbers = ("MB", "import ms", "ready ms", "first s")
    assert all(row[name] > 0 for row in (ours, other) for name in numbers)
    assert [(row["processes"], row["first starts"]) for row in (ours, other)] == [(4, 2)] * 2
    assert starts.read_text() == "xx"
    assert ours["again s"] > 0
    assert other["again s"] is None
    assert found["package_bytes"]["numpy"]["numpy"] > 1_000_000
    assert [text.partition(":")[0] for text in found["missing"]] == ["anomalib", "ultralytics"]
    assert "missing: ultralytics: no --python ultralytics=PYTHON" in capsys.readouterr().out


def test_without_a_program_there_is_no_first_result(tmp_path: Path) -> None:
    row = cold.measure("numpy", Path(sys.executable), 1, {})
    assert (row["first s"], row["again s"], row["first starts"]) == (None, None, None)


@pytest.mark.parametrize("code", ["import sys; print(1); sys.exit(3)", "pass"])
def test_a_program_that_fails_or_prints_nothing_has_no_time(code: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        cold.first_line_s([sys.executable, "-c", code], os.environ)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--python", "anomalib=/no/such/python"], "expected NAME=FILE, an existing file"),
        (["--python", sys.executable], "expected NAME=FILE"),
        (["--first", f"anomalib={ENGINE}"], "--first: no --python for anomalib"),
    ],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cold.main([str(ENGINE), *options])
    assert message in capsys.readouterr().err


def test_refuses_a_missing_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cold.main(["nowhere.engine"])
    assert "`make demo` writes one" in capsys.readouterr().err
