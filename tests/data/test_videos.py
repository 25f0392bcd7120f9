"""Folders of videos: animations, films, folders of frames; a run of Wan on them."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families.test_matrix import CASES
from PIL import Image

from stepdistill.data.buckets import Chosen
from stepdistill.data.images import BothWays
from stepdistill.data.stream import Stream
from stepdistill.data.videos import VideoImages, read_video, video_files
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe
from stepdistill.run.data import dataset
from stepdistill.run.setup import setup


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


def frames(count: int, height: int = 16, width: int = 24, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
                        for picture in pictures])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three videos of seven frames: an animation, a folder of frames deeper down, and another."""
    place = tmp_path / "videos"
    (place / "deep/b").mkdir(parents=True)
    first, *rest = frames(7, seed=1)
    first.save(place / "a.webp", save_all=True, append_images=rest, lossless=True)
    for name, seed in (("deep/b", 2), ("c", 3)):
        (place / name).mkdir(exist_ok=True)
        for i, picture in enumerate(frames(7, seed=seed)):
            picture.save(place / name / f"{i:03}.png")
    for name, text in (("a", "a red ring"), ("c", "a green cross"), ("deep/b", "a blue square")):
        (place / f"{name}.txt").write_text(text)
    return place


def test_a_folder_of_videos_is_read_in_the_order_of_paths(folder):
    assert [path.relative_to(folder).as_posix() for path in video_files(folder)] == ["a.webp", "c", "deep/b"]
    videos = VideoImages.open(folder, (16, 24), 5)
    every = torch.arange(3)
    assert (videos.captions(every) == ["a red ring", "a green cross", "a blue square"]
            and videos.sides == ((16, 24),) * 3)
    assert torch.equal(videos.pixels(every), torch.stack([tensor(frames(7, seed=seed)[:5]) for seed in (1, 3, 2)]))
    flipped = BothWays(videos)
    assert torch.equal(flipped.pixels(torch.tensor([1, 2])),
                       torch.stack([tensor(frames(5, seed=1)).flip(-1), tensor(frames(5, seed=3))]))
    assert Chosen(videos, torch.tensor([2])).pixels(torch.tensor([0])).shape == (1, 5, 3, 16, 24)
    fewer = VideoImages.open(folder, (16, 24), 3, count=2)
    assert fewer.count == 2 and fewer.pixels(every[:1]).shape == (1, 3, 3, 16, 24) and fewer.identity != videos.identity


def test_videos_cover_their_size(folder):
    cut = VideoImages.open(folder, (16, 16), 2).pixels(torch.tensor([0]))[0]
    assert torch.equal(cut, tensor(frames(2, seed=1))[..., 4:20])


def test_captions_may_stand_in_a_table(folder):
    for name in ("a", "c", "deep/b"):
        (folder / f"{name}.txt").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": name}) + "\n"
                                                   for name in ("c", "a.webp", "deep/b")))
    assert VideoImages.open(folder, 16, 2).captions(torch.arange(3)) == ["a.webp", "c", "deep/b"]
    (folder / "metadata.jsonl").write_text('{"file_name": "d", "text": "d"}\n')
    with pytest.raises(RequestError, match="names 'd', which is not a video file of that folder"):
        VideoImages.open(folder, 16, 2)


def test_a_gif_is_a_video(tmp_path):
    solid = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    solid[0].save(tmp_path / "a.gif", save_all=True, append_images=solid[1:])
    assert ([round(float((frame[0] + 1).mean() * 127.5)) for frame in read_video(tmp_path / "a.gif", 4)]
            == [0, 60, 120, 180])


