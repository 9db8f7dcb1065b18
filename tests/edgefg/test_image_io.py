"""The one decoder: what it reads, and what it refuses instead of filling with grey."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from edgefg.errors import DataError
from edgefg.image_io import decode_image, image_files, list_images, read_image
from edgefg.preprocess import UInt8Array
from tests.synthetic import draw


@pytest.fixture(scope="module")
def picture() -> UInt8Array:
    """BGR, higher than wide, and different at each corner."""
    return draw(np.random.default_rng(1), "cross", 96)[0][:, 10:74]


def _encode(picture: UInt8Array, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture[..., ::-1] if picture.ndim == 3 else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_are_exact(kind: str, picture: UInt8Array) -> None:
    np.testing.assert_array_equal(decode_image(_encode(picture, kind), "x"), picture)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_jpeg(options: dict[str, Any], picture: UInt8Array, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(_encode(picture, "JPEG", quality=95, **options))
    for source in (path, str(path)):
        found = read_image(source)
        assert found.shape == picture.shape
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - picture).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind: str, picture: UInt8Array) -> None:
    found = decode_image(_encode(np.ascontiguousarray(picture[..., 1]), kind), "x")
    assert found.shape == picture.shape
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_alpha_is_dropped_and_sixteen_bits_become_eight(picture: UInt8Array) -> None:
    alpha = cv2.imencode(".png", np.dstack([picture, np.full(picture.shape[:2], 9, np.uint8)]))[1].tobytes()
    np.testing.assert_array_equal(decode_image(alpha, "x"), picture)
    deep = cv2.imencode(".png", picture.astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode_image(deep, "x"), picture)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int, picture: UInt8Array) -> None:
    upright = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x),
    }[orientation](picture)
    found = decode_image(_encode(picture, kind, exif=_exif(orientation)), "x")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < (8 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "BMP", "WEBP"])
def test_cut_off_at_many_lengths(kind: str, picture: UInt8Array) -> None:
    whole = _encode(picture, "JPEG", progressive=True) if kind == "progressive" else _encode(picture, kind)
    decode_image(whole, "x")
    for end in [*range(0, 60), *range(60, len(whole), 37), *range(len(whole) - 12, len(whole))]:
        with pytest.raises(DataError, match=r"^photo\.jpg ") as caught:
            decode_image(whole[:end], "photo.jpg")
        assert "\n" not in str(caught.value)


def test_cut_off_jpeg_with_a_whole_thumbnail(picture: UInt8Array) -> None:
    """The thumbnail inside the EXIF segment has an end-of-image marker of its own, which does not count."""
    thumbnail = b"Exif\x00\x00" + _encode(picture[:32, :32], "JPEG")
    whole = _encode(picture, "JPEG", exif=thumbnail)
    assert whole.count(b"\xff\xd9") >= 2
    decode_image(whole, "x")
    with pytest.raises(DataError, match="cut off"):
        decode_image(whole[: len(whole) * 3 // 4], "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("trailer", [b"\x00", b"\xff", b"camera trailer" * 100, b"\xff\xd8\xff\xe0"])
def test_bytes_after_the_end_do_not_matter(kind: str, trailer: bytes, picture: UInt8Array) -> None:
    whole = _encode(picture, kind)
    np.testing.assert_array_equal(decode_image(whole + trailer, "x"), decode_image(whole, "x"))


def test_jpeg_with_fill_bytes_and_a_comment_that_looks_like_an_end(picture: UInt8Array) -> None:
    whole = _encode(picture, "JPEG", comment=b"\xff\xd9\xff\xd9")
    filled = whole[:2] + b"\xff\xff" + whole[2:]
    np.testing.assert_array_equal(decode_image(filled, "x"), decode_image(whole, "x"))
    with pytest.raises(DataError, match="cut off"):
        decode_image(filled[: len(filled) // 2], "x")


def test_reduced_decoding_is_an_eighth(picture: UInt8Array) -> None:
    for kind in ("JPEG", "PNG"):
        found = decode_image(_encode(picture, kind), "x", reduced=True)
        assert found.shape == (picture.shape[0] // 8, picture.shape[1] // 8, 3)


@pytest.mark.parametrize(
    "data", [b"not a photo, only text\n" * 30, b"GIF89a" + bytes(40), bytes(500), b"\x89PNG", b"\xff\xd8"]
)
def test_what_is_no_image(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "renamed.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"renamed\.jpg is (not an image|cut off)"):
        read_image(path)


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png is empty"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path)


def test_listing_is_sorted_and_holds_images_only(tmp_path: Path, picture: UInt8Array) -> None:
    names = ["b/2.PNG", "b/10.jpg", "a/z.jpeg", "c.webp"]
    for name in [*names, "notes.txt", "a/list.csv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_encode(picture, "PNG"))
    (tmp_path / "folder.jpg").mkdir()
    found = image_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == sorted(names)
    assert image_files(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]
    for path in found:
        np.testing.assert_array_equal(read_image(path), picture)
    assert list_images(tmp_path) == (found, {".txt": 1, ".csv": 1})


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        image_files(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        image_files(tmp_path / "nowhere")


@pytest.mark.slow
def test_real_photographs(grocery: Path) -> None:
    files = image_files(grocery / "val")
    assert len(files) == 296
    for path in files[::10]:
        assert min(read_image(path).shape[:2]) >= 100, path
