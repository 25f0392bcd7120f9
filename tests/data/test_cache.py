from __future__ import annotations

import json
import os
import sys
import time
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepdistill.data import cache as module
from stepdistill.data.cache import Cache, contents, default_root, fingerprint
from stepdistill.errors import RequestError


class Maker:
    """Rows that are a function of their number, and a record of what was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, indices):
        if self.fail_at in indices.tolist():
            raise KeyboardInterrupt
        self.asked += indices.tolist()
        return ({"x": indices[:, None, None] + torch.arange(6.0).reshape(2, 3) / 7, "n": indices * 2},
                [f"row {i}" for i in indices.tolist()])


def make(root, maker=None, count=25, per_file=10, identity=(("source", 1),), **settings):
    return Cache(root, batch=4, **settings).store("rows", dict(identity), count, ("x", "n"), maker or Maker(), per_file)


def check(store):
    indices = torch.tensor([24, 0, 9, 10, 3, 3])
    want, texts = Maker()(indices)
    assert len(store) == 25 and [store.texts[i] for i in indices] == texts
    assert (all(torch.equal(store.rows(name, indices), want[name]) for name in store.names)
            and set(store.names) == {"x", "n"})


def files(root):
    return sorted(root.rglob("*.safetensors"))


def test_rows_come_back_and_are_made_once(tmp_path):
    check(make(tmp_path))
    assert [path.name for path in files(tmp_path)] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    again = Maker()
    check(make(tmp_path, again))
    assert not again.asked
    assert json.loads(next(tmp_path.rglob("about.json")).read_text())["source"] == 1


def test_an_interrupted_cache_goes_on_from_its_finished_files(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Maker(fail_at=17))
    assert len(files(tmp_path)) == 1
    again = Maker()
    check(make(tmp_path, again))
    assert again.asked == list(range(10, 25))


def test_a_lost_file_alone_is_made_again_and_leftovers_are_swept(tmp_path):
    make(tmp_path)
    files(tmp_path)[1].unlink()
    left = files(tmp_path)[0].with_name(".00001.safetensors.partial")
    left.write_bytes(b"half")
    again = Maker()
    check(make(tmp_path, again))
    assert again.asked == list(range(10, 20)) and not left.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:4], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_damaged_file_is_named_and_made_again(tmp_path, caplog, damage):
    make(tmp_path)
    path = files(tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    again = Maker()
    check(make(tmp_path, again))
    assert again.asked == list(range(10, 20)) and str(path) in caplog.text and "damaged" in caplog.text


def test_a_file_of_another_length_is_no_file_of_this_store(tmp_path, caplog):
    make(tmp_path)
    paths = files(tmp_path)
    paths[0].write_bytes(paths[2].read_bytes())
    check(make(tmp_path))
    assert "10 rows" in caplog.text


def test_every_change_leads_to_another_store(tmp_path):
    make(tmp_path)
    for change in ({"count": 24}, {"identity": (("source", 2),)}, {"identity": (("source", 1), ("seed", 0))},
                   {"per_file": 11},
                   {"dtype": torch.float16}):
        maker = Maker()
        make(tmp_path, maker, **change)
        assert maker.asked == list(range(change.get("count", 25)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_stored_and_float32_handed_out(tmp_path, dtype):
    store = make(tmp_path, dtype=dtype)
    assert store.files[0]["x"].dtype == dtype and store.files[0]["n"].dtype == torch.int64
    rows = store.rows("x", torch.tensor([3]))
    assert rows.dtype == torch.float32 and torch.equal(rows, Maker()(torch.tensor([3]))[0]["x"].to(dtype).float())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_are_mapped_not_loaded(tmp_path):
    store = make(tmp_path)
    with open("/proc/self/maps") as maps:
        assert str(files(tmp_path)[0]) in maps.read()
    check(store)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    overflow = lambda indices: ({"latents": torch.full((len(indices), 2), 1e6)}, [""] * len(indices))
    with pytest.raises(RequestError, match="'latents'.*not finite.*float32"):
        Cache(tmp_path, dtype=torch.float16).store("rows", {}, 3, ("latents",), overflow)
    assert not files(tmp_path)


def test_progress_is_told(tmp_path):
    reports = []
    make(tmp_path, report=lambda *row: reports.append(row))
    assert (reports[0] == ("rows", 4, 25) and reports[-1] == ("rows", 25, 25) and [row[1] for row in reports]
            == sorted(row[1] for row in reports))


def test_a_disk_without_room_is_refused_with_the_need(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(RequestError, match="needs .* MiB more.*STEPDISTILL_CACHE"):
        make(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and not files(tmp_path)


def test_a_disk_that_fills_up_while_writing_keeps_what_is_finished(tmp_path, monkeypatch):
    calls = []

    def sync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:                     # after about.json and a file
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", sync)
    with pytest.raises(RequestError, match="needs"):
        make(tmp_path)
    assert len(files(tmp_path)) == 1 and not list(tmp_path.rglob("*.partial"))
    again = Maker()
    check(make(tmp_path, again))
    assert again.asked == list(range(10, 25))


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write into.*STEPDISTILL_CACHE"):
        make(tmp_path / "file")


def test_the_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    assert default_root() == tmp_path == Cache().root
    monkeypatch.delenv("STEPDISTILL_CACHE")
    assert default_root().parts[-2:] == (".cache", "stepdistill")


def test_a_fingerprint_changes_with_its_files(tmp_path):
    (tmp_path / "a").write_text("1")
    seen = [fingerprint(tmp_path)]
    (tmp_path / "a").write_text("12")
    seen.append(fingerprint(tmp_path))
    os.utime(tmp_path / "a", ns=(1, 1))
    seen.append(fingerprint(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 4 and fingerprint(tmp_path) == seen[-1]
    assert fingerprint("runwayml/stable-diffusion-v1-5") == "runwayml/stable-diffusion-v1-5"


def test_contents_are_the_same_wherever_a_pipeline_lies(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "unet/weights").write_bytes(b"1234")
    os.utime(tmp_path / "there/unet/weights", (0, 0))
    (tmp_path / "there/README.md").write_text("of no concern")
    here, there = tmp_path / "here", tmp_path / "there"
    assert contents(here) == contents(there) and fingerprint(here) != fingerprint(there)
    for path, text in ((there / "unet/weights", b"1235"), (there / "model_index.json", b"{ }"),
                       (there / "unet/more", b"")):
        before = contents(there)
        path.write_bytes(text)
        assert contents(there) not in (before, contents(here))
    assert (contents("owner/name") == "owner/name" and contents(here / "unet/weights")
            != contents(there / "unet/weights"))


def test_a_named_folder_says_what_it_holds(tmp_path):
    spec = lambda count=25, source=1: Cache(tmp_path, batch=4).spec("rows", {"source": {"seed": source}}, count,
                                                                    ("x", "n"), 10, tmp_path / "mine")
    assert spec().found_otherwise() == [] and spec().made() == 0
    check(Cache(tmp_path, batch=4).fill(spec(), Maker()))
    assert spec().found_otherwise() == [] and spec().made() == 25
    assert spec(24, 2).found_otherwise() == ["count is 25 there and 24 here", "source.seed is 1 there and 2 here"]
    (tmp_path / "mine/00001.safetensors").unlink()
    assert spec().made() == 15
    (tmp_path / "mine/about.json").write_text("[]")
    with pytest.raises(RequestError, match="about.json is damaged.*mine' holds other files"):
        spec().found_otherwise()


def rewritten(path, change):
    """A file whose header is whole, and what it holds another."""
    with safe_open(path, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


CHANGES = {
    "a number": (lambda tensors, metadata: tensors["x"][3].zero_(), "not those that were written"),
    "a NaN": (lambda tensors, metadata: tensors["x"][3].fill_(float("nan")), "not those that were written"),
    "a text": (lambda tensors, metadata: metadata.update(rows=metadata["rows"].replace("row 13", "row 31")),
               "not those that were written"),
    "another dtype": (lambda tensors, metadata: tensors.update(n=tensors["n"].int()), "not those that were written"),
    "a tensor less": (lambda tensors, metadata: tensors.pop("n"), "it holds x, and should hold n, x"),
    "a tensor more": (lambda tensors, metadata: tensors.update(y=tensors["x"].clone()),
                      "it holds n, x, y, and should hold n, x"),
    "no texts": (lambda tensors, metadata: metadata.pop("rows"), "should be a list"),
    "texts of another kind": (lambda tensors, metadata: metadata.update(rows='{"texts": [1]}'), "should be a text"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_on_disk_is_named_and_made_again(tmp_path, caplog, name):
    make(tmp_path)
    change, message = CHANGES[name]
    rewritten(files(tmp_path)[1], change)
    again = Maker()
    check(make(tmp_path, again))
    assert again.asked == list(range(10, 20)) and str(files(tmp_path)[1]) in caplog.text and message in caplog.text


def test_files_of_earlier_versions_are_taken_as_they_are(tmp_path):
    make(tmp_path)
    rewritten(files(tmp_path)[1],
              lambda tensors, metadata: metadata.update(texts=json.dumps(json.loads(metadata.pop("rows"))["texts"])))
    again = Maker()
    check(make(tmp_path, again))
    assert not again.asked


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    make(tmp_path)
    path = files(tmp_path)[2]
    whole = path.read_bytes()
    for at in range(len(whole) - 5 * 6 * 4 - 5 * 8, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1:])
        again = Maker()
        make(tmp_path, again)
        assert again.asked == list(range(20, 25)), at


def test_others_wait_for_who_makes_a_store(tmp_path):
    folder = make(tmp_path / "known").files and files(tmp_path / "known")[0].parent.name
    told, done = [], []

    def slow(indices):
        if not told:
            told.append(Thread(target=lambda: done.append(make(tmp_path / "new", second))))
            told[0].start()
            time.sleep(1)
        return Maker()(indices)

    second = Maker()
    check(make(tmp_path / "new", slow))
    told[0].join()
    check(done[0])
    assert not second.asked and not list((tmp_path / "new" / folder).glob(".*"))
