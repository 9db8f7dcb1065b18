from __future__ import annotations

import errno
import logging

import pytest
from msgspec.structs import replace

from edgefg.errors import EdgefgError, ExportError, HardwareError, TrainingError
from edgefg.export.search.context import SearchContext
from edgefg.settings.options import with_options
from edgefg.settings.search import TrialSchedule
from tests.export.search.searching import CONFIG, PRUNED, RESNET


def test_a_candidates_files_have_its_name(context: SearchContext) -> None:
    assert context.model((PRUNED, "int8"), "full") == context.out / "full" / "test_resnet-32-macs80/int8/model.xml"
    assert context.record((RESNET, "fp32"), "short") == context.out / "short" / "test_resnet-32/fp32.json"


def test_training_follows_the_schedule(context: SearchContext) -> None:
    context = replace(context, search=with_options(context.search, train_share=0.7))
    growing = replace(context, candidates=replace(context.candidates, training=with_options(CONFIG, start_size=16)))
    large = replace(RESNET, size=96)
    full, short = growing.training_of(large, "full"), growing.training_of(large, "short")
    assert (full.image_size, full.augmentation.train_size, full.augmentation.start_size) == (96, 64, 16)
    assert (full.schedule.epochs, short.schedule.epochs) == (2, 1)
    assert short.augmentation.start_size == 0  # one epoch is too short to grow
    assert growing.training_of(replace(RESNET, size=16), "full").augmentation.start_size == 0


def test_training_after_pruning_is_short_in_a_short_trial(context: SearchContext) -> None:
    schedule = TrialSchedule(short_epochs=1, prune_epochs=6)
    context = replace(context, search=replace(context.search, schedule=schedule))
    epochs = [context.pruning_training_of(PRUNED, stage).schedule.epochs for stage in ("full", "short")]
    assert epochs == [6, 3]
    assert context.pruning_training_of(PRUNED, "full").schedule.lr == CONFIG.schedule.lr / 2


def test_training_in_int8_neither_mixes_nor_averages(context: SearchContext) -> None:
    training = with_options(CONFIG, mix="snapmix", ema=0.9998, hue=0.1, randaugment=9, freeze_epochs=1)
    config = replace(context, candidates=replace(context.candidates, training=training)).qat_training_of(RESNET)
    augmentation = config.augmentation
    assert (augmentation.mix, augmentation.hue, augmentation.randaugment) == ("none", 0.0, 0)
    assert (config.schedule.ema, config.schedule.lr, config.fine_tuning.freeze_epochs) == (0.0, 3e-5, 0)


def test_deep_pruning_raises_the_limit_per_layer(context: SearchContext) -> None:
    pruned = [context.pruning_of(replace(PRUNED, macs=macs)) for macs in (0.9, 0.5, 0.05)]
    assert [one.macs for one in pruned] == [0.9, 0.5, 0.05]
    assert [one.max_ratio for one in pruned] == pytest.approx([0.25, 0.55, 0.95])


def test_mixed_images_are_not_cached(context: SearchContext) -> None:
    assert context.teacher_cache == context.out / "teacher-cache.bin"
    mixed = replace(context.candidates, training=with_options(CONFIG, mix="mixup"))
    assert replace(context, candidates=mixed).teacher_cache is None


def test_a_skipped_candidate_is_recorded_and_logged(context: SearchContext, caplog: pytest.LogCaptureFixture) -> None:
    context.skip("net-32 int8", ExportError("cannot\nbe quantised"))
    assert context.skipped == ["net-32 int8: cannot be quantised"]
    assert caplog.record_tuples == [
        ("edgefg.export.search.context", logging.WARNING, "skipped: net-32 int8: cannot be quantised")
    ]


def _full_disk() -> EdgefgError:
    failure = ExportError("cannot write model.xml")
    failure.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return failure


@pytest.mark.parametrize("failure", [HardwareError("cannot train on 1 × 'cuda'"), _full_disk()])
def test_a_failure_of_the_machine_stops_the_search(context: SearchContext, failure: EdgefgError) -> None:
    with pytest.raises(type(failure)):
        context.skip("net-32", failure)
    assert context.skipped == []


def test_too_little_disk_space_stops_the_search(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgefg.export.search.context._MIN_FREE", 2**62)
    with pytest.raises(TrainingError, match="not finite"):
        context.skip("net-32", TrainingError("the loss is not finite"))
