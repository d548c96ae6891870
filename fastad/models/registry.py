"""What every method is, and where a method is found by its name.

Adding a method: one file in `fastad/models/`, one import line in `fastad/models/__init__.py`, one
recipe in `fastad/training/recipes/`. Export, tests and benchmarks iterate over the registry.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from fastad.errors import InputError
from fastad.spec import InputSpec, ModelSpec

Features = tuple[Tensor, ...]  # what a frozen backbone hands to the trained part, one per level


def widened(t: Tensor) -> Tensor:
    """``t`` in float32, or in float64 if it is: distances and softmax run so in every precision."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Method(nn.Module, ABC):
    """A detector: frozen backbone (or none), trained head, anomaly map and raw score.

    Subclasses declare ``name``, a frozen dataclass ``Config`` of their own settings, and the four
    abstract members. Everything in ``features`` is frozen and free of randomness, so training may
    compute it once per image; everything after it trains.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    map_rule: ClassVar[str]  # how the map is made, for people
    score_rule: ClassVar[str]  # how the raw score is made, for people
    # Submodules that stay in float32 where the products of all others run in half precision.
    float32_parts: ClassVar[tuple[str, ...]] = ()

    config: Any
    input: InputSpec
    # `score_rule` in numbers: the largest mean of the map in a window (H, W); 1 x 1 is its maximum.
    score_window: tuple[int, int] = (1, 1)

    @abstractmethod
    def features(self, image: Tensor) -> Features:
        """Frozen features of ``image`` float32 [B, 3, H, W], normalised by ``input``."""

    @abstractmethod
    def loss(self, features: Features) -> Tensor:
        """Training loss, a scalar, of frozen features."""

    @abstractmethod
    def score(self, features: Features) -> tuple[Tensor, Tensor]:
        """Anomaly map float32 [B, H, W] and raw score float32 [B] of frozen features."""

    @abstractmethod
    def parameter_groups(self, lr: float, **settings: float) -> list[dict[str, Any]]:
        """Optimiser groups over everything that trains, with each group's learning rate."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map float32 [B, H, W] and raw score float32 [B].

        Args:
            image: float32 [B, 3, H, W], RGB in 0..1 normalised by ``input``'s mean and std.
        """
        return self.score(self.features(image))

    @property
    def visits_per_epoch(self) -> int:
        """How often one training epoch goes through the images; 1 unless a method samples them."""
        return 1

    def finish(self, batches: Iterable[Tensor]) -> None:
        """Set what follows from the training images after the last step; default: nothing.

        Args:
            batches: The images trained on, float32 [B, 3, H, W], normalised, not augmented.
        """

    def adapt(self, features: Features) -> None:
        """Set constants that follow from a sample of the training features; default: none."""

    @property
    def spec(self) -> ModelSpec:
        """The settings that travel with this model."""
        return ModelSpec(
            method=self.name,
            input=self.input,
            config=pydantic.TypeAdapter(type(self.config)).dump_python(self.config, mode="json"),
            map_rule=self.map_rule,
            score_rule=self.score_rule,
            score_window=self.score_window,
        )


M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(cls: M) -> M:
    """Class decorator: make a method available under its ``name``."""
    if cls.name in _METHODS:
        raise ValueError(f"method {cls.name!r} is registered twice")
    _METHODS[cls.name] = cls
    return cls


def methods() -> tuple[str, ...]:
    """Names of all registered methods, sorted."""
    return tuple(sorted(_METHODS))


def method_class(name: str) -> type[Method]:
    """The class registered as ``name``.

    Raises:
        InputError: nothing is registered under that name; the message lists what is.
    """
    if name in _METHODS:
        return _METHODS[name]
    near = difflib.get_close_matches(name, _METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"method: expected one of {', '.join(methods())}, got {name!r}{hint}")


def build(name: str, config: Mapping[str, Any], **build_settings: Any) -> Method:
    """Build an untrained method from its settings.

    Args:
        name: A registered method.
        config: Fields of the method's ``Config``; unknown ones are refused.
        build_settings: Passed on to the class, such as ``weights`` for the backbone.

    Raises:
        InputError: unknown method, unknown or mistyped setting, weights that do not fit.
    """
    cls = method_class(name)
    try:
        settings = pydantic.TypeAdapter(cls.Config).validate_python(dict(config), extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(cls.Config.__dataclass_fields__)
        raise InputError(f"{name}: {where}: {first['msg']}; settings are {known}") from None
    return cls(settings, **build_settings)


def rebuild(spec: ModelSpec, state: Mapping[str, Tensor], source: str) -> Method:
    """A trained method from its spec and weights, in eval mode.

    Raises:
        InputError: keys or shapes of ``state`` differ from what the settings ask for.
    """
    method = build(spec.method, spec.config, weights="none")
    load_exactly(
        method,
        state,
        f"{source}: weights do not fit {spec.method}",
        "; the checkpoint is damaged or belongs to other settings",
    )
    method.input = spec.input
    return method.eval()


def load_exactly(
    method: Method, state: Mapping[str, Tensor], label: str, way_out: str = ""
) -> None:
    """Load weights, every one that the method has and no other.

    Args:
        method: Changed in place, to values of its own dtypes.
        state: Tensors by the method's keys.
        label: Begins the message of a refusal.
        way_out: Ends it.

    Raises:
        InputError: keys are missing, left over or of another shape; the message names them.
    """
    own = method.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unknown or shapes:
        raise InputError(
            f"{label}: {len(missing)} keys missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}, {len(shapes)} of another shape {shapes[:3]}{way_out}"
        )
    method.load_state_dict(dict(state))
