"""Classifier on the committed tiny artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from edgefg import (
    Classifier,
    EdgefgError,
    FrameError,
    IntegrityError,
    ManifestError,
    Prediction,
    RuntimeUnavailableError,
)
from edgefg.artifact.manifest import Manifest
from edgefg.errors import InferenceError
from edgefg.preprocess import InputSpec, UInt8Array, prepare
from tests.conftest import MODELS, TINY, Tiny
from tests.threads import run_together

Rewrite = Callable[..., Manifest]
Birds = tuple[tuple[str, ...], list[UInt8Array]]
REAL = [name for name in MODELS if name != "null"]


def _open(name: str, **arguments: Any) -> Classifier:
    return Classifier(TINY / MODELS[name], threads=1, **arguments)


def _same(found: Prediction, expected: Prediction) -> None:
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert (found.label, found.index) == (expected.label, expected.index)


@pytest.mark.parametrize("name", REAL)
def test_predictions_mean_something(name: str, birds: Birds) -> None:
    labels, frames = birds
    with _open(name) as classifier:
        assert classifier.labels == ("bar", "cross", "disc", "pair")
        hits = [classifier.predict(frame).label == label for label, frame in zip(labels, frames, strict=True)]
    assert sum(hits) >= 13


def test_null_answers_with_its_logits() -> None:
    model = msgspec.json.decode((TINY / MODELS["null"]).read_bytes())
    with _open("null") as classifier:
        found = classifier.predict(np.zeros((30, 40, 3), np.uint8))
    np.testing.assert_array_equal(found.logits, np.array(model["logits"], np.float32))
    assert found.index == int(np.argmax(model["logits"]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_batches_equal_single_frames(name: str, count: int, birds: Birds) -> None:
    frames = birds[1][:count]
    with _open(name) as classifier:
        found = classifier.predict_batch(frames)
        assert len(found) == count
        for prediction, frame in zip(found, frames, strict=True):
            _same(prediction, classifier.predict(frame))


def test_more_frames_than_one_chunk(birds: Birds) -> None:
    frames = birds[1] * 3
    with _open("onnx-dynamic") as dynamic, _open("onnx") as single:
        for prediction, frame in zip(dynamic.predict_batch(frames), frames, strict=True):
            _same(prediction, single.predict(frame))


def test_runtimes_agree(birds: Birds) -> None:
    with _open("ir") as ir, _open("onnx") as onnx:
        for frame in birds[1]:
            _same(ir.predict(frame), onnx.predict(frame))


def test_colour_orders_agree(birds: Birds) -> None:
    frame = birds[1][0]
    alpha = np.full((*frame.shape[:2], 1), 77, np.uint8)
    with _open("ir") as classifier:
        expected = classifier.predict(frame)
        _same(classifier.predict(frame[..., ::-1], color="rgb"), expected)
        _same(classifier.predict(np.dstack([frame, alpha]), color="bgra"), expected)
        _same(classifier.predict(np.dstack([frame[..., ::-1], alpha]), color="rgba"), expected)
        grey = classifier.predict(frame[..., 0], color="gray")
        _same(classifier.predict_batch([np.dstack([frame[..., 0]] * 3)])[0], grey)


@pytest.mark.parametrize("name", MODELS)
def test_read_only_rgb_frame_of_network_size(name: str, birds: Birds) -> None:
    """The one case where preprocessing hands the caller's own memory to the engine."""
    with _open(name) as classifier:
        frame = prepare(birds[1][0], classifier.manifest.input)
        frame.flags.writeable = False
        before = frame.copy()
        _same(classifier.predict(frame, color="rgb"), classifier.predict(frame[..., ::-1]))
        np.testing.assert_array_equal(frame, before)


@pytest.mark.parametrize("name", REAL)
def test_eight_threads_share_one_classifier(name: str, birds: Birds) -> None:
    frames = birds[1][:5]
    with _open(name) as classifier:
        expected = [classifier.predict(frame).logits for frame in frames]

        def work(first: int) -> None:
            for i in range(first, first + 50):
                found = classifier.predict(frames[i % 5]).logits
                np.testing.assert_array_equal(found, expected[i % 5])

        run_together(work)


def test_closed_classifier() -> None:
    frame = np.zeros((8, 8, 3), np.uint8)
    with _open("ir") as classifier:
        assert isinstance(classifier, Classifier)
        classifier.predict(frame)
    classifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        classifier.predict(frame)
    with pytest.raises(RuntimeError, match="closed"):
        classifier.predict_batch([frame])


def test_bad_frame_loses_nothing(birds: Birds) -> None:
    frame = birds[1][0]
    with _open("ir") as classifier:
        expected = classifier.predict(frame)
        with pytest.raises(FrameError):
            classifier.predict(frame.astype(np.float32))
        _same(classifier.predict(frame), expected)


def test_a_batch_is_checked_before_it_runs(birds: Birds, monkeypatch: pytest.MonkeyPatch) -> None:
    with _open("onnx") as classifier:
        ran: list[object] = []
        monkeypatch.setattr(classifier._runtime, "infer", ran.append)
        with pytest.raises(FrameError, match="None"):
            classifier.predict_batch([birds[1][0], None])  # type: ignore[list-item]
    assert not ran


