from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data import notices, shapes
from stepdistill.data.images import open_images
from stepdistill.errors import RequestError

ALL = torch.arange


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))


def save(path, colour=(255, 0, 0), size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b.png", (0, 255, 0)), ("a.jpg", (255, 0, 0)), ("deep/c.webp", (0, 0, 255))):
        save(tmp_path / name, colour).with_suffix(".txt").write_text(f"picture {name[0] if '/' not in name else 'c'}\n")
    return tmp_path


def table(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_shapes_are_rendered_by_seed_and_number():
    images, ids = open_images("shapes", 32, seed=5), torch.tensor([9, 4])
    scene = shapes.scenes(ids, 5)
    assert images.count is None and open_images("shapes", 32, count=7).count == 7
    assert torch.equal(images.pixels(ids), shapes.render(scene)) and images.captions(ids) == shapes.captions(scene)
    assert open_images("shapes", 64).pixels(ids).shape == (2, 3, 64, 64)


def test_a_folder_for_each_class(tmp_path):
    for name in ("0/a.png", "03/b.png", "tench/c.png"):
        save(tmp_path / name)
    save(tmp_path / "d.png").with_suffix(".txt").write_text("class 7")
    images = open_images(tmp_path, 8, reads="classes")
    assert images.captions(ALL(4)) == ["class 0", "class 3", "class 7", "tench"]
    (tmp_path / "d.txt").unlink()
    with pytest.raises(RequestError, match="d.png' has no class"):
        open_images(tmp_path, 8, reads="classes")
    with pytest.raises(RequestError, match="a.png' has no caption"):
        open_images(tmp_path, 8)
    assert open_images(tmp_path, 8, reads="nothing").captions(ALL(4)) == [""] * 4
    table(tmp_path, [{"file_name": name, "text": "class 9"}
                     for name in ("0/a.png", "03/b.png", "tench/c.png", "d.png")])
    assert open_images(tmp_path, 8, reads="classes").captions(ALL(4)) == ["class 9"] * 4


def test_pictures_of_shapes_without_their_captions():
    images, told = open_images("shapes", 32, count=5, reads="nothing"), open_images("shapes", 32, count=5)
    assert images.count == 5 and images.captions(ALL(2)) == ["", ""] and images.identity != told.identity
    assert torch.equal(images.pixels(ALL(2)), told.pixels(ALL(2)))


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    images = open_images(folder, 8)
    assert images.count == 3 and images.captions(ALL(3)) == ["picture a", "picture b", "picture c"]
    pixels = images.pixels(torch.tensor([2, 1]))
    assert pixels.shape == (2, 3, 8, 8) and pixels.dtype == torch.float32
    assert pixels[1].mean((1, 2)).tolist() == [-1, 1, -1]           # png is exact
    assert (pixels[0].mean((1, 2)) - torch.tensor([-1.0, -1, 1])).abs().max() < 0.1


def test_metadata_wins_over_text_files(folder):
    table(folder, [{"file_name": name, "text": name.upper()} for name in ("deep/c.webp", "a.jpg", "b.png")])
    assert open_images(folder, 8).captions(ALL(3)) == ["A.JPG", "B.PNG", "DEEP/C.WEBP"]


def test_the_centre_is_cropped_and_nothing_is_squeezed(tmp_path):
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255                                         # white is the central square
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert (open_images(tmp_path, 10).pixels(ALL(2)) == 1).all()


def test_what_is_transparent_is_white_and_grey_has_three_channels(tmp_path):
    save(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA").with_suffix(".txt").write_text("clear")
    save(tmp_path / "b.png", 128, mode="L").with_suffix(".txt").write_text("grey")
    pixels = open_images(tmp_path, 4).pixels(ALL(2))
    assert (pixels[0] == 1).all() and (pixels[1] - (128 / 127.5 - 1)).abs().max() < 1e-6


def test_rotation_in_the_camera_s_tag_is_obeyed(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3                                                # upside down
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("turned")
    assert open_images(tmp_path, 8).pixels(ALL(1))[0, 0, :, 0].tolist() == [-1.0] * 4 + [1.0] * 4


def test_the_identity_changes_with_whatever_changes_the_data(folder):
    seen = [open_images(folder, 8).identity, open_images(folder, 16).identity]
    (folder / "b.txt").write_text("another caption")
    seen.append(open_images(folder, 8).identity)
    os.utime(folder / "b.png", ns=(1, 1))
    seen.append(open_images(folder, 8).identity)
    save(folder / "d.png").with_suffix(".txt").write_text("more")
    seen.append(open_images(folder, 8).identity)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert open_images(folder, 8).identity == seen[-1]


def test_a_count_takes_the_first_of_a_folder(folder):
    two = open_images(folder, 8, count=2)
    assert two.count == 2 and two.captions(ALL(2)) == ["picture a", "picture b"] and two.identity["files"] == 2
    assert two.identity != open_images(folder, 8).identity == open_images(folder, 8, count=3).identity
    with pytest.raises(RequestError, match="holds 3 images, fewer than data.count, which is 4"):
        open_images(folder, 8, count=4)


@pytest.mark.parametrize("name", ["b.txt", "metadata.jsonl"])
def test_captions_of_older_programs_are_read_and_said(folder, name, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    text = "Bär" if name == "b.txt" else "\n".join(json.dumps({"file_name": each, "text": "Bär"}, ensure_ascii=False)
                                                   for each in ("a.jpg", "b.png", "deep/c.webp"))
    (folder / name).write_bytes(text.encode("latin-1"))
    with caplog.at_level("INFO", "stepdistill"):
        assert open_images(folder, 8).captions(torch.tensor([1])) == ["Bär"]
    assert f"{name}' is not UTF-8, and read as Windows-1252" in caplog.text
    (folder / name).write_bytes(text.encode("utf-16"))
    assert open_images(folder, 8).captions(torch.tensor([1])) == ["Bär"]
    (folder / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match=f"{name}' cannot be read as UTF-8 text"):
        open_images(folder, 8)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "deep/metadata.csv"])
def test_tables_as_datasets_reads_them(folder, name, column):
    """A folder's own table names its pictures from there; the nearest one holds."""
    rows = {"c.webp": "one, and two"} if "/" in name else {"a.jpg": "a", "b.png": "b", "deep/c.webp": "one, and two"}
    if name.endswith("jsonl"):
        (folder / name).write_text("\n".join(json.dumps({"file_name": each, column: [text, "another"]})
                                             for each, text in rows.items()))
    else:
        (folder / name).write_text(f"file_name,{column}\n" + "".join(f'{each},"{text}"\n'
                                                                     for each, text in rows.items()))
        if "/" in name:
            table(folder, [{"file_name": each, "text": each[0]} for each in ("a.jpg", "b.png", "deep/c.webp")])
    assert open_images(folder, 8).captions(ALL(3)) == ["a", "b", "one, and two"]


def test_linked_folders_are_read_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "e.png").with_suffix(".txt").write_text("linked")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert open_images(folder, 8).captions(ALL(4)) == ["picture a", "picture b", "picture c", "linked"]


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".gif"])
def test_other_kinds_of_pictures(tmp_path, suffix):
    save(tmp_path / f"a{suffix}").with_suffix(".txt").write_text("red")
    assert open_images(tmp_path, 8).pixels(ALL(1)).mean((0, 2, 3)).tolist() == [1, -1, -1]


