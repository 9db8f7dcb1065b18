"""Options that several verbs have in common and that belong to no settings struct."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from edgefg.settings.quantization import TargetName

_POSITIVE = Number(gte=1)
_flag = Parameter(negative=())

Flag = Annotated[bool, _flag]
"""A switch that is off unless given."""
Count = Annotated[int, Parameter(validator=_POSITIVE)]
"""An integer from 1."""
Natural = Annotated[int, Parameter(validator=Number(gte=0))]
"""An integer from 0."""
OptionalCount = Annotated[int | None, Parameter(validator=_POSITIVE)]
"""An integer from 1, or None."""

Out = Annotated[Path, Parameter(help="Output folder.")]
Json = Annotated[bool, _flag, Parameter(help="Print the result as JSON.")]
SkipCorrupt = Annotated[bool, _flag, Parameter(help="Leave out unreadable images instead of stopping.")]
Restart = Annotated[bool, _flag, Parameter(help="Start over instead of resuming an unfinished run in OUT.")]
DeviceOption = Annotated[str | None, Parameter(help="Device of the inference engine, for instance GPU with OpenVINO.")]
Threads = Annotated[
    int | None, Parameter(validator=_POSITIVE, help="CPU threads of the inference engine. Default: the engine's own.")
]
TrustedKey = Annotated[
    Path | None, Parameter(help="PEM file of the public key that must have signed the artifact (see edgefg sign).")
]
SplitSeed = Annotated[int, Parameter(help="Seed of the split of data without splits of their own.")]
GroupPattern = Annotated[
    str | None,
    Parameter(
        name="--group",
        help="Regular expression on image paths. Images with the same match (camera, patient, lot) stay in one split.",
    ),
]
Weights = Annotated[
    str,
    Parameter(
        help="Pretrained weights: hub (timm's download), none, the path of a state dict or of an edgefg checkpoint, or"
        " an installed weight package."
    ),
]
TargetOption = Annotated[
    TargetName, Parameter(help="OpenVINO IR, ONNX for ONNX Runtime, or ONNX to build with TensorRT on the device.")
]
