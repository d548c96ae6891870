"""The command line: results on stdout, all else on stderr, no traceback, no half-written file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import interrupts
import numpy as np
import pytest
import yaml
from PIL import Image
from textures import CATEGORIES, CONFIG, COUNTS, H, Outcome, Textures, W
from typer.core import TyperGroup
from typer.main import get_command

from fastad import Prediction, Predictor
from fastad.cli import app
from fastad.engine.container import read_engine
from fastad.sinks import unique_names

Cli = Callable[..., Outcome]
COMMANDS = list(cast(TyperGroup, get_command(app)).commands)
NEEDED = "train calibrate export predict evaluate verify info doctor"


def fastad(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "fastad", *map(str, args)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, text=True, timeout=120, **(streams | options))


def flat(text: str) -> str:
    return " ".join(text.split())


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_refused(done: Outcome, message: str) -> None:
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert message in done.err


@pytest.fixture
def engine(texture_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copy(texture_engine, tmp_path / "copy.engine"))


@pytest.fixture(scope="session")
def holes(textures: Textures) -> Path:
    """Folder of three test images."""
    return textures.root / "grain" / "test" / "hole"


# Help


def test_every_command_of_the_design_is_there() -> None:
    assert set(NEEDED.split()) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Example: fastad {command}" in flat(done.out)


def test_runs_as_a_module() -> None:
    done = fastad("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("args", [("predict",), ("predict", "--nope"), ("forecast",)])
def test_wrong_usage_exits_with_2(cli: Cli, args: tuple[str, ...]) -> None:
    done = cli(*args)
    assert (done.code, done.out) == (2, "")
    assert "Usage: " in done.err


# The whole road


def test_from_folder_to_answer(cli: Cli, textures: Textures, tmp_path: Path) -> None:
    recipe, run, engine = tmp_path / "tiny.yaml", tmp_path / "run", tmp_path / "a.engine"
    settings = {"epochs": 9, "batch": 8, "lr": 1e-3, "groups": {"grid_lr": 0.1}}
    recipe.write_text(yaml.safe_dump({"method": "grad", "config": CONFIG, "train": settings}))
    done = cli(
        *("train", textures.root, "--out", run, "--recipe", recipe, "--weights", "random"),
        *("--set", "train.epochs=1", "--category", "grain", "--json"),
    )
    trained = json.loads(done.out)
    assert (trained["method"], trained["categories"]) == ("grad", ["grain"])
    assert trained["trained_on"] + trained["held_out"] == COUNTS["train"]

    done = cli(
        "calibrate",
        run,
        "--data",
        textures.calibration / "grain",
        "--json",
        "--false-alarm-rate",
        0.05,
    )
    assert json.loads(done.out)["pooled"]["count"] == COUNTS["calibration"]

    done = cli("export", run, "--out", engine, "--images", textures.calibration, "--json")
    exported = json.loads(done.out)
    assert exported["engine"] == str(engine)
    assert exported["bytes"] == engine.stat().st_size
    assert {"openvino"} <= {report["runtime"] for report in exported["parity"]}

    assert json.loads(cli("verify", engine, "--json").out)["verified"] is True
    done = cli("predict", engine, textures.root / "grain" / "test" / "chalk", "--json")
    assert len(done.out.splitlines()) == 3
    done = cli("evaluate", engine, textures.root / "grain", "--json")
    assert json.loads(done.out)["mean"]["images"] == COUNTS["test"] + 6


@pytest.mark.parametrize("command", ["info", "verify", "doctor", "evaluate", "calibrate"])
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_results_are_on_stdout_alone(
    cli: Cli, engine: Path, textures: Textures, command: str, as_json: bool
) -> None:
    arguments: dict[str, list[object]] = {
        "doctor": [],
        "evaluate": [engine, textures.root],
        "calibrate": [engine, "--data", textures.calibration, "--false-alarm-rate", 0.05],
    }
    done = cli(command, *arguments.get(command, [engine]), *(["--json"] if as_json else []))
    assert done.code == 0
    if as_json:
        assert isinstance(json.loads(done.out), dict)
    else:
        assert done.out.strip()
        assert max(len(line) for line in done.out.splitlines()) <= 80
        assert "…" not in done.out


def test_evaluation_table_fits_80_columns_with_every_figure(
    cli: Cli, texture_engine: Path, textures: Textures, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(textures.root / "grain", root / "a_category_with_a_long_name")
    shutil.copytree(textures.root / "stripes", root / "stripes")
    mean = json.loads(cli("evaluate", texture_engine, root, "--json").out)["mean"]
    done = cli("evaluate", texture_engine, root)
    assert max(len(line) for line in done.out.splitlines()) <= 80
    (row,) = [line.split() for line in done.out.splitlines() if line.split()[:1] == ["mean"]]
    names = "image_auroc image_ap image_f1max pixel_auroc pixel_ap pixel_f1max aupro"
    rates = "false_alarm_rate detection_rate"
    shown = [f"{mean[name]:.3f}" for name in f"{names} {rates}".split()]
    assert row == ["mean", str(mean["images"]), *shown]


# predict


def test_predict_prints_what_the_predictor_says(
    cli: Cli, texture_engine: Path, predictor: Predictor, holes: Path
) -> None:
    done = cli("predict", texture_engine, holes, "--category", "grain", "--threshold", "1.5")
    assert done.code == 0
    lines = [json.loads(line) for line in done.out.splitlines()]
    expected = predictor.predict(sorted(holes.iterdir()), category="grain", threshold=1.5)
    assert isinstance(expected, list)
    assert [line["path"] for line in lines] == [str(p.path) for p in expected]
    for line, prediction in zip(lines, expected, strict=True):
        wanted = prediction.to_dict()
        assert line["raw_score"] == pytest.approx(wanted["raw_score"], rel=1e-5)
        assert (line["threshold"], line["pred_label"]) == (1.5, wanted["pred_label"])
        assert set(line) == set(wanted)


def test_predict_takes_files_folders_and_globs(
    cli: Cli, texture_engine: Path, textures: Textures, holes: Path
) -> None:
    chalk = textures.root / "grain" / "test" / "chalk"
    done = cli("predict", texture_engine, holes / "01.png", chalk, f"{textures.root}/*/test/good/*")
    paths = [json.loads(line)["path"] for line in done.out.splitlines()]
    assert paths[:4] == [str(holes / "01.png"), *(str(p) for p in sorted(chalk.iterdir()))]
    assert len(paths) == 4 + len(CATEGORIES) * COUNTS["test"]


def test_predict_writes_lines_and_images(
    cli: Cli, texture_engine: Path, predictor: Predictor, holes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "lines.jsonl"
    folders = {kind: tmp_path / kind for kind in ("overlays", "maps", "masks")}
    options = [part for kind, folder in folders.items() for part in (f"--{kind}", folder)]
    done = cli("predict", texture_engine, holes, "--out", out, *options)
    assert (done.code, done.out) == (0, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3
    assert files(out.parent) == ["lines.jsonl"]
    stems = [f"grain_test_hole_0{i}" for i in range(3)]
    assert files(folders["overlays"]) == files(folders["masks"]) == [f"{s}.png" for s in stems]
    assert files(folders["maps"]) == [f"{stem}.npy" for stem in stems]
    for line in lines:
        found = predictor.predict(line["path"])
        assert isinstance(found, Prediction)
        anomaly_map = np.load(line["map"], allow_pickle=False)
        np.testing.assert_allclose(anomaly_map, found.anomaly_map, rtol=1e-4, atol=1e-4)
        mask = np.asarray(Image.open(line["mask"]))
        assert (mask.shape, set(np.unique(mask)) <= {0, 255}) == ((H, W), True)
        assert Image.open(line["overlay"]).size == (W, H)


def test_same_names_in_different_places_do_not_overwrite_each_other(
    cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path
) -> None:
    for place in ("a/x/y/z/00.png", "b/x/y/z/00.png", "b/x/y/z/00.bmp"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.open(holes / "00.png").save(tmp_path / place)
    done = cli("predict", texture_engine, tmp_path / "a", tmp_path / "b", "--maps", tmp_path / "m")
    assert files(tmp_path / "m") == ["x_y_z_00-2.npy", "x_y_z_00-3.npy", "x_y_z_00.npy"]
    written = [json.loads(line)["map"] for line in done.out.splitlines()]
    assert len(set(written)) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b.png"], ["a_b"]),
        (["/b.png"], ["b"]),
        (["/p/q/r/s/t.png"], ["q_r_s_t"]),
        (["/a/b.png", "/a/B.png", "/a/b.PNG"], ["a_b", "a_B-2", "a_b-3"]),
        (["/a/b.png", "/a/b-2.png", "/a/b.bmp"], ["a_b", "a_b-2", "a_b-3"]),
        (["/a/b.png", "/a/b.png"], ["a_b"]),
        (["/a.b/c.d.png"], ["a.b_c.d"]),
    ],
)
def test_names_are_unique(paths: list[str], names: list[str]) -> None:
    assert list(unique_names([Path(path) for path in paths]).values()) == names


def test_unreadable_images_are_counted_and_named_and_the_rest_is_written(
    cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path
) -> None:
    shutil.copytree(holes, tmp_path / "images")
    (tmp_path / "images" / "00.png").write_bytes(b"no image")
    done = cli("predict", texture_engine, tmp_path / "images", "--out", tmp_path / "out.jsonl")
    assert done.code == 3
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert "1 of 3 images could not be read" in done.err
    assert f"{tmp_path}/images/00.png: is not an image" in done.err


def test_evaluate_counts_unreadable_images(
    cli: Cli, texture_engine: Path, textures: Textures, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(textures.root, tmp_path / "data"))
    (data / "grain" / "test" / "good" / "00.png").write_bytes(b"no image")
    done = cli("evaluate", texture_engine, data, "--json")
    assert done.code == 3
    assert len(json.loads(done.out)["unreadable"]) == 1
    assert "00.png: is not an image" in done.err


@pytest.mark.parametrize("model", ["engine", "run"])
def test_evaluate_writes_a_report(
    cli: Cli,
    texture_engine: Path,
    texture_run: Path,
    textures: Textures,
    tmp_path: Path,
    model: str,
) -> None:
    report = tmp_path / "report.html"
    chosen = texture_engine if model == "engine" else texture_run
    done = cli("evaluate", chosen, textures.root, "--category", "grain", "--report", report)
    assert done.code == 0
    assert report.read_text().count("<figure>") == COUNTS["test"] + 6
    assert files(tmp_path) == ["report.html"]


# Bad input


def broken(kind: str, engine: Path) -> Path:
    """A file that is not the engine it should be."""
    path = engine.with_name(f"{kind}.engine")
    whole = engine.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[:-100])
    elif kind == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    elif kind == "text":
        path.write_text("This is not an engine.")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("command", ["info", "verify", "predict", "calibrate", "evaluate"])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "text", "empty", "missing", "folder"])
def test_broken_engines_are_named(
    cli: Cli, engine: Path, textures: Textures, holes: Path, command: str, kind: str
) -> None:
    path = broken(kind, engine)
    rest: dict[str, list[object]] = {
        "predict": [holes],
        "evaluate": [textures.root],
        "calibrate": ["--data", textures.calibration, "--false-alarm-rate", 0.05],
    }
    assert_refused(cli(command, path, *rest.get(command, [])), f"{kind}.engine")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("predict", "ENGINE", "missing.png"), "missing.png: no such file or folder"),
        (("predict", "ENGINE", "EMPTY"), "no images here; accepted are .bmp"),
        (("predict", "ENGINE", "EMPTY/*.png"), "no images here"),
        (("predict", "ENGINE", "HOLES", "--category", "Grain"), "expected one of grain, stripes"),
        (("predict", "ENGINE", "HOLES", "--threshold", "nan"), "expected a finite number"),
        (("predict", "ENGINE", "HOLES", "--runtime", "tensorflow"), "runtime: expected auto, tens"),
        (("predict", "ENGINE", "HOLES", "--precision", "int4"), "precision: expected auto, fp32"),
        (
            ("predict", "ENGINE", "HOLES", "--threads", "0"),
            "threads: expected a whole number of at least 1",
        ),
        (("predict", "ENGINE", "HOLES", "--out", "EMPTY"), "expected the name of a file"),
        (("predict", "ENGINE", "HOLES", "--out", "ENGINE/a"), "a: cannot be written"),
        (("predict", "ENGINE", "HOLES", "--overlays", "ENGINE"), "cannot be written"),
        (("evaluate", "ENGINE", "EMPTY"), "no images found"),
        (("evaluate", "ENGINE", "HOLES"), "expected test images in"),
        (("evaluate", "ENGINE", "DATA", "--resolution", "full"), "expected model or original"),
        (("evaluate", "ENGINE", "DATA", "--category", "stripe"), "did you mean 'stripes'"),
        (("evaluate", "EMPTY", "DATA"), "expected a run folder or checkpoint"),
        (("calibrate", "ENGINE"), "pass --data with normal images"),
        (("calibrate", "ENGINE", "--data", "CALIB"), "needs at least 99 held-out normal images"),
        (("export", "EMPTY", "--out", "a.engine"), "expected a run folder or checkpoint"),
        (("export", "RUN", "--out", "EMPTY/a.onnx"), "expected a name ending in .engine"),
        (("train", "EMPTY", "--out", "EMPTY/run"), "no images found"),
        (("train", "DATA", "--out", "RUN", "--weights", "random"), "expected a new or empty"),
        (("train", "DATA", "--out", "EMPTY/r", "--recipe", "grad.papr"), "did you mean grad.paper"),
    ],
)
def test_refuses(
    cli: Cli,
    engine: Path,
    texture_run: Path,
    textures: Textures,
    holes: Path,
    tmp_path: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"ENGINE": engine, "EMPTY": empty, "HOLES": holes, "DATA": textures.root}
    places |= {"CALIB": textures.calibration, "RUN": texture_run}
    parts = [arg.partition("/") for arg in args]
    filled = [f"{places.get(first, first)}{slash}{rest}" for first, slash, rest in parts]
    before = engine.read_bytes()
    done = cli(*filled)
    if "--overlays" in args:  # its first line was already right, and shown with a bar
        done = Outcome(done.code, "", done.err[done.err.index("error: ") :])
    assert_refused(done, message)
    assert engine.read_bytes() == before
    assert files(empty) == []


def test_masks_of_an_uncalibrated_engine_are_refused_before_work(
    cli: Cli, engine: Path, holes: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from fastad.engine.container import write_engine

    with read_engine(engine) as opened:
        members = {name: opened.member(name) for name in opened.manifest.members}
        manifest = replace(opened.manifest, calibration=None)
    write_engine(engine, manifest, members)
    done = cli("predict", engine, holes, "--masks", tmp_path / "masks")
    assert_refused(done, "--masks: the engine is not calibrated")
    assert not (tmp_path / "masks").exists()
    assert json.loads(cli("predict", engine, holes / "00.png").out)["pred_label"] is None


# Disks and pipes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["predict", "info"])
def test_full_stdout_is_one_line_and_no_trace(
    texture_engine: Path, holes: Path, command: str
) -> None:
    rest = [holes] if command == "predict" else ["--json"]
    with Path("/dev/full").open("w") as full:
        done = fastad(command, texture_engine, *rest, stdout=full)
    assert done.returncode == 1
    assert "error: standard output: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


@pytest.mark.parametrize("what", ["--out", "--overlays", "--maps", "--report", "calibrate"])
def test_a_full_disk_leaves_no_part_and_keeps_the_old_file(
    engine: Path, textures: Textures, tmp_path: Path, what: str
) -> None:
    place = tmp_path / "written"
    if what == "--report":
        args = ["evaluate", engine, textures.root, "--category", "grain", "--report", place]
    elif what == "calibrate":
        args = ["calibrate", engine, "--data", textures.calibration, "--false-alarm-rate", 0.05]
    else:
        args = ["predict", engine, textures.root / "grain" / "test", what, place]
    if what in ("--out", "--report"):
        place.write_text("old")
    before = engine.read_bytes()
    done = fastad(*args, preexec_fn=limit_file_size)
    assert done.returncode == 1
    assert "cannot be written" in flat(done.stderr)
    assert "Traceback" not in done.stderr
    assert engine.read_bytes() == before
    if what in ("--out", "--report"):
        assert place.read_text() == "old"
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    assert files(tmp_path) == ["copy.engine", *(["written"] if what != "calibrate" else [])]
    assert not place.is_dir() or files(place) == []


def test_a_pipe_is_written_through_and_stays_a_pipe(
    cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    done = cli("predict", texture_engine, holes, "--out", pipe)
    reader.join(timeout=120)
    assert done.code == 0
    assert len(read[0].splitlines()) == 3
    assert pipe.is_fifo()


def test_a_link_is_followed(cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    assert cli("predict", texture_engine, holes, "--out", link).code == 0
    assert link.is_symlink()
    assert len(target.read_text().splitlines()) == 3


def test_a_reader_that_has_seen_enough_is_no_error(texture_engine: Path, holes: Path) -> None:
    images = [holes] * 40
    command = [sys.executable, "-m", "fastad", "predict", str(texture_engine), *map(str, images)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert json.loads(child.stdout.readline())["path"]
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    child.wait(timeout=120)
    assert "Traceback" not in errors
    assert "error" not in errors.lower()


def test_ctrl_c_leaves_no_file(texture_engine: Path, holes: Path, tmp_path: Path) -> None:
    out, maps = tmp_path / "out.jsonl", tmp_path / "maps"
    images = [str(holes)] * 4000
    command = [sys.executable, "-m", "fastad", "predict", str(texture_engine), *images]
    child = subprocess.Popen(
        [*command, "--out", str(out), "--maps", str(maps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interrupts.listen,
    )
    deadline = time.monotonic() + 120
    while not maps.is_dir():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode not in (0, 1, 3), errors
    assert "Traceback" not in errors
    assert files(tmp_path) == ["maps"]
    assert not [name for name in files(maps) if "partial" in name]


def test_stream_prints_a_line_per_image_and_the_end(
    cli: Cli, texture_engine: Path, holes: Path
) -> None:
    done = cli("predict", texture_engine, holes, "--stream")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    results = [line for line in lines if "raw_score" in line]
    assert len(results) == len(files(holes))
    assert lines[-1]["event"] == "end"


def test_stream_says_with_its_exit_code_that_a_frame_was_unreadable(
    cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path
) -> None:
    whole = sorted(holes.iterdir())[0]
    shutil.copy(whole, tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(whole.read_bytes()[:100])
    done = cli("predict", texture_engine, tmp_path, "--stream")
    assert done.code == 3
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line.get("event", "result") for line in lines] == ["result", "unreadable", "end"]


def test_stream_refuses_files_to_write(
    cli: Cli, texture_engine: Path, holes: Path, tmp_path: Path
) -> None:
    done = cli("predict", texture_engine, holes, "--stream", "--maps", tmp_path / "maps")
    assert done.code == 1
    assert "--stream: writes JSON lines to stdout" in done.err
    assert files(tmp_path) == []
