"""The command line: `fastad` and `python -m fastad`. Results on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fastad.console import (
    Bars,
    calibration_table,
    diagnosis_tables,
    fastest_precisions,
    manifest_tables,
    messages,
    parity_table,
    plain,
    precision_parts,
    print_result,
    scores_table,
)
from fastad.errors import FastadError, FastadWarning, InputError

app = typer.Typer(
    help="From a folder of normal images to a fast, verified anomaly-detection engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXTRAS = dict.fromkeys(("torch", "lightning", "timm", "yaml", "safetensors"), "train") | {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "tensorrt": "tensorrt",
}
PARTLY_FAILED = 3  # exit code: results were written, some images could not be read

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Runtime = Annotated[
    str, typer.Option(help="auto, openvino, onnxruntime; on GPUs tensorrt, pytorch, onnxruntime.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, int8 or fp16.")]
Threads = Annotated[int | None, typer.Option(help="Cores to use; all by default.")]
Mode = Annotated[
    str, typer.Option(help="latency: all cores on one image; throughput: an image on each core.")
]
Categories = Annotated[list[str] | None, typer.Option("--category", help="Only these; repeat.")]
ValueRange = Annotated[
    tuple[float, float] | None, typer.Option(help="Black and white of images above 8 bits.")
]
Tile = Annotated[
    str | None, typer.Option(help="Tiles of the image, in pixels: 512, or 384x512 for H x W.")
]
Rate = Annotated[float, typer.Option(help="Accepted share of normal images called anomalous.")]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="MVTec-style root, or a folder of normal images.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    recipe: Annotated[
        str | None, typer.Option(help="Shipped recipe or YAML file; grad.paper by default.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Backbone weights: imagenet (downloads), a file, or random.")
    ] = "imagenet",
    category: Categories = None,
    value_range: ValueRange = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as train.epochs=5; repeat.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill.")] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes, one GPU each; torchrun brings its own.")
    ] = 1,
    json_: Json = False,
) -> None:
    """Train on normal images. Example: fastad train data/ --out runs/a --recipe crad-s.paper."""
    from fastad.training.fit import train as run_training
    from fastad.training.processes import is_first

    with Bars() as bars:
        checkpoint = run_training(
            data,
            out,
            recipe,
            weights=weights,
            categories=category,
            value_range=value_range,
            overrides=set_ or (),
            resume=resume,
            devices=devices,
            report=bars,
        )
    if not is_first():
        return
    record = checkpoint.record
    result = {
        "run": str(out),
        "method": record.spec.method,
        "categories": list(record.spec.categories),
        "trained_on": len(record.fit),
        "held_out": len(record.holdout),
        "final_loss": float(record.provenance["final_loss"]),
    }
    print_result(result, json_)


@app.command("import-checkpoint")
def import_checkpoint(
    origin: Annotated[str, typer.Argument(help="uniad, grad, crad or rd4ad.")],
    file: Annotated[Path, typer.Argument(help="The authors' file.")],
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    teacher: Annotated[
        Path | None, typer.Option(help="Encoder weights for rd4ad; downloaded by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Convert an authors' file. Example: fastad import-checkpoint grad a.pth.tar --out runs/a."""
    from fastad.training.import_checkpoint.run import import_checkpoint as run_import

    checkpoint = run_import(origin, file, out, teacher=teacher)
    spec = checkpoint.record.spec
    print_result({"run": str(out), "method": spec.method, "size": list(spec.input.size)}, json_)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Run folder or engine file.")],
    data: Annotated[
        Path | None, typer.Option(help="Normal images; held-out ones of the run by default.")
    ] = None,
    false_alarm_rate: Rate = 0.01,
    json_: Json = False,
) -> None:
    """Set thresholds from normal images. Example: fastad calibrate runs/a."""
    from fastad.evaluation import calibrate_model

    with Bars() as bars:
        fitted = calibrate_model(model, data=data, false_alarm_rate=false_alarm_rate, progress=bars)
    from fastad.spec import to_json

    print_result(json.loads(to_json(fitted)), json_, calibration_table(fitted))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="The .engine file to write.")],
    images: Annotated[
        list[str] | None, typer.Option(help="Images or folders for parity and gate; repeat.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto (fp32, bf16, int8), or a list such as fp32,int8.")
    ] = "auto",
    test_data: Annotated[
        Path | None, typer.Option(help="Labelled images: the gate then compares AUROC and AUPRO.")
    ] = None,
    mask_folder: Annotated[str, typer.Option(help="Folder of masks.")] = "ground_truth",
    weights: Annotated[
        bool, typer.Option("--weights", help="Store weights too, for PyTorch on a GPU.")
    ] = False,
    format_: Annotated[
        str, typer.Option("--format", help="engine; or plain files: onnx, openvino, plan.")
    ] = "engine",
    json_: Json = False,
) -> None:
    """Write the engine file, checked. Example: fastad export runs/a --out a.engine."""
    from fastad.engine.container import read_engine
    from fastad.export import export_engine, export_plain
    from fastad.preprocess import expand

    if format_ != "engine":
        if images or test_data or weights or precision != "auto":
            raise InputError(
                f"--format {format_}: writes the float32 graph; --images, --precision, --test-data "
                "and --weights belong to --format engine"
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


@app.command()
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


@app.command()
def predict(
    engine: Annotated[Path, typer.Argument(help="Engine file.")],
    sources: Annotated[list[str], typer.Argument(help="Images, folders or globs.")],
    threshold: Annotated[float | None, typer.Option(help="In units of the raw score.")] = None,
    category: Annotated[str | None, typer.Option(help="Product class.")] = None,
    value_range: ValueRange = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines file; stdout by default.")] = None,
    overlays: Annotated[Path | None, typer.Option(help="Folder for heat map images.")] = None,
    maps: Annotated[Path | None, typer.Option(help="Folder for float32 maps (.npy).")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder for masks (.png).")] = None,
    tile: Tile = None,
    overlap: Annotated[float, typer.Option(help="Least share of a tile seen by the next.")] = 0.25,
    region: Annotated[
        Path | None, typer.Option(help="Mask image: only what is not black counts.")
    ] = None,
    ignore: Annotated[
        Path | None, typer.Option(help="Mask image: what is not black does not count.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Videos, camera numbers, rtsp:// addresses.")
    ] = False,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    mode: Mode = "latency",
    json_: Annotated[
        bool, typer.Option("--json", help="As elsewhere; predict prints JSON lines anyway.")
    ] = False,
) -> None:
    """One JSON line per image. Example: fastad predict a.engine images/ --overlays out/."""
    from fastad.predictor import load
    from fastad.preprocess import Source, expand
    from fastad.sinks import ImageFolders, LineFile

    area: dict[str, Any] = {"tile": _tile(tile), "overlap": overlap}
    area |= {"region": region, "ignore": ignore}
    chosen = {"device": device, "runtime": runtime, "precision": precision, "mode": mode}
    if stream:
        if overlays or maps or masks or out:
            raise InputError(
                "--stream: writes JSON lines to stdout; leave out --out, --overlays, --maps and "
                "--masks"
            )
        with load(engine, **chosen, threads=threads) as predictor, LineFile(None) as lines:
            source = sources if len(sources) > 1 else sources[0]
            options = {"threshold": threshold, "category": category, "value_range": value_range}
            for each in predictor.stream(source, events=True, **options, **area):
                lines.write(json.dumps(each.to_dict()))
        return
    paths = expand(sources)
    folders = ImageFolders(paths, overlays=overlays, maps=maps, masks=masks)
    unreadable: list[str] = []

    def note(source: Source, error: FastadError) -> None:
        unreadable.append(str(error))

    with (
        load(engine, **chosen, threads=threads) as predictor,
        LineFile(out) as lines,
        Bars() as bars,
    ):
        if masks and predictor.manifest.calibration is None:
            raise InputError("--masks: the engine is not calibrated; run `fastad calibrate` first")
        results = predictor.iterate(
            paths,
            threshold=threshold,
            category=category,
            value_range=value_range,
            **area,
            on_unreadable=note,
        )
        for done, prediction in enumerate(results, 1):
            lines.write(json.dumps(prediction.to_dict() | folders.write(prediction)))
            bars("predict", done + len(unreadable), len(paths))
    if unreadable:
        messages.print(f"{len(unreadable)} of {len(paths)} images could not be read:", style="red")
        for line in unreadable:
            messages.print(f"  {line}", markup=False, soft_wrap=True)
        raise typer.Exit(PARTLY_FAILED)


def _tile(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``384x512`` as (H, W)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--tile: expected pixels such as 512, or 384x512 for H x W, got {text}")
    return int(sides[0]), int(sides[-1])


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Engine file or run folder.")],
    data: Annotated[Path, typer.Argument(help="MVTec-style root or category.")],
    category: Categories = None,
    resolution: Annotated[str, typer.Option(help="Pixel metrics at model or original size.")] = (
        "model"
    ),
    mask_folder: Annotated[str, typer.Option(help="Folder of masks.")] = "ground_truth",
    report: Annotated[Path | None, typer.Option(help="HTML report to write.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Check data and print the papers' table: mvtec, visa, ...")
    ] = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Image and pixel metrics on labelled test images. Example: fastad evaluate a.engine data/."""
    from fastad.evaluation import evaluate as run_evaluation
    from fastad.evaluation import read_manifest
    from fastad.report import Example, example_of, write_report

    if resolution not in ("model", "original"):
        raise InputError(f"resolution: expected model or original, got {resolution!r}")
    if protocol:
        from fastad.protocol_table import protocol_results, protocol_table
        from fastad.training.protocols import load_protocol

        # Of a prepared folder --category picks the split, and the root is that split's.
        data = load_protocol(protocol, data, category).root
    examples: list[Example] = []
    with Bars() as bars:
        result = run_evaluation(
            model,
            data,
            categories=category,
            resolution=resolution,  # type: ignore[arg-type]  # checked above
            mask_folder=mask_folder,
            device=device,
            runtime=runtime,
            precision=precision,
            threads=threads,
            progress=bars,
            on_prediction=(lambda s, p: examples.append(example_of(s, p))) if report else None,
        )
    if report:
        write_report(report, result, read_manifest(model), examples)
    document, tables = result.to_dict(), [scores_table(result)]
    if protocol:
        table = {Path(model).stem: result}
        document["protocol"] = protocol_results(protocol, table)
        tables.append(protocol_table(protocol, table))
    print_result(document, json_, *tables)
    for line in result.unreadable:
        messages.print(line, markup=False, style="red", soft_wrap=True)
    if result.unreadable:
        raise typer.Exit(PARTLY_FAILED)


@app.command()
def prepare(
    protocol: Annotated[str, typer.Argument(help="cifar10-unified, mnist-oneclass, ...")],
    root: Annotated[Path, typer.Argument(help="Folder of the original files.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    split: Annotated[list[str] | None, typer.Option(help="Only these; repeat.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels; the protocol's by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Class data sets as folders. Example: fastad prepare cifar10-unified data/ --out cifar/."""
    from fastad.training.materialise import materialise
    from fastad.training.protocols import read_record

    with Bars() as bars:
        path = materialise(protocol, root, out, splits=split, size_px=size, progress=bars)
    splits = list(read_record(path)["splits"])
    print_result({"out": str(path), "protocol": protocol, "splits": splits}, json_)


@app.command()
def table(
    protocol: Annotated[str, typer.Argument(help="mvtec, visa, btad, cifar10-unified, ...")],
    results: Annotated[list[Path], typer.Argument(help="Files of `fastad evaluate --json`.")],
    label: Annotated[str, typer.Option(help="Heading, such as the method.")] = "fastad",
    json_: Json = False,
) -> None:
    """One table from one model per category. Example: fastad table cifar10-unified *.json."""
    from fastad.protocol_table import protocol_results, protocol_table, read_evaluation

    evaluations = {label: [read_evaluation(path) for path in results]}
    print_result(
        protocol_results(protocol, evaluations), json_, protocol_table(protocol, evaluations)
    )


@app.command()
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


@app.command()
def info(engine: Annotated[Path, typer.Argument(help="Engine file.")], json_: Json = False) -> None:
    """What is inside an engine file. Example: fastad info a.engine."""
    from fastad.engine.container import read_engine
    from fastad.spec import to_json

    with read_engine(engine) as file:
        manifest = file.manifest
    print_result(json.loads(to_json(manifest)), json_, *manifest_tables(manifest, engine))


@app.command()
def doctor(json_: Json = False) -> None:
    """What this machine can run, and why not the rest. Example: fastad doctor --json."""
    from fastad.doctor import diagnose

    found = diagnose()
    print_result(found.to_dict(), json_, *diagnosis_tables(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to fill.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of data and training.")] = 0,
) -> None:
    """The whole road on photographs; last line is JSON. Example: fastad demo --out demo."""
    from fastad.demo import run_demo

    with Bars() as bars:
        result, table = run_demo(out, seed, bars)
    messages.print(scores_table(table))
    messages.print(f"report: {out / 'report.html'}", markup=False)
    print(json.dumps(result))


def main() -> None:
    """Run the command line; fastad's errors become one line on stderr and exit code 1."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", FastadWarning)
    warnings.showwarning = lambda message, *_args, **_kw: messages.print(
        f"warning: {message}", style="yellow", markup=False
    )
    try:
        app()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        messages.print(
            f"error: {error.name} is not installed; pip install 'fastad[{extra}]'",
            style="red",
            markup=False,
        )
        sys.exit(1)
    except FastadError as error:
        messages.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        _flush_or_drop()
        sys.exit(1)


def _flush_or_drop() -> None:
    """Leave nothing in stdout that the interpreter would fail to write, with a trace, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
