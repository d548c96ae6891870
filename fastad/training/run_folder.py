"""A run folder before training touches it: new, or left by a run that may go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastad.errors import InputError
from fastad.training.checkpoint import load_tensors
from fastad.training.loop import RESUME
from fastad.training.recipe import Recipe, settings_of

# A run that failed before its first save leaves these, and nobody would miss them.
LEFT_OVER = ("recipe.yaml", "metrics.csv", "features.*.bin", ".*.partial")
SCRATCH = LEFT_OVER[2:]  # of a process that was killed; the other files are the user's to keep
UNSET = "unset"


def check_run(run: Path, resume: bool) -> None:
    """Refuse a folder in use, or with nothing to resume; clear what a killed process left.

    Raises:
        InputError: either of them.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: expected a folder, it is a file; choose another --out")
    if resume and not (run / RESUME).is_file():
        raise InputError(f"{run}: nothing to resume, expected {RESUME} in it")
    found = list(run.iterdir()) if run.exists() else []
    if not resume and not all(any(p.match(name) for name in LEFT_OVER) for p in found):
        raise InputError(
            f"{run}: expected a new or empty folder; choose another --out, or --resume a run "
            "that was killed"
        )
    for path in found:
        if any(path.match(name) for name in SCRATCH):
            path.unlink()


def identity_of(
    recipe: Recipe, weights: str, value_range: tuple[float, float] | None, fit: tuple[str, ...]
) -> str:
    """What a resumed run must agree on, as JSON: settings, weights and names of the images."""
    settings = dict(settings_of(recipe))
    epochs = settings["train"].pop("epochs")  # the one thing that a resumed run may change
    known = weights in ("imagenet", "random")
    facts = {
        "recipe": settings,
        "weights": weights if known else Path(weights).name,
        "value_range": value_range,
        "images": fit,
        "epochs": epochs if recipe.train.depends_on_epochs else None,
    }
    return json.dumps(facts, sort_keys=True)


def check_identity(run: Path, identity: str) -> str:
    """``identity`` itself, if the run in this folder was started with it.

    Raises:
        InputError: something differs; the message says what.
        EngineError: the resume state is damaged.
    """
    _, metadata = load_tensors(run / RESUME)
    before, now = json.loads(metadata["identity"]), json.loads(identity)
    if (epochs := before.pop("epochs", None)) != now.pop("epochs") and before == now:
        raise InputError(
            f"{run}: was started with train.epochs={epochs}, and its learning rates follow from "
            "that number (schedule cosine, or a warm-up); resume with the same, or start anew"
        )
    for key in sorted(now, key=lambda key: key == "images"):  # settings choose the images
        if before[key] != now[key]:
            raise InputError(
                f"{run}: was started with other {key}, so it cannot go on: "
                f"{_difference(before[key], now[key])}"
            )
    return identity


def _difference(before: Any, now: Any) -> str:
    """The first thing that differs between two JSON values, in a sentence."""
    if isinstance(before, dict) and isinstance(now, dict):
        old, new = _flat(before), _flat(now)
        key = next(k for k in {**old, **new} if old.get(k, UNSET) != new.get(k, UNSET))
        return f"{key}: {old.get(key, UNSET)} then, {new.get(key, UNSET)} now"
    if isinstance(before, list) and isinstance(now, list):
        names = sorted(set(before) ^ set(now))
        first = f", {names[0]} only {'then' if names[0] in before else 'now'}" if names else ""
        return f"{len(before)} then, {len(now)} now{first}"
    return f"{before} then, {now} now"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested settings under keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inside or {f"{prefix}{key}": value}
    return flat
