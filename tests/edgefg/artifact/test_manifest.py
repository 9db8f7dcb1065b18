"""The manifest: round trip, and every way of being broken said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefg import Classifier, IntegrityError, ManifestError
from edgefg.artifact.hashes import FileInfo, file_info, sha256
from edgefg.artifact.manifest import (
    SCHEMA,
    Accuracy,
    ClassDrop,
    Comparison,
    Flip,
    GoldenInfo,
    Manifest,
    OutputSpec,
    Provenance,
    RuntimeInfo,
    TemperatureScaling,
    check_artifact,
    decode_manifest,
    encode_manifest,
    read_manifest,
)
from edgefg.metrics import score
from edgefg.preprocess import InputSpec
from edgefg.settings.gate import Gate
from edgefg.taxonomy import TaxonomyLevel
from tests.conftest import MODELS, TINY, Tiny

PATH = Path("model.json")

shares = st.floats(0, 1)
points = st.floats(-100, 100)
finite = st.floats(0, 1e6)
counts = st.integers(1, 10**6)
texts = st.text(st.characters(codec="utf-8"), max_size=12)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\\\x00"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..")
)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)


accuracies = st.builds(
    Accuracy, data=texts, images=counts, top1=shares, top1_low=shares, top1_high=shares, balanced=shares
)
scalings = st.builds(
    TemperatureScaling, data=texts, images=counts, parts=st.integers(0, 9), ece_before=shares, ece_after=shares,
    nll_before=finite, nll_after=finite, unchanged=texts,
)  # fmt: skip
drops = st.builds(ClassDrop, label=texts, images=counts, parent_recall=shares, recall=shares, chance=shares)
comparisons = st.builds(
    Comparison, parent=accuracies, drop=points, drop_low=points, drop_high=points, drop_error=finite,
    lost=st.integers(0, 99), gained=st.integers(0, 99), mcnemar_p=shares, agreement=shares, logits=finite,
    parent_logits_max=finite, worst=st.lists(drops, max_size=2).map(tuple),
    flips=st.lists(st.builds(Flip, label=texts, predicted=texts, images=counts), max_size=2).map(tuple),
    gate=st.none() | st.builds(Gate, max_drop=points, max_class_drop=st.floats(0, 100), min_agreement=shares),
)  # fmt: skip


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    labels = tuple(draw(st.lists(texts, min_size=1, max_size=5, unique=True)))
    files = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    golden = GoldenInfo(
        file=files[1], frames=draw(st.integers(1, 9)), logits=draw(st.floats(1e-6, 1)), parent_logits=0.5
    )
    groups = st.lists(texts, min_size=len(labels), max_size=len(labels)).map(tuple)
    return Manifest(
        schema=SCHEMA,
        model=files[0],
        labels=labels,
        input=InputSpec(
            height=draw(st.integers(1, 8192)),
            width=draw(st.integers(1, 8192)),
            crop=draw(st.sampled_from(["center", "none"])),
            crop_fraction=draw(st.floats(0.01, 1)),
        ),
        output=OutputSpec(
            temperature=draw(st.floats(1e-3, 1e3)),
            reject_threshold=draw(st.none() | shares),
            reject_risk=draw(st.none() | shares),
        ),
        precision=draw(st.sampled_from(["fp32", "fp16", "int8"])),
        runtime=RuntimeInfo(name=draw(texts), version=draw(texts)),
        files=tuple(FileInfo(name=n, size=draw(st.integers(0, 2**40)), sha256=draw(digests)) for n in files),
        golden=draw(st.none() | st.just(golden)),
        provenance=Provenance(edgefg=draw(texts), parent=draw(texts), teacher=draw(st.none() | texts)),
        accuracy=draw(st.none() | accuracies),
        temperature_scaling=draw(st.none() | scalings),
        comparison=draw(st.none() | comparisons),
        taxonomy=tuple(draw(st.lists(st.builds(TaxonomyLevel, name=texts, groups=groups), max_size=2))),
    )  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(manifests())
def test_round_trip(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    assert decode_manifest(data, PATH, manifest.model) == manifest
    assert data.endswith(b"}\n")


@pytest.fixture
def fields() -> dict[str, Any]:
    """A whole manifest's fields, to spoil."""
    found: dict[str, Any] = json.loads((TINY / "onnx" / "model.json").read_bytes())
    return found


def _refused(fields: object, model: str | None = "model.onnx") -> str:
    data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(ManifestError) as caught:
        decode_manifest(data, PATH, model)
    message = str(caught.value)
    assert "model.json" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", MODELS)
def test_committed_artifacts_are_whole(name: str) -> None:
    model = TINY / MODELS[name]
    manifest = read_manifest(model)
    check_artifact(manifest, model)
    assert manifest.labels == ("bar", "cross", "disc", "pair")


def test_cut_off_at_every_byte() -> None:
    whole = (TINY / "onnx" / "model.json").read_bytes()
    for end in range(len(whole.rstrip())):
        _refused(whole[:end])
    decode_manifest(whole.rstrip(), PATH)


