"""`fastad build`: TensorRT plans for this machine's GPU, added to an engine file.

Not yet run on hardware: written against TensorRT 10.13 and 11.4. What needs no GPU is proven with
the parser and builder of TensorRT-RTX and with TensorRT's own bindings (tests/tensorrt).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from fastad.atomic import check_target, user_cache, write_whole
from fastad.engine import parity
from fastad.engine.base import Precision
from fastad.engine.container import MODEL, EngineFile, read_engine, write_engine
from fastad.engine.plans import (
    HARDWARE,
    Hardware,
    Machine,
    Plan,
    plan_name,
    read_plans,
    record_name,
)
from fastad.engine.tensorrt import NAMES, TensorRTRuntime, this_machine, why_unsupported
from fastad.errors import EngineError, InputError, UnsupportedError
from fastad.ops.aot import capability_for
from fastad.spec import Variant, to_json
from fastad.training.progress import Report

from .onnx_plugins import operators, to_plugins

BUILDABLE: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class BuildSettings:
    """How a plan is built.

    Attributes:
        max_batch: Largest batch of one run; 1 has a profile of its own, which wide ones would slow.
        hardware: ``exact`` for this GPU, ``same-capability``, or ``ampere-plus`` for all from
            compute capability 8.0 on, slower.
        version_compatible: Newer TensorRT of the same major version may load it; larger, slower.
        level: TensorRT's builder optimisation level, 0..5; higher takes longer.
    """

    max_batch: int = 8
    hardware: Hardware = "exact"
    version_compatible: bool = False
    level: int = 3


def build_plans(
    engine: str | Path,
    *,
    precision: str | Sequence[str] = "fp32",
    device: str = "cuda",
    plugins: bool = True,
    settings: BuildSettings | None = None,
    report: Report | None = None,
) -> tuple[Plan, ...]:
    """Build a plan per precision, compare it on the golden images, and add it to the engine.

    The file is written beside and renamed once every plan has passed; a plan that differs from
    PyTorch by more than its precision may leaves it as it was. Plans of other machines stay.

    Args:
        engine: An engine file; replaced.
        precision: ``fp32``, ``fp16``, ``int8``, a list of them, or ``auto`` for all whose graph
            the engine holds.
        device: ``cuda`` or ``cuda:N``.
        plugins: Run fastad's operators with the package's own kernels; False leaves them to
            TensorRT, as standard layers.
        settings: None takes the defaults.
        report: Receives progress; None is silent.

    Returns:
        What was added.

    Raises:
        InputError: a name or number that does not exist.
        UnsupportedError: no TensorRT, no GPU, or no graph in that precision.
        EngineError: TensorRT refuses the graph, or the plan differs from PyTorch.
    """
    settings = settings or BuildSettings()
    _check_settings(settings)
    wanted = _wanted(precision)
    reason = why_unsupported(wanted[0] if wanted else "fp32", device)
    if reason:
        raise UnsupportedError(reason)
    check_target(Path(engine))
    machine = this_machine(device)
    with read_engine(engine) as file:
        found = wanted or [p for p in BUILDABLE if _graph_of(file, p) is not None]
        lacking = [name for name in found if _graph_of(file, name) is None]
        if lacking:
            raise UnsupportedError(
                f"{file.path}: holds no {lacking[0]} graph; export it with --precision {lacking[0]}"
            )
        built = {}
        for step, name in enumerate(found):
            if report:
                report(f"build {name}", step, len(found))
            plan, data = _build(file, name, machine, device, plugins, settings)
            built[plan] = data
    # Building takes minutes: a calibration stored meanwhile must not be overwritten.
    with read_engine(engine) as file:
        digests = {name: member.sha256 for name, member in file.manifest.members.items()}
        if any(digests.get(plan.graph) != plan.graph_sha256 for plan in built):
            raise EngineError(
                f"{engine}: was exported again while building; run `fastad build` again"
            )
        members = _members_with(file, built)
        manifest = file.manifest
    write_engine(engine, manifest, members)
    return tuple(built)


def serialise(
    trt: Any,
    graph: bytes,
    settings: BuildSettings,
    *,
    cache: Path | None = None,
    adjust: Callable[[Any], None] = lambda config: None,
) -> bytes:
    """A plan of a graph, types as in the graph, TF32 off.

    Args:
        trt: The module ``tensorrt``, or ``tensorrt_rtx`` in tests.
        graph: ONNX with input ``image``.
        settings: How to build.
        cache: Timing cache to read and replace; None keeps none.
        adjust: Last word on the builder's configuration.

    Raises:
        EngineError: the parser or the builder refuses; the message holds what they said.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    chosen = [flags.STRONGLY_TYPED]
    # TensorRT-RTX has no such plugins.
    if hasattr(flags, "PREFER_AOT_PYTHON_PLUGINS"):
        chosen.append(flags.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(sum(1 << int(flag) for flag in chosen))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
        raise _refused("parse", [*(said or log.lines)[:2], "an older engine: export it again"])
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    if {network.get_input(0).name, *outputs} != set(NAMES):
        raise EngineError(f"tensorrt: expected tensors {NAMES}, got {outputs}; export again")
    config = builder.create_builder_config()
    # Distances in float32 lose 13 of 23 bits in TF32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    levels = trt.HardwareCompatibilityLevel
    config.hardware_compatibility_level = {
        "exact": levels.NONE,
        "same-capability": levels.SAME_COMPUTE_CAPABILITY,
        "ampere-plus": levels.AMPERE_PLUS,
    }[settings.hardware]
    config.builder_optimization_level = settings.level
    sizes = network.get_input(0).shape[1:]
    for low, high in ((1, 1), (2, settings.max_batch))[: settings.max_batch]:
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (low, *sizes), (high, *sizes), (high, *sizes))
        config.add_optimization_profile(profile)
    adjust(config)
    timing = _timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused("build", log.lines)
    if cache is not None and timing is not None:
        data = bytes(timing.serialize())
        with contextlib.suppress(EngineError):  # the next build takes longer, this one is done
            write_whole(cache, lambda file: file.write(data))
    return bytes(plan)


