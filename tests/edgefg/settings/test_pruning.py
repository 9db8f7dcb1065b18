import pytest

from edgefg.errors import DataError
from edgefg.settings.pruning import PruningConfig


def test_the_target_is_the_cost_that_was_given() -> None:
    assert PruningConfig().target() == ("macs", 0.7)
    assert PruningConfig(macs=0.5).target() == ("macs", 0.5)
    assert PruningConfig(latency=0.8).target() == ("latency", 0.8)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (PruningConfig(macs=0.5, params=0.5), "--macs 0.5 and --params 0.5 exclude each other"),
        (PruningConfig(params=1.0), "--params 1 is out of range. Give a share between 0 and 1"),
        (PruningConfig(isomorphic=True, uniform=True), "--isomorphic and --uniform exclude each other"),
    ],
)
def test_contradicting_targets_and_rankings_are_refused(config: PruningConfig, complaint: str) -> None:
    with pytest.raises(DataError) as refusal:
        config.target()
    assert complaint in str(refusal.value)
