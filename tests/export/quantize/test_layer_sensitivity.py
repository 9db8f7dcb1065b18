"""The scan of layers: its figures, its order, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgefg import runtime
from edgefg.export.quantize.layer_sensitivity import scan
from edgefg.export.targets import TARGETS
from edgefg.preprocess import InputSpec, UInt8Array
from edgefg.training.models.network import Network
from tests.conftest import Run
from tests.export.conftest import write_checkpoint
from tests.export.quantize.conftest import HURT
from tests.export.quantizing import quantizer_of


@pytest.mark.parametrize("to", list(TARGETS))
def test_the_scan_puts_what_hurts_first(spoilt: Path, inputs: UInt8Array, to: str) -> None:
    found = scan(quantizer_of(to, spoilt, inputs), inputs)
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
    quantizer = quantizer_of("onnx", spoilt, inputs)
    row = next(row for row in scan(quantizer, inputs).layers if row.layer == HURT)
    logits = []
    for path in (spoilt, quantizer.write_single(tmp_path, HURT)):
        opened = runtime.load(path)
        logits.append(np.concatenate([opened.infer(image[None]) for image in inputs]).astype(np.float64))
        opened.close()
    noise = ((logits[0] - logits[1]) ** 2).mean()
    assert row.mse == pytest.approx(noise)
    assert row.sqnr == pytest.approx(10 * np.log10((logits[0] ** 2).mean() / noise))
    assert row.agreement == (logits[0].argmax(1) == logits[1].argmax(1)).mean()


@pytest.mark.slow
def test_the_command_prints_a_table_or_json(
    run: Run, resnet: tuple[Network, InputSpec], birds_folder: Path, tmp_path: Path
) -> None:
    labels = ("bar", "cross", "disc", "pair")
    checkpoint = write_checkpoint(tmp_path / "r.safetensors", resnet[0], "resnet10t", labels, 32)
    options = ("--to", "tensorrt-onnx", "--num-samples", 4, "--compared", 6)
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
