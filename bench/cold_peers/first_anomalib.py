"""anomalib's Reverse Distillation (WideResNet-50-2) in OpenVINO: the score of a first frame.

python first_anomalib.py export    # once: writes the model, with random weights
python first_anomalib.py           # what `bench.cold` times
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from anomalib.deploy import OpenVINOInferencer

FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers" / "first"
MODEL = FOLDER / "model.xml"


def main(arguments: list[str]) -> int:
    if arguments == ["export"]:
        print(export())
        return 0
    if not MODEL.is_file():
        print(f"{MODEL}: no such model; give `export` as argument first", file=sys.stderr)
        return 2
    frame = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    found = OpenVINOInferencer(MODEL, "CPU").predict(frame)
    print(float(np.asarray(found.pred_score).squeeze()), flush=True)
    return 0


def export() -> Path:
    """The model as anomalib writes it, moved to `MODEL` with the weights beside it."""
    from anomalib.models import ReverseDistillation  # slow, and not what is timed

    written = ReverseDistillation(pre_trained=False).eval().to_openvino(FOLDER)
    for path in (written.with_suffix(".bin"), written):  # the model last: it says all is there
        path.replace(MODEL.with_suffix(path.suffix))
    return MODEL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
