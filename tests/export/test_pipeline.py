from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest

from edgefg import cli
from edgefg.data import load_dataset
from edgefg.errors import DataError
from edgefg.export import pipeline
from edgefg.export.pipeline import ARTIFACTS, Plan
from edgefg.settings.training import Schedule, TrainingConfig
from tests.cub import write_cub
from tests.synthetic import write_dataset


def plan_for(data: Path) -> Plan:
    config = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, batch_size=16))
    return Plan(
        data=str(data),
        backbone="test_resnet",
        weights="none",
        student="test_efficientnet",
        student_weights="none",
        teacher_config=config,
        student_config=config,
        prune_config=config,
        macs=0.9,
    )


def test_another_plan_s_folder_is_refused(tmp_path: Path) -> None:
    plan = plan_for(tmp_path / "data")
    pipeline._claim(plan, tmp_path / "out", restart=False)
    pipeline._claim(plan, tmp_path / "out", restart=False)
    other = msgspec.structs.replace(plan, macs=0.5, student="test_resnet")
    with pytest.raises(DataError, match="a pipeline with another student, macs"):
        pipeline._claim(other, tmp_path / "out", restart=False)
    (tmp_path / "out" / "teacher.safetensors").write_text("old")
    (tmp_path / "out" / "split").mkdir()
    pipeline._claim(other, tmp_path / "out", restart=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pipeline.json"]
    (tmp_path / "out" / "pipeline.json").write_text("{")
    with pytest.raises(DataError, match="is not a pipeline's plan"):
        pipeline._claim(other, tmp_path / "out", restart=False)


def test_a_checkpoint_that_no_pipeline_made_is_not_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "teacher.safetensors").write_text("by hand")
    with pytest.raises(DataError, match=r"holds teacher\.safetensors, which no pipeline made"):
        pipeline._claim(plan_for(tmp_path / "data"), tmp_path, restart=False)
    assert (tmp_path / "teacher.safetensors").read_text() == "by hand"


def test_one_folder_becomes_split_folders_once(tmp_path: Path) -> None:
    whole = write_dataset(tmp_path / "birds", classes=2, per_class=20, size=32, seed=0)
    flat = tmp_path / "flat"
    for split in ("train", "val", "test"):
        for image in (whole / split).rglob("*.*g"):
            target = flat / image.parent.name / f"{split}-{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            image.rename(target)
    spec = plan_for(flat).split
    made = pipeline._split_folders(flat, tmp_path / "out", spec, False)
    images = sorted(path.name for path in made.rglob("*.*g"))
    assert images == sorted(path.name for path in flat.rglob("*.*g"))
    assert pipeline._split_folders(flat, tmp_path / "out", spec, False) == made
    assert pipeline._split_folders(whole, tmp_path / "out", spec, False) == whole


def test_cub_stays_as_it_is_and_public_data_become_a_list(tmp_path: Path) -> None:
    cub = write_cub(tmp_path / "cub")
    split = plan_for(cub).split
    assert pipeline._split_folders(cub, tmp_path / "out", split, False) == cub
    assert not (tmp_path / "out").exists()
    # iNaturalist's layout of 2018: <group>/<number>/*.jpg
    for number, folder in enumerate(sorted((cub / "images").iterdir())):
        (tmp_path / "inat" / "2018" / "Aves").mkdir(parents=True, exist_ok=True)
        folder.rename(tmp_path / "inat" / "2018" / "Aves" / str(number))
    public = Path(f"inaturalist:2018:{tmp_path / 'inat'}")
    listed = pipeline._split_folders(public, tmp_path / "out", split, False)
    assert listed.suffix == ".csv"
    assert load_dataset(listed).splits == load_dataset(public, split).splits


@pytest.mark.slow
def test_the_whole_list_and_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage on a tiny network; then again, and nothing is redone."""
    data = write_dataset(tmp_path / "birds", classes=2, per_class=30, size=48, seed=2)
    out = tmp_path / "out"
    arguments = (
        f"edgefg pipeline {data} --out {out} --backbone test_resnet --weights none --student test_efficientnet"
        " --student-weights none --image-size 32 --epochs 1 --student-epochs 1 --prune-epochs 1 --macs 0.9"
        " --batch-size 16 --max-drop 60 --max-class-drop 100 --max-flips 100 --workers 0"
        " --json"
    ).split()
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["name"] for row in summary["rows"]] == [artifact.row for artifact in ARTIFACTS if artifact.row]
    for artifact in ARTIFACTS:
        assert {".json", ".npz"} <= {path.suffix for path in (out / artifact.folder).iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.rglob("model.*")}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.*")} == times
    assert "epoch" not in capsys.readouterr().out
