"""Students of teachers that are more than a base: LoRAs fused, another autoencoder, a variant."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from tiny import save_tiny, tiny_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_sources import FILE, same, save_lora, stock_fused

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.export import load, read_settings
from stepdistill.models.sources import Source
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.data import _identity
from stepdistill.run.plan import plan
from stepdistill.run.setup import open_run
from stepdistill.run.sources import source_of
from stepdistill.run.targets import open_target, teachers


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of a base that is there in half precision alone, with two LoRAs and another autoencoder, and its
    exports."""
    root = tmp_path_factory.mktemp("teachers")
    tiny_pipeline().save_pretrained(root / "base", variant="fp16")
    save_tiny(root / "plain")
    save_lora(root / "style", encoder=True)
    save_lora(root / "pose", seed=1, targets=("to_k", "conv1"))
    torch.manual_seed(7)
    AutoencoderKL.from_config(AutoencoderKL.load_config(root / "base", subfolder="vae")).save_pretrained(root / "vae")
    recipe = {"method": "lcm", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
              "teacher": {"base": str(root / "base"), "vae": str(root / "vae"),
                          "loras": [{"path": str(root / "style"), "weight": 0.5}, str(root / "pose" / FILE)]},
              "data": {"images": "shapes", "batch": 2}, "train": {"updates": 2, "lr": 1e-2}}
    run = api.train(recipe, out=root / "run")
    return root, run, {to: api.export(run, to, guidance=None) for to in ("lora", "pipeline", "comfyui")}


def test_an_export_says_what_its_teacher_is(work):
    root, run, exports = work
    for folder in exports.values():
        said = read_settings(folder)
        assert said["teacher"] == str(root / "base") and said["proof"]["difference"] <= 1e-4
        assert said["teacher_loras"] == [{"path": str(root / "style"), "weight": 0.5},
                                         {"path": str(root / "pose" / FILE), "weight": 1.0}]
        assert said["teacher_parts"] == {"variant": "fp16", "vae": str(root / "vae")}
        assert {(row["lora"], row["component"]) for row in said["teacher_traces"]} == {(0, "unet"), (0, "text_encoder"),
                                                                                       (1, "unet")}
        assert f"`{root / 'base'}` with the LoRA `{root / 'style'}` at 0.5" in (folder / "README.md").read_text()
    assert f"Before it, `{root / 'style'}` at strength 0.5. Before it" in (exports["comfyui"] / "README.md").read_text()


@pytest.mark.parametrize("to", ["lora", "pipeline", "comfyui"])
def test_the_card_s_snippet_gives_the_students_picture(work, to, tmp_path, monkeypatch):
    """The pictures of the proof are those of the run: the snippet's is the first prompt's, from seed 0."""
    root, run, exports = work
    text = (exports[to] / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})                                   # noqa: S102
    prompt = json.loads(re.search(r'image = pipe\((".*?")[,)]', snippet)[1])
    known = open_run(run)
    network = known.roles.stock_network(known.sampling_role, known.method.sampler, known.guidance)
    pipe = known.teacher.pipeline(network, known.scheduler())
    picture = pipe(prompt, **known.stock.call, generator=torch.Generator().manual_seed(0)).images[0]
    found, wanted = (torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).int() for image in
                     (Image.open(tmp_path / "sample.png"), picture))
    assert (found - wanted).abs().max() <= 2


def test_load_wants_the_loras_fused_first(work):
    root, _, exports = work
    vae = AutoencoderKL.from_pretrained(root / "vae")
    plain = StableDiffusionPipeline.from_pretrained(root / "base", variant="fp16", safety_checker=None,
                                                    vae=vae).to(torch.float32)
    for to in ("lora", "comfyui", "pipeline"):            # a pipeline lends its network, and not its text encoder
        with pytest.raises(RequestError, match=f"was trained on .*base with the LoRA {root / 'style'} fused into it.*"
                                               r"is without it: first call pipe.load_lora_weights, "
                                               r"pipe.fuse_lora\(lora_scale=0.5\)"):
            load(plain, exports[to])
    for place, weight in ((root / "style", 0.5), (root / "pose", 1.0)):
        plain.load_lora_weights(place, weight_name=FILE)
        plain.fuse_lora(lora_scale=weight)
        plain.unload_lora_weights()
    assert load(plain, exports["lora"])["num_inference_steps"] == 2
    half = stock_fused(root / "plain", (root / "style", 0.5), (root / "pose", 1.0)).to(torch.float16)
    assert load(half, exports["lora"])["num_inference_steps"] == 2


def test_commands_read_the_whole_teacher(work):
    root, run, exports = work
    opened = [open_target(run, "run"), open_target(exports["lora"], "lora")]
    assert opened[0].teacher == opened[1].teacher
    known = open_run(run).teacher
    found = teachers(opened)
    assert [target.companion for target in found] == [True] and same(found[0].pipeline.vae, known.parts["vae"])
    assert same(found[0].pipeline.unet, known.pipeline().unet) and same(found[0].pipeline.text_encoder,
                                                                        known.parts["text_encoder"])
    assert len(teachers([*opened, open_target(known.source, "base")])) == 1, (
        "a teacher that is asked for too is drawn of once")
    assert open_target(root / "base", "base").source == Source(str(root / "base"), variant="fp16")
    assert plan(Recipe.load(run / "recipe.yaml"))["downloads"] == []


def test_whatever_a_teacher_is_made_of_changes_the_print_of_what_it_makes(work, tmp_path):
    root, run, _ = work
    recipe = Recipe.load(run / "recipe.yaml").resolved()

    def print_of(resolution: int | None = None, **changes) -> str:
        source = source_of(Recipe.load(recipe | {"teacher": recipe["teacher"] | changes}))
        return json.dumps(_identity(load_teacher(source, resolution=resolution)), sort_keys=True)

    other = [{"path": str(root / "style"), "weight": 0.25}, {"path": str(root / "pose" / FILE)}]
    prints = [print_of(), print_of(loras=other), print_of(loras=[]), print_of(vae=None),
              print_of(base=str(root / "plain")),
              print_of(resolution=24)]
    assert len(set(prints)) == len(prints) and print_of() == prints[0]
    save_lora(root / "style", encoder=True, seed=9)
    assert print_of() != prints[0]


def test_a_plain_teacher_is_named_as_ever(tmp_path):
    base = save_tiny(tmp_path / "base")
    run = api.train({"method": "lcm", "teacher": str(base), "student": {"lora": {"rank": 2}}, "steps": 2,
                     "guidance": 2.0,
                     "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}}, out=tmp_path / "run")
    assert Recipe.load(run / "recipe.yaml").resolved()["teacher"] == str(base)
    assert not {"teacher_loras", "teacher_parts", "teacher_traces"} & read_settings(api.export(run)).keys()
