"""ONNX artifacts that plans are built from: which are taken, and which files may be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgefg.artifact.manifest import manifest_path, read_manifest
from edgefg.errors import DataError, IntegrityError, ManifestError
from edgefg.export.tensorrt.sources import Source, copy_source, folder_for, keep_other_artifacts, read_sources
from tests.export.tensorrt.test_build import copy


def test_those_of_a_precision_are_taken(tmp_path: Path) -> None:
    fp32 = copy("onnx", tmp_path / "a")
    int8 = copy("onnx", tmp_path / "b", precision="int8")
    assert [source.model for source in read_sources([fp32, int8], "auto", None)] == [fp32, int8]
    assert [source.model for source in read_sources([fp32, int8], "int8", None)] == [int8]
    source = read_sources([fp32], "auto", None)[0]
    assert source.file == read_manifest(fp32).files[0]


def test_what_cannot_be_built_from(tmp_path: Path) -> None:
    model = copy("onnx", tmp_path / "a")
    with pytest.raises(DataError, match=r"model\.json is not an ONNX file; give the model\.onnx"):
        read_sources([manifest_path(model)], "auto", None)
    with pytest.raises(ManifestError, match="no golden set to prove a plan with"):
        read_sources([copy("onnx", tmp_path / "b", golden=None)], "auto", None)
    model.write_bytes(b"altered")
    with pytest.raises(IntegrityError):
        read_sources([model], "auto", None)


def test_the_folder_of_the_plan(tmp_path: Path) -> None:
    sources = read_sources([copy("onnx", tmp_path / name) for name in ("a", "b")], "auto", None)
    assert folder_for(sources[:1], None) == tmp_path / "a"
    assert folder_for(sources, tmp_path / "out") == tmp_path / "out"
    with pytest.raises(DataError, match="name a folder for the plan by --out"):
        folder_for(sources, None)


def test_a_copy_is_whole_and_replaces_only_its_like(tmp_path: Path) -> None:
    source = read_sources([copy("onnx", tmp_path / "a")], "auto", None)[0]
    out = tmp_path / "out"
    out.mkdir()
    copy_source(source, out, tmp_path / "staging")
    assert {path.name for path in out.iterdir()} == {"model.onnx", "model.json", "golden.npz"}
    keep_other_artifacts([source], out)  # the same bytes may be replaced
    (out / "model.onnx").write_bytes(b"of the user")
    with pytest.raises(DataError, match=r"out/model\.onnx is another artifact's, which would be replaced"):
        keep_other_artifacts([source], out)


def test_in_its_own_folder_nothing_is_copied(tmp_path: Path) -> None:
    model = copy("onnx", tmp_path / "a")
    copy_source(Source(model, read_manifest(model)), model.parent, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()
