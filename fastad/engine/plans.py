"""TensorRT plans inside an engine file: which one this machine may load, and why not the others.

Knows names and versions only; nothing here imports TensorRT or CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastad.engine.base import Precision
from fastad.engine.container import EngineFile
from fastad.spec import ParityReport, from_json

FOLDER = "plans/"
Hardware = Literal["exact", "same-capability", "ampere-plus"]
HARDWARE: tuple[Hardware, ...] = ("exact", "same-capability", "ampere-plus")


@dataclass(frozen=True)
class Plan:
    """What a plan was built from, by and for; lies beside it as JSON."""

    member: str  # plans/NAME.plan
    graph: str  # member it was built from
    graph_sha256: str  # of that member then: another graph means another model
    precision: Precision
    gpu: str  # product name
    capability: tuple[int, int]
    tensorrt: str  # version, such as 11.4.0.106
    hardware: Hardware  # how far from that GPU it runs
    version_compatible: bool  # newer TensorRT of the same major version may load it
    max_batch: int
    plugins: tuple[str, ...]  # compiled into the plan; nothing needs them at run time
    parity: ParityReport | None = None  # against the golden images, on the machine that built it


@dataclass(frozen=True)
class Machine:
    """The GPU and the TensorRT that would run a plan."""

    gpu: str
    capability: tuple[int, int]
    tensorrt: str


@dataclass(frozen=True)
class Choice:
    """A plan for a machine, or none; a sentence for every plan passed over."""

    plan: Plan | None
    skipped: tuple[str, ...]


def plan_name(machine: Machine, precision: Precision) -> str:
    """Member name, such as ``plans/nvidia-h200-11.4.0.106-fp32.plan``."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") or "gpu"
    version = re.sub(r"[^0-9A-Za-z.]+", "-", machine.tensorrt)
    return f"{FOLDER}{gpu[:48]}-{version[:24]}-{precision}.plan"


def record_name(member: str) -> str:
    """The JSON member that describes a plan."""
    return member.removesuffix(".plan") + ".json"


def read_plans(engine: EngineFile) -> tuple[Plan, ...]:
    """Descriptions of all plans in an engine file, in the order of their names.

    Raises:
        EngineError: a description is not readable; the message names it.
    """
    names = [n for n in engine.manifest.members if n.startswith(FOLDER) and n.endswith(".json")]
    return tuple(from_json(Plan, engine.member(n), f"{engine.path}: {n}") for n in sorted(names))


def why_unsuitable(plan: Plan, machine: Machine, digests: Mapping[str, str]) -> str | None:
    """Why a machine may not load a plan, or None if it may.

    Args:
        plan: The plan.
        machine: The machine.
        digests: SHA-256 of the engine's members by name.
    """
    label = f"{plan.member}: "
    if plan.member not in digests or digests.get(plan.graph) != plan.graph_sha256:
        return f"{label}built from another {plan.graph}; build it again"
    if plan.tensorrt != machine.tensorrt:
        built, here = _numbers(plan.tensorrt), _numbers(machine.tensorrt)
        if not (plan.version_compatible and built[:1] == here[:1] and built <= here):
            return f"{label}built by TensorRT {plan.tensorrt}, this machine has {machine.tensorrt}"
    theirs, ours = (f"{p.gpu} ({p.capability[0]}.{p.capability[1]})" for p in (plan, machine))
    if plan.hardware == "ampere-plus":
        if machine.capability < (8, 0):
            return f"{label}for compute capability 8.0 and newer, found {ours}"
    elif plan.capability != machine.capability or (
        plan.hardware == "exact" and plan.gpu != machine.gpu
    ):
        return f"{label}built for {theirs}, found {ours}"
    return None


def choose(
    plans: tuple[Plan, ...], machine: Machine, precision: Precision, digests: Mapping[str, str]
) -> Choice:
    """The plan to load: of those that fit, the one made most exactly for this machine."""
    fitting, skipped = [], []
    for plan in plans:
        if plan.precision != precision:
            continue
        reason = why_unsuitable(plan, machine, digests)
        if reason:
            skipped.append(reason)
        else:
            fitting.append(plan)

    def distance(plan: Plan) -> tuple[bool, int, str]:
        return plan.tensorrt != machine.tensorrt, HARDWARE.index(plan.hardware), plan.member

    return Choice(min(fitting, key=distance, default=None), tuple(skipped))


def why_no_plan(choice: Choice, machine: Machine, precision: Precision) -> str | None:
    """The sentence for a machine that no plan of the engine serves; None when one does."""
    if choice.plan is not None:
        return None
    found = "; ".join(choice.skipped) or f"the engine holds no {precision} plan"
    return f"tensorrt: {found}; run `fastad build` on this machine ({machine.gpu})"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])
