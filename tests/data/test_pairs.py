"""The teacher's pairs of noise and picture: true to their solver, made once, resumed, refused where they are
others'."""
from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unmagnified import unmagnified

from stepdistill import api
from stepdistill.data.cache import Cache
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.solvers import SOLVERS
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Inference, Method, Trained, Update
from stepdistill.recipe import Recipe
from stepdistill.run.data import dataset, fill_pairs, pairs_spec
from stepdistill.run.plan import plan
from stepdistill.run.setup import setup
from stepdistill.training import TrainConfig, Trainer, checkpoints

PROMPTS = ["a red ring", "a blue square"]
RECIPE = {"method": "lcm", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2, "train": {"updates": 1},
          "data": {"pairs": {"prompts": PROMPTS, "solver": "ddim", "steps": 4}, "count": 5, "batch": 4}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def recipe(tiny_teacher):
    dotted = lambda changes: {name.replace("__", "."): value for name, value in changes.items()}
    return lambda **changes: Recipe.load({**RECIPE, "teacher": str(tiny_teacher)}, dotted(changes))


@pytest.fixture(scope="module")
def work(recipe):
    """Work on a changed recipe with one loaded teacher, which is what no change here concerns."""
    base = setup(recipe(), torch.device("cpu"))
    return lambda **changes: replace(base, recipe=recipe(**changes))


@pytest.fixture(scope="module")
def named(recipe, tmp_path_factory):
    """A folder of the recipe's pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "named"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPDISTILL_CACHE", str(folder.parent / "cache"))
        found = api.pairs(recipe(), out=folder)
    assert (found.folder, found.count, found.made) == (folder, 5, 5)
    return folder


@torch.no_grad()
def solved(work, pairs, indices, end: int, start: int = 0, x=None):
    """The recipe's solver anew, from the pairs' noise or from x, between two nodes of its grid."""
    settings = work.recipe.data.pairs
    times = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64)[start:end + 1]
    cond = work.teacher.encode([PROMPTS[i % 2] for i in indices.tolist()])
    return SOLVERS[settings.solver](guided(work.roles["teacher"], 2.0), pairs.noise if x is None else x, times, cond)


def assert_same(x, y):
    """To float32's digits of the largest value: batches of other sizes and other thread counts sum in another order."""
    assert (x - y).abs().max() <= 3e-6 * y.abs().max()


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "addim"])
def test_a_pair_ends_where_the_solver_ends_from_its_noise(work, solver):
    made, indices = work(data__pairs__solver=solver), torch.tensor([4, 0, 1])
    data = dataset(made)
    pairs, (x0, cond) = data.pairs(indices), data[indices]
    assert pairs.nodes.shape == (3, 1, 4, 8, 8) and pairs.times.tolist() == [[0.0]] * 3 and data.count == 5
    assert_same(pairs.nodes[:, 0], solved(made, pairs, indices, 4))
    assert torch.equal(x0, pairs.nodes[:, -1]) and (x0 - pairs.noise).abs().mean() > 0.1
    assert torch.equal(cond.text, made.teacher.encode([PROMPTS[0], PROMPTS[0], PROMPTS[1]]).text)
    noise = data.pairs(torch.arange(5)).noise
    assert abs(noise.std() - 1) < 0.1 and (noise[0] - noise[2]).abs().mean() > 0.5


@pytest.mark.parametrize(("solver", "nodes"), [("ddim", 4), ("ddim", 2), ("dpmpp_2m", 2), ("heun", 2)])
def test_the_nodes_lie_on_the_solver_s_own_path(work, solver, nodes):
    made, indices, every = work(data__pairs__solver=solver, data__pairs__nodes=nodes), torch.tensor([3, 2]), 4 // nodes
    pairs = dataset(made).pairs(indices)
    assert pairs.nodes.shape == (2, nodes, 4, 8, 8)
    torch.testing.assert_close(pairs.times, torch.linspace(1, 0, nodes + 1, dtype=torch.float64)[1:].expand(2, -1))
    for j in range(nodes):
        assert_same(pairs.nodes[:, j], solved(made, pairs, indices, (j + 1) * every))
        # a one-step rule goes on from a node as if it had never stopped
        if solver == "ddim":
            on = solved(made, pairs, indices, 4, (j + 1) * every, pairs.nodes[:, j])
            assert_same(on, pairs.nodes[:, -1])


def test_pairs_end_in_the_samples_of_the_same_recipe(work, tiny_teacher):
    pairs = dataset(work())
    table = {**RECIPE, "teacher": str(tiny_teacher), "data": {"samples": RECIPE["data"]["pairs"], "count": 5,
                                                              "batch": 4}}
    samples = dataset(replace(work(), recipe=Recipe.load(table)))
    assert (torch.equal(pairs[torch.arange(5)][0], samples[torch.arange(5)][0])
            and samples.pairs(torch.arange(5)) is None)


