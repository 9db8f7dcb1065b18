from __future__ import annotations

import pytest
import torch

from edgefg.errors import DataError
from edgefg.settings.options import options_of
from edgefg.training.methods import METHODS, build, describe, method_options
from edgefg.training.models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone
from edgefg.training.models.network import Network


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself_and_its_options(name: str) -> None:
    described = describe(name)
    assert described.summary
    assert described.paper
    assert all(text.rstrip(")").endswith(".") for _, text in described.options.values()), described.options
    text = described.render()
    assert text.startswith(name)
    assert all(f"-o {option}=" in text for option in described.options)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_file_is_named_like_its_classes(name: str) -> None:
    module = METHODS[name].__module__.rpartition(".")[2]
    assert module == {"plain": "network", "se": "attention", "cbam": "attention"}.get(name, name)


def test_options_that_are_not_given_are_the_paper_s() -> None:
    assert method_options("wsdan", {}) == METHODS["wsdan"].Options()
    assert method_options("wsdan", {"maps": "8"}) == METHODS["wsdan"].Options(maps=8)


@pytest.mark.parametrize(
    ("method", "values", "complaint"),
    [
        ("cnn", {}, "there is no method 'cnn'. Use one of plain, se, cbam"),
        ("bcnn", {"pooling": "x"}, "bcnn has no pooling 'x'. Use one of full, compact"),
        ("bcnn", {"streams": 3}, "invalid option of bcnn: Expected `int` <= 2"),
        ("plain", {"maps": 3}, "Its options are: none"),
    ],
)
def test_wrong_options_are_one_line(method: str, values: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError) as refusal:
        method_options(method, values)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_network_is_built_with_its_options() -> None:
    network = build("bcnn", build_backbone("test_resnet", 3), IMAGENET_MEAN, IMAGENET_STD, {"projection": 4})
    assert isinstance(network, METHODS["bcnn"])
    assert options_of(type(network.options))["projection"].value_in(network.options) == 4
    assert network.eval()(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 3)
    assert METHODS["plain"] is Network
