"""OpenVINO has one model for a single image and one for any batch: same results, compiled once."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openvino as ov
import pytest
import torch
from fastad.export import to_onnx
from numpy.typing import NDArray
from test_methods import TINY

from fastad.engine import openvino
from fastad.engine.openvino import OpenVINORuntime
from fastad.errors import EngineError
from fastad.models.registry import build

SHAPED = ("ShapeOf", "Broadcast", "StridedSlice", "Slice")  # what a known batch leaves nothing of


@pytest.fixture(scope="module", params=["grad", "rd4ad", "uniad"])
def graph(request: pytest.FixtureRequest) -> bytes:
    torch.manual_seed(0)
    config = TINY[request.param] | ({"feature_scale": 1.0} if request.param == "grad" else {})
    return to_onnx(build(request.param, config, weights="random").eval())


@pytest.fixture
def runtime(graph: bytes) -> OpenVINORuntime:
    return OpenVINORuntime(graph, "fp32", 1, cache=False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[ov.PartialShape]:
    """Shapes of the inputs of every graph that is read from here on, in order."""
    shapes: list[ov.PartialShape] = []
    read = openvino.read_model

    def spy(core: ov.Core, graph: bytes, weights: bytes = b"") -> ov.Model:
        model = read(core, graph, weights)
        shapes.append(model.input(0).partial_shape)
        return model

    monkeypatch.setattr(openvino, "read_model", spy)
    return shapes


def images(runtime: OpenVINORuntime, count: int) -> NDArray[np.uint8]:
    assert runtime._single is not None
    size = list(runtime._single.model.input(0).partial_shape)[1:]
    shape = (count, *(length.get_length() for length in size))
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_a_single_image_gives_what_it_gives_in_a_batch(runtime: OpenVINORuntime) -> None:
    batch = images(runtime, 3)
    maps, scores = runtime.run(batch)
    for i in range(len(batch)):
        alone, score = runtime.run(batch[i : i + 1])
        assert alone.shape == (1, *maps.shape[1:])
        np.testing.assert_allclose(alone[0], maps[i], rtol=0, atol=1e-4 * np.ptp(maps))
        np.testing.assert_allclose(score[0], scores[i], rtol=1e-4, atol=0)


def test_the_model_of_a_single_image_computes_no_shapes(runtime: OpenVINORuntime) -> None:
    assert runtime._single is not None
    model = runtime._single.model
    assert all(port.partial_shape.is_static for port in (*model.inputs, *model.outputs))
    nodes = [node.get_rt_info() for node in model.get_runtime_model().get_ordered_ops()]
    kinds = Counter(str(about["layerType"].value) for about in nodes)
    assert kinds["Input"] == 1
    assert not [kind for kind in SHAPED if kinds[kind]]


def test_batches_are_compiled_at_the_first_one_and_once(
    graph: bytes, compiled: list[ov.PartialShape]
) -> None:
    runtime = OpenVINORuntime(graph, "fp32", 1, cache=False)
    single = images(runtime, 1)
    runtime.run(single)
    assert len(compiled) == 1
    with ThreadPoolExecutor(4) as threads:
        sizes = [2, 3, 4, 5]
        found = list(threads.map(lambda n: runtime.run(single.repeat(n, 0))[0], sizes))
    assert [len(maps) for maps in found] == sizes
    assert len(compiled) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_closed_runtime_refuses_and_compiles_nothing(
    graph: bytes, count: int, compiled: list[ov.PartialShape]
) -> None:
    runtime = OpenVINORuntime(graph, "fp32", 1, cache=False)
    batch = images(runtime, count)
    runtime.close()
    with pytest.raises(EngineError, match="the runtime is closed; load the engine again"):
        runtime.run(batch)
    assert len(compiled) == 1


def test_throughput_needs_no_model_for_batches(
    graph: bytes, compiled: list[ov.PartialShape]
) -> None:
    """Images of a batch run one by one then, each on a core of its own."""
    runtime = OpenVINORuntime(graph, "fp32", 2, mode="throughput", cache=False)
    if runtime._streams is None:
        pytest.skip("OpenVINO makes no second stream on this machine")
    assert len(runtime.run(images(runtime, 1).repeat(3, 0))[0]) == 3
    assert len(compiled) == 1
    runtime.close()
