from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgefg.errors import TrainingError
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import with_options
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.teacher import train_teacher


def run(birds: Path, out: Path, config: TrainingConfig, hardware: Hardware, **options: Any) -> Path:
    return train_teacher(birds, out, config, backbone="test_efficientnet", weights="none", hardware=hardware, **options)


def test_a_finished_run_is_kept_and_another_one_does_not_overwrite_it(
    birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    path = run(birds, tmp_path, config, hardware)
    before = path.stat().st_mtime_ns
    assert run(birds, tmp_path, config, hardware) == path
    assert path.stat().st_mtime_ns == before
    other = with_options(config, seed=9)
    with pytest.raises(TrainingError, match="exists, and was made with seed 3, now 9"):
        run(birds, tmp_path, other, hardware)
    assert path.stat().st_mtime_ns == before
    run(birds, tmp_path, other, hardware, restart=True)
    assert path.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("backbone", "size", "reason"),
    [("torchvision:alexnet", 48, "too small"), ("vit_tiny_patch16_224", 48, "doesn't match model \\(224\\)")],
)
def test_a_size_that_the_backbone_does_not_take_is_one_line_and_leaves_nothing(
    birds: Path, tmp_path: Path, hardware: Hardware, backbone: str, size: int, reason: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=f"{backbone} does not accept images of {size} px .*{reason}.*--image-size"
    ) as found:
        train_teacher(
            birds,
            out,
            TrainingConfig(image_size=size, schedule=Schedule(epochs=1)),
            backbone=backbone,
            weights="none",
            hardware=hardware,
        )
    assert "\n" not in str(found.value)
    assert not out.exists()


def test_an_unwritable_folder_is_one_line(
    birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write below"):
        run(birds, tmp_path / "file" / "out", config, hardware)
