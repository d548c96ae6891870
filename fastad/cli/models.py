"""Commands that make a run folder: data, training, thresholds; and the demo of the whole road."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastad.cli.options import Categories, Json, Rate, ValueRange
from fastad.console import Bars, calibration_table, messages, print_result, scores_table


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
