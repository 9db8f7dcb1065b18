import msgspec

from edgefg.settings.options import options_of
from edgefg.settings.search import CandidateConfig, SearchConfig


def test_every_option_of_a_search_has_a_help_text() -> None:
    options = options_of(SearchConfig)
    assert all(option.help for option in options.values())
    assert list(options)[1:5] == ["student", "size", "macs", "precision"]


def test_settings_of_candidates_are_read_as_they_were_written() -> None:
    config = CandidateConfig()
    assert msgspec.json.decode(msgspec.json.encode(config), type=CandidateConfig) == config
    assert msgspec.json.decode(b"{}", type=CandidateConfig) == config
