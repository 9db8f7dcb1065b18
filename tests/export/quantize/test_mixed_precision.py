"""Layers that stay in floating point: what the scan finds, what the search does, and what is emitted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
from onnx import numpy_helper

from edgefg import runtime
from edgefg.data.split import Sample
from edgefg.errors import ExportError
from edgefg.export.onnx.check import check
from edgefg.export.onnx.graph import Graph
from edgefg.export.quantize.layer_sensitivity import logits_of, scan
from edgefg.export.quantize.mixed_precision import find_kept, search
from edgefg.export.quantize.quantizer import Quantizer
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.training.checkpoint import Target
from edgefg.training.models.network import Network
from tests.conftest import TINY
from tests.export.conftest import write_checkpoint

TARGETS: tuple[Target, ...] = ("openvino", "onnx", "tensorrt-onnx")
SPEC = InputSpec(height=64, width=64)
HURT = "node_Conv_67"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with one channel 3,000 times as large between two layers: the same function, but not in INT8."""
    model = onnx.load(TINY / "onnx" / "model.onnx")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("features.3.weight", "features.3.weight_bias"):
            values[0] *= 3000
        elif tensor.name == "features.6.weight":
            values[:, 0] /= 3000
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path_factory.mktemp("spoilt") / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def inputs(birds: tuple[tuple[str, ...], list[UInt8Array]]) -> UInt8Array:
    return np.stack([prepare(frame, SPEC) for frame in birds[1]])


@pytest.fixture(scope="module")
def samples(
    birds: tuple[tuple[str, ...], list[UInt8Array]], spoilt: Path, inputs: UInt8Array,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Sample, ...]:  # fmt: skip
    """The birds as files, labelled as the network sees them in FP32."""
    folder = tmp_path_factory.mktemp("birds")
    labels = np.concatenate(list(logits_of(spoilt, [row[None] for row in inputs]))).argmax(1)
    assert len(set(labels)) > 2
    rows = []
    for i, (frame, label) in enumerate(zip(birds[1], labels, strict=True)):
        cv2.imwrite(str(folder / f"{i}.png"), frame)
        rows.append(Sample(folder / f"{i}.png", int(label)))
    return tuple(rows)


def _floating(model: Path, layers: Sequence[str]) -> set[str]:
    """Name those layers of a model file whose weights are not in 8 bits."""
    if model.suffix == ".onnx":
        graph = Graph(onnx.load(model))
        named = {node.name: node for node in graph.nodes}
        return {name for name in layers if graph.writer_op(named[name].input[1]) != "DequantizeLinear"}
    operations = {op.get_friendly_name(): op for op in openvino.Core().read_model(model).get_ops()}
    found = set()
    for name in layers:
        weights = operations.get(f"{name}/WithoutBiases", operations.get(name)).input_value(1).get_node()
        while weights.get_type_name() != "Constant":
            weights = weights.input_value(0).get_node()
        if weights.get_element_type() != openvino.Type.i8:
            found.add(name)
    return found


@pytest.mark.parametrize("to", TARGETS)
def test_what_is_kept_is_floating_point_and_nothing_else(
    spoilt: Path, inputs: UInt8Array, to: Target, tmp_path: Path
) -> None:
    quantizer = Quantizer(to, spoilt, inputs)
    assert len(quantizer.layers) == 5
    for keep in ([], [HURT], list(quantizer.layers[2:]), list(quantizer.layers)):
        model = quantizer.write(tmp_path, keep)
        assert _floating(model, quantizer.layers) == set(keep)
        if to == "tensorrt-onnx":
            assert check(model).broken == ()
    assert _floating(quantizer.write_alone(tmp_path, HURT), quantizer.layers) == set(quantizer.layers) - {HURT}


def test_tensorrts_rules_hold_whichever_layer_of_a_residual_block_is_kept(
    resnet: tuple[Network, InputSpec], tmp_path: Path
) -> None:
    write_onnx(*resnet, tmp_path / "fp32.onnx")
    inputs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    quantizer = Quantizer("tensorrt-onnx", tmp_path / "fp32.onnx", inputs)
    graph = Graph(onnx.load(tmp_path / "fp32.onnx"))
    branches = {
        graph.writer(name).name for node in graph.nodes if node.op_type == "Add" for name in node.input
        if graph.writer_op(name) == "Conv"
    }  # fmt: skip
    assert len(branches) > 5, "needed blocks whose skip is a convolution too"
    for keep in [*([name] for name in sorted(branches)), sorted(branches)[::2], list(quantizer.layers)]:
        assert check(quantizer.write(tmp_path, keep)).broken == (), keep