def test_a_film_is_decoded_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 16, "yuv420p", 10**6
        for i in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 * i, np.uint8),
                                                                   format="rgb24")))
        container.mux(stream.encode(None))
    found = read_video(tmp_path / "a.mp4", 5)
    assert found.shape == (5, 3, 16, 32)
    assert ((found + 1).mean((1, 2, 3)) * 127.5 - torch.arange(5) * 40).abs().max() < 4
    with pytest.raises(RequestError, match="a.mp4' has 6 frames, fewer than 9"):
        read_video(tmp_path / "a.mp4", 9)
    (tmp_path / "b.mp4").write_bytes(b"no film")
    with pytest.raises(RequestError, match="b.mp4' cannot be read"):
        read_video(tmp_path / "b.mp4", 1)


def test_films_without_pyav_are_refused_with_what_to_install(folder, monkeypatch):
    (folder / "d.mp4").write_bytes(b"")
    monkeypatch.setattr("stepdistill.data.videos.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"d.mp4' is a film, which PyAV decodes, and that is not installed: pip "
                       r"install 'stepdistill\[video\]', or"):
        VideoImages.open(folder, 16, 5)
    with pytest.raises(RequestError, match=r"data.images is .*is a film, which PyAV decodes"):
        wan(folder, folder.parent)


@pytest.mark.parametrize("damage, message", [
    (lambda place: (place / "a.txt").unlink(), "a.webp' has no caption"),
    (lambda place: [path.unlink() for path in sorted((place / "c").iterdir())[3:]], "c' has 3 frames, fewer than 5"),
    (lambda place: (place / "a.webp").write_bytes(b"no video"), "a.webp' cannot be read as an image"),
    (lambda place: Image.new("RGB", (8, 8)).save(place / "c/001.png"), "frames in '.*c' are of several sizes"),
])
def test_what_is_missing_damaged_or_too_short_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(RequestError, match=message):
        VideoImages.open(folder, (16, 24), 5)


def test_a_folder_without_videos_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no video"):
        VideoImages.open(tmp_path / "empty", 16, 5)
    with pytest.raises(RequestError, match="is not a folder"):
        VideoImages.open(tmp_path / "none", 16, 5)


def wan(images: Path | str, place: Path, resolution: object = (16, 32)):
    case = CASES["wan"]
    case.build().save_pretrained(place / "wan")
    (place / "wan/stepdistill.json").write_text(json.dumps({"call": {"max_sequence_length": 8}}))
    return setup(Recipe.load({"method": "lcm", "teacher": str(place / "wan"), "student": {"lora": {"rank": 2}},
                              "steps": 2, "resolution": resolution,
                              "frames": 5, "data": {"images": str(images), "batch": 2}, "train": {"updates": 1}}),
                              torch.device("cpu"))


def test_wan_is_trained_on_a_folder_of_videos(folder, tmp_path):
    run = wan(folder, tmp_path)
    made = Stream(dataset(run), 2, 0).batch(0, "student")
    assert made.shape == run.teacher.latent_shape == made.x0.shape[1:]
    texts = {text: i for i, text in enumerate(("a red ring", "a green cross", "a blue square"))}
    videos = VideoImages.open(folder, (16, 32), 5)
    for x0, text in zip(made.x0, made.cond.text, strict=True):
        i = next(i for caption, i in texts.items() if torch.allclose(run.teacher.encode([caption]).text[0],
                                                                     text, atol=1e-6))
        torch.testing.assert_close(x0, run.teacher.encode_images(videos.pixels(torch.tensor([i])))[0],
                                   rtol=1e-4, atol=1e-5)


def test_videos_in_buckets(folder, tmp_path):
    run = wan(folder, tmp_path, {"buckets": [[16, 32], [32, 16]]})
    made = Stream(dataset(run), 2, 0).batch(0, "student")
    assert made.shape == run.teacher.shape_at((16, 32))                 # all three are wider than tall


@pytest.mark.parametrize("images", ["shapes", "empty"])
def test_wan_is_refused_pictures(tmp_path, images):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="the teacher makes videos: name a folder of gif, webp, mp4, .*or let "
                       "frames be 1"):
        wan(images if images == "shapes" else tmp_path / "empty", tmp_path)
