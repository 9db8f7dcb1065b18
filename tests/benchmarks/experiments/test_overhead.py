from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgefg import Classifier
from edgefg.benchmarks.experiments import overhead


@pytest.fixture
def ir(tiny: Callable[[str], Path]) -> Path:
    return tiny("ir")


def test_compares_on_the_same_network(ir: Path) -> None:
    result = overhead.measure_overhead(ir, threads=1, iterations=5, warmup=1)
    assert (result.predict.count, result.bare.count) == (5, 5)
    assert result.ratio == pytest.approx(result.predict.p50 / result.bare.p50)


def test_the_bare_request_computes_what_predict_does(ir: Path) -> None:
    with Classifier(ir, threads=1) as classifier:
        spec = classifier.manifest.input
        frame = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), np.uint8)
        logits = classifier.predict(frame).logits
    results = overhead.bare_request(ir, np.ascontiguousarray(frame[np.newaxis, :, :, ::-1]), 1)()
    assert np.array_equal(next(iter(results.values()))[0], logits)


def test_prints_a_table_then_json(
    ir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead", str(ir), "--iterations", "3", "--threads", "1"])
    overhead.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("Classifier.predict")
    assert msgspec.json.decode(last, type=overhead.Overhead).predict.count == 3


def test_a_missing_artifact_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead", str(tmp_path / "model.xml")])
    with pytest.raises(SystemExit) as end:
        overhead.main()
    assert end.value.code == 2
    assert "model.json is not there" in capsys.readouterr().err.splitlines()[-1]
