"""Building plans, on the simulated device: the ladder, the caches, the choice between models, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from edgefg import Classifier, IntegrityError, RuntimeUnavailableError
from edgefg.artifact.manifest import OutputSpec, encode_manifest, manifest_path, read_manifest
from edgefg.artifact.signature import new_key, sign
from edgefg.errors import BuildError, DataError
from edgefg.export import tensorrt
from edgefg.export.tensorrt import build
from edgefg.export.tensorrt.build import build_engine
from edgefg.export.tensorrt.builder import settings_of
from edgefg.export.tensorrt.worker import BuildConfig
from tests.conftest import TINY, Run
from tests.simulated.books import Books
from tests.simulated.install import simulated_device
from tests.threads import run_together


def copy(kind: str, folder: Path, **fields: Any) -> Path:
    """Copy a tiny artifact and change its manifest."""
    shutil.copytree(TINY / kind, folder)
    model = folder / "model.onnx"
    manifest = msgspec.structs.replace(read_manifest(model), **fields)
    manifest_path(model).write_bytes(encode_manifest(manifest))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy("onnx", tmp_path / "artifact")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_plan_lies_beside_its_onnx(model: Path, device: Books) -> None:
    threshold = OutputSpec(temperature=1.5, reject_threshold=0.2)
    manifest = msgspec.structs.replace(read_manifest(model), output=threshold)
    manifest_path(model).write_bytes(encode_manifest(manifest))
    (model.parent / "notes.txt").write_text("a stranger's file stays")
    report = build_engine([model])
    assert names(model.parent) == [
        "engine.golden.npz", "engine.json", "engine.plan", "golden.npz", "model.json", "model.onnx", "notes.txt",
    ]  # fmt: skip
    plan, source = read_manifest(Path(report.plan)), read_manifest(model)
    for field in ("labels", "taxonomy", "input", "output", "precision"):
        assert getattr(plan, field) == getattr(source, field), field
    assert plan.provenance.parent == source.provenance.parent
    assert plan.plan is not None
    assert (plan.plan.gpu, plan.plan.compute_capability, plan.plan.tensorrt) == ("Simulated Orin", "8.7", "10.16.1.11")
    assert plan.plan.source == source.files[0]
    assert plan.runtime.name == "tensorrt"
    assert plan.accuracy is None  # the ONNX file's is not the plan's
    with Classifier(report.plan, verify=True) as classifier:
        assert classifier.predict(np.zeros((64, 64, 3), np.uint8)).label in classifier.labels


def test_building_again_keeps_the_plan_until_something_changed(model: Path, device: Books) -> None:
    assert not build_engine([model]).kept
    before = model.with_name("engine.plan").stat().st_mtime_ns
    assert build_engine([model]).kept
    assert model.with_name("engine.plan").stat().st_mtime_ns == before
    assert not build_engine([model], rebuild=True).kept
    assert not build_engine([model], settings=BuildConfig(hardware_compatible="ampere-plus")).kept
    assert not build_engine([model], settings=BuildConfig(optimization_level=4, workspace=512)).kept
    tensorrt.rebuild(model.with_name("engine.plan"))
    info = read_manifest(model.with_name("engine.plan")).plan
    assert info is not None
    assert (info.optimization_level, info.workspace) == (4, 512)
    model.with_name("engine.plan").write_bytes(b"cut off")
    assert not build_engine([model]).kept
    assert build_engine([model]).kept


def test_another_device_gets_another_plan(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with simulated_device():
        build_engine([model])
    with simulated_device(gpu="Simulated Xavier", compute_capability=(7, 2), major=11) as books:
        report = build_engine([model])
        books.assert_clean()
    assert not report.kept
    assert (report.gpu, report.tensorrt) == ("Simulated Xavier", "11.4.0.106")
    assert any("for another device, by another TensorRT" in line for line in caplog.messages)


def test_the_same_build_comes_from_the_cache(
    model: Path, device: Books, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_engine([model])
    first = model.with_name("engine.plan").read_bytes()
    assert sorted(path.suffix for path in (cache / "plans").iterdir()) == [".plan", ".timing"]
    model.with_name("engine.plan").unlink()
    build_engine([model])
    assert any("earlier build" in line for line in caplog.messages)
    assert model.with_name("engine.plan").read_bytes() == first
    caplog.clear()
    build_engine([model], settings=BuildConfig(optimization_level=1), rebuild=True)
    assert not any("earlier build" in line for line in caplog.messages)


@pytest.mark.parametrize("cache_variable", ["", "a-file/below"])
def test_without_a_cache(cache_variable: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("EDGEFG_CACHE", str(tmp_path / cache_variable) if cache_variable else "")
    with simulated_device():
        assert not build_engine([model]).kept


def test_timings_of_another_device_are_not_used(model: Path, device: Books, cache: Path) -> None:
    build_engine([model])
    (timing,) = (cache / "plans").glob("*.timing")
    own = timing.read_bytes()
    timing.write_bytes(b"of another device")
    build_engine([model], rebuild=True)
    assert timing.read_bytes() == own


@pytest.mark.parametrize("how", ["build_fails_above", "build_killed_above"])
def test_the_workspace_is_halved_until_it_fits(
    how: str, model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with simulated_device(**{how: 500 << 20}) as books:
        build_engine([model])
        books.assert_clean()
    steps = [line.partition(" with ")[2].split()[0] for line in caplog.messages if line.startswith("building ")]
    assert steps == ["3072", "1536", "768", "384"]
    reasons = [line for line in caplog.messages if line.startswith("out of memory: ")]
    assert len(reasons) == 3
    assert all(("SIGKILL" if how == "build_killed_above" else "Cuda Runtime (out of memory)") in r for r in reasons)


def test_the_ladder_ends(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = names(model.parent)
    with simulated_device(build_fails_above=0) as books:
        with pytest.raises(BuildError, match=r"too little memory to build .*model\.onnx, even with 32 MiB.*add swap"):
            build_engine([model], settings=BuildConfig(workspace=100))
        books.assert_clean()
    steps = [line.partition(" with ")[2].split()[0] for line in caplog.messages if line.startswith("building ")]
    assert steps == ["100", "50", "32"]
    assert names(model.parent) == before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"parser_error": "No importer registered for op"}, r"cannot read the network: Conv node_1: No importer"),
        ({"build_error": "Error Code 10: no implementation"}, "could not build .*Error Code 10: no implementation"),
        ({"wrong": 100.0}, "deviates"),
    ],
)
def test_a_build_that_fails_changes_nothing(config: dict[str, Any], said: str, model: Path, cache: Path) -> None:
    with simulated_device():
        build_engine([model])
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    with simulated_device(**config) as books:
        with pytest.raises(BuildError, match=said):
            build_engine([model], rebuild=True)
        del books  # the failed artifact's traceback may hold it
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_no_gpu(model: Path) -> None:
    with simulated_device(driver_error=35), pytest.raises(RuntimeUnavailableError, match=r"InsufficientDriver.*doctor"):
        build_engine([model])


def test_no_artifact_is_replaced_by_another(qdq: Path, tmp_path: Path, device: Books) -> None:
    fp32, other = copy("onnx", tmp_path / "fp32"), copy("onnx-batch4", tmp_path / "other")
    with pytest.raises(DataError, match=r"models of several folders were given; .* --out"):
        build_engine([qdq, fp32])
    before = {path.name: path.read_bytes() for path in other.parent.iterdir()}
    with pytest.raises(DataError, match=r"other/.* is another artifact's, which would be replaced"):
        build_engine([fp32], out=other.parent)
    with pytest.raises(DataError, match=r"other/.* is another artifact's, which would be replaced"):
        build_engine([fp32, other], out=other.parent)
    assert {path.name: path.read_bytes() for path in other.parent.iterdir()} == before


def test_a_cached_plan_that_does_not_hold_is_built_anew(
    model: Path, device: Books, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_engine([model])
    (kept,) = (cache / "plans").glob("*.plan")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    model.with_name("engine.plan").unlink()
    build_engine([model])
    assert any(line.startswith("it does not hold: ") for line in caplog.messages)
    assert kept.read_bytes() == whole


def test_only_a_proven_plan_is_cached(model: Path, cache: Path) -> None:
    with simulated_device(wrong=100.0), pytest.raises(BuildError, match="deviates"):
        build_engine([model])
    assert list((cache / "plans").glob("*.plan")) == []


def test_an_old_signature_does_not_stay_beside_a_new_manifest(model: Path, device: Books) -> None:
    build_engine([model])
    signature = model.with_name("engine.json.sig")
    signature.write_bytes(b"of the old one")
    build_engine([model], rebuild=True)
    assert not signature.exists()


def test_batches(tmp_path: Path, qdq: Path, device: Books) -> None:
    free = copy("onnx-dynamic", tmp_path / "free", golden=None)
    with pytest.raises(Exception, match="no golden set to prove a plan with"):
        build_engine([free])
    manifest = read_manifest(TINY / "onnx" / "model.onnx")
    shutil.copy(TINY / "onnx" / "golden.npz", free.parent)
    own = read_manifest(free)
    whole = msgspec.structs.replace(own, golden=manifest.golden, files=(*own.files, manifest.files[1]))
    manifest_path(free).write_bytes(encode_manifest(whole))
    report = build_engine([free], settings=BuildConfig(batches=(1, 2, 4)))
    with Classifier(report.plan) as classifier:
        assert len(classifier.predict_batch([np.zeros((64, 64, 3), np.uint8)] * 11)) == 11
    fixed = copy("onnx-batch4", tmp_path / "fixed")
    assert build_engine([fixed]).precision == "fp32"
    assert build_engine([fixed], settings=settings_of(4, None, "none", None, 3)).precision == "fp32"
    with pytest.raises(BuildError, match=r"the network's batch is 4, but batches of \(1, 1, 2\)"):
        build_engine([fixed], settings=BuildConfig(batches=(1, 1, 2)))


def test_one_of_two_builds_waits_for_the_other(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept: list[bool] = []
    with simulated_device(build_seconds=0.5) as books:
        run_together(lambda _: kept.append(build_engine([model]).kept), 2)
        books.assert_clean()
    assert sorted(kept) == [False, True]
    assert caplog.messages.count(f"waiting for another build in {model.parent}") == 1
    assert sum(line.startswith("building ") for line in caplog.messages) == 1


def test_what_a_killed_build_left_goes(model: Path, device: Books) -> None:
    left = model.parent / ".engine.plan.0123abcd"
    (left / "0").mkdir(parents=True)
    (left / "0" / "engine.plan").write_bytes(b"half")
    build_engine([model])
    assert not left.exists()


def test_a_folder_that_cannot_be_made(model: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    with simulated_device(), pytest.raises(BuildError, match="cannot make the folder"):
        build_engine([model], out=tmp_path / "file")


def test_timings_outlive_a_failure(model: Path, cache: Path) -> None:
    with simulated_device(build_error="Error Code 10"), pytest.raises(BuildError):
        build_engine([model])
    assert len(list((cache / "plans").glob("*.timing"))) == 1


def test_only_what_a_key_signed_is_built(model: Path, tmp_path: Path, device: Books, run: Run) -> None:
    public = new_key(tmp_path / "private.pem")
    with pytest.raises(IntegrityError, match=r"model\.json\.sig: No such file.*; sign the artifact by `edgefg sign`"):
        build_engine([model], trusted_key=public)
    sign(model, tmp_path / "private.pem")
    assert run("build", model, "--trusted-key", public)[0] == 0
    (tmp_path / "other").mkdir()
    other = new_key(tmp_path / "other" / "private.pem")
    assert run("build", model, "--trusted-key", other)[0] == 2


def test_with_a_key_a_plan_that_nobody_signed_is_not_kept(model: Path, tmp_path: Path, device: Books) -> None:
    public = new_key(tmp_path / "private.pem")
    sign(model, tmp_path / "private.pem")
    planted = Path(build_engine([model]).plan)
    labels = msgspec.structs.replace(read_manifest(planted), labels=tuple("dcba"))
    manifest_path(planted).write_bytes(encode_manifest(labels))
    assert build_engine([model]).kept
    assert not build_engine([model], trusted_key=public).kept
    assert read_manifest(planted).labels == read_manifest(model).labels
    sign(planted, tmp_path / "private.pem")
    assert build_engine([model], trusted_key=public).kept


def test_a_jetson_has_no_hardware_compatible_plans(
    model: Path, tmp_path: Path, device: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Path(build_engine([model], settings=BuildConfig(hardware_compatible="ampere-plus")).plan)
    monkeypatch.setattr(build, "_TEGRA", tmp_path)
    with pytest.raises(DataError, match=r"--hardware-compatible ampere-plus: .* build one for each type"):
        build_engine([model], settings=BuildConfig(hardware_compatible="ampere-plus"))
    tensorrt.rebuild(plan)
    info = read_manifest(plan).plan
    assert info is not None
    assert info.hardware_compatible == "none"


def test_an_altered_onnx_is_not_built(model: Path, device: Books) -> None:
    model.write_bytes(model.read_bytes() + b" ")
    with pytest.raises(IntegrityError):
        build_engine([model])


def test_the_verb(model: Path, device: Books, run: Run) -> None:
    status, out, err = run("build", model, "--json")
    assert status == 0, err
    assert json.loads(out)["gpu"] == "Simulated Orin"
    status, out, _ = run("build", model)
    assert (status, "was there already and fits this device" in out) == (0, True)
    photo = model.parent / "photo.png"
    cv2.imwrite(str(photo), np.full((70, 90, 3), 128, np.uint8))
    with simulated_device(major=11):
        status, _, err = run("predict", model.with_name("engine.plan"), photo)
        assert status == 2
        assert err.count("\n") == 1
        assert "edgefg build" in err
        status, out, _ = run("predict", model.with_name("engine.plan"), photo, "--rebuild")
        assert (status, str(photo) in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "coreml"], 'Invalid value "coreml" for --to. Choose from: "tensorrt".'),
        (["--precision", "int4"], 'Invalid value "int4" for --precision. Choose from: "auto", "int8", "fp16", "fp32".'),
        (["--batch", "4", "--max-batch", "2"], "--max-batch 2 is less than --batch 4"),
        (["--hardware-compatible", "all"], 'Choose from: "none", "ampere-plus", "same-capability".'),
        (["--optimization-level", "6"], "choose 0 to 5"),
    ],
)
def test_bad_usage_in_one_line(words: list[str], said: str, model: Path, run: Run) -> None:
    status, _, err = run("build", model, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
