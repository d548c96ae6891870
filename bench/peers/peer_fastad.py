"""fastad itself: `fastad.load` and `predict`, as the README shows them."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

import fastad
from bench.peers.worker import Peer, Setup, Verdict
from fastad.prediction import Prediction


def open_peer(setup: Setup) -> Peer:
    """Options: ``engine``, ``runtime`` and ``precision`` of `fastad.load`."""
    options = setup.options
    predictor = fastad.load(
        options["engine"],
        device="cpu",
        runtime=options["runtime"],
        precision=options["precision"],
        threads=setup.threads,
    )
    predictor.warmup()

    def predict(frame: NDArray[np.uint8]) -> Verdict:
        found = cast(Prediction, predictor.predict(frame))
        _ = found.pred_label
        return found.model_map, found.raw_score

    spec = predictor.manifest.spec
    backbone = spec.config.get("backbone") or {}
    about = {
        "network": f"{spec.method} {backbone.get('name', '')}".strip(),
        "size": list(spec.input.size),
        "weights": "run",
        "runtime": predictor.runtime.name,
        "precision": predictor.runtime.precision,
    }
    return Peer(predict, about)
