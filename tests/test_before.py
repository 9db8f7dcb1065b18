"""Checkpoints and artifacts of the code before its restructuring load and predict as they did.

``assets/before/README.md`` says what they are and how they were made.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from torch import nn

from edgefg import Classifier, IntegrityError, Prediction
from edgefg.artifact.manifest import Manifest
from edgefg.errors import CheckpointError
from edgefg.export.qat.quantized_network import load_quantized
from edgefg.preprocess import UInt8Array, prepare
from edgefg.taxonomy import TaxonomyLevel
from edgefg.training.checkpoint import Header, load, read_header
from tests.assets.before import backbone as backbone  # timm knows it from here on
from tests.simulated.install import simulated_device

BEFORE = Path(__file__).parent / "assets" / "before"
SIGNED = "onnx-int8"
EXPECTED: dict[str, Any] = msgspec.json.decode((BEFORE / "expected.json").read_bytes())
QAT = sorted(name for name, of in EXPECTED["checkpoints"].items() if of["header"]["kind"] == "qat")
FloatArray = npt.NDArray[np.float32]

# Shares of the greatest logit: on the processor and engine that the logits are of; FP32 on others, as in golden sets;
# and where sums are rounded to 8 bits, on others.
NEAR, FP32, INT8 = 1e-5, 2e-4, 0.02


def frames() -> list[UInt8Array]:
    """Return the frames, ``uint8 [H, W, 3]`` BGR, of several sizes."""
    with np.load(BEFORE / "frames.npz") as file:
        return [file[name] for name in sorted(file.files)]


def expected_logits(kind: str, name: str) -> FloatArray:
    with np.load(BEFORE / "expected.npz") as file:
        found: FloatArray = file[f"{kind}/{name}"]
    return found


def instruction_sets() -> list[str]:
    """Return what this processor offers of the instructions that engines choose their kernels by."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return sorted(flag for flag in flags[1].split() if re.match("avx|amx|fma|sse4", flag)) if flags else []


def describe_taxonomy(levels: Sequence[TaxonomyLevel]) -> dict[str, list[str]]:
    return {level.name: list(level.groups) for level in levels}


def describe_header(header: Header) -> dict[str, Any]:
    """Return what must not change in a checkpoint's header, as JSON has it."""
    validation, quantized = header.validation, header.quantized
    return {
        "kind": header.kind,
        "method": header.method,
        "options": msgspec.to_builtins(header.options),
        "backbone": header.backbone,
        "labels": list(header.labels),
        "taxonomy": describe_taxonomy(header.taxonomy),
        "input": [header.input.height, header.input.width, header.input.crop, header.input.crop_fraction],
        "mean": list(header.mean),
        "std": list(header.std),
        "pruned": sorted(header.channels),
        "dataset": header.dataset,
        "teacher": header.teacher,
        "parent": header.parent,
        "quantized": None if quantized is None else [quantized.to, quantized.reduce_range, quantized.torch],
        "validation": None if validation is None else [validation.data, validation.images, validation.top1],
        "members": [describe_header(member) for member in header.members],
        "recipe": header.recipe,
    }


def describe_manifest(manifest: Manifest) -> dict[str, Any]:
    """Return what must not change in an artifact's manifest, as JSON has it."""
    output, origin, accuracy, compared = manifest.output, manifest.provenance, manifest.accuracy, manifest.comparison
    plan, scaling, golden = manifest.plan, manifest.temperature_scaling, manifest.golden
    return {
        "model": manifest.model,
        "labels": list(manifest.labels),
        "taxonomy": describe_taxonomy(manifest.taxonomy),
        "input": [manifest.input.height, manifest.input.width, manifest.input.crop, manifest.input.crop_fraction],
        "output": [output.temperature, output.reject_threshold, output.reject_risk],
        "precision": manifest.precision,
        "runtime": manifest.runtime.name,
        "files": sorted(file.name for file in manifest.files),
        "golden": None if golden is None else [golden.file, golden.frames, golden.logits, golden.parent_logits],
        "parent": origin.parent,
        "teacher": origin.teacher,
        "dataset": origin.dataset,
        "calibration": origin.calibration,
        "recipe": origin.recipe,
        "accuracy": None if accuracy is None else [accuracy.data, accuracy.images, accuracy.top1],
        "scaling": None if scaling is None else [scaling.images, scaling.ece_before, scaling.ece_after],
        "comparison": None if compared is None else [compared.parent.top1, compared.drop, compared.lost],
        "gate": None if compared is None or compared.gate is None else compared.gate.max_drop,
        "plan": None if plan is None else [plan.gpu, plan.compute_capability, plan.tensorrt],
    }


def describe_prediction(found: Prediction) -> dict[str, Any]:
    """Return an answer without its logits, as JSON has it."""
    rollup = found.rollup
    return {
        "label": found.label,
        "confidence": found.confidence,
        "top": [candidate.label for candidate in found.top_k],
        "rejected": found.rejected,
        "rollup": None if rollup is None else [rollup.level, rollup.group],
    }


def engine_of_checkpoints() -> str:
    return f"torch {torch.__version__}"


