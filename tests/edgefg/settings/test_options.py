from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgefg.errors import DataError
from edgefg.settings.distillation import DistillationConfig
from edgefg.settings.gate import Gate
from edgefg.settings.hardware import Hardware
from edgefg.settings.options import differences, options_of, with_options
from edgefg.settings.pruning import PruningConfig
from edgefg.settings.search import SearchConfig, TrialSchedule
from edgefg.settings.training import FineTuning, Schedule, TrainingConfig


def test_groups_are_flattened() -> None:
    options = options_of(TrainingConfig)
    assert options["image_size"].path == ("image_size",)
    assert options["unfreeze_epochs"].path == ("fine_tuning", "unfreeze_epochs")
    assert options["unfreeze_epochs"].flag == "--unfreeze-epochs"
    assert options["optimizer"].choices == ("adamw", "sgd")
    assert options["lr"].value_in(TrainingConfig(schedule=Schedule(lr=0.5))) == 0.5


def fields_of(settings: msgspec.Struct) -> list[str]:
    values = [(name, getattr(settings, name)) for name in settings.__struct_fields__]
    return [
        field for name, value in values for field in (fields_of(value) if isinstance(value, msgspec.Struct) else [name])
    ]


@pytest.mark.parametrize("settings", [TrainingConfig, DistillationConfig, PruningConfig, Hardware, Gate])
def test_option_names_are_unique_across_groups_and_have_a_help_text(settings: type[msgspec.Struct]) -> None:
    options = options_of(settings)
    assert fields_of(settings()) == list(options)
    assert all(option.help for option in options.values())


def test_the_option_of_a_list_may_be_singular() -> None:
    option = options_of(SearchConfig)["size"]
    assert (option.flag, option.path) == ("--size", ("sizes",))
    assert with_options(SearchConfig(), size=(64,), qat_epochs=1) == SearchConfig(
        sizes=(64,), schedule=TrialSchedule(qat_epochs=1)
    )
    with pytest.raises(DataError, match=r"--size \(64, 8\) is out of range: Expected `int` >= 16"):
        with_options(SearchConfig(), size=(64, 8))
    with pytest.raises(DataError, match=r"--train-share 85 is out of range: Expected `float` <= 1.0"):
        with_options(SearchConfig(), train_share=85)


def test_options_are_set_in_their_groups() -> None:
    config = with_options(TrainingConfig(), image_size=64, lr=0.1, freeze_epochs=2)
    expected = TrainingConfig(image_size=64, schedule=Schedule(lr=0.1), fine_tuning=FineTuning(freeze_epochs=2))
    assert config == expected


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"lr": -1.0}, "--lr -1.0 is out of range: Expected `float` > 0.0"),
        ({"optimizer": "adam"}, "--optimizer 'adam' is not a choice. Use one of adamw, sgd"),
        ({"train_size": 3}, "--train-size 3 is too small. Use 0, or at least 16"),
        ({"rate": 1.0}, "TrainingConfig has no option 'rate'. Use one of image_size, epochs,"),
    ],
)
def test_wrong_values_are_named(values: dict, complaint: str) -> None:
    with pytest.raises(DataError) as refusal:
        with_options(TrainingConfig(), **values)
    assert complaint in str(refusal.value)


# Without None, which stands for what one side lacks.
_TREES = st.recursive(
    st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(_TREES, _TREES)
def test_settings_differ_where_a_leaf_does(old: Any, new: Any) -> None:
    assert not list(differences(old, old))
    assert bool(list(differences(old, new))) == (old != new)


def test_differences_have_the_name_of_the_option() -> None:
    old, new = (msgspec.to_builtins(config) for config in (TrainingConfig(), TrainingConfig(schedule=Schedule(lr=0.1))))
    assert [name for name, *_ in differences(old, new)] == ["lr"]
    assert list(differences({"sizes": [64]}, {"sizes": [64, 96]})) == [("sizes", None, 96)]
    assert list(differences({}, {"macs": 0.5})) == [("macs", None, 0.5)]
