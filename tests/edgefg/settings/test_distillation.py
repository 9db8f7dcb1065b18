import msgspec
import pytest

from edgefg.settings.distillation import DistillationConfig


@pytest.mark.parametrize(
    ("config", "hard", "beta"),
    [
        (DistillationConfig(), 0.0, 0.5),
        (DistillationConfig(loss="dist"), 0.5, 0.5),
        (DistillationConfig(loss="dkd"), 0.5, 0.5),
        (DistillationConfig(loss="dkd", temperature=4.0), 0.5, 8.0),
        (DistillationConfig(loss="kl", hard_weight=0.3), 0.3, 0.5),
        (DistillationConfig(loss="dist", hard_weight=0.0), 0.0, 0.5),
        (DistillationConfig(loss="dkd", dkd_beta=0.0, hard_weight=1.0), 1.0, 0.0),
    ],
)
def test_defaults_are_those_of_the_loss_s_paper(config: DistillationConfig, hard: float, beta: float) -> None:
    assert (config.hard_share, config.beta) == (hard, beta)


def test_resolved_settings_do_not_depend_on_what_was_left_to_the_default() -> None:
    assert DistillationConfig(loss="dist").resolved() == DistillationConfig(loss="dist", hard_weight=0.5).resolved()
    assert DistillationConfig().resolved() == DistillationConfig(hard_weight=0.0)
    resolved = DistillationConfig(loss="dkd", temperature=4.0).resolved()
    assert (resolved.hard_weight, resolved.dkd_beta) == (0.5, 8.0)


def test_without_maps_only_predictions_are_compared() -> None:
    config = DistillationConfig(loss="dist", feature_weight=1.0, attention_weight=1.0)
    assert config.needs_maps
    assert config.without_maps() == DistillationConfig(loss="dist")
    assert not config.without_maps().needs_maps


def test_settings_survive_json() -> None:
    for config in (DistillationConfig(loss="dist"), DistillationConfig(hard_weight=0.0)):
        assert msgspec.json.decode(msgspec.json.encode(config), type=DistillationConfig) == config
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"hard_weight":1.5}', type=DistillationConfig)
