"""Commands that run a model on images: results, thresholds, metrics, and tables of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastad.cli.options import (
    PARTLY_FAILED,
    Categories,
    Device,
    Ignore,
    Json,
    Mode,
    Overlap,
    Precision,
    Rate,
    Region,
    Runtime,
    Threads,
    Tile,
    ValueRange,
)
from fastad.console import Bars, messages, print_result, scores_table
from fastad.errors import FastadError, InputError


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
    overlap: Overlap = 0.25,
    region: Region = None,
    ignore: Ignore = None,
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
    from fastad.images import expand
    from fastad.predictor import load
    from fastad.preprocess import Source
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
            whole = True
            for each in predictor.stream(source, events=True, **options, **area):
                found = each.to_dict()
                lines.write(json.dumps(found))
                whole = whole and found.get("event") != "unreadable"
        if not whole:
            raise typer.Exit(PARTLY_FAILED)
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


def threshold(
    engine: Annotated[Path, typer.Argument(help="Engine file; it is not changed.")],
    normal: Annotated[
        list[str], typer.Argument(help="Normal images that training never saw: folders, globs.")
    ],
    false_alarm_rate: Rate = 0.01,
    value_range: ValueRange = None,
    tile: Tile = None,
    overlap: Overlap = 0.25,
    region: Region = None,
    ignore: Ignore = None,
    device: Device = "auto",
    runtime: Runtime = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """The --threshold for predict with tiles or a region, from normal images.

    Example: fastad threshold a.engine normal/ --tile 512.
    """
    from fastad.images import expand
    from fastad.predictor import load

    paths = expand(normal)
    chosen = {"device": device, "runtime": runtime, "precision": precision}
    with load(engine, **chosen, threads=threads) as predictor, Bars() as bars:
        found = predictor.find_threshold(
            paths,
            false_alarm_rate=false_alarm_rate,
            progress=lambda done, total: bars("threshold", done, total),
            value_range=value_range,
            tile=_tile(tile),
            overlap=overlap,
            region=region,
            ignore=ignore,
        )
    about = {"threshold": found.value, "median": found.median, "count": found.count}
    print_result(about | {"false_alarm_rate": false_alarm_rate}, json_)


def _tile(text: str | None) -> tuple[int, int] | None:
    """``512`` or ``384x512`` as (H, W)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise InputError(f"--tile: expected pixels such as 512, or 384x512 for H x W, got {text}")
    return int(sides[0]), int(sides[-1])


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
