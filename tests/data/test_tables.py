"""Parquet files as `datasets` reads them: pictures and prompts."""
from __future__ import annotations

import sys

import pytest
import torch
from test_shards import BLUE, RED, picture

from stepdistill.data.images import open_images
from stepdistill.data.prompts import all_captions, open_prompts
from stepdistill.data.tables import is_table, load
from stepdistill.errors import RequestError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
    load.cache_clear()


def save(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def pictures(*colours):
    return [{"bytes": picture(colour), "path": None} for colour in colours]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_pictures_and_captions(tmp_path, column):
    place = save(tmp_path / "a.parquet", image=pictures(RED, BLUE), **{column: ["red", "blue"]})
    for spec in (place, tmp_path):
        images = open_images(spec, 8)
        assert images.count == 2 and images.captions(torch.tensor([1, 0])) == ["blue", "red"]
        assert images.pixels(torch.tensor([1, 0])).mean((2, 3)).tolist() == [[-1, -1, 1], [1, -1, -1]]
    assert open_images(place, 8, count=1).count == 1 and images.identity != open_images(tmp_path, 16).identity


def test_labels_are_classes(tmp_path):
    table = datasets.Dataset.from_dict({"image": pictures(RED, BLUE), "label": [1, 0]})
    table.to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 8, reads="classes").captions(torch.arange(2)) == ["class 1", "class 0"]
    table.cast_column("label", datasets.ClassLabel(names=["tench", "shark"])).to_parquet(tmp_path / "b.parquet")
    assert open_images(tmp_path / "b.parquet", 8, reads="classes").captions(torch.arange(2)) == ["shark", "tench"]


def test_prompts_of_tables(tmp_path):
    assert all_captions(open_prompts(save(tmp_path / "a.parquet", prompt=["a cat", " a dog "]))) == ["a cat", "a dog"]


@pytest.mark.parametrize("columns, what", [
    ({"text": ["red"]}, "no column of pictures .*found text"),
    ({"image": pictures(RED), "url": ["u"]}, r"no column of captions \(text, caption, prompt\); found image, url"),
    ({"image": pictures(RED), "text": [" "]}, "is empty"),
    ({"image": [{"bytes": b"no", "path": None}], "text": ["a"]}, "1 of 1 pictures .* row 0' cannot be read")])
def test_bad_tables_are_named(tmp_path, columns, what):
    with pytest.raises(RequestError, match=what):
        open_images(save(tmp_path / "a.parquet", **columns), 8)


def test_what_is_no_parquet_and_too_large_a_count(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(RequestError, match="a.parquet' cannot be read as a table"):
        open_images(tmp_path / "a.parquet", 8)
    with pytest.raises(RequestError, match="holds 1 images, fewer than data.count"):
        open_images(save(tmp_path / "b.parquet", image=pictures(RED), text=["red"]), 8, count=2)


def test_a_dataset_of_the_hub_is_asked_for_by_name_and_revision(monkeypatch, tmp_path):
    asked = {}

    def given(name, **how):
        asked.update(how, name=name)
        kinds = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        return datasets.Dataset.from_dict({"image": pictures(RED), "text": ["red"]}, features=kinds)
    monkeypatch.setattr(datasets, "load_dataset", given)
    assert open_images("someone/pictures@abc", 8).captions(torch.tensor([0])) == ["red"]
    assert ((asked["name"], asked["revision"], asked["split"]) == ("someone/pictures", "abc", "train")
            and "trust_remote_code" not in asked)
    assert not is_table(tmp_path) and not is_table("folder") and not is_table("a cat")


def test_without_the_library_it_is_said_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'stepdistill\[data\]'"):
        open_prompts(tmp_path / "a.parquet")
