from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from edgefg.errors import CheckpointError
from edgefg.export.prune.channels import remove_channels
from edgefg.export.prune.cost import CostModel
from edgefg.preprocess import InputSpec
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.split import SplitSpec
from edgefg.training import checkpoint
from edgefg.training.checkpoint import SCHEMA, Header, apply_channels, channel_plan, load, network_of, read_header, save
from edgefg.training.models.backbone import build_backbone
from edgefg.training.models.network import Network
from tests.export.prune.pruning import SPEC, gradients_of

BACKBONE = "test_efficientnet"


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network(build_backbone(BACKBONE, 3), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)).eval()


@pytest.fixture
def header() -> Header:
    return Header(
        schema=SCHEMA,
        kind="student",
        method="plain",
        backbone=BACKBONE,
        labels=("a", "b", "c"),
        input=InputSpec(height=32, width=32),
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
        dataset="d",
        split=SplitSpec(),
        edgefg="0",
    )


def test_round_trip(tmp_path: Path, network: Network, header: Header) -> None:
    path = tmp_path / "new" / "student.safetensors"
    save(path, network, header)
    loaded, read = load(path)
    assert read == header
    images = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded(images), network(images))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_channel_plan_rebuilds_a_narrower_network(tmp_path: Path, network: Network, header: Header) -> None:
    original = CostModel(copy.deepcopy(network), SPEC)
    left = remove_channels(network, PruningConfig(round_to=8, max_ratio=0.5), original, 0.8, gradients_of())
    assert 0.2 < left.macs <= 0.8
    plan = channel_plan(network, Network(build_backbone(BACKBONE, 3), header.mean, header.std))
    assert plan
    assert all(width % 8 == 0 for widths in plan.values() for name, width in widths.items() if "channels" in name)
    save(tmp_path / "p.safetensors", network, msgspec.structs.replace(header, channels=plan))
    loaded, _ = load(tmp_path / "p.safetensors")
    images = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded(images), network.eval()(images))


@pytest.mark.parametrize("backbone", ["mobilenetv4_conv_small_035", "regnetx_002", "convnext_atto"])
def test_a_plan_rebuilds_backbones_with_wrappers_and_other_norms(backbone: str, header: Header) -> None:
    """Wrappers offer widths as read-only properties; LayerNorm calls its width otherwise."""
    network = Network(build_backbone(backbone, 3), header.mean, header.std)
    spec = InputSpec(height=32, width=32)
    original = CostModel(copy.deepcopy(network), spec)
    remove_channels(network, PruningConfig(round_to=8), original, 0.97, gradients_of(spec))
    original_network = Network(build_backbone(backbone, 3), header.mean, header.std)
    header = msgspec.structs.replace(header, backbone=backbone, channels=channel_plan(network, original_network))
    header = msgspec.json.decode(msgspec.json.encode(header), type=Header)
    images = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    rebuilt = network_of(header, network.state_dict()).eval()
    assert torch.equal(rebuilt(images), network.eval()(images))


def test_a_plan_of_another_network_is_refused(network: Network) -> None:
    with pytest.raises(CheckpointError, match="contains no_such"):
        apply_channels(network, {"no_such": {"out_channels": 4}})
    with pytest.raises(CheckpointError, match="sets 'training'"):
        apply_channels(network, {"backbone.conv_stem": {"training": 4}})


def test_what_is_no_checkpoint(tmp_path: Path, network: Network, header: Header) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load(path)
    save(path, network, header)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
            load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not a checkpoint of edgefg"):
        load(path)
    checkpoint.write_tensors(path, {"a": torch.zeros(1)}, '{"schema": 99, "new": 1}')
    with pytest.raises(CheckpointError, match="has schema 99, but this edgefg reads up to"):
        load(path)
    checkpoint.write_tensors(path, {"a": torch.zeros(1)}, '{"schema": 1}')
    with pytest.raises(CheckpointError, match="header is damaged"):
        load(path)
    checkpoint.write_tensors(path, {"a": torch.zeros(1)}, msgspec.json.encode(header).decode())
    with pytest.raises(CheckpointError, match="do not fit the test_efficientnet"):
        load(path)


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, network: Network, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save(path, network, header)

    def full(*args: Any, **kwargs: Any) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(path, network, msgspec.structs.replace(header, edgefg="later"))
    assert read_header(path) == header
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
