"""Lower precisions of an exported graph: int8 by quantise/dequantise pairs, float16 by casts.

What may be lowered is read off the graph, so no method knows about it. A *layer* is a Conv, Gemm or
MatMul whose second input is a constant; MatMuls of two activations (attention) are none. The second
half of a separable fixed map, ``(U @ M) @ U.T`` with a constant ``U``, is none either, nor is a
Conv of a single channel (a filter on the map). Nodes that no layer follows are the *head*:
distances, norms and the map; it keeps float32 and reads what the layers computed unquantised.
So do layers that no other layer follows: the head compares their output value by value (quantising
GRAD's last one moved OpenVINO's maps by 43 % of their range, ONNX Runtime's by 0.1 %). Nodes that
stem from an operator of this package (local functions) keep float32 too.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from onnx.inliner import inline_local_functions

from .onnx_float16 import NARROW, narrow

# Of the magnitudes of a tensor that its range covers; larger ones are clipped. Measured on DeepPCB
# with every layer in int8 on OpenVINO, against covering all: the maps' mean error falls from 4.5 to
# 3.0 % (grad.quick), 6.2 to 4.5 % (uniad.quick) and 5.7 to 4.9 % (rd4ad.quick), the AUPRO lost from
# 1.9 to 1.6 and 1.2 to 0.5 points (grad, rd4ad). 99.99 clips what defects show: uniad.quick then
# loses a point of AUROC.
PERCENTILE = 99.999
OP_TYPES = ("Conv", "Gemm", "MatMul", "Add")
WEIGHTED = OP_TYPES[:3]


@dataclass(frozen=True)
class Parts:
    """Names of a graph's nodes by what they are for, in graph order."""

    layers: tuple[str, ...]  # may be lowered: weights, and the sums of residual branches
    last: tuple[str, ...]  # layers that no layer follows
    head: tuple[str, ...]  # no layer follows them, and they are none


def _prepare(graph: bytes) -> tuple[ModelProto, frozenset[str]]:
    """The graph without local functions and with shapes; names of the nodes they became."""
    model = onnx.load_from_string(graph)
    outside = {id_ for node in model.graph.node for id_ in node.output if node.domain == ""}
    if model.functions:
        model = inline_local_functions(model)
    for index, node in enumerate(model.graph.node):  # the quantizer finds nodes by name
        node.name = f"{index:04}.{node.name or node.op_type}"
    inlined = frozenset(n.name for n in model.graph.node if not outside.issuperset(n.output))
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "shapes.onnx"
        # the exporter folded BatchNorm and constants; ONNX Runtime's passes would rename nodes
        quant_pre_process(model, target, skip_optimization=True, skip_symbolic_shape=True)
        return onnx.load(target), inlined


def _parts(model: ModelProto, kept_apart: Collection[str]) -> Parts:
    nodes = list(model.graph.node)
    constants = {i.name: tuple(i.dims) for i in model.graph.initializer}
    constants |= {n.output[0]: () for n in nodes if n.op_type == "Constant"}
    producer = {name: node for node in nodes for name in node.output}

    def is_weighted(node: NodeProto) -> bool:
        if node.op_type not in WEIGHTED or node.name in kept_apart:
            return False
        if node.input[1] not in constants or node.input[0] in constants:
            return False
        if node.op_type == "Conv":
            shape = constants[node.input[1]]
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            return not (len(shape) > 1 and shape[1] * groups == 1)
        before = producer.get(node.input[0])
        half = before is not None and before.op_type == "MatMul" and before.input[0] in constants
        return not (node.op_type == "MatMul" and half)

    weighted = {node.name for node in nodes if is_weighted(node)}
    followed: set[str] = set()  # tensors that reach a layer
    head, last = [], []
    for node in reversed(nodes):
        reaches = bool(followed.intersection(node.output))
        if node.name not in weighted and not reaches:
            head.append(node.name)
            continue
        followed.update(node.input)
        if not reaches:
            last.append(node.name)
    computed: set[str] = set()  # tensors that a layer, its bias or a residual sum gave
    layers = []
    for node in nodes:
        direct = computed.intersection(node.input)
        if node.name in weighted:
            if node.name not in last:
                layers.append(node.name)
            computed.update(node.output)
        elif node.op_type == "Add" and direct and node.name not in {*head, *kept_apart}:
            computed.update(node.output)
            # a bias next to a quantised product would be rounded twice for nothing
            if not any(name in constants for name in node.input):
                layers.append(node.name)
    return Parts(tuple(layers), tuple(reversed(last)), tuple(reversed(head)))


