from edgefg.settings.hardware import Hardware
from edgefg.settings.options import options_of


def test_a_stage_runs_on_one_device_of_any_kind_unless_told_otherwise() -> None:
    assert Hardware() == Hardware(accelerator="auto", devices=1, precision="auto", workers=1)
    assert all(option.help.endswith(".") for option in options_of(Hardware).values())
