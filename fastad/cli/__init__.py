"""The command line: `fastad` and `python -m fastad`. Results on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from fastad.cli import engines, models, results
from fastad.console import messages
from fastad.errors import FastadError, FastadWarning

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

for command in (  # the order of `fastad --help`
    *(models.train, models.import_checkpoint, models.calibrate, engines.export, engines.build),
    *(results.predict, results.threshold, results.evaluate, models.prepare, results.table),
    *(engines.verify, engines.info, engines.doctor, models.demo),
):
    app.command()(command)


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
