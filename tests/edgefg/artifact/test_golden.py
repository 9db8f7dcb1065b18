"""The golden set: it passes where all is well, and a failure names the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgefg import Classifier, ManifestError
from edgefg.artifact import golden as golden_sets
from edgefg.artifact.golden import MAX_BYTES, GoldenSet, check, choose_frames, read, write
from edgefg.artifact.manifest import Manifest, OutputSpec
from edgefg.decision import decide
from edgefg.errors import ParityError
from edgefg.preprocess import InputSpec
from tests.conftest import MODELS, TINY, Tiny

Rewrite = Callable[..., Manifest]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "onnx-dynamic"])
def test_committed_artifacts_prove_themselves(name: str) -> None:
    with Classifier(TINY / MODELS[name], threads=1, verify=True) as classifier:
        report = check(classifier)
        info = classifier.manifest.golden
    assert info is not None
    assert report.frames == info.frames == 2
    assert report.input_levels <= info.input_levels
    assert report.logits <= info.logits
    assert report.parent_logits <= info.parent_logits


@pytest.fixture
def spoil(tiny: Tiny, rewrite: Rewrite) -> Callable[..., Path]:
    """An artifact whose golden set was changed, hashes and all."""

    def change(name: str = "onnx", **fields: Any) -> Path:
        model = tiny(name)
        path = model.parent / "golden.npz"
        golden = read(path)
        write(
            msgspec.structs.replace(golden, **{key: value(getattr(golden, key)) for key, value in fields.items()}), path
        )
        rewrite(model)
        return model

    return change


@pytest.mark.parametrize("name", ["onnx", "ir", "null"])
@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("inputs", lambda x: x ^ 2, r"^preprocess: deviates by \d+ levels of the network input, allowed are 1"),
        ("logits", lambda x: x + 0.002, r"^engine: .* against the artifact's own logits, allowed are 0\.001"),
        ("logits", lambda x: x * np.nan, r"^engine: deviates by nan against the artifact's own"),
        ("parent_logits", lambda x: x - 0.02, r"^engine: .* against the FP32 parent's logits, allowed are 0\.01"),
    ],
)
def test_the_failed_step_is_named(
    name: str, field: str, change: Callable[[Any], Any], message: str, spoil: Callable[..., Path]
) -> None:
    with pytest.raises(ParityError, match=message):
        Classifier(spoil(name, **{field: change}), verify=True)


def test_weights_of_8_bits_are_named_where_they_may_saturate(spoil: Callable[..., Path], rewrite: Rewrite) -> None:
    model = spoil("ir", logits=lambda x: x + 0.002)
    for precision, named in (("int8", True), ("fp32", False)):
        rewrite(model, precision=precision)
        with pytest.raises(ParityError) as deviates:
            Classifier(model, verify=True)
        assert ("or export with --reduce-range for an x86 CPU without VNNI" in str(deviates.value)) == named


def test_one_level_of_the_input_is_tolerated(spoil: Callable[..., Path]) -> None:
    model = spoil("null", inputs=lambda x: x ^ 1)
    with Classifier(model, verify=True) as classifier:
        assert check(classifier).input_levels == 1


@pytest.mark.parametrize(("tolerance", "message"), [("logits", "own logits"), ("parent_logits", "parent's logits")])
def test_the_tolerances_are_the_manifests(tolerance: str, message: str, tiny: Tiny, rewrite: Rewrite) -> None:
    model = tiny("null")
    path = model.parent / "golden.npz"
    golden = read(path)
    write(msgspec.structs.replace(golden, **{tolerance: getattr(golden, tolerance) + np.float32(5e-4)}), path)
    info = rewrite(model).golden
    assert info is not None
    Classifier(model, verify=True).close()
    rewrite(model, golden=msgspec.structs.replace(info, **{tolerance: 1e-4}))
    with pytest.raises(ParityError, match=message):
        Classifier(model, verify=True)


def test_altered_temperature_is_no_matter_of_the_engine(tiny: Tiny, rewrite: Rewrite) -> None:
    model = tiny("onnx")
    rewrite(model, output=OutputSpec(temperature=3.0))
    Classifier(model, verify=True).close()


def test_a_wrong_decision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(logits: Any, *arguments: Any) -> Any:
        found = decide(logits, *arguments)
        return msgspec.structs.replace(found, index=int(logits.argmin()))

    monkeypatch.setattr("edgefg.classifier.decide", swapped)
    with pytest.raises(ParityError, match=r"^decision: class \d instead of \d"):
        Classifier(TINY / MODELS["onnx"], verify=True)


def test_a_preprocessing_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_sets, "prepare", lambda frame, spec: np.zeros((spec.height, spec.width, 3), np.uint8))
    with pytest.raises(ParityError, match=r"^preprocess"):
        Classifier(TINY / MODELS["onnx"], verify=True)


def test_an_engine_that_gives_nan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(_: object, batch: Any) -> Any:
        return np.full((len(batch), 4), np.nan, np.float32)

    monkeypatch.setattr("edgefg.runtimes.onnxruntime.OnnxRuntime.infer", nan)
    with pytest.raises(ParityError, match=r"^engine: .*not finite"):
        Classifier(TINY / MODELS["onnx"], verify=True)


def test_an_artifact_without_golden_set(tiny: Tiny, rewrite: Rewrite) -> None:
    model = tiny("null")
    rewrite(model, golden=None)
    Classifier(model).close()
    with pytest.raises(ManifestError, match="no golden set; export it again"):
        Classifier(model, verify=True)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("inputs", lambda x: x[:1]),
        ("inputs", lambda x: x[:, :32]),
        ("inputs", lambda x: x.astype(np.float32)),
        ("inputs", lambda x: x[0, 0]),
        ("logits", lambda x: x[:1]),
        ("logits", lambda x: x[0]),
        ("parent_logits", lambda x: x[:, :2]),
        ("frames", lambda x: x[:1]),
        ("frames", lambda x: ()),
    ],
)
def test_arrays_that_do_not_belong_together(
    field: str, change: Callable[[Any], Any], spoil: Callable[..., Path]
) -> None:
    with pytest.raises(ManifestError, match="belong together"):
        Classifier(spoil("null", **{field: change}), verify=True)


def test_cut_off_or_altered_golden_file(tmp_path: Path) -> None:
    whole = (TINY / "onnx" / "golden.npz").read_bytes()
    path = tmp_path / "golden.npz"
    for end in range(0, len(whole), 997):
        path.write_bytes(whole[:end])
        with pytest.raises(ManifestError, match="is not a golden set"):
            read(path)
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(whole), 150).tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= int(rng.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            read(path)
        except ManifestError:
            refused += 1
    assert refused > 100  # the rest are bytes that the format does not use, dates for instance


def test_what_is_no_golden_set(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    with pytest.raises(ManifestError, match="is not a golden set"):
        read(path)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "plain.npy").rename(path)
    with pytest.raises(ManifestError, match="is not a golden set"):
        read(path)
    np.savez(path, inputs=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ManifestError, match="is not a golden set"):
        read(path)


def test_round_trip_keeps_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = tuple(rng.integers(0, 256, (5, 4 + i, 3), np.uint8) for i in range(12))
    inputs = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    logits = rng.normal(size=(12, 3)).astype(np.float32)
    write(GoldenSet(frames, inputs, logits, logits * 2), tmp_path / "golden.npz")
    found = read(tmp_path / "golden.npz")
    for one, other in zip(found.frames, frames, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.inputs, inputs)
    np.testing.assert_array_equal(found.parent_logits, logits)
    np.testing.assert_array_equal(found.logits, logits * 2)


def test_chosen_frames_stay_under_the_limit(tmp_path: Path) -> None:
    spec = InputSpec(height=224, width=224)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (224, 300, 3), np.uint8) for _ in range(12)]
    chosen = choose_frames(frames, spec, 81)
    assert 3 <= len(chosen) < 12
    noise = rng.integers(0, 256, (len(chosen), 224, 224, 3), np.uint8)
    logits = rng.normal(size=(len(chosen), 81)).astype(np.float32)
    write(GoldenSet(chosen, noise, logits, logits), tmp_path / "golden.npz")
    assert (tmp_path / "golden.npz").stat().st_size <= MAX_BYTES
    assert choose_frames(frames[:2], spec, 81) == tuple(frames[:2])