def test_an_interrupted_making_goes_on_bit_for_bit(work, tmp_path):
    made, files = work(data__count=260, data__pairs__steps=1), {}

    def interrupt(what, done, total):
        if done > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole = Cache(tmp_path / "parts", report=interrupt)
        fill_pairs(made, pairs_spec(made, whole), whole)
    assert len(list((tmp_path / "parts").rglob("pairs-*/*.safetensors"))) == 1
    first = next((tmp_path / "parts").rglob("pairs-*/00000.safetensors"))
    written = first.stat().st_mtime_ns
    for name in ("parts", "whole"):
        fill_pairs(made, pairs_spec(made, Cache(tmp_path / name)), Cache(tmp_path / name))
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).rglob("pairs-*/*.safetensors")}
    assert files["parts"] == files["whole"] and len(files["whole"]) == 2 and first.stat().st_mtime_ns == written


CHANGES = {"guidance": {"data__pairs__guidance": 3.0}, "solver": {"data__pairs__solver": "heun"},
           "steps": {"data__pairs__steps": 8}, "nodes": {"data__pairs__nodes": 2}, "seed": {"train__seed": 1},
           "count": {"data__count": 6}, "prompts": {"data__pairs__prompts": ["a"]}}


def test_whatever_changes_the_pairs_leads_to_others_in_the_cache(work, cache):
    folders = {pairs_spec(work(**changes), Cache()).folder for changes in ({}, *CHANGES.values())}
    assert len(folders) == 1 + len(CHANGES)
    assert pairs_spec(work(guidance=3.0, data__pairs__guidance=2.0), Cache()).folder == pairs_spec(work(),
                                                                                                   Cache()).folder


def test_training_makes_the_pairs_that_are_absent(recipe, cache, tmp_path):
    run = api.train(recipe(data__pairs__nodes=2), out=tmp_path / "run")
    assert checkpoints.latest(run).name == "step-000001" and "nodes: 2" in (run / "recipe.yaml").read_text()
    assert len(list(cache.glob("pairs-*/*.safetensors"))) == 1
    assert api.pairs(Recipe.load(run / "recipe.yaml")).made == 0


def test_a_plan_counts_the_states_that_are_kept(recipe):
    disks = [plan(recipe(data__pairs__nodes=nodes))["disk"] for nodes in (1, 4)]
    # states, bytes a number, channels, height, width, pairs
    assert disks[1] - disks[0] == 3 * 4 * 4 * 8 * 8 * 5


# -- a folder by its name ----------------------------------------------------------------------------------------------

def test_a_named_folder_is_trained_on_and_its_pairs_are_those_of_the_cache(recipe, work, named):
    assert api.pairs(recipe(), out=named).made == 0
    carried, cached = (dataset(work(**changes)).pairs(torch.arange(5))
                       for changes in ({"data__pairs__path": str(named)}, {}))
    assert torch.equal(carried.noise, cached.noise) and torch.equal(carried.nodes, cached.nodes)


@pytest.mark.parametrize("entry", CHANGES)
def test_a_folder_of_other_pairs_is_refused_by_what_differs(work, named, entry):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in named.iterdir())
    here, there = {"guidance": ("3.0", "2.0"), "solver": ("'heun'", "'ddim'"), "steps": ("8", "4"), "nodes": ("2", "1"),
                   "seed": ("1", "0"), "count": ("6", "5"),
                   "prompts": (r"\['a'\]", r"\['a red ring', 'a blue square'\]")}[entry]
    command = "`stepdistill pairs recipe --set .* --out FOLDER`"
    message = rf"data.pairs.path is .*named, whose.*{entry} is {there} there and {here} here\. .*{command}"
    with pytest.raises(RequestError, match=message):
        dataset(work(data__pairs__path=str(named), **CHANGES[entry]))
    with pytest.raises(RequestError, match=rf"--out is .*{entry} is {there} there and {here} here"):
        pairs_spec(work(**CHANGES[entry]), Cache(), out=named)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in named.iterdir()) == before