class _Images:
    """Feeds one batch of calibration images, as ONNX Runtime's quantizer wants it."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._feeds = iter([images])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        images = next(self._feeds, None)
        return None if images is None else {"image": images}


def _peaks(session: Any, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """(0, largest magnitude) of each output over ``images`` [N, 1, H, W, 3]."""
    names = [output.name for output in session.get_outputs()]
    peaks = np.zeros((len(names), 2), np.float32)
    for image in images:
        found = session.run(None, {"image": image})
        highest = [np.abs(value).max(initial=0.0) for value in found]
        peaks[:, 1] = np.maximum(peaks[:, 1], highest)
    return dict(zip(names, peaks, strict=True))


class Quantizer:
    """A graph and the value ranges its tensors take on calibration images.

    Ranges are measured once and each layer is quantised once for each kind of activations; `int8`
    may then be called for any choice of layers.

    Args:
        graph: ONNX bytes with input ``image``; local functions are inlined.
        images: Normal images, uint8 RGB [N, H, W, 3], at model size.
        weight_bits: 8, or 7: products of those fit in pairs into 16 bits, where CPUs without dot
            products of int8 add them up (`fastad._native.sums_int8_exactly`).
    """

    def __init__(self, graph: bytes, images: NDArray[np.uint8], weight_bits: int = 8) -> None:
        from onnxruntime.quantization.calibrate import (
            CalibrationDataReader,
            CalibrationMethod,
            create_calibrator,
        )

        self._model, self._inlined = _prepare(graph)
        self.parts = _parts(self._model, self._inlined)
        self._weight_bits = weight_bits
        self._whole: dict[bool, ModelProto] = {}  # by symmetry, every layer quantised
        reader = type("Reader", (_Images, CalibrationDataReader), {})
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source.onnx"
            onnx.save(self._model, source)
            with redirect_stdout(io.StringIO()):  # it prints what it does
                calibrator = create_calibrator(
                    source,
                    list(OP_TYPES),
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=CalibrationMethod.Percentile,
                    extra_options={"symmetric": True, "percentile": PERCENTILE},
                )
                singly = images[:, None]  # it holds all values of what it reads at once
                peaks = _peaks(calibrator.infer_session, singly)
                calibrator.collect_data(reader(singly[0]))  # makes its collector
                # Bins keep their first width: an image on which a tensor is next to nothing would
                # make those of the following ones a million times as many. So all begin full size.
                calibrator.collector.histogram_dict.clear()
                calibrator.collector.collect(peaks)
                for image in singly:
                    calibrator.collect_data(reader(image))
                self._ranges = calibrator.compute_data()
            del calibrator  # it holds the file open

    def int8(self, activations: Literal["s8", "u8"] = "s8", kept: Collection[str] = ()) -> bytes:
        """A checked graph of standard operators with QuantizeLinear and DequantizeLinear pairs.

        Weights are symmetric int8 per channel, biases float32.

        Args:
            activations: ``s8`` is symmetric and serves OpenVINO and TensorRT: only inputs of layers
                are quantised and whatever is no layer reads unquantised values. ``u8`` has zero
                points, and quantises outputs too, which ONNX Runtime's CPU kernels ask for.
            kept: Layers of `parts` to leave unquantised.
        """
        symmetric = activations == "s8"
        chosen = {name for name in self.parts.layers if name not in kept}
        if not chosen:
            return _finished(_copy(self._model))
        if symmetric not in self._whole:
            self._whole[symmetric] = self._quantised(self.parts.layers, symmetric)
        model = _copy(self._whole[symmetric])
        _read_as_before(model, self._model, chosen, None if symmetric else self.parts.head)
        return _finished(model)

    def _quantised(self, layers: Collection[str], symmetric: bool) -> ModelProto:
        """The graph as ONNX Runtime's quantizer leaves it: all nodes read rounded values."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        assert layers, "an empty list means all to the quantizer"
        level = logging.getLogger().level
        quantizer = QDQQuantizer(
            _copy(self._model),
            True,  # per channel
            self._weight_bits == 7,
            QuantType.QInt8,
            QuantType.QInt8 if symmetric else QuantType.QUInt8,
            self._ranges,
            list(layers),
            [],
            list(OP_TYPES),
            {
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                **({"OpTypesToExcludeOutputQuantization": list(OP_TYPES)} if symmetric else {}),
            },
        )
        quantizer.quantize_model()
        logging.getLogger().setLevel(level)
        model = cast(ModelProto, quantizer.model.model)
        _sort(model)  # the quantizer appends its nodes at the end
        return model

    def float16(self, kept: Collection[str] = ()) -> bytes:
        """A checked graph whose layers compute in float16 between explicit casts.

        Input, output, the head, softmax, norms and reductions are float32.
        """
        model = _copy(self._model)
        wide = {*self.parts.head, *self.parts.last, *kept, *self._inlined}
        narrow(
            model,
            {n.name for n in model.graph.node if n.op_type in NARROW and n.name not in wide},
        )
        _drop_unread_constants(model)
        _sort(model)
        return _finished(model)


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _read_as_before(
    model: ModelProto,
    original: ModelProto,
    chosen: Collection[str],
    exact: Collection[str] | None,
) -> None:
    """Undo the rounding of a fully quantised graph around all layers but ``chosen``.

    The result is what the quantizer makes of ``chosen`` alone, without quantising again: pairs that
    no chosen layer needs go, and float weights come back.

    Args:
        model: Every layer quantised; changed.
        original: The graph before; its nodes have the same names.
        chosen: Layers that stay quantised.
        exact: Nodes that read values before rounding; None means all that are not chosen. The
            others read rounded values wherever a chosen layer has made or read them.
    """
    before = {node.name: node for node in original.graph.node}
    constants = {constant.name: constant for constant in original.graph.initializer}
    touched = {
        name for layer in chosen for name in (*before[layer].input, *before[layer].output) if name
    }
    for node in model.graph.node:
        if node.name in chosen or node.name not in before:
            continue
        for i, name in enumerate(before[node.name].input):
            by_value = name not in constants and (exact is None or node.name in exact)
            if by_value or name not in touched:
                node.input[i] = name
    there = {constant.name for constant in model.graph.initializer}
    missing = {name for node in model.graph.node for name in node.input} & constants.keys() - there
    model.graph.initializer.extend(constants[name] for name in sorted(missing))
    _drop_unread(model)


def _sort(model: ModelProto) -> None:
    """Put every node behind those it reads, otherwise in the order it has."""
    waiting = list(model.graph.node)
    made = {name for node in waiting for name in node.output}
    ordered: list[NodeProto] = []
    while waiting:
        late = []
        for node in waiting:
            if made.intersection(node.input):
                late.append(node)
            else:
                ordered.append(node)
                made.difference_update(node.output)
        assert len(late) < len(waiting), "a graph has no cycles"
        waiting = late
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _drop_unread(model: ModelProto) -> None:
    """Remove nodes and constants that nothing reads."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    alive: list[Any] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            alive.append(node)
    alive.reverse()
    del graph.node[:]
    graph.node.extend(alive)
    _drop_unread_constants(model)


def _drop_unread_constants(model: ModelProto) -> None:
    """Remove constants that no node reads."""
    needed = {name for node in model.graph.node for name in node.input}
    held = [initializer for initializer in model.graph.initializer if initializer.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)


def _finished(model: ModelProto) -> bytes:
    """Checked bytes with nothing of the exporting machine."""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    used = {node.domain for node in model.graph.node}
    imports = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.checker.check_model(model, full_check=True)
    return cast(bytes, model.SerializeToString())
