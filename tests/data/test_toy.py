from __future__ import annotations

import json

import pytest
import torch

from stepdistill.data.images import open_images
from stepdistill.data.prompts import open_prompts
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.diffusion.toy import Toy, caption, is_toy, labels_of, write
from stepdistill.errors import RequestError

MANY = torch.arange(40_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("toy") / "t", 11, "flow")


def test_a_problem_is_a_function_of_its_seed(folder, tmp_path):
    read = lambda path: json.loads((path / "toy.json").read_text())
    assert read(write(tmp_path / "again", 11, "flow")) == read(folder)
    assert read(write(tmp_path / "other", 12, "flow"))["means"] != read(folder)["means"]
    assert read(write(tmp_path / "noise", 11, "vp"))["means"] == read(folder)["means"]


def test_points_have_the_law_that_the_folder_tells(folder):
    toy = Toy(folder)
    x, labels = toy.points(MANY)
    law = toy.law(RectifiedFlow(), "velocity")
    assert x.shape == (len(MANY), 2, 1, 1) and x.dtype == torch.float32
    assert x.mean(0).abs().max() < 0.02 and (x.flatten(1).T.cov() - torch.eye(2)).abs().max() < 0.03
    for part, weight in zip(law.components, law.weights):                  # each component by itself, at its own points
        near = (x.flatten(1).double() - part.mean.flatten()) @ torch.linalg.inv(part.covariance)
        # half of its mass
        inside = ((near * (x.flatten(1).double() - part.mean.flatten())).sum(1) < 1.386).double().mean()
        assert inside > 0.5 * weight - 0.01
    shares = torch.zeros(2).double().index_add_(0, toy.labels, law.weights)
    assert (labels.bincount() / len(MANY) - shares).abs().max() < 0.02


def test_samples_are_functions_of_their_numbers(folder):
    toy = Toy(folder, seed=4)
    some = torch.tensor([7, 30_000, 2])
    assert torch.equal(toy.pixels(some), toy.pixels(MANY)[some])
    assert toy.captions(some) == [caption(label) for label in toy.points(some)[1].tolist()]
    assert not torch.equal(toy.pixels(some), Toy(folder, seed=5).pixels(some))


def test_it_opens_as_images_and_as_prompts(folder):
    assert is_toy(folder) and not is_toy(folder.parent)
    assert open_images(str(folder), 1, 3) == open_prompts(str(folder), 3) == Toy(folder, 3)


def test_captions_are_read_back_and_others_refused():
    assert labels_of(["class 1", "", "class 0"], 2).tolist() == [1, -1, 0]
    with pytest.raises(RequestError, match="knows no prompt 'class 2': its prompts are class 0, class 1 and the "
                       "empty one"):
        labels_of(["class 2"], 2)
