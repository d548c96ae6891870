"""Training in several processes: files, weights and losses are those of one process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from textures import Textures
from torch import nn

from fastad.errors import InputError, UnsupportedError
from fastad.training import loop as loop_module
from fastad.training.checkpoint import load_checkpoint
from fastad.training.features import BatchParts, EpochSampler
from fastad.training.fit import train
from fastad.training.layers import share_statistics
from fastad.training.processes import Processes, processes
from fastad.training.recipe import Recipe, TrainSettings, dump_recipe

NET = {"name": "mobilenetv3_small_050", "taps": [1, 2]}
# Dropout and jitter draw other numbers in every split of a batch, so they are off.
CONFIGS: dict[str, dict[str, Any]] = {
    "uniad": {"backbone": NET, "size": [64, 64], "width": 32, "heads": 4, "ffn_width": 64}
    | {"encoder_layers": 1, "decoder_layers": 1, "window": [3, 3]}
    | {"dropout": 0.0, "jitter_probability": 0.0},
    "grad": {"backbone": NET, "size": [64, 64], "fusion": "crad-s", "blocks": 1}
    | {"feature_scale": "auto", "jitter_probability": 0.0},
}
# Gradients are sums over other groups of images: float32 rounding, 1e-7 of a value, which twelve
# steps of Adam at a rate of 1e-3 spread to weights of about 0.1. A wrong weight of a part, or
# statistics of one part alone, are off by percents.
LOSS_RTOL, WEIGHT_ATOL = 1e-5, 1e-4


def recipe(method: str, **changes: Any) -> Recipe:
    """Batches of 8 from 25 or fewer images: the last one is odd or a single image."""
    settings: dict[str, Any] = {"epochs": 3, "batch": 8, "lr": 1e-3, "gradient_clip": 1.0}
    return Recipe(method, TrainSettings(**(settings | changes)), CONFIGS[method])


UNIAD = recipe("uniad", schedule="cosine", warmup=0.2, validation_fraction=0.2, patience=2)
GRAD = recipe("grad", cache="none")


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def files(run: Path) -> list[str]:
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*"))


def assert_same_run(run: Path, single: Path) -> None:
    """Same files, same table but for seconds, same record but for the time, same weights."""
    assert files(run) == files(single)
    assert (run / "recipe.yaml").read_text() == (single / "recipe.yaml").read_text()
    for key, rtol in (("epoch", 0.0), ("lr", 0.0), ("loss", LOSS_RTOL)):
        ours, theirs = ([float(row[key]) for row in table(r)] for r in (run, single))
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    one, two = load_checkpoint(run), load_checkpoint(single)
    assert one.record.spec == two.record.spec
    assert (one.record.fit, one.record.holdout) == (two.record.fit, two.record.holdout)
    D = CONFIGS["uniad"]["width"]
    for key, weight in one.method.state_dict().items():
        a, b = weight.float(), two.method.state_dict()[key].float()
        if key.endswith("qkv.bias"):
            # A softmax does not see a shift of all keys: this gradient is rounding and nothing
            # else, and Adam makes full steps of it.
            a, b = (torch.cat([bias[:D], bias[2 * D :]]) for bias in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=WEIGHT_ATOL)


def run_command(command: Sequence[object]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def arguments(data: Path, run: Path, chosen: Recipe, folder: Path) -> list[object]:
    path = folder / "given.yaml"
    path.write_text(dump_recipe(chosen))
    return ["train", data, "--out", run, "--recipe", path, "--weights", "random", "--json"]


@pytest.mark.parametrize("start", ["published", "local"])  # local: weights follow from images
def test_two_processes_equal_one(textures: Textures, tmp_path: Path, start: str) -> None:
    chosen = replace(UNIAD, config=UNIAD.config | {"start": start})
    train(textures.root, tmp_path / "one", chosen, weights="random")
    given = arguments(textures.root, tmp_path / "two", chosen, tmp_path)
    out = run_command([sys.executable, "-m", "fastad", *given, "--devices", 2])
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert json.loads(out)["method"] == "uniad"


def test_torchrun_equals_one_with_batch_norm(textures: Textures, tmp_path: Path) -> None:
    train(textures.root, tmp_path / "one", GRAD, weights="random")
    given = arguments(textures.root, tmp_path / "two", GRAD, tmp_path)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--standalone",
    ]
    out = run_command([*torchrun, "-m", "fastad", *given])
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert json.loads(out)["method"] == "grad"  # printed once


def test_one_process_resumes_what_two_began(
    textures: Textures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "SAVE_EVERY_S", 0.0)

    def stop(stage: str, done: int, total: int, remark: str = "") -> None:
        if stage == "train" and done == 2:
            raise RuntimeError("killed")

    chosen = recipe("uniad", cache="file")
    with pytest.raises(RuntimeError, match="killed"):
        train(textures.root, tmp_path / "two", chosen, weights="random", devices=2, report=stop)
    assert files(tmp_path / "two") == ["metrics.csv", "recipe.yaml", "resume.safetensors"]
    train(textures.root, tmp_path / "two", weights="random", resume=True)
    train(textures.root, tmp_path / "one", chosen, weights="random")
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_refusal_of_another_process_is_the_callers(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train" / "good"
    folder.mkdir(parents=True)
    for i in range(72):
        Image.fromarray(np.full((64, 64, 3), 3 * i, np.uint8)).save(folder / f"{i:02}.png")
    # The first process adapts to 64 images and gets the other half of the first batch.
    adapted = {i * 72 // 64 for i in range(64)}
    seed, broken = next(
        (seed, i)
        for seed in range(100)
        for i in next(iter(BatchParts(EpochSampler(72, seed), 8, 1, 2)))
        if i not in adapted
    )
    (folder / f"{broken:02}.png").write_bytes(b"not an image")
    chosen = recipe("uniad", cache="none", holdout=0.0, seed=seed)
    with pytest.raises(InputError, match=rf"{broken:02}\.png"):
        train(tmp_path / "data", tmp_path / "run", chosen, weights="random", devices=2)


def test_diverging_loss_ends_all_processes(textures: Textures, tmp_path: Path) -> None:
    chosen = recipe("uniad", lr=1e30, gradient_clip=0.0)
    with pytest.raises(InputError, match="lower the learning rate"):
        train(textures.root, tmp_path / "run", chosen, weights="random", devices=2)
    assert files(tmp_path / "run") == ["recipe.yaml"]


def test_refuses_a_batch_that_does_not_divide(textures: Textures, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"train\.batch: expected a multiple of 3 processes, got 8"
    ):
        train(textures.root, tmp_path / "run", UNIAD, weights="random", devices=3)
    assert not (tmp_path / "run").exists()


def test_refuses_no_process(textures: Textures, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="devices: expected at least 1, got 0"):
        train(textures.root, tmp_path / "run", UNIAD, weights="random", devices=0)


def test_refuses_another_number_than_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="torchrun started 4 processes, got 2"), processes(2, {}):
        pass


@pytest.mark.parametrize("images", [16, 17, 19, 24], ids=lambda n: f"{n} images")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_are_the_batch(images: int, size: int) -> None:
    whole = list(BatchParts(EpochSampler(images, seed=2), 8))
    parts = [BatchParts(EpochSampler(images, seed=2), 8, rank, size) for rank in range(size)]
    values = np.random.default_rng(0).normal(size=images)
    for step, split in enumerate(zip(*parts, strict=True)):
        weights = [part.weight(step) for part in parts]
        counted = [i for i, w in zip(split, weights, strict=True) if w > 0]
        assert sorted(i for part in counted for i in part) == sorted(whole[step])
        mean = sum(w * values[i].mean() for i, w in zip(split, weights, strict=True)) / size
        assert mean == pytest.approx(values[whole[step]].mean())
    assert all(len(part) == len(whole) for part in parts)


def test_refuses_batch_normalisation_that_would_see_a_part() -> None:
    class Other(nn.BatchNorm2d):
        pass

    method: Any = nn.Sequential(nn.Conv2d(3, 4, 1), Other(4))
    with pytest.raises(UnsupportedError, match="1: Other in several processes"):
        share_statistics(method.train(), torch.device("cpu"))
    share_statistics(method.eval(), torch.device("cpu"))  # frozen: no statistics of a batch


def test_a_single_process_needs_no_connection() -> None:
    alone = Processes()
    alone.join()
    assert alone.first(lambda: "done") == "done"
    assert alone.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not torch.distributed.is_initialized()
