"""A run folder before training touches it: new, or left by a run that may go on."""

from __future__ import annotations

import json
from pathlib import Path

from fastad.errors import InputError
from fastad.training.checkpoint import load_tensors
from fastad.training.loop import RESUME
from fastad.training.recipe import Recipe, settings_of


def check_run(run: Path, resume: bool) -> None:
    """Refuse a folder in use, or with nothing to resume; clear what a failed start left.

    Raises:
        InputError: either of them.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: expected a folder, it is a file; choose another --out")
    if resume and not (run / RESUME).is_file():
        raise InputError(f"{run}: nothing to resume, expected {RESUME} in it")
    left = [p for p in run.iterdir() if not resume] if run.exists() else []
    # A run that failed before its first epoch leaves nothing that anybody would miss.
    if any(p.name != "recipe.yaml" and not p.match("features.*.bin") for p in left):
        raise InputError(
            f"{run}: expected a new or empty folder; choose another --out, or --resume a run "
            "that was killed"
        )
    for path in left:
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
    for key in now:
        if before[key] != now[key]:
            old, new = (str(v)[:200] for v in (before[key], now[key]))
            raise InputError(
                f"{run}: was started with other {key}, so it cannot go on: {old} then, {new} now"
            )
    return identity
