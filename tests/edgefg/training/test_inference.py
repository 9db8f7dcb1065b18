from __future__ import annotations

import numpy as np
import torch

from edgefg.preprocess import InputSpec, prepare
from edgefg.training.inference import network_logits
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Network


def test_frames_are_preprocessed_as_on_the_device() -> None:
    torch.manual_seed(0)
    network = Network(build_backbone("test_resnet", 3), IMAGENET_MEAN, IMAGENET_STD).train()
    spec = InputSpec(height=32, width=32)
    frames = [np.random.default_rng(n).integers(0, 256, (40 + n, 60, 3), np.uint8) for n in range(3)]
    found = network_logits(network, spec)(frames)
    assert not network.training
    inputs = torch.from_numpy(np.stack([prepare(frame, spec) for frame in frames]))
    with torch.no_grad():
        np.testing.assert_allclose(found, network(inputs).numpy(), rtol=1e-5)
