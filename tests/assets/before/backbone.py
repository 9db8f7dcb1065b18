"""The backbone of most networks in this folder: a ResNet of 20,000 parameters, so that the folder stays small.

timm's smallest has five times as many. Importing this file makes `timm.create_model("before_resnet")` work.
"""

from __future__ import annotations

from typing import Any

from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

NAME = "before_resnet"
default_cfgs = generate_default_cfgs({NAME: {"mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": "conv1.0"}})


@register_model
def before_resnet(pretrained: bool = False, **options: Any) -> ResNet:
    """Build it; the stem and the kinds of block are those of timm's ``test_resnet``."""
    shape: dict[str, Any] = {"block": BasicBlock, "layers": (1, 1, 1, 1), "stem_width": 8, "stem_type": "deep"}
    return build_model_with_cfg(ResNet, NAME, pretrained, channels=(8, 12, 16, 24), avg_down=True, **shape, **options)
