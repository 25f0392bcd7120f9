"""A run with buckets: on a tiny SDXL and a folder of pictures of three shapes."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_tiny_sd3

from stepdistill import api
from stepdistill.data.picture import read_picture
from stepdistill.data.stream import Stream
from stepdistill.errors import RequestError
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.buckets import own_sides
from stepdistill.run.data import dataset
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup
from stepdistill.training import checkpoints

from ..families.dit import tiny_dit
from ..methods.test_two_processes import CASES, CLOSE, LORA, seen, train
from ..models.test_sdxl import save_tiny_xl
from ..processes import on_two_processes

SIZES, BATCH = [[16, 16], [24, 16], [16, 24]], 4
SHAPES = {(4, 8, 8): (16, 16), (4, 12, 8): (24, 16), (4, 8, 12): (16, 24)}
PICTURES = [(30, 20)] * 6 + [(20, 30)] * 5 + [(25, 25)] * 4 + [(40, 21)]                  # height, width


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """teacher: a tiny SDXL. pictures: noise, captioned by its number."""
    folder, random = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    save_tiny_xl(folder / "teacher", zeros=True)
    (folder / "pictures").mkdir()
    for i, size in enumerate(PICTURES):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i:02}.png")
        (folder / "pictures" / f"{i:02}.txt").write_text(f"a ring {i}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


def table(world: Path, data: dict | None = None, **changes) -> dict:
    return {"method": "lcm", "teacher": str(world / "teacher"), "student": LORA, "steps": 2, "guidance": 2.0,
            "resolution": {"buckets": SIZES},
            "data": {"images": str(world / "pictures"), "batch": BATCH, **({} if data is None else data)},
            "train": {"updates": 4, "doctor": "off"}, **changes}


def batches(recipe: dict, count: int = 12) -> tuple:
    run = setup(Recipe.load(recipe), torch.device("cpu"))
    stream = Stream(dataset(run), BATCH, 0, run.teacher.latent_shape)
    return run, [stream.batch(step, "student") for step in range(count)]


@pytest.mark.parametrize("data", [{}, {"cache": True}, {"flip": True}], ids=["live", "cached", "flipped"])
def test_a_batch_is_of_one_bucket_its_pictures_cut_to_it_and_told_truly(world, data):
    run, made = batches(table(world, data))
    assert {batch.shape for batch in made} == {*SHAPES}
    captions = {f"a ring {i}": i for i in range(len(PICTURES))}
    text = {i: run.teacher.encode([caption]).text[0] for caption, i in captions.items()}
    for batch in made:
        size = SHAPES[batch.shape]
        for x0, own, ids, null in zip(batch.x0, batch.cond.text, batch.cond.time_ids.tolist(),
                                      batch.cond.null.time_ids.tolist(), strict=True):
            i = next(i for i, found in text.items() if torch.allclose(found, own, atol=1e-6))
            pixels = read_picture(world / "pictures" / f"{i:02}.png", size)[None]
            known = [run.teacher.encode_images(p)[0]
                     for p in (pixels, *([pixels.flip(-1)] if data.get("flip") else []))]
            assert any(torch.allclose(x0, latents, atol=1e-5) for latents in known)
            assert ids == null and ids[:2] == [*PICTURES[i]] and ids[4:] == [*size]
            scale = max(size[0] / PICTURES[i][0], size[1] / PICTURES[i][1])
            assert ids[2:4] == [round((PICTURES[i][0] * scale - size[0]) / 2),
                                round((PICTURES[i][1] * scale - size[1]) / 2)]


@pytest.mark.parametrize("data", [{"images": "shapes"}, {"images": "shapes", "count": 20, "cache": True},
                                  {"images": None, "prompts": ["a red ring", "b"]}],
                         ids=["endless", "counted", "prompts"])
def test_what_is_of_any_size_comes_in_every_bucket(world, data):
    run, made = batches(table(world, data, method="dmd2" if data["images"] is None else "lcm",
                              settings={"gan_weight": 0.0} if data["images"] is None else {}))
    assert {batch.shape for batch in made} == {*SHAPES}
    for batch in made:
        size = SHAPES[batch.shape]
        assert batch.cond.time_ids.tolist() == [[*size, 0, 0, *size]] * BATCH
        assert (batch.x0 is None) == (data["images"] is None)
        if batch.x0 is not None:
            assert batch.x0.shape[1:] == batch.shape


def test_the_standard_buckets_of_a_teacher(world):
    run = setup(Recipe.load(table(world, teacher="assets/shapes-sd", resolution="buckets", data={"images": "shapes"})),
                torch.device("cpu"))
    assert run.sizes == ((32, 32), (24, 40), (40, 24)) and run.teacher.resolution is None
    assert Recipe.load(run.recipe.resolved()).resolution == "buckets"
    listed = Recipe.load(table(world))
    assert Recipe.load(listed.resolved()).resolution == listed.resolution == {"buckets": tuple(map(tuple, SIZES))}


def test_a_teacher_at_another_size_is_the_one_that_is_loaded_for_it(world):
    of_square, of_wide = load_teacher(world / "teacher"), load_teacher(world / "teacher", resolution=(16, 24))
    other = of_square.at((16, 24))
    assert (other.latent_shape, other.resolution, other.call) == (of_wide.latent_shape, of_wide.resolution,
                                                                  of_wide.call)
    assert other.feature_shapes == of_wide.feature_shapes != of_square.feature_shapes
    assert other.encode(["a"]).time_ids.tolist() == of_wide.encode(["a"]).time_ids.tolist() == [[16, 24, 0, 0, 16, 24]]
    assert of_square.encode(["a"]).time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    assert own_sides(other) == (16, 24) and own_sides(of_square) == (16, 16)


@pytest.mark.long
def test_a_run_is_resumed_exactly_and_its_export_is_proved_at_two_sizes(world, tmp_path):
    whole = api.train(table(world), out=tmp_path / "whole", **{"train.checkpoint_every": 2})
    cut = tmp_path / "cut"

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match="interrupted"):
        api.train(table(world), out=cut, on_step=stop, **{"train.checkpoint_every": 2})
    api.train(table(world), out=cut, resume=True, **{"train.checkpoint_every": 2})
    first, second = (checkpoints.load(checkpoints.latest(run)) for run in (whole, cut))
    assert all(torch.equal(second[part][name], value) for part, state in first.items() for name, value in state.items())
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    out = api.export(whole, "lora", dtype="float32")
    settings = json.loads((out / "stepdistill.json").read_text())
    assert (settings["sizes"] == SIZES and settings["proof"]["sizes"] == [[16, 16], [24, 16]]
            and settings["proof"]["difference"] < 1e-5)
    assert (settings["call"]["height"], settings["call"]["width"]) == (16, 16)
    card = (out / "README.md").read_text()
    assert ("trained on pictures of 16 x 16, 24 x 16, 16 x 24 (height x width)" in card
            and "proved at 16 x 16 and 24 x 16" in card)


@pytest.mark.long
def test_a_plan_is_of_the_largest_bucket(world):
    peak = lambda resolution: plan(Recipe.load(table(world, resolution=resolution)))["peak"]
    assert peak({"buckets": [[16, 16], [24, 16], [16, 32]]}) == peak([16, 32]) > peak([24, 16]) > peak([16, 16])


@pytest.mark.parametrize("changes, message", [
    ({"resolution": {"buckets": [[16, 16]]}}, "2 to 64 sizes"),
    ({"resolution": {"buckets": [[16, 16], [16, 16]]}}, "each size once"),
    ({"resolution": {"bucket": [[16, 16], [16, 24]]}}, "buckets: "),
    ({"resolution": "bucket"}, "768, \\[height, width\\] such as \\[832, 1216\\], or buckets"),
    ({"resolution": {"buckets": [[16, 16], [16, 20]]}}, "sides of a multiple of 8 pixels; found 20 of 16 x 20"),
    ({"resolution": {"buckets": [[16, 12], [16, 24]]}}, "sides of a multiple of 8 pixels; found 12 of 16 x 12"),
    ({"resolution": "buckets"}, "of about the area of 16 x 16 pixels, with sides of a multiple of 8, there is but "
     "one: list sizes"),
    ({"method": "kd", "guidance": 1.0, "steps": 1, "data": {"pairs": {"prompts": "shapes", "solver": "ddim"},
                                                            "count": 8, "batch": 4}},
     "data.pairs are the teacher's own pictures, which it makes of one size"),
    ({"data": {"samples": {"prompts": "shapes"}, "count": 8, "batch": 4}},
     "data.samples are the teacher's own pictures"),
    ({"teacher": "assets/toy", "data": {"images": "assets/toy", "batch": 4}},
     "a teacher of the family toy draws one size alone: leave it out"),
])
def test_what_cannot_be_is_refused_before_anything_is_loaded(world, changes, message, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    with pytest.raises(RequestError, match=message):
        setup(Recipe.load(table(world) | changes), torch.device("cpu"))


def test_families_of_one_size_have_no_buckets(world, tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    for resolution in ("buckets", {"buckets": SIZES}):
        recipe = table(world, {"images": "shapes"}, teacher=str(tmp_path), resolution=resolution)
        with pytest.raises(RequestError, match=r"resolution asks for buckets, but a teacher of the family dit draws "
                           r"one size alone: leave it out"):
            setup(Recipe.load(recipe), torch.device("cpu"))


def test_sides_beyond_the_positions_that_a_network_knows_are_refused(tmp_path):
    save_tiny_sd3(tmp_path)
    with pytest.raises(RequestError, match="positions for sides of 32 pixels at most; found 16 x 36"):
        load_teacher(tmp_path, device="meta", resolution=(16, 36))


WORKER = """
from pathlib import Path
import stepdistill
sys.path.insert(0, str(Path(stepdistill.__file__).parents[1] / "tests"))
from tests.run.test_buckets import on_each
on_each(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), accumulate=1)
"""


def on_each(folder: Path, world: str, until: int, accumulate: int) -> None:
    """`train` of test_two_processes, on buckets."""
    for name in ("lcm", "dmd2-gan"):
        data = {"images": str(Path(world) / "pictures"), "batch": BATCH}
        CASES[name] = {**CASES[name], "data": data, "resolution": {"buckets": SIZES}}
        train(name, folder, str(Path(world) / "teacher"), until, accumulate)


@pytest.mark.long
def test_two_processes_have_the_gradients_of_one(world, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    on_each(tmp_path / "one", str(world), 3, accumulate=1)
    on_two_processes(WORKER, tmp_path, tmp_path / "two", world, 3)
    for name in ("lcm", "dmd2-gan"):
        whole, *ranks = (seen(tmp_path / kind, name, 3, rank)["gradients"]
                         for kind, rank in (("one", 0), ("two", 0), ("two", 1)))
        for found in ranks:
            assert found.keys() == whole.keys()
            for key, gradient in found.items():
                assert gradient.norm() > 0 and (gradient - whole[key]).norm() <= CLOSE[name] * whole[key].norm(), (
                    (name, key))