@pytest.mark.parametrize("data", [b"\xff\xfe{}", b'{"schema": 1, "model": "\xe9"}', b"\x00" * 40, b"null", b"[]", b"7"])
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    _refused(data)


def test_non_utf8_inside_a_whole_manifest() -> None:
    whole = (TINY / "onnx" / "model.json").read_bytes()
    _refused(whole.replace(b'"cross"', b'"cr\xf6ss"'))


@pytest.mark.parametrize("others", ["kept", "changed", "gone"])
def test_a_later_schema_is_named_as_such(fields: dict[str, Any], others: str) -> None:
    later: dict[str, Any] = {
        "kept": fields,
        "changed": fields | {"labels": {"new": "shape"}, "future": [1], "files": None},
        "gone": {},
    }[others]
    message = _refused(later | {"schema": SCHEMA + 1})
    assert f"schema {SCHEMA + 1}" in message
    assert "upgrade edgefg" in message


@pytest.mark.parametrize("schema", [0, -1, None, "1", 1.5, True])
def test_schema_that_never_was(fields: dict[str, Any], schema: object) -> None:
    assert "upgrade" not in _refused(fields | {"schema": schema})


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["a", "a", "b", "c"]},
        {"labels": []},
        {"labels": ["a", 1]},
        {"taxonomy": [{"name": "level", "groups": ["a"]}]},
        {"precision": "int4"},
        {"unknown": 1},
        {"comparison": {}},
        {"temperature_scaling": {"data": "val", "images": 0}},
        {"output": {"temperature": 0}},
        {"output": {"temperature": -1}},
        {"output": {"reject_threshold": 1.5}},
        {"input": {"height": 64, "width": 64, "resize": "bicubic"}},
        {"files": []},
        {"model": "other.onnx"},
    ],
)
def test_inconsistent_fields(fields: dict[str, Any], change: dict[str, Any]) -> None:
    _refused(fields | change)


@pytest.mark.parametrize("field", ["model", "labels", "input", "precision", "runtime", "files", "provenance", "schema"])
def test_a_missing_field_is_named(fields: dict[str, Any], field: str) -> None:
    del fields[field]
    assert field in _refused(fields)


def test_a_manifest_of_another_model(fields: dict[str, Any]) -> None:
    assert "'model.onnx', not 'else.onnx'" in _refused(fields, "else.onnx")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..\\x", "a\x00b", "", ".", ".."])
@pytest.mark.parametrize("place", ["model", "file", "golden"])
def test_file_names_stay_in_the_folder(fields: dict[str, Any], name: str, place: str) -> None:
    if place == "model":
        fields["model"] = fields["files"][0]["name"] = name
    elif place == "file":
        fields["files"].append(fields["files"][0] | {"name": name})
    else:
        fields["golden"]["file"] = fields["files"][-1]["name"] = name
    _refused(fields, None)


def test_a_file_listed_twice_is_inconsistent(fields: dict[str, Any]) -> None:
    fields["files"].append(fields["files"][0] | {"size": 1})
    assert "twice" in _refused(fields)


def test_missing_manifest_and_missing_model(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("onnx")
    model.with_suffix(".json").unlink()
    with pytest.raises(ManifestError, match="is not there; copy the manifest"):
        Classifier(model)
    with pytest.raises(ManifestError, match="and neither is"):
        Classifier(tmp_path / "nothing.onnx")


def test_a_folder_instead_of_a_manifest(tiny: Tiny) -> None:
    model = tiny("onnx")
    model.with_suffix(".json").unlink()
    model.with_suffix(".json").mkdir()
    with pytest.raises(ManifestError, match="cannot read"):
        Classifier(model)


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_a_missing_file_of_an_ir(tiny: Tiny, suffix: str) -> None:
    model = tiny("ir")
    model.with_suffix(suffix).unlink()
    with pytest.raises(IntegrityError, match=rf"model\{suffix} is missing: .*model\.xml, model\.bin"):
        Classifier(model)


@pytest.mark.parametrize("file", ["model.xml", "model.bin", "golden.npz"])
def test_an_altered_file_never_reaches_the_engine(tiny: Tiny, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was loaded")

    monkeypatch.setattr("edgefg.classifier.load", never)
    model = tiny("ir")
    path = model.parent / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"SHA-256 .* altered"):
        Classifier(model)
    path.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=rf"{len(data) - 1} bytes, its manifest says {len(data)}"):
        Classifier(model)


def test_file_info(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_info(path) == FileInfo(name="abc", size=3, sha256=sha256(path))


def test_accuracy_by_hand() -> None:
    logits = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    found = Accuracy.of(score(logits, np.array([0, 0, 1, 0]), 2), "val of here")
    assert (found.data, found.images, found.top1, found.balanced) == ("val of here", 4, 0.5, 1 / 3)
    assert found.top1_low < 0.5 < found.top1_high
