"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PARTLY_FAILED = 3  # exit code: results were written, some images could not be read

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Runtime = Annotated[
    str, typer.Option(help="auto, openvino, onnxruntime; on GPUs tensorrt, pytorch, onnxruntime.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, int8, int8-bf16 or fp16.")]
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
Overlap = Annotated[float, typer.Option(help="Least share of a tile seen by the next.")]
Region = Annotated[Path | None, typer.Option(help="Mask image: only what is not black counts.")]
Ignore = Annotated[Path | None, typer.Option(help="Mask image: what is not black does not count.")]
Rate = Annotated[float, typer.Option(help="Accepted share of normal images called anomalous.")]
