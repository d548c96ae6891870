"""Commands about engine files: write, build for a GPU, verify, look inside; and the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastad.cli.options import Json
from fastad.console import (
    Bars,
    diagnosis_tables,
    fastest_precisions,
    manifest_tables,
    messages,
    parity_table,
    plain,
    precision_parts,
    print_result,
)
from fastad.errors import InputError


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="The .engine file to write.")],
    images: Annotated[
        list[str] | None, typer.Option(help="Images or folders for parity and gate; repeat.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto (fp32, bf16, int8, int8-bf16), or a list such as fp32,int8.")
    ] = "auto",
    test_data: Annotated[
        Path | None, typer.Option(help="Labelled images: the gate then compares AUROC and AUPRO.")
    ] = None,
    mask_folder: Annotated[str, typer.Option(help="Folder of masks.")] = "ground_truth",
    weights: Annotated[
        bool, typer.Option("--weights", help="Store weights too, for PyTorch on a GPU.")
    ] = False,
    int8_weight_bits: Annotated[
        int | None,
        typer.Option(help="8, or 7 for the same sums on every CPU. Default: what this CPU sums."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="engine; or plain files: onnx, openvino, plan.")
    ] = "engine",
    json_: Json = False,
) -> None:
    """Write the engine file, checked. Example: fastad export runs/a --out a.engine."""
    from fastad.engine.container import read_engine
    from fastad.export import export_engine, export_plain
    from fastad.images import expand

    if format_ != "engine":
        if images or test_data or weights or int8_weight_bits or precision != "auto":
            raise InputError(
                f"--format {format_}: writes the float32 graph; --images, --precision, "
                "--test-data, --int8-weight-bits and --weights belong to --format engine"
            )
        with Bars() as bars:
            plain_file = export_plain(run, out, format_, report=bars)
        print_result({"file": str(plain_file), "sidecar": f"{plain_file}.json"}, json_)
        return
    with Bars() as bars:
        chosen = expand(images) if images else None
        path = export_engine(
            run,
            out,
            images=chosen,
            precision=precision,
            test_data=test_data,
            mask_folder=mask_folder,
            weights=weights,
            weight_bits=int8_weight_bits,
            report=bars,
        )
    with read_engine(path) as engine:
        variants = engine.manifest.variants
    reports = [report for variant in variants for report in variant.parity]
    result = {
        "engine": str(path),
        "bytes": path.stat().st_size,
        "parity": plain(reports),
        "gate": plain([report for variant in variants for report in variant.gate]),
        "auto": fastest_precisions(variants),
    }
    print_result(result, json_, parity_table(reports, str(path)), *precision_parts(variants))


def build(
    engine: Annotated[Path, typer.Argument(help="Engine file; gains the plans.")],
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8, a list of them, or auto for all in the file.")
    ] = "fp32",
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of one run.")] = 8,
    plugins: Annotated[
        bool, typer.Option(help="Own kernels for fastad's operators, or TensorRT's layers.")
    ] = True,
    hardware: Annotated[
        str, typer.Option(help="exact GPU, same-capability, or ampere-plus.")
    ] = "exact",
    version_compatible: Annotated[
        bool, typer.Option(help="Loadable by newer TensorRT of this major version.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    json_: Json = False,
) -> None:
    """TensorRT plans for this machine's GPU. Example: fastad build a.engine --precision fp16."""
    from fastad.export.to_tensorrt import BuildSettings, build_plans
    from fastad.spec import to_json

    settings = BuildSettings(max_batch, hardware, version_compatible)
    with Bars() as bars:
        built = build_plans(
            engine,
            precision=precision,
            device=device,
            plugins=plugins,
            settings=settings,
            report=bars,
        )
    reports = [plan.parity for plan in built if plan.parity]
    result = {"engine": str(engine), "plans": [json.loads(to_json(plan)) for plan in built]}
    print_result(result, json_, parity_table(reports, str(engine)))


def verify(
    engine: Annotated[Path, typer.Argument(help="Engine file.")], json_: Json = False
) -> None:
    """Rerun the golden images on this machine. Example: fastad verify a.engine."""
    from fastad.engine.parity import verify as run_verify

    reports, absent = run_verify(engine)
    result = {"engine": str(engine), "verified": True, "parity": plain(reports), "absent": absent}
    print_result(
        result, json_, parity_table(reports, f"{engine}: every hash and golden image agrees")
    )
    for reason in absent:
        messages.print(reason, style="yellow", markup=False, soft_wrap=True)


def info(engine: Annotated[Path, typer.Argument(help="Engine file.")], json_: Json = False) -> None:
    """What is inside an engine file. Example: fastad info a.engine."""
    from fastad.engine.container import read_engine
    from fastad.spec import to_json

    with read_engine(engine) as file:
        manifest = file.manifest
    print_result(json.loads(to_json(manifest)), json_, *manifest_tables(manifest, engine))


def doctor(json_: Json = False) -> None:
    """What this machine can run, and why not the rest. Example: fastad doctor --json."""
    from fastad.doctor import diagnose

    found = diagnose()
    print_result(found.to_dict(), json_, *diagnosis_tables(found))
