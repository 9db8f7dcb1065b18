from __future__ import annotations

import msgspec
import pytest

from edgefg.settings.training import Transfer


@pytest.mark.parametrize(
    ("transfer", "hard", "beta"),
    [
        (Transfer(), 0.0, 0.5),
        (Transfer(loss="dist"), 0.5, 0.5),
        (Transfer(loss="dkd"), 0.5, 0.5),
        (Transfer(loss="dkd", temperature=4.0), 0.5, 8.0),
        (Transfer(loss="kl", hard_weight=0.3), 0.3, 0.5),
        (Transfer(loss="dist", hard_weight=0.0), 0.0, 0.5),
        (Transfer(loss="dkd", dkd_beta=0.0, hard_weight=1.0), 1.0, 0.0),
    ],
)
def test_what_is_left_out_is_as_the_loss_s_paper_has_it(transfer: Transfer, hard: float, beta: float) -> None:
    assert (transfer.hard_share, transfer.beta) == (hard, beta)


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        (Transfer(), ["T=1", "hard=0"]),
        (Transfer(loss="dist"), ["T=1", "hard=0.5", "loss=dist"]),
        (Transfer(loss="dist", hard_weight=0.5), ["T=1", "hard=0.5", "loss=dist"]),
        (
            Transfer(loss="dkd", temperature=4.0, teacher_size=96),
            ["T=4", "hard=0.5", "teachers at 96 px", "loss=dkd β=8"],
        ),
    ],
)
def test_a_run_is_known_by_what_was_taken(transfer: Transfer, words: list[str]) -> None:
    assert transfer.words() == words


def test_what_a_search_wrote_down_of_what_is_learnt_is_still_the_same() -> None:
    assert msgspec.json.encode(Transfer()) == b"{}"
    assert msgspec.json.decode(b'{"hard_weight":0.5,"dkd_beta":2.0}', type=Transfer) == Transfer(
        hard_weight=0.5, dkd_beta=2.0
    )
    for transfer in (Transfer(loss="dist"), Transfer(loss="dist", hard_weight=0.0)):
        assert msgspec.json.decode(msgspec.json.encode(transfer), type=Transfer) == transfer
    with pytest.raises(msgspec.ValidationError, match="hard_weight"):
        msgspec.json.decode(b'{"hard_weight":1.5}', type=Transfer)
