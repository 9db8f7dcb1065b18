"""Make the committed tiny artifacts, so that the tests of core and runtimes need no torch.

    python -m tests.assets.make_tiny

A CNN of 6,000 parameters is trained on the synthetic birds, for a few minutes, and written to ``tests/assets/tiny/``:
``ir``, ``onnx`` and ``null`` at batch 1, ``onnx-batch4`` and ``onnx-dynamic``. Each has a manifest, and
all but the last a golden set. Then ``onnx-int8`` and ``onnx-fp16``, by `tests.assets.make_tiny_tensorrt`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import openvino
import torch
from torch import nn

from edgefg import Classifier, __version__
from edgefg.artifact import golden
from edgefg.artifact.hashes import file_info, sha256
from edgefg.artifact.manifest import SCHEMA, Accuracy, GoldenInfo, Manifest, Provenance, RuntimeInfo, encode_manifest
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from edgefg.runtime import load
from edgefg.taxonomy import TaxonomyLevel
from tests.assets import make_tiny_tensorrt
from tests.synthetic import write_dataset

TINY = Path(__file__).parent / "tiny"
SIDE = 64
SPEC = InputSpec(height=SIDE, width=SIDE)
LABELS = ("bar", "cross", "disc", "pair")
TAXONOMY = (TaxonomyLevel(name="outline", groups=("straight", "straight", "round", "round")),)


class TinyNet(nn.Module):
    """uint8 ``[N, 64, 64, 3]`` RGB → float32 logits ``[N, 4]``; normalisation is part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 12, 2), (12, 12, 2), (12, 16, 1), (16, 16, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(16, len(LABELS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify a batch."""
        x = (images.float().permute(0, 3, 1, 2) - 127.0) / 64.0
        logits: torch.Tensor = self.head(self.features(x).amax(dim=(2, 3)))
        return logits


def load_split(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[UInt8Array]]:
    frames, targets = [], []
    for index, label in enumerate(LABELS):
        for path in sorted((root / split / label).iterdir()):
            frames.append(read_image(path))
            targets.append(index)
    inputs = np.stack([prepare(frame, SPEC) for frame in frames])
    return torch.from_numpy(inputs), torch.tensor(targets), frames


def train(inputs: torch.Tensor, targets: torch.Tensor, epochs: int = 30) -> TinyNet:
    torch.manual_seed(0)
    net = TinyNet()
    batch = 32
    steps = epochs * -(-len(inputs) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(batch):
            flipped = inputs[rows].flip(2) if torch.rand(()) < 0.5 else inputs[rows]
            loss = nn.functional.cross_entropy(net(flipped), targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def write_onnx(net: TinyNet, path: Path, batch: int | None) -> None:
    example = torch.zeros((batch or 2, SIDE, SIDE, 3), dtype=torch.uint8)
    shapes = None if batch else {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.onnx.export(
        net,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # the exporter's stack traces are larger than the network
        del node.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(model)
    onnx.save(model, path)


def package(
    model: Path,
    frames: list[UInt8Array],
    parent: np.ndarray,
    accuracy: Accuracy | None,
    parent_sha: str,
    extra: tuple[Path, ...] = (),
) -> None:
    """Write golden set and manifest beside ``model``; the logits are the artifact's own, by its runtime."""
    inputs = np.stack([prepare(frame, SPEC) for frame in frames])
    runtime = load(model, threads=1)
    size = runtime.input.shape[0] or len(inputs)
    padded = np.concatenate([inputs, np.repeat(inputs[-1:], -len(inputs) % size, axis=0)])
    logits = np.concatenate([runtime.infer(padded[i : i + size]) for i in range(0, len(padded), size)])[: len(inputs)]
    name, version = runtime.version.split()
    runtime.close()
    files = [model, *extra]
    proof = None
    if model.parent.name != "onnx-dynamic":  # the tests need no fifth one, and the repository stays small
        files.append(model.parent / "golden.npz")
        golden.write(golden.GoldenSet(tuple(frames), inputs, parent, logits), files[-1])
        proof = GoldenInfo(file=files[-1].name, frames=len(frames), logits=1e-3, parent_logits=1e-2)
    manifest = Manifest(
        schema=SCHEMA,
        model=model.name,
        labels=LABELS,
        input=SPEC,
        precision="fp32",
        runtime=RuntimeInfo(name=name, version=version),
        files=tuple(file_info(path) for path in files),
        golden=proof,
        provenance=Provenance(edgefg=__version__, parent=parent_sha, recipe="tests/assets/make_tiny.py"),
        accuracy=accuracy,
        taxonomy=TAXONOMY,
    )
    (model.parent / "model.json").write_bytes(encode_manifest(manifest))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder), classes=len(LABELS), per_class=500, size=96, seed=1)
        inputs, targets, _ = load_split(root, "train")
        net = train(inputs, targets)
        test_inputs, test_targets, test_frames = load_split(root, "test")
    with torch.inference_mode():
        hits = (net(test_inputs).argmax(dim=1) == test_targets).float()
    top1, margin = float(hits.mean()), 1.96 * float(hits.std()) / len(hits) ** 0.5
    print(f"top-1 on {len(hits)} test images: {top1:.3f}")
    accuracy = Accuracy(
        data="synthetic birds, test",
        images=len(hits),
        top1=top1,
        top1_low=max(0.0, top1 - margin),
        top1_high=min(1.0, top1 + margin),
        balanced=top1,
    )
    shutil.rmtree(TINY, ignore_errors=True)
    paths = {name: TINY / name / "model.onnx" for name in ("onnx", "onnx-batch4", "onnx-dynamic")}
    paths |= {"ir": TINY / "ir" / "model.xml", "null": TINY / "null" / "model.null"}
    for path in paths.values():
        path.parent.mkdir(parents=True)
    write_onnx(net, paths["onnx"], 1)
    write_onnx(net, paths["onnx-batch4"], 4)
    write_onnx(net, paths["onnx-dynamic"], None)
    openvino.save_model(openvino.convert_model(paths["onnx"]), paths["ir"], compress_to_fp16=False)
    # One bird of each of two classes, larger and smaller than the network's input; smooth, to compress well.
    frames = [
        cv2.GaussianBlur(cv2.resize(test_frames[i], size, interpolation=cv2.INTER_AREA), (5, 5), 0)
        for i, size in ((0, (80, 64)), (-1, (36, 40)))
    ]
    with torch.inference_mode():
        parent = net(torch.from_numpy(np.stack([prepare(frame, SPEC) for frame in frames]))).numpy()
    fixed = parent[0].tolist()
    paths["null"].write_bytes(msgspec.json.encode({"shape": [1, SIDE, SIDE, 3], "logits": fixed}))
    parent_sha = sha256(paths["onnx"])
    for name, path in paths.items():
        extra = (path.with_suffix(".bin"),) if name == "ir" else ()
        of_null = name == "null"
        own_parent = np.repeat(parent[:1], len(frames), axis=0) if of_null else parent
        package(path, frames, own_parent, None if of_null else accuracy, parent_sha, extra)
        with Classifier(path, threads=1, verify=name != "onnx-dynamic") as classifier:
            print(path, classifier.predict(frames[0]).label)
    make_tiny_tensorrt.main()


if __name__ == "__main__":
    main()
