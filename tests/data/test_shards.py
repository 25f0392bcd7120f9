"""WebDataset shards: what is read of them, and what is refused."""
from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from stepdistill.data.images import open_images
from stepdistill.errors import RequestError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(colour):
    held = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(held, "PNG")
    return held.getvalue()


def shard(path, files):
    with tarfile.open(path, "w") as out:
        for name, held in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(held)
            out.addfile(info, io.BytesIO(held))
    return path


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_samples_of_several_shards_in_order(tmp_path):
    """The part of a name before its first point is the sample's."""
    shard(tmp_path / "b.tar", {"000.txt": b"blue", "000.seg.png": picture(BLUE)})
    shard(tmp_path / "a.tar", {"x/1.0.png": b"", "x/000.png": picture(RED),
                               "x/000.json": json.dumps({"caption": "red"}).encode(), "._000.png": b"no"}
          | {"x/1.0.png": picture(BLUE), "x/1.txt": "grün".encode()})
    images = open_images(tmp_path, 8)
    assert images.captions(torch.arange(3)) == ["grün", "red", "blue"] and images.count == 3
    assert images.pixels(torch.tensor([1, 2, 1])).mean((2, 3)).tolist() == [[1, -1, -1], [-1, -1, 1], [1, -1, -1]]
    assert open_images(tmp_path / "a.tar", 8).count == 2 and open_images(tmp_path, 8, count=2).count == 2
    assert images.identity == open_images(tmp_path, 8).identity != open_images(tmp_path, 16).identity


def test_classes_of_shards(tmp_path):
    place = shard(tmp_path / "a.tar", {"0.png": picture(RED), "0.cls": b"7", "1.png": picture(RED), "1.cls": b"tench"})
    assert open_images(place, 8, reads="classes").captions(torch.arange(2)) == ["class 7", "tench"]
    assert open_images(place, 8, reads="nothing").captions(torch.arange(2)) == ["", ""]


@pytest.mark.parametrize("files, what", [
    ({"0.png": picture(RED)}, "a.tar/0.png' has no caption: .*found nothing beside it"),
    ({"0.png": picture(RED), "0.json": b"{"}, "the .json of 'a.tar/0.png' cannot be read"),
    ({"0.png": picture(RED), "0.json": b'{"url": 3}'}, r"has no caption: .*found \.json beside it"),
    ({"0.png": picture(RED), "0.txt": b" "}, "is empty"),
    ({"0.txt": b"red"}, "holds no picture"),
    ({"0.png": b"not one", "0.txt": b"red"}, "1 of 1 pictures .* cannot be read")])
def test_bad_shards_are_named(tmp_path, files, what):
    with pytest.raises(RequestError, match=what):
        open_images(shard(tmp_path / "a.tar", files), 8)


def test_what_is_no_tar_and_too_large_a_count(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"PK not a tar" * 100)
    with pytest.raises(RequestError, match="a.tar' cannot be read as a tar file"):
        open_images(tmp_path / "a.tar", 8)
    with pytest.raises(RequestError, match="holds 1 images, fewer than data.count, which is 2"):
        open_images(shard(tmp_path / "b.tar", {"0.png": picture(RED), "0.txt": b"red"}), 8, count=2)


def test_nothing_is_unpacked_wherever_names_lead(tmp_path):
    place = shard(tmp_path / "a.tar", {"../../out.png": picture(RED), "../../out.txt": b"red"})
    images = open_images(place, 8)
    assert (images.pixels(torch.tensor([0])).shape == (1, 3, 8, 8) and [path.name for path in tmp_path.iterdir()]
            == ["a.tar"])
