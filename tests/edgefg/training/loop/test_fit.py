from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgefg.data import load_dataset
from edgefg.errors import TrainingError
from edgefg.image_io import read_image
from edgefg.preprocess import InputSpec, prepare
from edgefg.settings.hardware import Hardware
from edgefg.settings.training import Schedule, TrainingConfig
from edgefg.training.checkpoint import load
from edgefg.training.data.augment import EvaluationImages, TrainingImages
from edgefg.training.loop import fit as loop
from edgefg.training.loop.fit import predict
from edgefg.training.loop.optimizer import lr_at
from edgefg.training.loop.resume import RunProgress
from edgefg.training.losses import cross_entropy
from edgefg.training.models.network import Batch
from edgefg.training.teacher import train_teacher


def run(birds: Path, out: Path, config: TrainingConfig, hardware: Hardware, **options: Any) -> Path:
    return train_teacher(birds, out, config, backbone="test_efficientnet", weights="none", hardware=hardware, **options)


def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(
    birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(birds, tmp_path / "whole", config, hardware)
    epoch = loop._Loop.epoch

    def killed(self: Any, training: Any, progress: RunProgress, *args: Any) -> float:
        if progress.epochs_done == 1:
            raise KeyboardInterrupt
        return epoch(self, training, progress, *args)

    monkeypatch.setattr(loop._Loop, "epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(birds, tmp_path / "cut", config, hardware)
    assert not (tmp_path / "cut" / "teacher.safetensors").exists()
    monkeypatch.undo()
    resumed = run(birds, tmp_path / "cut", config, hardware)
    assert resumed.read_bytes() == whole.read_bytes()
    assert len((tmp_path / "cut" / "teacher.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("wrong", [{"accelerator": "bogus"}, {"precision": "bogus"}, {"accelerator": "cuda"}])
def test_hardware_that_is_not_there_is_one_line(
    birds: Path, tmp_path: Path, config: TrainingConfig, wrong: dict
) -> None:
    if wrong.get("accelerator") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(TrainingError, match="cannot train on 1 × ") as caught:
        run(birds, tmp_path, config, Hardware(workers=0, **wrong))
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops(birds: Path, tmp_path: Path, hardware: Hardware) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch \d, step \d"):
        run(
            birds,
            tmp_path,
            TrainingConfig(image_size=32, schedule=Schedule(epochs=3, batch_size=16, lr=1e30)),
            hardware,
        )


def test_evaluation_sees_exactly_what_the_classifier_prepares(birds: Path) -> None:
    spec = InputSpec(height=40, width=48, crop_fraction=0.9)
    samples = load_dataset(birds).splits["val"]
    images = EvaluationImages(samples, spec)
    for index, sample in enumerate(samples):
        assert np.array_equal(images[index][0].numpy(), prepare(read_image(sample.path), spec))


def test_training_images_are_uint8_of_the_network_s_size_and_vary(birds: Path) -> None:
    samples = load_dataset(birds).splits["train"]
    images = TrainingImages(samples, InputSpec(height=40, width=48))
    torch.manual_seed(0)
    first, again = images[0][0], images[0][0]
    assert first.dtype == torch.uint8
    assert first.shape == (40, 48, 3)
    assert first.is_contiguous()
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(first, images[0][0])


def test_predict_keeps_order_and_mode(birds: Path, tmp_path: Path, config: TrainingConfig, hardware: Hardware) -> None:
    network, header = load(run(birds, tmp_path, config, hardware))
    samples = load_dataset(birds).splits["test"]
    network.train()
    logits, labels = predict(network, samples, header.input, batch_size=5, workers=0)
    assert network.training
    network.eval()
    with torch.inference_mode():
        one = network(torch.from_numpy(prepare(read_image(samples[7].path), header.input))[None])
    np.testing.assert_allclose(logits[7], one[0].numpy(), atol=1e-4)
    assert labels.tolist() == [sample.label for sample in samples]


def test_cross_entropy_with_smoothing_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    loss = cross_entropy(0.3)(logits, Batch(torch.zeros(1, 1, 1, 3), torch.tensor([0])))
    expected = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainingConfig(image_size=32, schedule=Schedule(epochs=1, lr=2.0, warmup=0.25))
    rates = [lr_at(config.schedule, progress) for progress in (0.125, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 1.0, 0.0])