def test_what_is_no_picture_is_counted(folder, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())
    for name in ("x.mp4", "deep/y.heic", "z.heic"):
        (folder / name).write_bytes(b"film")
    with caplog.at_level("INFO", "stepdistill"):
        assert open_images(folder, 8).count == open_images(folder, 16).count == 3
    assert caplog.text.count("3 files under") == 1 and "2 .heic, 1 .mp4" in caplog.text


def test_no_folder_and_no_images(tmp_path):
    with pytest.raises(RequestError, match="missing' is not a folder"):
        open_images(tmp_path / "missing", 8)
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(RequestError, match="holds no image"):
        open_images(tmp_path, 8)


def test_missing_and_empty_captions_are_named(folder):
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(RequestError, match="a.jpg' is empty"):
        open_images(folder, 8)
    (folder / "a.txt").unlink()
    with pytest.raises(RequestError, match="a.jpg' has no caption"):
        open_images(folder, 8)
    table(folder, [{"file_name": "a.jpg", "text": "a"}])
    with pytest.raises(RequestError, match="b.png' has no caption.*not list: 2"):
        open_images(folder, 8)


@pytest.mark.parametrize("row", [{"file": "a.jpg", "text": "a"}, {"file_name": "z.jpg", "text": "a"}, "a.jpg",
                                 {"file_name": "a.jpg"},
                                 {"file_name": "a.jpg", "text": 3}])
def test_bad_lines_are_numbered(folder, row):
    table(folder, [{"file_name": "b.png", "text": "b"}, row])
    with pytest.raises(RequestError, match="line 2"):
        open_images(folder, 8)


def test_damaged_images_are_named_before_anything_is_trained(folder):
    (folder / "b.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(RequestError, match="b.png' cannot be read"):
        open_images(folder, 8)


def cut_short(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])


def test_pictures_that_were_cut_short_are_refused_before_training(folder):
    cut_short(folder / "b.png")
    with pytest.raises(RequestError, match="1 of 3 pictures of .* cannot be read, more than 2%: .*b.png"):
        open_images(folder, 8)


def test_a_small_share_is_skipped_with_a_count_and_remembered(tmp_path, caplog, monkeypatch):
    for i in range(60):
        save(tmp_path / f"{i:02}.png").with_suffix(".txt").write_text(str(i))
    cut_short(tmp_path / "07.png")
    monkeypatch.setattr(notices, "_said", set())
    with caplog.at_level("INFO", "stepdistill"):
        images = open_images(tmp_path, 8)
    assert images.count == 59 and images.captions(torch.tensor([6, 7])) == ["6", "8"]
    assert "1 of 60 pictures" in caplog.text and "07.png" in caplog.text
    monkeypatch.setattr("stepdistill.data.images.read_picture", None)                # nothing is decoded again
    assert open_images(tmp_path, 8).identity == images.identity
    save(tmp_path / "07.png")
    monkeypatch.undo()
    assert open_images(tmp_path, 8).count == 60                                      # mended, it is there


def test_sixteen_bits_are_rounded_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("deep")
    assert (open_images(tmp_path, 8).pixels(ALL(1)) - (round(40_000 / 257) / 127.5 - 1)).abs().max() < 1e-6


def test_what_is_hidden_is_no_picture(folder):
    for name in ("._a.jpg", ".thumbnails/a.jpg", "deep/.cache/a.png"):
        save(folder / name)
    assert open_images(folder, 8).count == 3
