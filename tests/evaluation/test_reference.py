"""Folders of pictures to measure against: read as training reads them, and refused before anything is drawn."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.images import open_images
from stepdistill.errors import RequestError
from stepdistill.evaluation.reference import FolderSource, compute_reference, load_source
from stepdistill.evaluation.sweep import Evaluation, admitted


@pytest.fixture
def odd(tmp_path):
    """Four pictures, no two saved alike, each with its caption."""
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16).repeat(64).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([ramp // 257] * 4).astype(np.uint8)).save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray((ramp // 257).astype(np.uint8)).convert("RGB").save(tmp_path / "plain.bmp")
    for file in tmp_path.glob("*.*"):
        file.with_suffix(".txt").write_text(f"picture {file.stem}")
    (tmp_path / ".hidden.png").write_bytes(b"nothing")
    return tmp_path


def test_one_reader_for_training_and_for_references(odd):
    source, trained = FolderSource(odd, 1), open_images(odd, 64)
    assert len(source.files) == trained.count == 4
    read = dict(zip(source.files, [*source.real(1), *source.pictures()], strict=True))
    for i, file in enumerate(trained.files):
        assert torch.equal(read[file], trained.pixels(torch.tensor([i]))), file
    assert read[odd / "sixteen.png"][0, 0, :, 0].tolist() == pytest.approx(np.linspace(-1, 1, 64), abs=1 / 127)
    assert source.prompts(2) == [f"picture {file.stem}" for file in source.files[:2]]


def test_a_damaged_file_is_named_before_anything_is_drawn(odd):
    (odd / "plain.bmp").write_bytes(b"<html>")
    with pytest.raises(RequestError, match="plain.bmp' cannot be read as an image"):
        load_source(odd, 1)


def save_pictures(folder, count):
    generator = np.random.default_rng(0)
    for i in range(count):
        size = (24 + i % 3, 32, 3) if i % 2 else (40, 36, 3)
        Image.fromarray(generator.integers(0, 255, size, np.uint8)).save(folder / f"{i}.png")


def test_pictures_of_mixed_sizes_are_measured_and_shown(clip_folder, tmp_path):
    save_pictures(tmp_path, 110)
    context = Evaluation(51, prompts=["a cat"], features=[clip_folder], reference=tmp_path, say=lambda text: None)
    row, shown = context.real()
    assert shown.shape[:2] == (10, 3) and row["metrics"]["clip_score"] is None
    assert compute_reference(context.features, context.source).whole.count == 59


def test_what_cannot_be_measured_is_refused_from_configs_alone(clip_folder, tmp_path, monkeypatch):
    save_pictures(tmp_path, 110)
    monkeypatch.setattr("stepdistill.evaluation.features.CLIPModel", None)
    with pytest.raises(RequestError, match="its images have no captions: give a list of prompts"):
        admitted(51, None, [clip_folder], tmp_path)
    with pytest.raises(RequestError, match="9 samples against 50000 pictures of shapes:50000@7 are too few for "
                       "any figure: at least 10 of each"):
        admitted(9, None, [clip_folder], "shapes")
    with pytest.raises(RequestError, match="holds 110 images; 56 samples need at least 112"):
        admitted(56, ["a cat"], [clip_folder], tmp_path)
    with pytest.raises(RequestError, match="against 9 pictures of shapes:9@7 are too few"):
        admitted(51, None, [clip_folder], "shapes:9")
    assert admitted(51, ["a cat"], [clip_folder], tmp_path).count == 59
