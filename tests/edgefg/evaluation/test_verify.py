"""`verify` proves what holds, names what does not, and runs without torch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgefg import Classifier
from edgefg.artifact import golden
from edgefg.artifact.manifest import Manifest, Provenance
from edgefg.errors import DataError, GateError, IntegrityError, ManifestError, ParityError
from edgefg.evaluation.verify import VerifyReport, examine, verify
from edgefg.preprocess import UInt8Array
from edgefg.settings.gate import Gate
from tests.conftest import Tiny

LABELS = ("bar", "cross", "disc", "pair")


@pytest.fixture
def folder(birds: tuple[tuple[str, ...], list[UInt8Array]], tmp_path: Path) -> Path:
    """Sixteen birds as ``val/<class>/*.png``."""
    for i, (label, frame) in enumerate(zip(*birds, strict=True)):
        path = tmp_path / "birds" / "val" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), frame)
    return tmp_path / "birds"


def test_an_artifact_alone(tiny: Tiny) -> None:
    report = verify(tiny("onnx"))
    assert report.files == 2
    assert report.golden.frames >= 1
    assert (report.accuracy, report.comparison) == (None, None)
    assert "2 files as recorded, on onnxruntime" in report.render()


def test_accuracy_without_a_parent(tiny: Tiny, folder: Path) -> None:
    accuracy = verify(tiny("onnx"), data=folder).accuracy
    assert accuracy is not None
    assert (accuracy.images, accuracy.data) == (16, "val of birds")
    assert accuracy.top1_low < accuracy.top1 <= accuracy.top1_high
    assert accuracy.top1 > 0.5


def test_data_that_are_split_here_must_be_those_of_training(
    tiny: Tiny, folder: Path, rewrite: Callable[..., Manifest]
) -> None:
    from edgefg.data import load_dataset
    from edgefg.settings.split import SplitSpec

    flat, spec = folder / "val", SplitSpec(seed=2, val=0.3, test=0.3)
    next((flat / "disc").iterdir()).write_bytes(b"cut off")
    trained = load_dataset(flat, spec, skip_corrupt=True)
    model = tiny("onnx")
    rewrite(model, provenance=Provenance(edgefg="0", parent="0", dataset=trained.fingerprint, split=spec))
    accuracy = verify(model, data=flat).accuracy
    assert accuracy is not None
    assert accuracy.images == len(trained.splits["val"])
    next((flat / "bar").iterdir()).unlink()
    with pytest.raises(DataError, match="has changed since the artifact was trained"):
        verify(model, data=flat)


def test_two_engines_agree(tiny: Tiny, folder: Path) -> None:
    gate = Gate(max_drop=0, max_flips=0, min_agreement=1)
    report = verify(tiny("ir"), parent=tiny("onnx"), data=folder, gate=gate)
    found = report.comparison
    assert found is not None
    assert (found.drop, found.agreement, found.worst) == (0, 1, ())
    assert found.logits <= 1e-4 * found.parent_logits_max
    assert found.parent == report.accuracy
    assert msgspec.json.decode(msgspec.json.encode(report), type=VerifyReport) == report
    assert "top-1 agreement 100.00%" in report.render()


@pytest.fixture
def worse(tiny: Tiny, rewrite: Callable[..., Manifest]) -> Path:
    """An artifact of a network that never says ``disc``; it is true to itself, not to its parent."""
    model = tiny("onnx")
    proto = onnx.load(model)
    bias = next(tensor for tensor in proto.graph.initializer if list(tensor.dims) == [4])
    values = numpy_helper.to_array(bias) - np.array([0, 0, 50, 0], np.float32)
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(proto, model)
    info = rewrite(model).golden
    assert info is not None
    path = model.with_name(info.file)
    recorded = golden.read(path)
    with Classifier(model) as classifier:
        rows = classifier.predict_batch(list(recorded.inputs), color="rgb")
    logits = np.stack([row.logits for row in rows])
    golden.write(golden.GoldenSet(recorded.frames, recorded.inputs, logits, logits), path)
    rewrite(model)
    return model


OPEN = Gate(max_drop=100, max_class_drop=100, max_flips=100)
"""Limits that hold whatever happens."""


def test_lost_class_fails_and_is_named(tiny: Tiny, worse: Path, folder: Path) -> None:
    parent = tiny("ir")
    with pytest.raises(GateError, match=r"top-1 drops by .* points .*16 images.*allowed are 1; worst class: disc"):
        verify(worse, parent=parent, data=folder)
    with pytest.raises(GateError, match=r"agree on .* required are 99\.00%; worst class: disc"):
        verify(worse, parent=parent, data=folder, gate=msgspec.structs.replace(OPEN, min_agreement=0.99))
    report = verify(worse, parent=parent, data=folder, gate=OPEN)
    assert report.comparison is not None
    worst = report.comparison.worst[0]
    assert (worst.label, worst.images, worst.recall) == ("disc", 4, 0)
    assert worst.parent_recall > 0
    assert report.comparison.drop == pytest.approx(100 * worst.parent_recall * 4 / 16, abs=13)
    assert "disc: recall" in report.render()


def test_a_lost_class_fails_though_the_mean_hardly_drops(tiny: Tiny, worse: Path, folder: Path) -> None:
    gate = msgspec.structs.replace(OPEN, max_class_drop=10)
    with pytest.raises(GateError, match=r"a class loses more than 10 points of recall on val .*: disc: recall"):
        verify(worse, parent=tiny("ir"), data=folder, gate=gate)


def test_examine_tells_everything_where_the_gate_fails(tiny: Tiny, worse: Path, folder: Path) -> None:
    report = examine(worse, parent=tiny("ir"), data=folder)
    found = report.comparison
    assert found is not None
    assert [failure.split()[0] for failure in report.failures] == ["top-1", "a", str(found.lost)]
    assert found.gate == Gate()
    assert found.lost > found.gained
    assert {flip.label for flip in found.flips} == {"disc"}
    assert sum(flip.images for flip in found.flips) == found.lost
    assert f"flips: disc → {found.flips[0].predicted}" in report.render()
    assert examine(worse, data=folder).failures == ()


def test_the_command_tells_everything_whether_the_gate_holds_or_not(
    tiny: Tiny, worse: Path, folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    command = ("verify", worse, "--parent", tiny("ir"), "--data", folder)
    status, out, err = run(*command, "--json")
    report = msgspec.json.decode(out, type=VerifyReport)
    assert status == 1
    assert report == examine(worse, parent=tiny("ir"), data=folder)
    assert err.count("\n") == 1
    assert "model.onnx does not pass the gate: top-1 drops by" in err
    assert "disc: recall" in err
    status, out, err = run(*command, "--max-drop", 100, "--max-class-drop", 100, "--max-flips", 100, "--json")
    report = msgspec.json.decode(out, type=VerifyReport)
    assert (status, err, report.failures) == (0, "", ())
    assert report.comparison is not None
    assert report.comparison.gate == OPEN
    status, out, err = run(*command, "--max-flips", 100)
    assert status == 1
    assert "flips: disc → " in out, "people see the figures too"


def test_improvement_is_a_negative_drop(tiny: Tiny, worse: Path, folder: Path) -> None:
    report = verify(tiny("ir"), parent=worse, data=folder, gate=Gate(max_drop=0))
    assert report.comparison is not None
    assert report.comparison.drop < 0


def test_altered_file(tiny: Tiny) -> None:
    model = tiny("onnx")
    data = bytearray(model.read_bytes())
    data[-20] ^= 1
    model.write_bytes(data)
    with pytest.raises(IntegrityError, match="was altered"):
        verify(model)


def test_altered_golden_set(tiny: Tiny, rewrite: Callable[..., Manifest]) -> None:
    model = tiny("onnx")
    path = next(model.parent.glob("*.npz"))
    recorded = golden.read(path)
    golden.write(golden.GoldenSet(recorded.frames, recorded.inputs, recorded.parent_logits, recorded.logits + 1), path)
    with pytest.raises(IntegrityError, match=path.name):
        verify(model)
    rewrite(model)
    with pytest.raises(ParityError, match="against the artifact's own logits"):
        verify(model)


def test_artifact_without_golden_set(tiny: Tiny, rewrite: Callable[..., Manifest]) -> None:
    model = tiny("onnx")
    rewrite(model, golden=None)
    with pytest.raises(ManifestError, match="no golden set"):
        verify(model)


def test_parent_of_other_classes(tiny: Tiny, folder: Path, rewrite: Callable[..., Manifest]) -> None:
    parent = tiny("ir")
    rewrite(parent, labels=LABELS[::-1])
    with pytest.raises(DataError, match="same classes in the same order"):
        verify(tiny("onnx"), parent=parent, data=folder)


def test_parent_without_data(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="without --data"):
        verify(tiny("onnx"), parent=tiny("ir"))


def test_runs_where_torch_and_onnx_are_not(
    tiny: Tiny, folder: Path, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import sys; from pathlib import Path; from edgefg.evaluation.verify import verify;"
        "import edgefg.evaluation.package;"
        "print(verify(Path(sys.argv[1]), data=Path(sys.argv[2])).accuracy.images)"
    )
    done = python(code, tiny("onnx"), folder, blocked=("torch", "onnx", "openvino", "tqdm", "timm", "nncf"))
    assert (done.stdout.strip(), done.stderr) == ("16", "")