def test_a_folder_is_of_this_teacher_wherever_it_lies_and_of_no_other(recipe, named, tmp_path, tiny_teacher):
    work = lambda **changes: setup(recipe(data__pairs__path=str(named), **changes), torch.device("cpu"))
    shutil.copytree(tiny_teacher, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy/README.md").write_text("moved to another machine")
    weights = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    os.utime(weights, (0, 0))
    assert dataset(work(teacher=str(tmp_path / "copy"))).count == 5
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(RequestError, match=r"teacher\.teacher is '\w+' there and '\w+' here"):
        dataset(work(teacher=str(tmp_path / "copy")))
    with pytest.raises(RequestError, match="teacher.revision is None there and 'main' here"):
        dataset(work(revision="main"))


def test_a_folder_that_does_not_hold_them_all_is_not_trained_on(work, tmp_path):
    with pytest.raises(RequestError, match="holds 0 of 5 pairs: `stepdistill pairs recipe --set .*path.*` makes them"):
        dataset(work(data__pairs__path=str(tmp_path / "named")))
    assert not (tmp_path / "named").exists()
    made = work(data__pairs__path=str(tmp_path / "named"))
    fill_pairs(made, pairs_spec(made, Cache()), Cache())
    assert dataset(work(data__pairs__path=str(tmp_path / "named"))).count == 5
    (tmp_path / "named/about.json").write_text("[]")
    with pytest.raises(RequestError, match="about.json.*other files"):
        dataset(work(data__pairs__path=str(tmp_path / "named")))


@pytest.mark.parametrize(("changes", "message"), [
    ({"data__pairs__solver": "sde_ddim"}, r"data.pairs.solver is sde_ddim; pairs are made by one of ddim, .*no "
     r"other noise"),
    ({"data__pairs__solver": "dimm"}, "data.pairs.solver is dimm; pairs are made by one of ddim, euler"),
    ({"data__pairs__nodes": 3}, "data.pairs.nodes is 3, which does not divide the 4 steps"),
    ({"data__count": None}, "pairs without a count"),
    ({"data__prompts": "shapes"}, "found prompts and pairs"),
    ({"method": "swiftbrush"}, "swiftbrush trains on"),
])
def test_what_cannot_be_meant_is_refused(recipe, changes, message):
    with pytest.raises(RequestError, match=message):
        setup(recipe(**changes), torch.device("cpu"))


def test_pairs_are_made_for_recipes_that_train_on_them(tiny_teacher):
    with pytest.raises(RequestError, match="data names images; pairs are made for"):
        api.pairs({**RECIPE, "teacher": str(tiny_teacher), "data": {"images": "shapes", "batch": 4}})


# -- batches of pairs --------------------------------------------------------------------------------------------------

def test_batches_are_slices_of_the_joined_batch(work):
    source = Stream(dataset(work(data__pairs__nodes=2)), 4, seed=3)
    whole = source.batch(2, "student")
    assert torch.equal(whole.x0, whole.pairs.nodes[:, -1]) and whole.shape == (4, 8, 8)
    for world, micros in ((1, 2), (2, 1), (2, 2)):
        parts = [source.batch(2, "student", 0, rank, world, micro, micros) for rank in range(world)
                 for micro in range(micros)]
        for name in ("noise", "nodes", "times"):
            assert torch.equal(torch.cat([getattr(part.pairs, name) for part in parts]), getattr(whole.pairs, name))
        assert torch.equal(Condition.cat([part.cond for part in parts]).text, whole.cond.text)


class Imitates(Method):
    """The student's x_0 at the noise, and at the first node, shall be the teacher's end."""

    Settings = dict
    data = ("pairs",)

    @classmethod
    def needs(cls, settings, full):
        return {"teacher": Frozen(), "student": Trained()}

    @classmethod
    def inference(cls, settings, steps, schedule, guidance=1.0):
        return Inference(steps)

    def updates(self):
        return [Update(("student",), self.loss)]

    def loss(self, batch, step):
        pairs, student = batch.pairs, self.roles["student"]
        starts = {"noise": (pairs.noise, torch.ones(len(batch), dtype=torch.float64)),
                  "node": (pairs.nodes[:, 0], pairs.times[:, 0])}
        return {name: (student(x, t, batch.cond).x0 - batch.x0).square().mean() for name, (x, t) in starts.items()}


def test_two_micro_batches_of_pairs_train_what_one_does(recipe, tmp_path):
    trained = {}
    for accumulate in (1, 2):
        made = setup(recipe(data__pairs__nodes=2), torch.device("cpu"))
        start = {name: tensor.clone() for name, tensor in made.roles.state_dict("student").items()}
        stream = Stream(dataset(made), 4, seed=0, shape=made.teacher.latent_shape)
        config = TrainConfig(updates=3, lr=0.1, accumulate=accumulate)
        with unmagnified():
            Trainer(Imitates({}, made.roles, 1.0, None), made.roles, stream, config, tmp_path / str(accumulate)).train()
        trained[accumulate] = checkpoints.load_role(checkpoints.latest(tmp_path / str(accumulate)), "student")
    for name, tensor in trained[1].items():
        torch.testing.assert_close(tensor, trained[2][name], rtol=1e-5, atol=1e-5)
    assert sum((trained[1][name] - start[name]).abs().max() > 1e-3 for name in start) > len(start) / 2
