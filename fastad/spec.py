"""What travels with a model: frozen settings that read from and write to JSON.

The manifest of an engine file is one `Manifest`; a checkpoint's JSON holds one `ModelSpec`.
Reading validates every field, so a hand-edited or damaged file fails with the field's name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar

import pydantic
from pydantic_core import to_jsonable_python

from fastad.errors import EngineError, InputError

FORMAT_VERSION = 1  # of the engine file; a reader refuses anything newer

T = TypeVar("T")


@dataclass(frozen=True)
class InputSpec:
    """What the graph is fed: uint8 RGB [B, H, W, 3], resized by Pillow's bilinear rule.

    ``mean`` and ``std`` apply to values in 0..1 and live inside the graph. ``value_range`` holds
    the grey levels that become 0 and 255 for cameras of more than 8 bits.
    """

    size: tuple[int, int]  # (H, W)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: Literal["bilinear"] = "bilinear"
    color: Literal["rgb"] = "rgb"
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One trained model: method, its settings, input and what its scores mean."""

    method: str
    input: InputSpec
    config: dict[str, Any]  # the method's own settings, enough to rebuild the network
    categories: tuple[str, ...] = ()
    map_rule: str = ""  # how the anomaly map is made, for people
    score_rule: str = ""  # how the raw score is made, for people
    # The raw score is the largest mean of the map in a window (H, W), at stride 1; 1 x 1 is the
    # maximum. None in files of versions that did not record it.
    score_window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Threshold:
    """A decision threshold in units of the raw score, and the sample it rests on."""

    value: float
    median: float  # of the raw scores of the calibration sample
    count: int  # normal images in the sample


@dataclass(frozen=True)
class Calibration:
    """Split-conformal thresholds from held-out normal images.

    ``map_scale`` is the (low, high) of map values that heat maps span, fixed for all images.
    ``uncovered`` names the categories whose own sample is too small: the pooled threshold serves.
    """

    false_alarm_rate: float  # promised, in 0..1
    pooled: Threshold
    per_category: dict[str, Threshold]
    map_scale: tuple[float, float]
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParityReport:
    """One runtime's engine outputs against PyTorch in float32, over real images."""

    runtime: str
    precision: str
    images: int
    map_max: float  # largest absolute map difference / range of the reference maps
    map_mean: float  # mean absolute map difference / range of the reference maps
    score_max: float  # largest absolute raw score difference / range of the reference maps
    decision_flips: int  # images whose side of the threshold changed


@dataclass(frozen=True)
class GateReport:
    """One runtime and precision against float32 of the same runtime, over real images.

    Map differences are relative to the range of the float32 maps. The false-alarm rate is the share
    of normal images, held-out and labelled, above the calibrated threshold; its interval holds the
    true rate with 95 % confidence as float32 shows it. Changes of AUROC and AUPRO are in points of
    0..100, negative is worse; None without labelled images. Times are of the machine that exported.
    """

    runtime: str
    precision: str
    normal_images: int
    test_images: int
    map_max: float
    map_mean: float
    score_rank_correlation: float  # Spearman, over normal images
    false_alarm_rate: float | None
    false_alarm_interval: tuple[float, float] | None
    image_auroc_change: float | None
    pixel_auroc_change: float | None
    aupro_change: float | None
    ms_batch1: float
    ms_batch8: float  # per image
    refused: str = ""  # the rule that failed; empty where the variant passed


@dataclass(frozen=True)
class Variant:
    """One graph inside the engine file.

    ``runtimes`` may load it for ``precision``; several variants may share a member. ``kept`` names
    the layers that int8 leaves alone beyond its own rules. int8 ``weight_bits`` of 7 give the same
    sums on every CPU; those of 8 need instructions that old ones lack.
    """

    member: str
    precision: str
    parity: tuple[ParityReport, ...]
    runtimes: tuple[str, ...] = ("openvino", "onnxruntime")
    gate: tuple[GateReport, ...] = ()
    kept: tuple[str, ...] = ()
    weight_bits: int = 8


@dataclass(frozen=True)
class Member:
    """Size and digest of one ZIP member."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The engine file's table of contents."""

    spec: ModelSpec
    variants: tuple[Variant, ...]
    calibration: Calibration | None
    provenance: dict[str, str]
    members: dict[str, Member] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@cache
def _adapter(cls: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(cls)


def to_json(value: object) -> str:
    """JSON text of one of this module's dataclasses, indented.

    Raises:
        InputError: a number is not finite, or a value has no JSON.
    """
    try:
        # a type adapter would turn NaN and infinity inside ``config`` into null
        plain = to_jsonable_python(value, inf_nan_mode="constants")
        return json.dumps(plain, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(
            f"{type(value).__name__}: {error}; use finite numbers and plain values"
        ) from None


def from_json(cls: type[T], text: str | bytes, source: str) -> T:
    """Read one of this module's dataclasses.

    Args:
        cls: The dataclass to read.
        text: JSON text.
        source: What the text came from; errors name it.

    Raises:
        EngineError: the text is not JSON, or a field is missing, of another type or unknown.
    """
    try:
        # mypy does not count classes among the hashable
        result: T = _adapter(cls).validate_json(text, extra="forbid")  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise EngineError(
            f"{source}: {where}: {first['msg']}; the file is damaged or was written by another "
            "version of fastad, export it again"
        ) from None
    return result
