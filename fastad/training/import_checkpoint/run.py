"""From an authors' checkpoint file to a run folder that calibrates and exports like any other."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from fastad.errors import InputError
from fastad.models.registry import Method
from fastad.training.checkpoint import Checkpoint, Record, load_checkpoint, save_checkpoint
from fastad.training.import_checkpoint.grad import grad_from_authors
from fastad.training.import_checkpoint.rd4ad import rd4ad_from_authors, read_rd4ad_state
from fastad.training.import_checkpoint.reader import read_state
from fastad.training.import_checkpoint.uniad import uniad_from_authors

Origin = Literal["uniad", "grad", "crad", "rd4ad"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)


def import_checkpoint(
    origin: str, file: str | Path, out: str | Path, *, teacher: str | Path | None = None
) -> Checkpoint:
    """Convert an authors' file, without executing anything in it.

    Args:
        origin: Whose file it is: ``uniad``, ``grad``, ``crad`` or ``rd4ad``.
        file: The authors' file.
        out: Run folder to make; calibrate it with ``--data``, since the file names no images.
        teacher: For ``rd4ad``, whose files hold bottleneck and decoder only: the encoder's weights
            (``.pth`` or ``.safetensors``); None downloads the published ones.

    Returns:
        The checkpoint as written.

    Raises:
        InputError: an unknown origin, a file of another kind or origin, keys missing, unknown or of
            another shape (named), or a folder that is in use.
    """
    file, out = Path(file), Path(out)
    if origin not in ORIGINS:
        raise InputError(f"origin: expected one of {', '.join(ORIGINS)}, got {origin!r}")
    if teacher is not None and origin != "rd4ad":
        raise InputError(f"teacher: only rd4ad files lack their encoder, {origin} files hold it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder")
    method = _convert(origin, file, teacher)
    record = Record(
        spec=method.spec,
        provenance={
            "fastad": version("fastad"),
            "imported_from": file.name,
            "origin": origin,
            "backbone_weights": "in the file" if origin != "rd4ad" else _teacher_name(teacher),
        },
    )
    return load_checkpoint(save_checkpoint(out / "checkpoint", method, record))


def _convert(origin: str, file: Path, teacher: str | Path | None) -> Method:
    if origin == "uniad":
        return uniad_from_authors(read_state(file))
    if origin in ("grad", "crad"):
        method = grad_from_authors(read_state(file))
        fusion = method.config.fusion
        if (origin == "grad") != (fusion == "grad"):
            right = "grad" if fusion == "grad" else "crad"
            raise InputError(f"{file}: holds a {fusion} model, got origin {origin}; pass {right}")
        return method
    weights = "imagenet" if teacher is None else str(teacher)
    return rd4ad_from_authors(read_rd4ad_state(file), weights=weights)


def _teacher_name(teacher: str | Path | None) -> str:
    return "imagenet" if teacher is None else Path(teacher).name