def _check_settings(settings: BuildSettings) -> None:
    if not 1 <= settings.max_batch <= 1024:
        raise InputError(f"max_batch: expected 1 to 1024, got {settings.max_batch}")
    if settings.hardware not in HARDWARE:
        raise InputError(f"hardware: expected {', '.join(HARDWARE)}, got {settings.hardware!r}")
    if not 0 <= settings.level <= 5:
        raise InputError(f"level: expected 0 to 5, got {settings.level}")


def _wanted(precision: str | Sequence[str]) -> list[Precision]:
    """Precisions asked for by name, empty for ``auto``."""
    names = precision.split(",") if isinstance(precision, str) else list(precision)
    if names == ["auto"]:
        return []
    for name in names:
        if name == "bf16":
            raise UnsupportedError(
                "precision: bf16 has no graph, TensorRT takes types from casts in it; use fp16"
            )
        if name not in BUILDABLE:
            raise InputError(f"precision: expected auto, {', '.join(BUILDABLE)}, got {name!r}")
    return cast(list[Precision], list(dict.fromkeys(names)))


def _graph_of(file: EngineFile, precision: Precision) -> Variant | None:
    """The variant whose graph has that precision written into it, for TensorRT."""
    held = [v for v in file.manifest.variants if v.precision == precision]
    held = [v for v in held if v.member in file.manifest.members]
    if precision == "int8":
        # The symmetric file; the one for ONNX Runtime's CPU kernels has zero points.
        held = [v for v in held if {"openvino", "tensorrt"} & set(v.runtimes)]
    if precision != "fp32":
        held = [v for v in held if v.member != MODEL]
    return held[0] if held else None


def _build(
    file: EngineFile,
    precision: Precision,
    machine: Machine,
    device: str,
    plugins: bool,
    settings: BuildSettings,
) -> tuple[Plan, bytes]:
    """One plan that agrees with the golden images."""
    variant = _graph_of(file, precision)
    assert variant is not None  # checked before the first build
    graph = file.member(variant.member)
    plan, data = build_plan(
        graph, machine, precision, variant.member, plugins=plugins, settings=settings
    )
    return verify_plan(file, variant, plan, TensorRTRuntime(data, plan, device)), data


