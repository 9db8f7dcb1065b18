"""Which runtime opens which file; `tests/runtimes/test_contract.py` has the runtimes themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgefg.errors import RuntimeUnavailableError
from edgefg.runtime import RUNTIMES, load, model_files, runtime_for
from tests.conftest import MODELS, TINY


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_a_suffix_names_its_runtime_in_any_case(suffix: str) -> None:
    module, _, name = RUNTIMES[suffix].partition(":")
    for spelt in (suffix, suffix.upper()):
        found = runtime_for(Path(f"model{spelt}"))
        assert (found.__module__, found.__qualname__) == (module, name)  # type: ignore[attr-defined]


def test_what_no_runtime_opens(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"is a folder; give the model file in it"):
        runtime_for(tmp_path)
    with pytest.raises(RuntimeUnavailableError, match=r"student\.safetensors is a checkpoint; `edgefg export`"):
        runtime_for(tmp_path / "student.safetensors")
    with pytest.raises(RuntimeUnavailableError, match=r"'model\.tflite'; give a model file that ends in \.engine, "):
        load(tmp_path / "model.tflite")


def test_the_files_of_a_model() -> None:
    assert [path.name for path in model_files(Path("a/model.xml"))] == ["model.xml", "model.bin"]
    assert model_files(Path("a/engine.plan")) == (Path("a/engine.plan"),)
    assert model_files(Path("a/model.unknown")) == (Path("a/model.unknown"),)


def test_only_the_runtime_of_the_file_is_imported(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = """
import edgefg
edgefg.Classifier(sys.argv[1]).close()
print(sorted(name for name in sys.modules if name.startswith("edgefg.runtimes.")))
"""
    result = python(code, TINY / MODELS["null"])
    assert result.stdout.strip() == "['edgefg.runtimes.null']", result.stderr