def test_timings_and_top_k(birds: Birds) -> None:
    with _open("ir", top_k=2) as classifier:
        for found in (classifier.predict(birds[1][0]), *classifier.predict_batch(birds[1][:3])):
            assert len(found.top_k) == 2
            assert min(found.timings.preprocess, found.timings.infer, found.timings.decide) > 0


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"threads": 0}, {"threads": -1}])
def test_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Classifier(TINY / MODELS["null"], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ir", "onnx", "null"])
def test_engine_of_another_input_size(name: str, tiny: Tiny, rewrite: Rewrite) -> None:
    model = tiny(name)
    rewrite(model, input=InputSpec(height=64, width=72), golden=None)
    with pytest.raises(
        ManifestError, match=r"takes uint8 \[1, 64, 64, 3\], but its manifest has uint8 \[N, 64, 72, 3\]"
    ):
        Classifier(model)


@pytest.mark.parametrize("name", ["ir", "onnx-batch4", "null"])
def test_labels_and_logits_must_match(name: str, tiny: Tiny, rewrite: Rewrite) -> None:
    model = tiny(name)
    rewrite(model, labels=("a", "b", "c"), taxonomy=())
    with Classifier(model) as classifier, pytest.raises(ManifestError, match=r"returned logits \[\d, 4\].* 3 labels"):
        classifier.predict(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".plan", ".engine", ".PLAN"])
def test_a_plan_without_tensorrt_names_the_extra(suffix: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("null")
    plan = model.with_suffix(suffix)
    manifest = json.loads(model.with_suffix(".json").read_bytes())
    model.rename(plan)
    manifest["model"] = manifest["files"][0]["name"] = plan.name
    model.with_suffix(".json").write_text(json.dumps(manifest))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match=rf"model\{suffix} needs TensorRT.*edgefg\[tensorrt\]"):
        Classifier(plan)


def test_a_model_without_manifest_needs_labels_and_input(tiny: Tiny) -> None:
    model = tiny("onnx")
    frame = np.full((90, 120, 3), 128, np.uint8)
    with Classifier(model) as classifier:
        labels, expected = classifier.labels, classifier.predict(frame)
    with pytest.raises(ManifestError, match=r"labels were given for model\.onnx, but .*model\.json has its own"):
        Classifier(model, labels=labels, input=64)
    model.with_suffix(".json").unlink()
    with pytest.raises(ManifestError, match="opened with only one of labels and input"):
        Classifier(model, labels=labels)
    with pytest.raises(ManifestError, match="no labels were given"):
        Classifier(model, labels=[], input=64)
    with pytest.raises(ManifestError, match="a label occurs twice"):
        Classifier(model, labels=["a", "a"], input=64)
    for given in (64, InputSpec(height=64, width=64)):
        with pytest.warns(UserWarning, match=r"model\.onnx has no manifest") as warned:
            classifier = Classifier(model, labels=labels, input=given)
        assert warned[0].filename == __file__
        with classifier:
            found = classifier.predict(frame)
        assert found.label == expected.label
        np.testing.assert_array_equal(found.logits, expected.logits)


def test_unknown_suffix_names_the_known_ones(tiny: Tiny) -> None:
    model = tiny("null")
    other = model.rename(model.with_suffix(".tflite"))
    path = model.with_suffix(".json")
    path.write_bytes(path.read_bytes().replace(b"model.null", b"model.tflite"))
    with pytest.raises(RuntimeUnavailableError, match=r"'model\.tflite'.*\.null, \.onnx, \.plan, \.xml"):
        Classifier(other)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("ir", "openvino", "openvino"), ("onnx", "onnxruntime", "onnxruntime")]
)
def test_a_missing_engine_names_the_extra(
    name: str, package: str, extra: str, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = """
import edgefg
try:
    edgefg.Classifier(sys.argv[1])
except edgefg.RuntimeUnavailableError as error:
    assert isinstance(error.__cause__, ImportError)
    print(error)
"""
    result = python(code, TINY / MODELS[name], blocked=(package,))
    assert result.returncode == 0, result.stderr
    assert f"pip install 'edgefg[{extra}]'" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_an_exception_of_the_caller_s_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog's signal handler may raise in the middle of a prediction."""

    class Watchdog(Exception):
        pass

    def late(_: object) -> None:
        raise Watchdog

    with _open("onnx") as classifier:
        monkeypatch.setattr(classifier._runtime, "infer", late)
        with pytest.raises(Watchdog):
            classifier.predict(np.zeros((64, 64, 3), np.uint8))


def test_nan_is_never_a_prediction(birds: Birds, monkeypatch: pytest.MonkeyPatch) -> None:
    with _open("onnx-batch4") as classifier:
        monkeypatch.setattr(classifier._runtime, "infer", lambda batch: np.full((len(batch), 4), np.nan, np.float32))
        with pytest.raises(InferenceError, match="not finite"):
            classifier.predict_batch(birds[1][:2])


@pytest.mark.parametrize("name", ["ir", "onnx"])
def test_every_cut_of_a_model_file_is_an_edgefg_error(name: str, tiny: Tiny, rewrite: Rewrite) -> None:
    """Behind a manifest that vouches for it, a spoilt model is the engine's to refuse, in one line of ours."""
    model = tiny(name)
    whole = model.read_bytes()
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 20):
        model.write_bytes(whole[:end])
        with pytest.raises(IntegrityError):
            Classifier(model)
    model.write_bytes(whole[: len(whole) // 2])
    rewrite(model)
    with pytest.raises(RuntimeUnavailableError, match="refused") as caught:
        Classifier(model)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, EdgefgError)


def test_a_failed_constructor_closes_the_engine(tiny: Tiny, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[object] = []
    monkeypatch.setattr("edgefg.runtimes.null.NullRuntime.close", lambda self: closed.append(self))
    model = tiny("null")
    rewrite(model, input=InputSpec(height=64, width=72))
    with pytest.raises(ManifestError):
        Classifier(model)
    assert len(closed) == 1
