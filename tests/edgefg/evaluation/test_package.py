"""Artifacts appear whole or not at all, and what they say of themselves holds."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.artifact import golden
from edgefg.artifact.manifest import Provenance, read_manifest
from edgefg.errors import ExportError, RuntimeUnavailableError
from edgefg.evaluation.package import Draft, golden_frames, write_artifact
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from tests.conftest import TINY

Write = Callable[[Path], Path]
LABELS = ("bar", "cross", "disc", "pair")
SPEC = InputSpec(height=64, width=64)


def _copy(name: str) -> Write:
    """Return a `write_model` that writes the committed tiny network."""

    def write(folder: Path) -> Path:
        for suffix in {"ir": (".xml", ".bin")}.get(name, (".onnx",)):
            shutil.copyfile(TINY / name / f"model{suffix}", folder / f"model{suffix}")
        return folder / ("model.xml" if name == "ir" else "model.onnx")

    return write


@pytest.fixture
def draft(birds: tuple[tuple[str, ...], list[UInt8Array]]) -> Draft:
    frames = golden_frames(birds[1], SPEC, len(LABELS))
    with Classifier(TINY / "onnx" / "model.onnx") as parent:
        rows = parent.predict_batch([prepare(frame, SPEC) for frame in frames], color="rgb")
    return Draft(
        labels=LABELS,
        input=SPEC,
        precision="fp32",
        provenance=Provenance(edgefg="0", parent="a" * 64, recipe="test"),
        frames=frames,
        parent_logits=np.stack([row.logits for row in rows]),
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["onnx", "ir", "onnx-batch4", "onnx-dynamic"])
def test_artifact_is_complete_and_proves_itself(name: str, draft: Draft, tmp_path: Path) -> None:
    model = write_artifact(tmp_path / "new" / "a", draft, _copy(name))
    expected = {"model.xml", "model.bin"} if name == "ir" else {"model.onnx"}
    assert {path.name for path in model.parent.iterdir()} == expected | {"model.json", "model.golden.npz"}
    assert _names(tmp_path / "new") == ["a"]
    with Classifier(model, verify=True) as classifier:
        manifest = classifier.manifest
        assert (manifest.runtime.name, manifest.labels) == ("openvino" if name == "ir" else "onnxruntime", LABELS)
        assert f"{manifest.runtime.name} {manifest.runtime.version}" == classifier.runtime_version
    assert {file.name for file in manifest.files} == expected | {"model.golden.npz"}
    assert manifest.golden is not None
    assert manifest.golden.frames == len(draft.frames)
    largest = np.abs(draft.parent_logits).max()
    assert 1e-4 * largest < manifest.golden.parent_logits < 3e-4 * largest


def test_files_may_be_read_by_others(draft: Draft, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        model = write_artifact(tmp_path / "a", draft, _copy("onnx"))
    finally:
        os.umask(mask)
    assert model.parent.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in model.parent.iterdir())


def test_earlier_artifact_is_replaced(draft: Draft, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", draft, _copy("ir"))
    model = write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert {path.name for path in model.parent.iterdir()} == {"model.onnx", "model.json", "model.golden.npz"}
    assert _names(tmp_path) == ["a"]
    Classifier(model, verify=True).close()


def test_broken_artifact_may_be_replaced(draft: Draft, tmp_path: Path) -> None:
    model = write_artifact(tmp_path / "a", draft, _copy("onnx"))
    model.with_suffix(".json").write_text("{")
    write_artifact(tmp_path / "a", draft, _copy("onnx"))
    Classifier(model, verify=True).close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda out: (out.mkdir(), (out / "thesis.tex").write_text("x")),
            r"not an artifact \(it holds thesis.tex\)",
        ),
        (
            lambda out: (out.mkdir(), (out / "model.onnx").write_text("x")),
            r"not an artifact \(it holds model.onnx\)",
        ),
        (lambda out: out.write_text("x"), "is a file or a link"),
        (lambda out: out.symlink_to("elsewhere"), "is a file or a link"),
    ],
)
def test_what_is_no_artifact_is_left_alone(
    make: Callable[[Path], object], message: str, draft: Draft, tmp_path: Path
) -> None:
    make(tmp_path / "a")
    before = _contents(tmp_path)
    with pytest.raises(ExportError, match=message):
        write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert _contents(tmp_path) == before


def test_folder_that_cannot_be_made(draft: Draft, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot create a folder"):
        write_artifact(tmp_path / "file" / "a", draft, _copy("onnx"))


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refused(*_: Any, **__: Any) -> None:
    raise RuntimeUnavailableError("the engine refused the model")


@pytest.mark.parametrize(
    ("where", "failure", "message"),
    [
        ("edgefg.evaluation.package.golden.write", _full, "No space left on device"),
        ("edgefg.artifact.folder.sync", _full, "No space left on device"),
        ("edgefg.evaluation.package.encode_manifest", _full, "No space left on device"),
        ("edgefg.evaluation.package.Classifier", _refused, "the engine refused the model"),
        ("pathlib.Path.rename", _full, "No space left on device"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_failure_changes_nothing(
    where: str, failure: Callable[..., None], message: str, earlier: bool,
    draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if earlier:
        write_artifact(tmp_path / "a", draft, _copy("ir"))
    before = _contents(tmp_path)
    monkeypatch.setattr(where, failure)
    with pytest.raises(ExportError, match=message) as caught:
        write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert "\n" not in str(caught.value)
    assert _contents(tmp_path) == before
    assert _names(tmp_path) == (["a"] if earlier else [])


def test_last_rename_fails_and_the_earlier_artifact_is_back(
    draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "a", draft, _copy("ir"))
    before, rename, calls = _contents(tmp_path), Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(self)
        return _full() if len(calls) == 2 else rename(self, target)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(ExportError, match="nothing was changed"):
        write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert len(calls) == 3
    assert (_contents(tmp_path), _names(tmp_path)) == (before, ["a"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the kernel refuse to write any file beyond 20 kB, as a full disk would, C++ included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_that_the_kernel_refuses(draft: Draft, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(ExportError, match="cannot write"):
        write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert _names(tmp_path) == []


def test_half_written_weights_are_noticed(draft: Draft, tmp_path: Path) -> None:
    """A writer that ignores a full disk leaves zeros where weights should be."""

    def write(folder: Path) -> Path:
        model = _copy("ir")(folder)
        data = model.with_suffix(".bin").read_bytes()
        model.with_suffix(".bin").write_bytes(data[:1000] + bytes(4000) + data[5000:])
        return model

    with pytest.raises(ExportError, match="deviates from its parent"):
        write_artifact(tmp_path / "a", draft, write)
    assert _names(tmp_path) == []


def test_parent_of_another_network_is_noticed(draft: Draft, tmp_path: Path) -> None:
    other = msgspec.structs.replace(draft, parent_logits=draft.parent_logits + 0.1)
    with pytest.raises(ExportError, match="FP32 artifact deviates"):
        write_artifact(tmp_path / "a", other, _copy("onnx"))
    model = write_artifact(tmp_path / "a", msgspec.structs.replace(other, precision="int8"), _copy("onnx"))
    tolerances = read_manifest(model).golden
    assert tolerances is not None
    largest = np.abs(other.parent_logits).max()
    assert tolerances.logits == pytest.approx(0.02 * largest)
    assert tolerances.parent_logits == pytest.approx(0.02 * largest + 0.15, rel=1e-3)


def test_logits_that_are_not_finite_are_noticed(draft: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Classifier.predict_batch

    def broken(self: Classifier, *args: Any, **options: Any) -> object:
        rows = predict(self, *args, **options)
        rows[0].logits[0] = np.nan
        return rows

    monkeypatch.setattr(Classifier, "predict_batch", broken)
    with pytest.raises(ExportError, match="not finite"):
        write_artifact(tmp_path / "a", draft, _copy("onnx"))


def test_golden_frames_are_reduced_and_few() -> None:
    big = [np.random.default_rng(i).integers(0, 256, (600, 800, 3), np.uint8) for i in range(20)]
    frames = golden_frames(big, SPEC, 4)
    assert len(frames) == 16
    assert {frame.shape for frame in frames} == {(72, 96, 3)}
    small = [np.zeros((10, 20, 3), np.uint8)]
    assert golden_frames(small, SPEC, 4)[0].shape == (10, 20, 3)
    large = golden_frames(big, InputSpec(height=224, width=224), 1000)
    assert 3 <= len(large) < 16
    with pytest.raises(ExportError, match="no frame fits"):
        golden_frames(big, InputSpec(height=2000, width=2000), 4)


def test_golden_set_stays_under_its_limit(draft: Draft, tmp_path: Path) -> None:
    model = write_artifact(tmp_path / "a", draft, _copy("onnx"))
    assert (model.parent / "model.golden.npz").stat().st_size < golden.MAX_BYTES
