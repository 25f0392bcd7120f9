"""The feature space, the judge, and the reference computed in it."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from stepdistill.data.shapes import SLOTS, captions, render, scenes
from stepdistill.errors import RequestError
from stepdistill.evaluation.fd import Moments, frechet
from stepdistill.evaluation.features import dimensions, load_features
from stepdistill.evaluation.kernels import kid
from stepdistill.evaluation.means import clip_score
from stepdistill.evaluation.reference import (
    ShapesSource,
    compute_reference,
    load_reference,
    load_source,
    read_reference,
    reference_key,
    ship_reference,
)
from stepdistill.models.reading import resized

from .conftest import DIM


def test_features_are_the_models_projections(clip_folder):
    features, pixels = load_features(clip_folder), render(scenes(torch.arange(3)))
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
    found = features.images(pixels)
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, features.dim) == (3, DIM)
    assert found.dtype == features.texts(["a red ring"]).dtype == torch.float32


def test_the_judge_reads_each_slot(clip_folder):
    features = load_features(clip_folder)
    weight, bias = features.attribute_classifier.heads[2]
    wanted = torch.tensor([4])
    x = torch.linalg.lstsq(weight, 10 * torch.nn.functional.one_hot(wanted, len(weight)).float().T
                           - bias[:, None]).solution.T
    seen = features.attribute_classifier(x)
    assert seen.shape == (1, len(SLOTS)) and seen[0, 2] == 4


def test_the_id_follows_the_weights_and_not_the_place(clip_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in clip_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert load_features(copy).id == load_features(clip_folder).id
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b"\n")
    assert load_features(copy).id != load_features(clip_folder).id


def test_pictures_of_the_right_size_pass_and_others_are_cut_to_it():
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert resized(pixels, 32) is pixels
    wide = torch.linspace(-1, 1, 96).expand(1, 3, 64, 96)
    small = resized(wide, 32)
    assert small.shape == (1, 3, 32, 32)
    torch.testing.assert_close(small.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)       # the centre was cut out
    assert small[0, 0, 0, 0] > -0.75 and small[0, 0, 0, -1] < 0.75


def test_clip_score_clips_at_zero():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert clip_score(x, torch.tensor([[3.0, 0.0], [0.0, -1.0]])).value == pytest.approx(50)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino") / "tiny-dino"
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 28, "width": 28},
                                                                 "image_mean": mean, "image_std": std}))
    return folder


def test_dinos_class_token_of_pictures_as_its_processor_reads_them(dino_folder):
    features, pixels = load_features(dino_folder), render(scenes(torch.arange(3)))[..., :28, :28]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.no_grad():
        expected = model(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(features.images(pixels), expected, atol=1e-5, rtol=1e-5)
    assert (features.dim == dimensions(dino_folder) == 24 and features.texts(["a"]) is None
            and "28 px" in features.resize)


def test_a_module_of_ones_own_is_a_feature_space():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
                                 torch.nn.Linear(12, 5, dtype=torch.float32))
    features, pixels = load_features(module), render(scenes(torch.arange(3)))
    torch.testing.assert_close(features.images(pixels), module(pixels).detach())
    assert features.dim == dimensions(module) == 5 and features.name == f"Sequential@{features.id[:12]}"
    with torch.no_grad():
        module[2].weight[0, 0] += 1
    assert load_features(module).id != features.id
    with pytest.raises(RequestError, match=r"gave \(2, 3, 2, 2\) for 2 pictures: wanted \(2, dim\)"):
        load_features(torch.nn.AdaptiveAvgPool2d(2))


def test_other_models_are_no_features(tmp_path, dino_folder):
    from shutil import copytree
    folder = copytree(dino_folder, tmp_path / "bert")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RequestError, match="is a bert; features are of a CLIPModel or a Dinov2Model, or `inception`"):
        dimensions(folder)


def test_wrong_requests_teach(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="no folder of a CLIPModel or a Dinov2Model"):
        load_features(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(RequestError, match=r"pip install 'stepdistill\[fidelity\]'"):
        load_features("inception")
    with pytest.raises(RequestError, match="nor a folder of images"):
        load_source("shpaes", 100)
    with pytest.raises(RequestError, match="holds 0 images"):
        load_source(tmp_path, 100)


def test_reference_is_computed_once_and_the_shipped_one_needs_its_key(clip_folder, tmp_path):
    features, source, messages = load_features(clip_folder), ShapesSource(100), []
    first = load_reference(features, source, say=messages.append)
    again = load_reference(features, source, say=messages.append)
    assert len(messages) == 1 and torch.equal(first.subset, again.subset)
    torch.testing.assert_close(first.whole.mean, again.whole.mean, rtol=0, atol=0)
    shipped = ship_reference(features, source, tmp_path, messages.append)
    assert read_reference(shipped)[0] == reference_key(features, source)
    other = load_reference(features, ShapesSource(90), shipped, messages.append)
    assert other.whole.count == 90 and "not used" in messages[1]
    shipped.write_bytes(shipped.read_bytes()[:100])
    with pytest.raises(RequestError, match="delete it"):
        load_reference(features, source, shipped)


def test_reference_is_that_of_all_its_pictures(clip_folder):
    features = load_features(clip_folder)
    whole = compute_reference(features, ShapesSource(60)).whole
    expected = features.images(render(scenes(torch.arange(60), 7))).double()
    torch.testing.assert_close(whole.mean, expected.mean(0))
    torch.testing.assert_close(whole.covariance, expected.T.cov())


def test_real_pictures_are_those_of_the_prompts():
    source = ShapesSource(10)
    assert source.prompts(4) == captions(scenes(torch.arange(4), 5))
    assert torch.equal(torch.cat(list(source.real(4))), render(scenes(torch.arange(4), 5)))
    alike = torch.cat(list(source.alike(2, 3)))
    assert alike.shape == (6, 3, 32, 32) and not torch.equal(alike[0], alike[1])
    assert not torch.equal(alike[0], render(scenes(torch.arange(1), 5))[0])


def test_a_folder_of_images_keeps_some_apart(tmp_path):
    from PIL import Image
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    source = load_source(tmp_path, 3)
    reds = lambda blocks: {round((block[0, 0, 0, 0].item() + 1) * 127.5) for block in blocks}
    assert source.count == 3
    assert reds(source.pictures()) | reds(source.real(3)) == {0, 40, 80, 120, 160, 200}
    assert source.alike(1, 4) is None
    with pytest.raises(RequestError, match="prompts"):
        source.prompts(3)


class Extractor(torch.nn.Module):
    """Our features as torchmetrics takes them. It asks for their width by a picture of bytes."""

    def __init__(self, folder):
        super().__init__()
        self.features = load_features(folder)

    def forward(self, pixels):
        return self.features.images(pixels.float()).double()


def test_torchmetrics_finds_the_same_distances_with_our_extractor(clip_folder):
    extractor, pictures = Extractor(clip_folder), [render(scenes(torch.arange(60), seed)) for seed in (1, 2)]
    pictures[1] = (1.3 * pictures[1]).clamp(-1, 1)
    fid, kernel = (FrechetInceptionDistance(extractor, input_img_size=(3, 32, 32)),
                   KernelInceptionDistance(extractor, subsets=2, subset_size=60))
    for metric in (fid.set_dtype(torch.float64), kernel):
        metric.update(pictures[0], real=True)
        metric.update(pictures[1], real=False)
    real, made = (extractor(side) for side in pictures)
    here = Moments.of(made)
    assert frechet(here.mean, here.covariance, Moments.of(real)).item() == pytest.approx(fid.compute().item(), rel=1e-6)
    assert kid(made, real).value == pytest.approx(kernel.compute()[0].item(), rel=1e-9)


def test_figures_need_no_torchvision_and_matplotlib_comes_with_a_picture(tmp_path):
    done = subprocess.run([sys.executable, "-c", """
import sys
sys.modules["torchvision"] = None
import stepdistill.api
assert "matplotlib" not in sys.modules, "imported before anything is drawn"
import torch
from stepdistill.evaluation.kernels import kid
print(kid(torch.eye(8), torch.eye(8)).value)
"""], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and float(done.stdout) < 0, done.stderr