@pytest.mark.parametrize("to", TARGETS)
def test_the_scan_puts_what_hurts_first(spoilt: Path, inputs: UInt8Array, to: Target) -> None:
    found = scan(Quantizer(to, spoilt, inputs), inputs)
    assert (found.to, found.images) == (to, len(inputs))
    first, second = found.layers[:2]
    assert first.layer == HURT
    assert first.sqnr < second.sqnr - 10
    assert first.agreement < 1
    assert [row.sqnr for row in found.layers] == sorted(row.sqnr for row in found.layers)
    lines = found.render().splitlines()
    assert len(lines) == 7
    assert lines[2].startswith(HURT)


def test_the_figures_are_those_of_the_logits(spoilt: Path, inputs: UInt8Array, tmp_path: Path) -> None:
    quantizer = Quantizer("onnx", spoilt, inputs)
    row = next(row for row in scan(quantizer, inputs).layers if row.layer == HURT)
    logits = []
    for path in (spoilt, quantizer.write_alone(tmp_path, HURT)):
        opened = runtime.load(path)
        logits.append(np.concatenate([opened.infer(image[None]) for image in inputs]).astype(np.float64))
        opened.close()
    noise = ((logits[0] - logits[1]) ** 2).mean()
    assert row.mse == pytest.approx(noise)
    assert row.sqnr == pytest.approx(10 * np.log10((logits[0] ** 2).mean() / noise))
    assert row.agreement == (logits[0].argmax(1) == logits[1].argmax(1)).mean()


@pytest.mark.parametrize("to", TARGETS)
def test_the_layer_that_hurts_is_kept(
    spoilt: Path, inputs: UInt8Array, samples: tuple[Sample, ...], to: Target
) -> None:
    lines: list[str] = []
    kept = find_kept(Quantizer(to, spoilt, inputs), samples, SPEC, 7.0, say=lines.append)
    assert kept == (HURT,)
    assert lines[0].startswith("with no layers in floating point INT8 loses ")
    assert lines[-1] == f"kept in floating point: {HURT}"
    assert find_kept(Quantizer(to, spoilt, inputs), samples, SPEC, 100.0) == ()


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(
    run, resnet: tuple[Network, InputSpec], birds_folder: Path, tmp_path: Path
) -> None:
    labels = ("bar", "cross", "disc", "pair")
    checkpoint = write_checkpoint(tmp_path / "r.safetensors", resnet[0], "resnet10t", labels, 32)
    options = ("--to", "tensorrt-onnx", "--images", 4, "--compared", 6)
    status, out, err = run("sensitivity", checkpoint, birds_folder, *options, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["to"], found["images"]) == ("tensorrt-onnx", 6)
    ratios = [row["sqnr"] for row in found["layers"]]
    assert len(ratios) > 10
    assert ratios == sorted(ratios)
    status, out, err = run("sensitivity", checkpoint, birds_folder, *options)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:]] == [row["layer"] for row in found["layers"]]


def test_the_search_doubles_and_stops() -> None:
    tried: list[frozenset[str]] = []
    layers = [f"layer {i}" for i in range(13)]

    def build(keep: frozenset[str]) -> int:
        tried.append(keep)
        return len(keep)

    built, found = search(build, lambda kept: 9.0 - kept, lambda: layers, 2.5)
    assert [len(keep) for keep in tried] == [0, 1, 2, 4, 8]
    assert (built, found.layers, found.drop) == (8, tuple(layers[:8]), 1.0)
    assert tried[-1] == set(layers[:8])


def test_the_scan_is_spared_where_nothing_has_to_be_kept() -> None:
    def never() -> list[str]:
        raise AssertionError

    assert search(len, lambda kept: 0.5, never, 0.5)[1].layers == ()


def test_where_all_layers_are_not_enough() -> None:
    lines: list[str] = []
    with pytest.raises(ExportError, match=r"loses 3\.00 points of top-1 .* even with all 5 layers .*; allow more"):
        search(len, lambda kept: 3.0, lambda: list("abcde"), 1.0, lines.append)
    assert [line.split()[1] for line in lines] == ["no", "1", "2", "4", "5"]


def test_a_loss_that_is_no_number_is_never_allowed() -> None:
    with pytest.raises(ExportError, match="loses nan points"):
        search(len, lambda kept: float("nan"), lambda: ["a"], 1.0)


def test_a_network_without_a_layer_to_keep_ends_the_search() -> None:
    with pytest.raises(ExportError, match="even with all 0 layers"):
        search(lambda keep: keep, lambda _: 5.0, list, 1.0)
