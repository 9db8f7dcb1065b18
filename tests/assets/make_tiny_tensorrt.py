"""Make the committed tiny artifacts for TensorRT: INT8 (QDQ) and FP16 of the same network as ``tiny/onnx``.

    python -m tests.assets.make_tiny_tensorrt

Nothing is trained: ``tiny/onnx`` is quantised, on new synthetic birds, and cast, by the code that exports for users.
`tests.assets.make_tiny` calls it, since the network is another one then.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from edgefg import Classifier, __version__
from edgefg.artifact import golden
from edgefg.artifact.hashes import sha256
from edgefg.artifact.manifest import Provenance, read_manifest
from edgefg.data.split import Sample
from edgefg.evaluation.package import Draft, write_artifact
from edgefg.evaluation.validation import Validation, validate
from edgefg.export.onnx.fp16 import to_half
from edgefg.image_io import read_image
from edgefg.preprocess import UInt8Array, prepare
from tests.export.quantizing import quantize_tensorrt
from tests.synthetic import write_dataset

TINY = Path(__file__).parent / "tiny"
SOURCE = TINY / "onnx" / "model.onnx"


def make(precision: Literal["int8", "fp16"], calibration: UInt8Array, test: list[Sample]) -> Path:
    """Write ``onnx-int8`` or ``onnx-fp16`` and return its model file."""
    manifest = read_manifest(SOURCE)
    assert manifest.golden is not None
    proof = golden.read(SOURCE.with_name(manifest.golden.file))
    draft = Draft(
        labels=manifest.labels,
        taxonomy=manifest.taxonomy,
        input=manifest.input,
        precision=precision,
        provenance=Provenance(edgefg=__version__, parent=sha256(SOURCE), recipe="tests/assets/make_tiny_tensorrt.py"),
        frames=proof.frames,
        parent_logits=proof.parent_logits,
    )

    def write(folder: Path) -> Path:
        target = folder / "model.onnx"
        if precision == "fp16":
            to_half(SOURCE, target, list(proof.inputs[:, None]))
        else:
            assert quantize_tensorrt(SOURCE, target, calibration) == "", "the tiny network bears FP16"
        return target

    def measuring(classifier: Classifier) -> Validation:
        return validate(classifier, test, "synthetic birds, test", fit_temperature=False)

    return write_artifact(TINY / f"onnx-{precision}", draft, write, measuring)


def _samples(folder: Path, labels: tuple[str, ...]) -> list[Sample]:
    return [Sample(path, i) for i, label in enumerate(labels) for path in sorted((folder / label).iterdir())]


def main() -> None:
    """Make both."""
    manifest = read_manifest(SOURCE)
    with tempfile.TemporaryDirectory() as folder:
        root = write_dataset(Path(folder), classes=len(manifest.labels), per_class=100, size=96, seed=4)
        train, test = (_samples(root / split, manifest.labels) for split in ("train", "test"))
        inputs = np.stack([prepare(read_image(sample.path), manifest.input) for sample in train])
        for path in (make("int8", inputs, test), make("fp16", inputs, test)):
            print(path, path.stat().st_size, read_manifest(path).accuracy)


if __name__ == "__main__":
    main()
