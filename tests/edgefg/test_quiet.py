"""What vendors print, warn and log is dropped; errors are not, and everything is restored."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

import pytest

from edgefg.quiet import quiet, without_telemetry


def test_nothing_is_heard(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        print("progress: 50 %")
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        logging.getLogger("vendor").warning("tracing")
    assert capsys.readouterr().out == ""
    assert caplog.messages == []


def test_errors_pass_and_everything_is_restored(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        with quiet():
            logging.getLogger("vendor").error("a real problem")
            raise RuntimeError("unsupported")

    with pytest.raises(RuntimeError, match="unsupported"):
        fail()
    logging.getLogger("vendor").warning("heard again")
    print("printed again")
    assert caplog.messages == ["a real problem", "heard again"]
    assert capsys.readouterr().out == "printed again\n"
    with pytest.warns(UserWarning, match="warned again"):
        warnings.warn("warned again", stacklevel=1)


def test_the_root_logger_is_restored() -> None:
    """A failed `openvino.convert_model` leaves the root logger at ERROR, and the application's warnings are lost."""
    root = logging.getLogger()
    level, handlers, filters = root.level, root.handlers.copy(), root.filters.copy()

    def fail() -> None:
        with quiet():
            root.setLevel(logging.ERROR)
            root.addFilter(lambda _: False)
            root.addHandler(logging.NullHandler())
            raise RuntimeError("no conversion")

    with pytest.raises(RuntimeError, match="no conversion"):
        fail()
    assert (root.level, root.handlers, root.filters) == (level, handlers, filters)


def test_telemetry_cannot_be_imported_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    with without_telemetry(), pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    assert "openvino_telemetry" not in sys.modules
    mine = object()
    monkeypatch.setitem(sys.modules, "openvino_telemetry", mine)
    with without_telemetry():
        assert sys.modules["openvino_telemetry"] is mine
    assert sys.modules["openvino_telemetry"] is mine
