"""Both plugins, from registration to launch, with NVIDIA's bindings and without a GPU.

What the bindings hand to TensorRT is compared with the reference: the kernel is interpreted with
that grid and those scalars. What stays unproven is that TensorRT launches them as documented.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
CAPABILITIES = (80, 90)
EMPTY_LIBRARY = """
void *createInferBuilder_INTERNAL(void) {return 0;} void *createInferRefitter_INTERNAL(void)
{return 0;} void *createInferRuntime_INTERNAL(void) {return 0;}
void *createNvOnnxParserRefitter_INTERNAL(void) {return 0;} void *createNvOnnxParser_INTERNAL(void)
{return 0;} int getNvOnnxParserVersion(void) {return 0;}
void *getBuilderPluginRegistry(void) {return 0;} void *getPluginRegistry(void) {return 0;}
int initLibNvInferPlugins(void) {return 1;}
"""
B = 2


def _attention(name: str, dtype: str, positions: int, grid: tuple[int, int], D: int) -> Any:
    heads, N = 2, grid[0] * grid[1]
    token, position = ["B", heads, N, D], [heads, N, D]
    shapes = [token] * 3 + [position if positions & bit else token for bit in (1, 2)]
    attributes = {"grid_width": grid[1], "window_height": 3, "window_width": 5}
    attributes |= {"scale": D**-0.5, "positions": positions}
    return name, "neighbor_attention", [dtype] * 5, shapes, attributes


def _interpolate(name: str, dtypes: list[str], table: list[Any], coords: list[Any]) -> Any:
    return name, "grid_interpolate", dtypes, [table, coords], {"per_image": int(table[0] == "B")}


CASES = [
    _attention("attention fp32", "fp32", 0, (5, 6), 32),
    _attention("attention fp32, both positions", "fp32", 3, (5, 6), 32),
    _attention("attention fp16, key position", "fp16", 2, (3, 5), 20),
    _attention("attention bf16, query position", "bf16", 1, (4, 4), 64),
    _interpolate("2-D fp32", ["fp32", "fp32"], [4, 6, 40], ["B", 3, 5, 2]),
    _interpolate("one point an image", ["fp32", "fp32"], [4, 4, 700], ["B", 2]),
    _interpolate("3-D fp16, wide positions", ["fp16", "fp32"], [3, 4, 2, 33], ["B", 11, 3]),
    _interpolate("4-D bf16", ["bf16", "bf16"], [2, 3, 2, 3, 16], [9, 4]),
    _interpolate("table per image fp16", ["fp16", "fp16"], ["B", 4, 3, 24], ["B", 11, 2]),
]


@pytest.fixture(scope="session")
def driven(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What the bindings got of every case and capability."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    compiler = shutil.which("cc")
    if spec is None or spec.origin is None or compiler is None or sys.platform != "linux":
        pytest.skip("needs the tensorrt bindings (pip install tensorrt-cu13-bindings) and cc")
    package = Path(spec.origin).parent
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "tensorrt").symlink_to(package)
    needed = re.findall(rb"libnv\w+\.so\.\d+", (package / "tensorrt.so").read_bytes())
    (folder / "empty.c").write_text(EMPTY_LIBRARY)
    for name in {name.decode() for name in needed}:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name]
        subprocess.run([*command, folder / "empty.c"], check=True)
    cases = [
        {"op": op, "dtypes": dtypes, "shapes": shapes, "B": B}
        | {"attributes": attributes | {"capability": capability}}
        for _, op, dtypes, shapes, attributes in CASES
        for capability in CAPABILITIES
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, HERE / "plugin_drive.py"],
        input=json.dumps(cases),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    print(f"bindings {answer['tensorrt']}")
    keys = [(case[0], capability) for case in CASES for capability in CAPABILITIES]
    return dict(zip(keys, answer["found"], strict=True))


def _params(ptx: str) -> str:
    """``p`` for a pointer, ``s`` for an int32, in the order of the entry."""
    entry = ptx.partition(".entry")[2].partition(")")[0]
    kinds = {"u64": "p", "u32": "s", "b64": "p", "b32": "s"}
    return "".join(kinds[kind] for kind in re.findall(r"\.param \.(\w+)", entry))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_tactic_launches_inputs_scalars_output(
    driven: dict[tuple[str, int], Any], case: Any, capability: int
) -> None:
    name, op, _, shapes, _ = case
    found = driven[name, capability]
    assert len(found) >= 2
    for launch in found:
        inputs = 5 if op == "neighbor_attention" else 2
        assert _params(launch["ptx"]) == "p" * inputs + "s" * len(launch["scalars"]) + "p"
        assert f".entry {launch['name']}(" in launch["ptx"]
        assert f".target sm_{'90a' if capability == 90 else '80'}" in launch["ptx"]
        assert ".version 8.0" in launch["ptx"]
        assert launch["shared_bytes"] <= 48 * 1024
        assert launch["block"][0] in (64, 128) and launch["block"][1:] == [1, 1]
        sizes = [[B if s == "B" else s for s in shape] for shape in shapes]
        expected = sizes[0] if op == "neighbor_attention" else [*sizes[1][:-1], sizes[0][-1]]
        assert launch["out_shape"] == expected
    assert len({launch["ptx"] for launch in found}) == len(found)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_ptx_assembles_for_its_own_and_newer_chips(
    driven: dict[tuple[str, int], Any], case: Any, capability: int, tmp_path: Path
) -> None:
    from triton import knobs

    chips = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120") if capability == 80 else ("sm_90a",)
    assembler = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas).path
    for i, launch in enumerate(driven[case[0], capability]):
        source = tmp_path / f"{i}.ptx"
        source.write_text(launch["ptx"])
        chip = chips[i % len(chips)]
        done = subprocess.run(
            [assembler, "-v", f"-arch={chip}", source, "-o", f"{source}.cubin"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{chip}: {done.stderr}"


INTERPRET = """
import json, sys, torch
from fastad.ops.{op} import triton_impl, reference
case, launches = json.load(sys.stdin)
kinds = dict(fp32=torch.float32, fp16=torch.float16)
random = torch.Generator().manual_seed(0)
def tensor(dtype, shape, spread):
    shape = [case["B"] if s == "B" else s for s in shape]
    t = torch.randn(shape, generator=random) if spread else torch.rand(shape, generator=random)
    return (t if spread else t * 2.6 - 1.3).to(kinds[dtype])
