"""Checkpoints: `model.safetensors` for the weights, `model.json` for everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastad.atomic import write_whole
from fastad.errors import EngineError, InputError
from fastad.models.registry import Method, rebuild
from fastad.spec import Calibration, ModelSpec, from_json, to_json

WEIGHTS, RECORD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Record:
    """What a checkpoint says about itself. Image paths are relative to ``data_root``."""

    spec: ModelSpec
    data_root: str = ""
    fit: tuple[str, ...] = ()  # trained on
    holdout: tuple[str, ...] = ()  # normal, never trained on: calibration and parity use them
    recipe: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A trained method in eval mode, its record, and the folder both came from."""

    path: Path
    method: Method
    record: Record


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole and durably, or not at all.

    Raises:
        EngineError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    write_whole(path, lambda file: file.write(data), durable=True)


def save_checkpoint(folder: Path, method: Method, record: Record) -> Path:
    """Write weights and record into ``folder``; returns ``folder``."""
    state = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(state))
    write_bytes(folder / RECORD, to_json(record).encode())
    return folder


def save_record(folder: Path, record: Record) -> None:
    """Replace the record of an existing checkpoint, such as after calibration."""
    write_bytes(folder / RECORD, to_json(record).encode())


def checkpoint_folder(path: str | Path) -> Path:
    """The checkpoint inside a run folder, or ``path`` itself if it is one.

    Raises:
        InputError: there is none; the message says what was looked for.
    """
    base = Path(path)
    for folder in (base, base / "checkpoint"):
        if (folder / RECORD).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise InputError(
        f"{base}: expected a run folder or checkpoint with {RECORD} and {WEIGHTS}, found none; "
        "`fastad train` writes one"
    )


def load_record(path: str | Path) -> Record:
    """What a run folder or checkpoint folder says about itself, without building the network.

    Raises:
        InputError: no checkpoint there.
        EngineError: a damaged file.
    """
    folder = checkpoint_folder(path)
    return from_json(Record, (folder / RECORD).read_bytes(), str(folder / RECORD))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild a trained method from a run folder or checkpoint folder.

    Raises:
        InputError: no checkpoint there, or weights that do not fit its settings.
        EngineError: a damaged file.
    """
    folder, record = checkpoint_folder(path), load_record(path)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise EngineError(f"{folder / WEIGHTS}: damaged ({error}); train again") from error
    method = rebuild(record.spec, state, str(folder))
    # Earlier versions did not record it.
    spec = replace(record.spec, score_window=method.score_window)
    return Checkpoint(folder, method, replace(record, spec=spec))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file with text metadata, written beside and renamed."""
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata)))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file written by `save_tensors`.

    Raises:
        EngineError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys()  # a safetensors file is no dict that could be iterated over
            return {name: file.get_tensor(name) for name in names}, metadata
    except SafetensorError as error:
        raise EngineError(f"{path}: damaged ({error}); start over in a new folder") from error