def open_checkpoint(path: Path) -> tuple[nn.Module, Header]:
    return load_quantized(path) if read_header(path).kind == "qat" else load(path)


def ask_checkpoint(network: nn.Module, header: Header) -> FloatArray:
    inputs = np.stack([prepare(frame, header.input) for frame in frames()])
    with torch.inference_mode():
        logits: FloatArray = network.eval()(torch.from_numpy(inputs)).numpy()
    return logits


@contextlib.contextmanager
def open_artifact(model: Path) -> Iterator[Classifier]:
    """Open an artifact, its signature checked where it has one, and prove it; a plan on the simulated device."""
    key = BEFORE / "public.pem" if model.parent.name == SIGNED else None
    with contextlib.ExitStack() as stack:
        if model.suffix == ".plan":
            books = stack.enter_context(simulated_device())
            stack.callback(books.assert_clean)
        yield stack.enter_context(Classifier(model, threads=1, verify=True, trusted_key=key))


def model_of(name: str) -> Path:
    return BEFORE / "artifacts" / name / str(EXPECTED["artifacts"][name]["manifest"]["model"])


def engine_of(classifier: Classifier) -> str:
    """Name what computes; of a simulated plan that is ONNX Runtime."""
    beneath = f", onnxruntime {onnxruntime.__version__}" if classifier.path.suffix == ".plan" else ""
    return classifier.runtime_version + beneath


def is_same_machine(engine: str, expected: str) -> bool:
    """Whether the logits must be equal: the engine's version and the processor's instructions are those of then."""
    return engine == expected and instruction_sets() == EXPECTED["instructions"]


def assert_near(found: FloatArray, expected: FloatArray, tolerance: float) -> None:
    """Compare logits, ``float32 [N, classes]``, and the best class where that is no tie; tolerance in logits."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 2 * tolerance
    np.testing.assert_array_equal(found.argmax(axis=1)[clear], expected.argmax(axis=1)[clear])


def test_every_file_is_expected_and_the_folder_is_small() -> None:
    checkpoints = {path.stem for path in (BEFORE / "checkpoints").iterdir()}
    artifacts = {path.name for path in (BEFORE / "artifacts").iterdir()}
    assert checkpoints == EXPECTED["checkpoints"].keys()
    assert artifacts == EXPECTED["artifacts"].keys()
    for kind, names in (("checkpoints", checkpoints), ("artifacts", artifacts)):
        for name in names:
            assert len(np.unique(expected_logits(kind, name).argmax(axis=1))) > 1, f"{name} says one class always"
    assert sum(path.stat().st_size for path in BEFORE.rglob("*") if "__pycache__" not in path.parts) < 8e6


@pytest.mark.parametrize("name", sorted(EXPECTED["checkpoints"]))
def test_a_checkpoint_loads_and_predicts_as_before(name: str) -> None:
    wanted, expected = EXPECTED["checkpoints"][name], expected_logits("checkpoints", name)
    network, header = open_checkpoint(BEFORE / "checkpoints" / f"{name}.safetensors")
    assert describe_header(header) == wanted["header"]
    share = NEAR if is_same_machine(engine_of_checkpoints(), wanted["engine"]) else INT8 if name in QAT else FP32
    assert_near(ask_checkpoint(network, header), expected, share * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", sorted(EXPECTED["artifacts"]))
def test_an_artifact_opens_and_predicts_as_before(name: str) -> None:
    wanted, expected = EXPECTED["artifacts"][name], expected_logits("artifacts", name)
    with open_artifact(model_of(name)) as classifier:
        found = [classifier.predict(frame) for frame in frames()]
        together = classifier.predict_batch(frames())
        manifest, engine = classifier.manifest, engine_of(classifier)
    assert describe_manifest(manifest) == wanted["manifest"]
    assert manifest.golden is not None
    same = is_same_machine(engine, wanted["engine"])
    tolerance = NEAR * float(np.abs(expected).max()) if same else manifest.golden.logits
    for predictions in (found, together):
        assert_near(np.stack([prediction.logits for prediction in predictions]), expected, tolerance)
    for prediction, answer in zip(found, wanted["answers"], strict=True):
        # A softmax moves by no more than its logits do.
        assert prediction.confidence == pytest.approx(answer["confidence"], abs=tolerance / manifest.output.temperature)
        if same:
            assert describe_prediction(prediction) == answer | {"confidence": prediction.confidence}


def test_the_old_signature_is_still_of_the_old_manifest(tmp_path: Path) -> None:
    folder = shutil.copytree(BEFORE / "artifacts" / SIGNED, tmp_path / SIGNED)
    manifest = folder / "model.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"disc"', b'"disk"'))
    with pytest.raises(IntegrityError, match="signature"):
        Classifier(folder / "model.onnx", trusted_key=BEFORE / "public.pem")


@pytest.mark.parametrize("name", QAT)
def test_a_quantised_checkpoint_is_still_told_from_others(name: str) -> None:
    with pytest.raises(CheckpointError, match="is a quantised network"):
        load(BEFORE / "checkpoints" / f"{name}.safetensors")
