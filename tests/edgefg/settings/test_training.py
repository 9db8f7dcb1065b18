import msgspec
import pytest

from edgefg.settings.options import with_options
from edgefg.settings.training import Augmentation, Schedule, TrainingConfig


def test_training_crops_grow_over_three_quarters_of_the_epochs() -> None:
    config = with_options(TrainingConfig(), epochs=8, image_size=256, train_size=192, start_size=96)
    assert [config.size_at(epoch) for epoch in range(9)] == [96, 112, 128, 144, 160, 176, 192, 192, 192]
    assert TrainingConfig(image_size=100).size_at(0) == 100


def test_crops_repeat_after_crop_epochs() -> None:
    config = TrainingConfig(schedule=Schedule(seed=2), augmentation=Augmentation(crop_epochs=3))
    seeds = [config.crop_seed(epoch) for epoch in range(7)]
    assert seeds[3:6] == seeds[:3]
    assert len(set(seeds)) == 3
    assert TrainingConfig().crop_seed(4) == 4


def test_too_small_a_training_size_is_refused() -> None:
    assert Augmentation(train_size=0).train_size == 0
    with pytest.raises(ValueError, match=r"--train-size 15 is too small\. Use 0, or at least 16"):
        Augmentation(train_size=15)


def test_settings_are_stored_with_all_their_values_and_read_without_those_that_came_later() -> None:
    config = TrainingConfig(image_size=64, schedule=Schedule(lr=0.1))
    stored = msgspec.to_builtins(config)
    assert stored["schedule"]["epochs"] == Schedule().epochs
    assert msgspec.json.decode(msgspec.json.encode(config), type=TrainingConfig) == config
    del stored["metric_learning"], stored["schedule"]["ema"]
    stored["fine_tuning"]["option_of_a_later_version"] = 1
    assert msgspec.convert(stored, TrainingConfig) == config