def build_plan(
    graph: bytes,
    machine: Machine,
    precision: Precision = "fp32",
    member: str = MODEL,
    *,
    plugins: bool = True,
    settings: BuildSettings | None = None,
) -> tuple[Plan, bytes]:
    """A plan of one graph for this machine, not yet compared with anything.

    Args:
        graph: ONNX in that precision.
        machine: What `this_machine` found.
        precision: A name of `BUILDABLE`.
        member: Name of the graph in its engine file.
        plugins: As in `build_plans`.
        settings: None takes the defaults.

    Raises:
        UnsupportedError: triton is missing for the plugins.
        EngineError: TensorRT refuses the graph.
    """
    settings = settings or BuildSettings()
    digest = hashlib.sha256(graph).hexdigest()
    names = operators(graph) if plugins else ()
    if names:
        portable = settings.hardware == "ampere-plus"
        capability = capability_for(*machine.capability, portable=portable)
        graph = to_plugins(graph, register(), capability)
    import tensorrt

    place = user_cache("tensorrt")
    cache = place / Path(plan_name(machine, precision)).name if place else None
    data = serialise(tensorrt, graph, settings, cache=cache and cache.with_suffix(".timing"))
    plan = Plan(
        member=plan_name(machine, precision),
        graph=member,
        graph_sha256=digest,
        precision=precision,
        gpu=machine.gpu,
        capability=machine.capability,
        tensorrt=machine.tensorrt,
        hardware=settings.hardware,
        version_compatible=settings.version_compatible,
        max_batch=settings.max_batch,
        plugins=names,
    )
    return plan, data


def verify_plan(file: EngineFile, variant: Variant, plan: Plan, runtime: Any) -> Plan:
    """The plan with its parity report; ``runtime`` holds it loaded and is closed.

    Raises:
        EngineError: it differs from PyTorch by more than its precision may.
    """
    golden, manifest = file.golden(), file.manifest
    threshold = manifest.calibration.pooled.value if manifest.calibration else None
    try:
        found = parity.compare(
            runtime, golden.images, (golden.anomaly_map, golden.raw_score), threshold
        )
    finally:
        runtime.close()
    limit = parity.MAP_LIMIT
    if plan.precision != "fp32":
        limit += parity.FACTOR * max(
            (max(r.map_max, r.score_max) for r in variant.parity), default=0.0
        )
    parity.check(found, limit)
    return dataclasses.replace(plan, parity=found)


def _members_with(file: EngineFile, built: dict[Plan, bytes]) -> dict[str, bytes]:
    """The engine's members with new plans, without those of graphs that are gone."""
    digests = {name: member.sha256 for name, member in file.manifest.members.items()}
    stale = {p.member for p in read_plans(file) if digests.get(p.graph) != p.graph_sha256}
    stale |= {record_name(member) for member in stale}
    members = {name: file.member(name) for name in digests if name not in stale}
    for plan, data in built.items():
        members |= {plan.member: data, record_name(plan.member): to_json(plan).encode()}
    return members


def register() -> dict[str, str]:
    """Register both operators' plugins with TensorRT; their names by operator.

    Raises:
        UnsupportedError: triton is not installed, or numpy too new for this TensorRT.
    """
    if find_spec("triton") is None:
        raise UnsupportedError(
            "plugins: triton is not installed; pip install triton, or build with --no-plugins"
        )
    import numpy
    import tensorrt

    # Its plugin layer takes int() of an array of one element, which newer NumPy refuses.
    if (
        tensorrt.__version__.startswith("10.")
        and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    ):
        raise UnsupportedError(
            f"plugins: TensorRT {tensorrt.__version__} needs numpy below 2.4, found "
            f"{numpy.__version__}; install 'numpy<2.4' or TensorRT 11, or build with --no-plugins"
        )
    ops = ("neighbor_attention", "grid_interpolate")
    modules = [import_module(f"fastad.ops.{op}.tensorrt_impl") for op in ops]
    return {module.NAME.rpartition("_")[0]: module.NAME for module in modules}


def _timing_cache(config: Any, path: Path | None) -> Any:
    """Timings of earlier builds, which TensorRT drops where device or version differ."""
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _log(trt: Any) -> Any:
    """A logger that keeps errors for our message."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)

    return Log()


def _refused(stage: str, said: Sequence[str]) -> EngineError:
    """What TensorRT said, and first what one of our plugins said: it knows why."""
    form = sys.modules.get("fastad.ops.tensorrt_form")
    failure = form.take_failure() if form else None
    lines = [str(failure)] if failure else [line.strip() for line in said if line.strip()]
    error = EngineError(f"tensorrt: {stage} failed: {'; '.join(lines[:3]) or 'no message'}")
    error.__cause__ = failure
    return error
