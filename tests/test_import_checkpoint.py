"""Authors' checkpoint files: read without running anything, refused when they would have to."""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import golden_state
import numpy as np
import pytest
import torch
from fastad.export import export_engine
from PIL import Image

from fastad.engine.container import read_engine
from fastad.engine.parity import MAP_LIMIT
from fastad.errors import FastadWarning, InputError
from fastad.training.import_checkpoint.grad import grad_from_authors
from fastad.training.import_checkpoint.reader import read_state
from fastad.training.import_checkpoint.run import import_checkpoint
from fastad.training.import_checkpoint.uniad import uniad_from_authors


@pytest.fixture
def easydict(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as the authors' configuration objects do."""
    module: Any = types.ModuleType("easydict")

    class EasyDict(dict[str, object]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.__dict__ = dict(self)

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    module.EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, "easydict", module)
    return EasyDict


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reads_a_file_as_the_authors_write_it(
    tmp_path: Path, easydict: type, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    path = tmp_path / "ckpt.pth.tar"
    file = {
        "epoch": 3,
        "arch": [easydict({"name": "backbone", "kwargs": easydict({"pretrained": True})})],
        "state_dict": {"module.reconstruction.recover.weight": torch.arange(6.0).view(2, 3)},
        "best_metric": np.float64(0.99),
        "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(file, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "easydict")  # the package is not there at import
    state = read_state(path)
    assert list(state) == ["reconstruction.recover.weight"]
    assert torch.equal(state["reconstruction.recover.weight"], torch.arange(6.0).view(2, 3))


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_executes_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "arch": _Bomb(trace)}, path)
    with pytest.raises(InputError, match="nothing in it was executed"):
        read_state(path)
    assert not trace.exists()


def test_plain_pickle_executes_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pkl", tmp_path / "executed"
    path.write_bytes(pickle.dumps(_Bomb(trace)))
    with pytest.raises(InputError, match="not readable as a checkpoint"):
        read_state(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": "text"}}, "expected only tensors"),
        ({"state_dict": {}}, "expected a dictionary of tensors"),
        ([torch.zeros(1)], "expected a dictionary of tensors, got list"),
    ],
)
def test_refuses_other_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        read_state(tmp_path / "x.pth")


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing there"):
        read_state(tmp_path / "none.pth")
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="not readable as a checkpoint"):
        read_state(path)


def test_imported_run_exports_like_a_trained_one(tmp_path: Path) -> None:
    state, _, _ = golden_state.load("crad")
    file = tmp_path / "ckpt_best.pth.tar"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    import_checkpoint("crad", file, tmp_path / "run")
    images = []
    for i in range(3):
        images.append(tmp_path / f"{i}.png")
        noise = np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images[-1])
    with pytest.warns(FastadWarning, match="not calibrated"):
        engine = export_engine(tmp_path / "run", tmp_path / "crad.engine", images=images)
    with read_engine(engine) as file_:
        worst = max(report.map_max for v in file_.manifest.variants for report in v.parity)
    print(f"imported CRAD, engine against PyTorch: {worst:.1e} of the range")
    assert worst < MAP_LIMIT


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("backbone._blocks", (1,), r"1 unknown \['backbone\.net\._blocks'\]"),
        ("backbone._blocks.x._bn0.weight", (1,), "1 unknown .*_blocks.x._bn0.weight"),
        ("backbone._conv_stem", (1,), "1 unknown .*_conv_stem"),
        ("reconstruction.query.2", (1, 1, 1, 1), "1 unknown .*query.2"),
        ("reconstruction.query", (1,), "1 unknown .*query"),
        ("reconstruction.coord.0", (1,), "1 unknown .*coord.0"),
        ("reconstruction.layer", (1,), "1 unknown .*layer"),
        (
            "reconstruction.query.0",
            (3,),
            r"query\.0: expected \[1 channels rows columns\], got \[3\]",
        ),
        ("reconstruction.query.1", (1, 0, 8, 8), r"query\.1: expected .*, got \[1, 0, 8, 8\]"),
        ("reconstruction.layer.0.conv.0.weight", (), r"conv\.0\.weight: expected .*, got \[\]"),
    ],
)
def test_names_keys_of_unexpected_form(key: str, shape: tuple[int, ...], message: str) -> None:
    state, _, _ = golden_state.load("crad")
    with pytest.raises(InputError, match=message):
        grad_from_authors({**state, key: torch.zeros(shape)})


@pytest.mark.parametrize("key", ["transformer.encoder.layers", "transformer.encoder.la.x"])
def test_names_uniad_keys_of_unexpected_form(key: str) -> None:
    state, _, _ = golden_state.load("uniad")
    with pytest.raises(InputError, match=f"1 unknown .*{key}"):
        uniad_from_authors({**state, f"reconstruction.{key}": torch.zeros(1)})


def test_refuses_the_other_origin(tmp_path: Path) -> None:
    state, _, _ = golden_state.load("crad")
    torch.save(state, tmp_path / "crad.pth")
    with pytest.raises(InputError, match=r"holds a crad model, got origin grad; pass crad"):
        import_checkpoint("grad", tmp_path / "crad.pth", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("origin", "teacher", "message"),
    [("padim", None, "expected one of"), ("grad", "x.pth", "only rd4ad files lack")],
)
def test_import_refuses(tmp_path: Path, origin: str, teacher: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_checkpoint(origin, tmp_path / "x", tmp_path / "run", teacher=teacher)