attention = "{op}" == "neighbor_attention"
inputs = [tensor(d, s, attention or i == 0)
          for i, (d, s) in enumerate(zip(case["dtypes"], case["shapes"]))]
settings = case["attributes"]
wide = [t.double() for t in inputs]
if attention:
    W = settings["grid_width"]
    grid = (inputs[0].shape[2] // W, W)
    window = (settings["window_height"], settings["window_width"])
    places = [wide[3 + i] if settings["positions"] & (1 << i) else None for i in (0, 1)]
    expected = reference.neighbor_attention(*wide[:3], grid, window, *places)
else:
    expected = reference.grid_interpolate(*wide, bool(settings["per_image"]))
for launch in launches:
    out = torch.full(launch["out_shape"], float("nan"), dtype=inputs[0].dtype)
    kernel = getattr(triton_impl, launch["kernel"])
    scalars = iter(launch["scalars"])
    pointers = iter([*inputs, out])
    arguments = {{n: launch["constants"][n] if n in launch["constants"]
                 else next(pointers) if n.endswith("_ptr") else next(scalars)
                 for n in kernel.arg_names}}
    assert next(scalars, None) is None and next(pointers, None) is None
    kernel[tuple(launch["grid"])](**arguments)
    print(json.dumps(float((out.double() - expected).abs().nan_to_num(1e9).max())))
"""


@pytest.mark.parametrize(
    "case", [case for case in CASES if "bf16" not in case[2]], ids=lambda case: case[0]
)
def test_kernels_with_that_grid_and_those_scalars_meet_the_reference(
    driven: dict[tuple[str, int], Any], case: Any
) -> None:
    name, op, dtypes, shapes, attributes = case
    document = {"B": B, "dtypes": dtypes, "shapes": shapes, "attributes": attributes}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRET.format(op=op)],
        input=json.dumps([document, driven[name, 80]]),
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # as the operators' own tests: 4e-6 and 1e-5, and 2 ulp of the results' size in float16
    limit = {"fp32": 1e-5, "fp16": 4e-3}[dtypes[0]]
    differences = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"{name}: {differences}")
    assert len(differences) == len(driven[name, 80])
    assert max(differences) <= limit
