"""Weights by rule and inputs by seed: what made the golden values."""

from __future__ import annotations

import json
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
errors: dict[str, dict[str, float]] = {}  # method -> quantity -> what `relative_error` found


def load(method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, np.ndarray]]:
    """State in the authors' keys, normalised input [B, 3, S, S], and expected outputs."""
    with np.load(GOLDEN / f"{method}.npz") as file:
        expected = dict(file)
    keys = json.loads((GOLDEN / f"{method}.keys.json").read_text())
    seed, size, batch = (int(expected[k]) for k in ("seed", "size", "batch"))
    state = {k: _value(k, shape, seed) for k, (shape, _) in keys.items()}
    image = np.random.Generator(np.random.PCG64(seed)).standard_normal((batch, 3, size, size))
    return state, torch.from_numpy(image.astype(np.float32)), expected


def relative_error(method: str, quantity: str, got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference / largest value; the end of the test run prints it (`lines`)."""
    error = float(np.abs(got - expected).max() / np.abs(expected).max())
    errors.setdefault(method, {})[quantity] = error
    return error


def lines() -> list[str]:
    """One line per method compared, its worst quantity first."""
    return [
        f"{method}: max relative error "
        + ", ".join(f"{e:.1e} {q}" for q, e in sorted(found.items(), key=lambda item: -item[1]))
        for method, found in sorted(errors.items())
    ]


def _value(key: str, shape: list[int], seed: int) -> torch.Tensor:
    g = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()) + seed))
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    value: Any
    if key.endswith("running_var"):
        value = g.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = 0.1 * g.standard_normal(shape)
    elif ".query." in key:
        value = g.standard_normal(shape)
    elif len(shape) == 1 and key.endswith("weight"):
        value = g.uniform(0.5, 1.5, shape)
    elif len(shape) <= 1:
        value = 0.05 * g.standard_normal(shape)
    else:
        value = (1 / prod(shape[1:])) ** 0.5 * g.standard_normal(shape)
    return torch.from_numpy(np.asarray(value, np.float32))
