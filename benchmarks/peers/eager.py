"""Times an artifact against what one would run without the SDK: the teacher and a ResNet-50, eager and in OpenVINO.

    python benchmarks/peers/eager.py runs/fit/chosen/model.xml --checkpoint teacher=runs/w/teacher.safetensors \
        --checkpoint student=runs/fit/full/x/student.safetensors --resnet50 224 --frames photos/test

All take turns in one process, on the same frames, decoded before, preprocessing included. A checkpoint is measured in
eager PyTorch and, where it is a single graph, as FP32 OpenVINO IR too. ResNet-50 has random weights, as quick as any.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from edgefg.classifier import Classifier
from edgefg.evaluation.timing import alternate, in_turn
from edgefg.export.targets import target_of
from edgefg.export.tracing.onnx_exporter import write_onnx
from edgefg.image_io import image_files, read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.training.checkpoint import load
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network

_FRAMES = 32
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
Call = Callable[[], object]


def eager(network: Network, spec: InputSpec) -> Callable[[UInt8Array], object]:
    """Return eager prediction of a frame, ``uint8 [H, W, 3]`` BGR: class and confidence."""

    @torch.inference_mode()
    def predict(frame: UInt8Array) -> object:
        probabilities = network(torch.from_numpy(prepare(frame, spec))[None]).softmax(dim=1)
        return probabilities.max(dim=1)

    return predict


def in_openvino(network: Network, spec: InputSpec, labels: Sequence[str], folder: Path) -> Classifier:
    """Open a network as FP32 OpenVINO IR."""
    folder.mkdir()
    write_onnx(network, spec, folder / "model.onnx")
    model = target_of("openvino").emit(folder / "model.onnx", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing proves a bare model
        return Classifier(model, labels=labels, input=spec)


def resnet50(size: int, classes: int) -> tuple[Network, InputSpec]:
    """Build an untrained ResNet-50."""
    return Network(build_backbone("resnet50", classes), *_IMAGENET).eval(), InputSpec(height=size, width=size)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description="Time an artifact against eager PyTorch and FP32 OpenVINO.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--resnet50", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--frames", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--turns", type=int, default=40)
    a = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    files = image_files(a.frames)
    frames = [read_image(path) for path in files[:: max(1, len(files) // _FRAMES)][:_FRAMES]]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        artifact = stack.enter_context(Classifier(a.artifact))
        networks = {"ResNet-50": (*resnet50(a.resnet50, len(artifact.labels)), artifact.labels)}
        for text in a.checkpoint:
            name, _, path = text.partition("=")
            network, header = load(Path(path))
            networks[name] = network, header.input, header.labels
        calls: dict[str, Call] = {f"{a.artifact} ({artifact.manifest.precision})": in_turn(artifact.predict, frames)}
        for name, (network, spec, labels) in networks.items():
            calls[f"{name}, {spec.height} px, eager PyTorch"] = in_turn(eager(network, spec), frames)
            if network.single_pass:
                classifier = stack.enter_context(in_openvino(network, spec, labels, scratch / name))
                calls[f"{name}, {spec.height} px, FP32 OpenVINO"] = in_turn(classifier.predict, frames)
        seconds = alternate(list(calls.values()), turns=a.turns, times=2, warm_up=3)
    quartiles = 1e3 * np.percentile(seconds, (25, 50, 75), axis=1).T
    print(f"{len(frames)} frames, {seconds.shape[1]} predictions each, {torch.get_num_threads()} threads; milliseconds")
    for name, (low, middle, high) in zip(calls, quartiles, strict=True):
        print(f"{middle:8.2f} ({low:.2f} to {high:.2f})  {middle / quartiles[0, 1]:6.1f} ×  {name}")


if __name__ == "__main__":
    main()
