"""docs/device/jetson.md holds: its service runs, its unit is one, its commands and tables are those of the code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg import Classifier, errors
from edgefg.artifact.signature import new_key, sign
from edgefg.nvidia import JETPACKS, LOWEST_TENSORRT, is_supported
from edgefg.preprocess import UInt8Array
from tests.conftest import ROOT, Run, Tiny

TEXT = (ROOT / "docs" / "device" / "jetson.md").read_text(encoding="utf-8")
Birds = tuple[tuple[str, ...], list[UInt8Array]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading, without its head."""
    section = re.split(r"^## ", TEXT.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (code,) = (block for block in blocks("python") if "READY=1" in block)
    path = tmp_path / "service.py"
    path.write_text(code, encoding="utf-8")
    return path


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a service of Type=notify reports."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


class Service:
    """The service on an inbox."""

    def __init__(self, script: Path, model: Path, **environment: str) -> None:
        self.inbox, self.done = script.parent / "inbox", script.parent / "done"
        self.inbox.mkdir()
        self.done.mkdir()
        command: list[str | Path] = [sys.executable, "-W", "error", script, model, self.inbox, self.done]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def end(self) -> tuple[list[dict[str, object]], str]:
        """Stop it as systemd does; returns the lines that it printed, and standard error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        return [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def serve(script: Path) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(model: Path, **environment: str) -> Service:
        started.append(Service(script, model, **environment))
        return started[-1]

    yield start
    for service in started:
        service.process.kill()
        service.process.communicate()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_service_classifies_what_appears(
    serve: Callable[..., Service], tiny: Tiny, birds: Birds, systemd: socket.socket, tmp_path: Path
) -> None:
    model = tiny("onnx")
    service = serve(model, NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert systemd.recv(99) == b"READY=1"  # and nothing before the golden set is proven
    for number, frame in enumerate(birds[1][:3]):
        cv2.imwrite(str(tmp_path / f"{number}.png"), frame)
        (tmp_path / f"{number}.png").rename(service.inbox / f"{number}.png")
    (service.inbox / "notes.txt").write_text("no picture")
    broken, unfinished = service.inbox / "broken.jpg", service.inbox / "unfinished.jpg"
    unfinished.write_bytes(b"\xff\xd8")
    (tmp_path / "old.jpg").write_bytes(b"\xff\xd8")
    os.utime(tmp_path / "old.jpg", (0, 0))
    (tmp_path / "old.jpg").rename(broken)
    wait_until(lambda: len(list(service.done.iterdir())) == 4)
    assert systemd.recv(99) == b"WATCHDOG=1"
    lines, err = service.end()
    assert (service.process.returncode, err) == (0, "")
    with Classifier(model) as classifier:
        expected = [classifier.predict(frame) for frame in birds[1][:3]]
    found = {str(line["image"]): line for line in lines}
    for number, prediction in enumerate(expected):
        line = found[f"{number}.png"]
        assert line["label"] == prediction.label
        assert line["confidence"] == pytest.approx(prediction.confidence, abs=1e-3)
    assert "cut off" in str(found["broken.jpg"]["error"])
    assert sorted(found) == ["0.png", "1.png", "2.png", "broken.jpg"]
    assert sorted(path.name for path in service.inbox.iterdir()) == ["notes.txt", "unfinished.jpg"]


def test_the_service_tells_that_it_lives_while_it_waits_and_not_when_it_hangs(
    serve: Callable[..., Service], tiny: Tiny, systemd: socket.socket, tmp_path: Path
) -> None:
    service = serve(tiny("null"), NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert [systemd.recv(99) for _ in range(4)] == [b"READY=1", *[b"WATCHDOG=1"] * 3]
    service.process.send_signal(signal.SIGSTOP)
    systemd.settimeout(1)
    with contextlib.suppress(TimeoutError):  # what it had sent before
        for _ in range(9):
            systemd.recv(99)
    with pytest.raises(TimeoutError):
        systemd.recv(99)
    service.process.send_signal(signal.SIGCONT)
    systemd.settimeout(60)
    assert systemd.recv(99) == b"WATCHDOG=1"
    assert service.end() == ([], "")


def test_the_service_reaches_an_abstract_socket(serve: Callable[..., Service], tiny: Tiny) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        name = f"edgefg-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.settimeout(60)
        service = serve(tiny("null"), NOTIFY_SOCKET=f"@{name}")
        assert listener.recv(99) == b"READY=1"
        service.end()


def test_the_service_proves_the_signature(
    serve: Callable[..., Service], tiny: Tiny, systemd: socket.socket, tmp_path: Path
) -> None:
    model = tiny("onnx")
    public = new_key(tmp_path / "private.pem")
    service = serve(model, TRUSTED_KEY=str(public), NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert service.process.wait(60) == 1
    lines, err = service.end()
    assert not lines
    assert err.splitlines()[-1].startswith("edgefg.errors.IntegrityError: cannot read")
    for folder in (service.inbox, service.done):
        folder.rmdir()
    sign(model, tmp_path / "private.pem")
    serve(model, TRUSTED_KEY=str(public), NOTIFY_SOCKET=str(tmp_path / "notify"))
    assert systemd.recv(99) == b"READY=1"


def test_an_engine_that_fails_ends_the_service_for_systemd_to_restart(
    serve: Callable[..., Service], script: Path, tiny: Tiny, tmp_path: Path
) -> None:
    failing = "\nedgefg.Classifier.predict = lambda *_: (_ for _ in ()).throw(edgefg.EdgefgError('CUDA error 719'))\n"
    script.write_text(script.read_text().replace("\nstop = threading.Event()", f"{failing}stop = threading.Event()"))
    service = serve(tiny("null"))
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "a.png").rename(service.inbox / "a.png")
    assert service.process.wait(60) == 1
    assert "CUDA error 719" in service.end()[1]
    assert (service.inbox / "a.png").exists()


def unit() -> str:
    (found,) = blocks("ini")
    return found


def test_the_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze to check the unit with")
    checked = re.sub(r"/opt/edgefg/\.venv/bin/\w+", sys.executable, unit())
    for text, healthy in ((checked, True), (checked.replace("WatchdogSec=30s", "WatchdogSec=often"), False)):
        path = tmp_path / "edgefg.service"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
        about_ours = [line for line in (done.stdout + done.stderr).splitlines() if "edgefg.service" in line]
        assert (done.returncode == 0 and not about_ours) == healthy, done.stdout + done.stderr


def test_the_unit_runs_the_service_of_the_same_text() -> None:
    settings = dict(line.split("=", 1) for line in unit().splitlines() if "=" in line and not line.startswith("#"))
    assert settings["ExecStartPre"].endswith("edgefg build /var/lib/edgefg/model/model.onnx --to tensorrt")
    assert "service.py /var/lib/edgefg/model/engine.plan /var/lib/edgefg/inbox" in settings["ExecStart"]
    assert (settings["Type"], settings["Restart"]) == ("notify", "on-failure")
    assert settings["StateDirectory"].split() == ["edgefg", "edgefg/inbox", "edgefg/done"]
    # What would take the GPU away.
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute", "ProtectClock"} & set(
        settings
    )


def commands() -> list[tuple[str, list[str]]]:
    """Every `edgefg VERB …` of the text's code, with its options."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    code = "\n".join([*blocks("sh"), *blocks("dockerfile"), *blocks("ini"), *inline])
    found = re.findall(r"(?:^|&& |bin/|CMD )edgefg ([a-z]+)([^#&\n]*)", code, flags=re.MULTILINE)
    return [(verb, re.findall(r"--[a-z-]+", rest)) for verb, rest in found]


def test_every_command_exists(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert ("build", ["--to", "--workspace"]) in commands()
    assert {"build", "doctor", "export", "predict", "sign", "verify"} == {verb for verb, _ in commands()}
    for verb, options in commands():
        status, shown, _ = run(verb, "--help")
        assert status == 0, verb
        assert not [option for option in options if option not in shown], (verb, options)


def test_the_table_of_jetpacks_is_doctor_s() -> None:
    rows = table("Supported versions")
    assert [(row[0], row[1], row[2], row[3]) for row in rows] == [
        (l4t, jetpack, cuda or "–", tensorrt or "–") for l4t, (jetpack, cuda, tensorrt) in JETPACKS.items()
    ]
    for *_, tensorrt, _, plans in rows:
        assert plans == ("see `edgefg doctor`" if tensorrt == "–" else "yes" if is_supported(tensorrt) else "no")


def test_the_lowest_tensorrt_is_doctor_s() -> None:
    assert f"TensorRT {LOWEST_TENSORRT} or later of 10, and with 11" in TEXT
    assert re.findall(r"tensorrt(?:-cu\d+)?>=([\d.]+)", TEXT) == [LOWEST_TENSORRT]


def test_the_errors_exist_and_every_one_of_a_device_is_told() -> None:
    told = {re.sub(r"\W", "", row[0]) for row in table("When something is wrong")}
    known = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    elsewhere = {"EdgefgError", "TrainingError", "HardwareError", "CheckpointError", "WeightsError", "ExportError"}
    assert told == known - elsewhere


def test_the_other_python_compiles() -> None:
    for block in blocks("python"):
        compile(block, "jetson.md", "exec")
