"""The design's import directions, walked in the source and checked in fresh processes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from textures import Textures

import fastad

ROOT = Path(__file__).resolve().parent.parent

# What each part may import of fastad, by prefix; the longest prefix of a module's name decides.
BASE = {"fastad.errors", "fastad.atomic", "fastad.spec", "fastad._native"}
RUNTIME = BASE | {
    "fastad.calibration",
    "fastad.engine",
    "fastad.metrics",
    "fastad.postprocess",
    "fastad.prediction",
    "fastad.predictor",
    "fastad.preprocess",
    "fastad.images",
    "fastad.levels",
    "fastad.feed",
    "fastad.forked",
    "fastad.inspected",
    "fastad.look",
    "fastad.request",
    "fastad.pending",
    "fastad.tiling",
}
ANYTHING = {"fastad"}
MAY_IMPORT: dict[str, set[str]] = {
    "fastad.errors": set(),
    "fastad.atomic": {"fastad.errors"},
    "fastad.spec": {"fastad.errors"},
    "fastad._native": {"fastad.errors"},
    "fastad.calibration": BASE,
    "fastad.metrics": BASE,
    "fastad.levels": {"fastad.errors"},
    "fastad.images": {"fastad.errors", "fastad.levels"},
    "fastad.preprocess": BASE | {"fastad.images", "fastad.levels"},
    "fastad.postprocess": BASE,
    "fastad.inspected": BASE | {"fastad.images", "fastad.preprocess"},
    "fastad.tiling": BASE | {"fastad.inspected", "fastad.preprocess"},
    "fastad.forked": BASE | {"fastad.engine.base"},
    "fastad.pending": {"fastad.errors"},
    "fastad.feed": BASE | {"fastad.engine.base", "fastad.preprocess"},
    "fastad.look": RUNTIME,
    "fastad.request": BASE
    | {"fastad.calibration", "fastad.inspected", "fastad.levels"}
    | {"fastad.look", "fastad.preprocess"},
    "fastad.prediction": BASE | {"fastad.postprocess", "fastad.preprocess"},
    "fastad.engine": BASE | {"fastad.engine"},
    "fastad.engine.opening": BASE | {"fastad.engine"},
    "fastad.engine.pytorch": BASE | {"fastad.engine", "fastad.models", "fastad.ops"},
    "fastad.engine.pytorch_graph": BASE | {"fastad.models"},
    "fastad.predictor": RUNTIME | {"fastad.camera"},
    "fastad.sinks": RUNTIME,
    "fastad.doctor": BASE | {"fastad.engine"},
    "fastad.camera": RUNTIME | {"fastad.camera", "fastad.sinks"},
    "fastad.serve": RUNTIME | {"fastad.serve"},
    "fastad.rejudge": RUNTIME | {"fastad.training.folder"},
    "fastad.evaluation": RUNTIME
    | {"fastad.rejudge", "fastad.training.folder", "fastad.training.checkpoint"},
    "fastad.report": RUNTIME | {"fastad.evaluation", "fastad.training.folder"},
    "fastad.protocol_table": BASE | {"fastad.evaluation", "fastad.training.protocols"},
    "fastad.ops": {"fastad.ops", "fastad.errors"},
    "fastad.models": BASE | {"fastad.models", "fastad.ops"},
    "fastad.training": BASE
    | {"fastad.training", "fastad.models"}
    | {"fastad.images", "fastad.levels", "fastad.preprocess"},
    "fastad.export": RUNTIME | {"fastad.export", "fastad.models", "fastad.ops", "fastad.training"},
    "fastad.demo": ANYTHING,
    "fastad.cli": ANYTHING,
    "fastad.__main__": {"fastad.cli"},
    "fastad.console": {
        "fastad.engine",
        "fastad.atomic",
        "fastad.doctor",
        "fastad.evaluation",
        "fastad.spec",
    },
}
# What pulls torch in; the runtime's choice may import the bridge when a GPU is asked for.
TORCH_SIDE = {
    *("fastad.engine.pytorch", "fastad.engine.pytorch_graph"),
    *("fastad.engine.cuda_graph", "fastad.engine.device_frames"),
}
MAY_NOT_IMPORT = {"fastad.engine": TORCH_SIDE}

# An optional package is imported in files whose name says so.
NAMED_FOR = {
    "av": ("source", "loopback"),
    "cv2": ("cv2", "opencv"),
    "onnx": ("onnx", "quantize"),
    "onnxruntime": ("onnxruntime", "quantize"),
    "onnxscript": ("onnx",),
    "openvino": ("openvino",),
    "skimage": ("demo_data",),
    "tensorrt": ("tensorrt",),
    "triton": ("triton", "tensorrt", "aot"),
}
TRAINING_ONLY = {
    *("torch", "torchvision", "lightning", "timm", "safetensors", "yaml"),
    *("onnx", "onnxscript", "onnxruntime", "skimage", "triton", "tensorrt", "cv2", "av"),
}
# What `pip install fastad` without extras has to import.
INSTALLED_ALONE = (
    *("fastad", "fastad.cli", "fastad.doctor", "fastad.evaluation", "fastad.predictor"),
    *(
        "fastad.camera.stream",
        "fastad.report",
        "fastad.sinks",
        "fastad.engine.parity",
        "fastad.training.folder",
    ),
)


def sources() -> dict[str, Path]:
    """Module name to file, as installed: export/ is fastad.export."""
    found = {}
    for folder, prefix in ((ROOT / "fastad", "fastad"), (ROOT / "export", "fastad.export")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """(imported name, whether importing the module imports it too) of every import statement."""
    found: list[tuple[str, bool]] = []
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, eager: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.append((deeper if deeper in SOURCES else base, eager))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, eager and not inside and not for_types)

    visit(ast.parse(SOURCES[module].read_text(encoding="utf-8")), True)
    return tuple(found)


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def part_of(module: str) -> str:
    """The entry of MAY_IMPORT that rules a module."""
    fitting = [prefix for prefix in MAY_IMPORT if is_below(module, prefix)]
    assert fitting, f"{module}: give it a place in MAY_IMPORT and in the design"
    return max(fitting, key=len)


def test_walks_the_whole_tree() -> None:
    assert {"fastad.predictor", "fastad.export.to_onnx", "fastad.models.grad"} <= set(SOURCES)
    assert ("fastad.export.to_onnx", True) in imports("fastad.export.engine")
    assert ("fastad.export", False) in imports("fastad.cli.engines")
    assert ("torch", True) in imports("fastad.models.grad")


@pytest.mark.parametrize("module", [name for name in SOURCES if name != "fastad"])
def test_imports_go_one_way(module: str) -> None:
    part = part_of(module)
    allowed, refused = MAY_IMPORT[part], MAY_NOT_IMPORT.get(part, set())
    wrong = [
        name
        for name, _ in imports(module)
        if is_below(name, "fastad")
        and (
            not any(is_below(name, prefix) for prefix in allowed)
            or any(is_below(name, prefix) for prefix in refused)
        )
    ]
    assert wrong == []


def test_only_the_command_line_and_the_demo_export() -> None:
    importers = {
        module
        for module in SOURCES
        if not is_below(module, "fastad.export")
        and any(is_below(name, "fastad.export") for name, _ in imports(module))
    }
    assert importers == {"fastad.cli.engines", "fastad.demo"}


def test_one_bridge_leads_from_engines_to_models() -> None:
    bridges = {
        module
        for module in SOURCES
        if is_below(module, "fastad.engine")
        and any(is_below(name, "fastad.models") or name == "torch" for name, _ in imports(module))
    }
    assert bridges == TORCH_SIDE


@pytest.mark.parametrize("package", NAMED_FOR)
def test_optional_packages_are_imported_where_the_name_says_so(package: str) -> None:
    wrong = [
        module
        for module, path in SOURCES.items()
        if any(is_below(name, package) for name, _ in imports(module))
        and not any(word in path.stem for word in NAMED_FOR[package])
    ]
    assert wrong == []


def reached(root: str) -> Iterator[str]:
    """Modules that importing ``root`` imports, packages above them included."""
    seen, waiting = set(), [root]
    while waiting:
        module = waiting.pop()
        if module in seen or module not in SOURCES:
            continue
        seen.add(module)
        yield module
        parents = module.split(".")
        waiting += [".".join(parents[:i]) for i in range(1, len(parents))]
        waiting += [name for name, eager in imports(module) if eager]


@pytest.mark.parametrize("root", INSTALLED_ALONE)
def test_the_base_installation_needs_no_extra(root: str) -> None:
    wrong = [
        (module, name)
        for module in reached(root)
        for name, eager in imports(module)
        if eager and name.partition(".")[0] in TRAINING_ONLY
    ]
    assert wrong == []


def loaded_after(script: str, *arguments: object) -> set[str]:
    """Top-level packages in a fresh process after ``script``."""
    script += (
        "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_fastad_is_light() -> None:
    loaded = loaded_after("import fastad")
    assert "fastad" in loaded
    assert not loaded & {"numpy", "openvino", "pydantic", "PIL", "rich", "typer", *TRAINING_ONLY}


def test_the_command_line_starts_without_runtimes() -> None:
    assert not loaded_after("import fastad.cli") & {"numpy", "openvino", "PIL", *TRAINING_ONLY}


def test_running_an_engine_imports_no_other_framework(
    texture_engine: Path, textures: Textures
) -> None:
    script = (
        "import sys, fastad\n"
        "with fastad.load(sys.argv[1], threads=1) as predictor:\n"
        "    found = predictor.predict(sys.argv[2])\n"
        "    found.plot(), found.to_json(), found.regions\n"
    )
    loaded = loaded_after(script, texture_engine, textures.images()[0])
    assert {"fastad", "openvino", "PIL"} <= loaded
    assert not loaded & TRAINING_ONLY


def test_public_names_resolve() -> None:
    assert {"load", "train", "evaluate", "Predictor", "Prediction"} <= set(fastad.__all__)
    assert all(hasattr(fastad, name) for name in fastad.__all__)
    assert set(fastad.__all__) <= set(dir(fastad))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = fastad.lode
