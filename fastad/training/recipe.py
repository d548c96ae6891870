"""Recipes: YAML files that fix every setting of a training run, shipped or written by users."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml

from fastad.errors import InputError

Count = Annotated[int, pydantic.Field(ge=1)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Units: ``epochs`` and ``step_epochs`` in epochs, ``batch`` in images.

    ``groups`` are further arguments of the method's ``parameter_groups``. With ``schedule`` "step"
    the learning rate falls by ``step_factor`` after epochs ``step_epochs``, twice that, ... (epoch
    0 counts, as in the authors' trainers); None keeps it. "cosine" falls along half a cosine wave,
    step by step, to 0 at the last step. ``warmup`` is the share of all optimiser steps in which
    the rate first rises in a straight line. ``holdout`` is the share of each category's normal
    training images that is kept for calibration and never trained on. ``gradient_clip`` is a global
    L2 norm; 0 is off. With a ``validation_fraction`` that share of the training images (at most 20,
    as in InTra's paper) is kept out of the gradient, training stops after ``patience`` epochs
    without a lower loss on them, and the best epoch is the result instead of the last.

    ``batch`` counts the images of one optimiser step, over all processes. ``autocast`` "bf16" lets
    layers compute in bfloat16; weights, optimiser, cached features and validation stay float32.
    ``channels_last`` stores images, feature maps and convolutions' weights with channels innermost.
    """

    epochs: Count
    batch: Count
    lr: Annotated[float, pydantic.Field(gt=0)]
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    groups: dict[str, float] = field(default_factory=dict)
    step_epochs: Count | None = None
    step_factor: float = 0.1
    schedule: Literal["step", "cosine"] = "step"
    warmup: Share = 0.0
    gradient_clip: NotNegative = 0.0
    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    holdout: Share = 0.2
    cache: Literal["auto", "memory", "file", "none"] = "auto"
    validation_fraction: Share = 0.0
    patience: Count = 50
    autocast: Literal["none", "bf16"] = "none"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and self.step_epochs is not None:
            raise InputError(
                f"train.step_epochs: expected none with schedule cosine, got {self.step_epochs}; "
                "the cosine replaces the steps, set train.step_epochs=null"
            )

    @property
    def depends_on_epochs(self) -> bool:
        """Whether the learning rate of an epoch follows from how many there will be."""
        return self.schedule == "cosine" or self.warmup > 0

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Factor on the learning rate in optimiser step ``step``, counted from 0 over all epochs.

        The warm-up reaches 1 in the first step behind it, where the cosine starts.
        """
        total = self.epochs * steps_per_epoch
        warm = min(int(self.warmup * total), total - 1)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.schedule == "cosine":
            done = (step - warm) / max(total - 1 - warm, 1)
            return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        if self.step_epochs is None:
            return 1.0
        # Published code steps after each epoch with its number: the first stage is one longer.
        epoch = step // steps_per_epoch
        return float(self.step_factor ** (max(epoch - 1, 0) // self.step_epochs))


@dataclass(frozen=True)
class Recipe:
    """One method, its settings, and how to train it."""

    method: str
    train: TrainSettings
    config: dict[str, Any] = field(default_factory=dict)


def shipped() -> tuple[str, ...]:
    """Names of the recipes inside the package, such as ``grad.paper``."""
    folder = files("fastad.training") / "recipes"
    return tuple(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name: A shipped recipe (``grad.paper``) or the path of a YAML file.
        overrides: ``key=value`` with dots for nesting and YAML values, such as
            ``train.epochs=5`` or ``config.backbone.name=resnet18``.

    Raises:
        InputError: no such recipe, YAML that does not parse, an unknown or mistyped setting.
    """
    text, source = _read(name)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{source}: expected the keys method, config, train")
    for override in overrides:
        _apply(tree, override)
    return _validated(tree, source)


def parse_recipe(text: str) -> Recipe:
    """Read back what `dump_recipe` wrote."""
    return _validated(yaml.safe_load(text), "recipe")


def _validated(tree: dict[str, Any], source: str) -> Recipe:
    try:
        return pydantic.TypeAdapter(Recipe).validate_python(tree, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{source}: {where}: {first['msg']}") from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML text that `load_recipe` reads back."""
    tree = pydantic.TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return yaml.safe_dump(tree, sort_keys=False)


def _read(name: str | Path) -> tuple[str, str]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"recipe: no file {path}")
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as a UTF-8 text file ({error})") from None
    if str(name) not in shipped():
        near = difflib.get_close_matches(str(name), shipped(), n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(
            f"recipe: expected a .yaml file or one of {', '.join(shipped())}, got {name}{hint}"
        )
    resource = files("fastad.training") / "recipes" / f"{name}.yaml"
    return resource.read_text(encoding="utf-8"), str(name)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override: expected key=value, got {override!r}")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"override: {key}: {parent} is a value, not a group of settings")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override: {key}: {text!r} is not a YAML value") from None


def settings_of(recipe: Recipe) -> Mapping[str, Any]:
    """The recipe as plain JSON values, for a checkpoint's record."""
    tree: dict[str, Any] = pydantic.TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return tree
