"""Public data sets in the layouts that torchvision reads, tiny."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgefg.data import ImageDataset, load_dataset, load_split
from edgefg.data.csv_manifest import write_csv
from edgefg.data.public import public_root
from edgefg.errors import DataError

RNG = np.random.default_rng(0)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), RNG.integers(0, 255, (16, 16, 3), np.uint8))


def sizes(data: ImageDataset) -> dict[str, int]:
    return {part: len(samples) for part, samples in data.splits.items()}


def write_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    levels = {"variant": ("707-320", "A300B4"), "family": ("Boeing 707", "A300"), "manufacturer": ("Boeing", "Airbus")}
    files = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
    for level, names in levels.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files[level]).write_text("\n".join(sorted(names)) + "\n")
    for i in range(12):
        picture(folder / "images" / f"{i:07d}.jpg")
        part = ("train", "val", "test")[i % 3]
        for level, names in levels.items():
            with (folder / f"images_{level}_{part}.txt").open("a") as file:
                file.write(f"{i:07d} {names[i // 3 % 2]}\n")


def test_aircraft(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    data = load_dataset(Path(f"fgvc-aircraft:{tmp_path}"))
    assert sizes(data) == {"train": 4, "val": 4, "test": 4}
    assert (data.labels, data.format, data.root) == (("707-320", "A300B4"), "fgvc-aircraft", tmp_path)
    assert {level.name: level.groups for level in data.taxonomy} == {
        "family": ("Boeing 707", "A300"),
        "manufacturer": ("Boeing", "Airbus"),
    }
    assert [(path.stem, label) for path, label in data.splits["val"]] == [
        ("0000001", 0), ("0000004", 1), ("0000007", 0), ("0000010", 1),
    ]  # fmt: skip


def test_pets(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("trainval", 10), ("test", 3)):
        lines = []
        for name, label, kind in (("Abyssinian", 1, 1), ("american_bulldog", 2, 2)):
            for i in range(count):
                picture(folder / "images" / f"{name}_{part}{i}.jpg")
                lines.append(f"{name}_{part}{i} {label} {kind} 1\n")
        (folder / "annotations" / f"{part}.txt").write_text("".join(lines))
    data = load_dataset(Path(f"oxford-pets:{tmp_path}"))
    assert data.labels == ("Abyssinian", "American Bulldog")
    assert sizes(data)["test"] == 6
    assert sizes(data)["train"] + sizes(data)["val"] == 20
    assert sizes(data)["val"]
    assert data.taxonomy[0].groups == ("Cat", "Dog")
    assert {path.name[0] for path, label in data.splits["train"] if label == 1} == {"a"}


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sio = pytest.importorskip("scipy.io", reason="torchvision reads this data set's .mat files with SciPy")
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    for i in range(1, 307):
        picture(folder / "jpg" / f"image_{i:05d}.jpg")
    sio.savemat(folder / "imagelabels.mat", {"labels": np.arange(306)[None] % 102 + 1})
    parts = {"trnid": np.arange(1, 103), "valid": np.arange(103, 205), "tstid": np.arange(205, 307)}
    sio.savemat(folder / "setid.mat", {name: ids[None] for name, ids in parts.items()})
    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, (name, _) in Flowers102._file_dict.items()
        if key != "image"
    }
    monkeypatch.setattr(Flowers102, "_file_dict", sums)
    data = load_dataset(Path(f"flowers-102:{tmp_path}"))
    assert sizes(data) == {"train": 102, "val": 102, "test": 102}
    assert data.labels[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert data.splits["test"][1] == (folder / "jpg" / "image_00206.jpg", 1)


def test_cars(tmp_path: Path) -> None:
    sio = pytest.importorskip("scipy.io", reason="torchvision reads this data set's .mat files with SciPy")
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    sio.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names[None]})
    for part, place in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros((1, 20), dtype=[("class", "O"), ("fname", "O")])
        for i in range(20):
            picture(folder / f"cars_{part}" / f"{i:05d}.jpg")
            rows[0, i] = (np.uint8(i % 2 + 1), f"{i:05d}.jpg")
        sio.savemat(folder / place, {"annotations": rows})
    data = load_dataset(Path(f"stanford-cars:{tmp_path}"))
    assert data.labels == tuple(names)
    assert sizes(data)["test"] == 20
    assert all(int(path.stem) % 2 == label for samples in data.splits.values() for path, label in samples)
    (folder / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"Dataset not found.*it expects .*stanford_cars/ with .*withlabels\.mat"):
        load_dataset(Path(f"stanford-cars:{tmp_path}"))


INAT = ("00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Pica_pica",
        "00001_Plantae_Tracheophyta_Magnoliopsida_Rosales_Rosaceae_Rosa_canina")  # fmt: skip


def write_inat(root: Path, version: str, count: int) -> None:
    for name in INAT:
        for i in range(count):
            picture(root / version / name / f"{version}-{i}.jpg")


def test_inaturalist(tmp_path: Path) -> None:
    write_inat(tmp_path, "2021_train_mini", 8)
    (tmp_path / "2021_train_mini" / INAT[0] / ".hidden.jpg").write_text("no image")
    data = load_dataset(Path(f"inaturalist:2021_train_mini:{tmp_path}"))
    assert sizes(data)["test"] == 0
    write_inat(tmp_path, "2021_valid", 3)
    data = load_dataset(Path(f"inaturalist:2021_train_mini:{tmp_path}"))
    assert data.labels == INAT
    assert sizes(data)["test"] == 6
    assert sizes(data)["train"] + sizes(data)["val"] == 16
    assert [level.name for level in data.taxonomy] == ["kingdom", "phylum", "class", "order", "family", "genus"]
    assert data.taxonomy[5].groups == ("Pica", "Rosa")
    alone = load_dataset(Path(f"inaturalist:2021_valid:{tmp_path}"))
    assert sum(sizes(alone).values()) == 6
    assert alone.root == data.root == tmp_path


def test_inaturalist_of_2018_is_split_here(tmp_path: Path) -> None:
    for name in ("Aves/0", "Plantae/1"):
        for i in range(10):
            picture(tmp_path / "2018" / name / f"{i}.jpg")
    data = load_dataset(Path(f"inaturalist:2018:{tmp_path}"))
    assert data.labels == ("Aves/0", "Plantae/1")
    assert all(sizes(data).values())
    assert data.taxonomy[0].groups == ("Aves", "Plantae")


def test_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inat(tmp_path / "inat", "2021_train", 8)
    monkeypatch.chdir(tmp_path)
    named = load_dataset(Path("inaturalist:2021_train:inat"))
    assert named.splits == load_dataset(Path("inaturalist:inat")).splits
    resolved = load_dataset(Path("inaturalist:2021_train:inat").resolve())
    assert (resolved.root, resolved.fingerprint) == (tmp_path / "inat", named.fingerprint)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("fgvc-aircraft", "fgvc-aircraft-2013b/data/ with images/"),
        ("stanford-cars", "stanford_cars/ with cars_train/"),
        ("oxford-pets", "oxford-iiit-pet/ with images/"),
        ("flowers-102", "flowers-102/ with jpg/"),
        ("inaturalist", r"2021_train/<category>/\*\.jpg, with version one of 2017"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_made(tmp_path: Path, name: str, needed: str) -> None:
    root = tmp_path / "gone"
    with pytest.raises(DataError, match=f"torchvision cannot read {name} in .*gone .*; it expects .*{needed}") as e:
        load_dataset(Path(f"{name}:{root}"))
    assert "\n" not in str(e.value)
    assert not root.exists()


def test_a_file_that_is_missing_inside(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images_family_train.txt").unlink()
    with pytest.raises(DataError, match=r"images_family_train\.txt"):
        load_dataset(Path(f"fgvc-aircraft:{tmp_path}"))


def test_a_device_reads_the_list_of_it(tmp_path: Path) -> None:
    write_aircraft(tmp_path / "root")
    data = load_dataset(Path(f"fgvc-aircraft:{tmp_path / 'root'}"))
    write_csv(tmp_path / "aircraft.csv", data.splits, data.labels, data.groups, data.taxonomy)
    assert load_split(tmp_path / "aircraft.csv", "test", data.labels, None)[1] == data.splits["test"]
    listed = load_dataset(tmp_path / "aircraft.csv")
    assert (listed.splits, listed.taxonomy) == (data.splits, data.taxonomy)


def test_public_data_sets_are_known_by_their_names(tmp_path: Path) -> None:
    assert public_root(Path("flowers-102:/data/x")) == ("flowers-102", Path("/data/x"))
    assert public_root(Path("flowers-102:x/y")) == ("flowers-102", Path("x/y"))
    assert public_root(Path("inaturalist:2021_valid:x")) == ("inaturalist", Path("2021_valid:x"))
    # As `Path.resolve` leaves them.
    assert public_root(Path("/here/flowers-102:/data/x")) == ("flowers-102", Path("/data/x"))
    assert public_root(Path("/here/flowers-102:x")) == ("flowers-102", Path("/here/x"))
    for other in ("flowers-102", "flowers-102:", "my-flowers-102:x", "flowers:x", "data/birds", "C:/birds"):
        assert public_root(Path(other)) is None
    (tmp_path / "flowers-102:x").mkdir()
    assert public_root(tmp_path / "flowers-102:x") is None
