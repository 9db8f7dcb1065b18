"""Sizes and hashes of an artifact's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from edgefg.artifact.hashes import FileInfo, check_files, file_info, sha256
from edgefg.errors import IntegrityError


@pytest.fixture
def files(tmp_path: Path) -> tuple[FileInfo, FileInfo]:
    (tmp_path / "model.xml").write_bytes(b"<net/>")
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 5000)  # more than one block
    return file_info(tmp_path / "model.xml"), file_info(tmp_path / "model.bin")


def test_a_file_is_described_by_its_bytes(files: tuple[FileInfo, FileInfo], tmp_path: Path) -> None:
    content = (tmp_path / "model.bin").read_bytes()
    assert files[1] == FileInfo(name="model.bin", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert sha256(tmp_path / "model.bin") == files[1].sha256


def test_whole_files_pass(files: tuple[FileInfo, FileInfo], tmp_path: Path) -> None:
    check_files(files, tmp_path, "copy it again")


def test_each_damage_is_named_with_the_remedy(files: tuple[FileInfo, FileInfo], tmp_path: Path) -> None:
    weights = tmp_path / "model.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"model\.bin has 1279999 bytes, .* says 1280000: build it again$"):
        check_files(files, tmp_path, "build it again")
    weights.write_bytes(whole[:-1] + b"?")
    with pytest.raises(IntegrityError, match=r"model\.bin has SHA-256 .*the file was altered; build it again$"):
        check_files(files, tmp_path, "build it again")
    weights.unlink()
    with pytest.raises(IntegrityError, match=r"consists of model\.xml, model\.bin and its manifest; build it again$"):
        check_files(files, tmp_path, "build it again")
    weights.mkdir()
    with pytest.raises(IntegrityError, match=r"cannot read .*model\.bin"):
        check_files(files, tmp_path, "build it again")


@pytest.mark.parametrize("name", ["../model.bin", "a/b", "a\\b", "", "x" * 256])
def test_a_name_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name, "size": 1, "sha256": "0" * 64}, FileInfo)
