"""UNet2DModel on pixels: what it is asked for, what calls it, and what it cannot be asked."""
from __future__ import annotations

import json
import re
from math import atan, log

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from families.unet2d import ddim, ddpm, tiny_unet
from PIL import Image
from tiny import save_tiny

from stepdistill import api
from stepdistill.diffusion.schedule import TrigFlow
from stepdistill.errors import RequestError
from stepdistill.evaluation.plans import SOLVERS, plans
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.targets import open_target

NONE = {"prompts": "none", "batch": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("ddpm", "ddim", "classes")}
    ddpm().save_pretrained(made["ddpm"])
    ddim().save_pretrained(made["ddim"])
    ddpm(classes=5).save_pretrained(made["classes"])
    return made


def recipe(folder, data, method="dmd2", **more):
    settings = {"gan_weight": 0.0, "critic_steps": 1} if method == "dmd2" else {}
    return {"method": method, "teacher": str(folder), "settings": settings, "steps": 2,
            "student": {"lora": {"rank": 2}}, "data": data,
            "train": {"updates": 1}, **more}


def pictures(folder, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 40 * i, np.uint8)).save(folder / name)
    return str(folder)


# -- what calls it -----------------------------------------------------------------------------------------------------

def test_the_class_that_calls_it(folders):
    """DDPM's call passes no classes on; DDIM's takes no scheduler but DDIM's."""
    assert {name: load_teacher(folder).cls for name, folder in folders.items()} == {
        "ddpm": DDPMPipeline, "ddim": DDPMPipeline, "classes": ConsistencyModelPipeline}
    with pytest.raises(ValueError, match="class_labels should be provided"):
        ddpm(classes=5)(num_inference_steps=1)
    assert (type(DDIMPipeline.from_pretrained(folders["ddim"], scheduler=LCMScheduler()).scheduler).__name__
            == "DDIMScheduler")


@pytest.mark.parametrize("name, to, asked, cls", [
    ("ddpm", "lora", "batch_size=1", DDPMPipeline), ("ddim", "pipeline", "batch_size=1", DDPMPipeline),
    ("classes", "lora", "class_labels=[3]", ConsistencyModelPipeline),
    ("classes", "pipeline", "class_labels=[3]", ConsistencyModelPipeline)])
def test_the_snippet_of_its_card_runs(folders, tmp_path, monkeypatch, name, to, asked, cls):
    data = {"prompts": ["class 3", "class 1"], "batch": 2} if name == "classes" else NONE
    api.train(recipe(folders[name], data, steps=3 if name == "ddim" else 2), out=tmp_path / "run")
    folder = api.export(tmp_path / "run", to=to, dtype="float32")
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert (f"pipe({asked}, num_inference_steps=" in code and cls.__name__ in code
            and ("pipe.unet = PeftModel" in code) == (to == "lora"))
    assert ("unconditional-image-generation" in text) == (name != "classes")
    monkeypatch.chdir(tmp_path)
    exec(code, {})                                      # noqa: S102
    first = torch.from_numpy(np.array(Image.open("sample.png"))) / 255
    drawn = api.sample(folder, "class 3" if name == "classes" else "", seed=0)[0]
    assert first.std() > 1e-3 and drawn.size == (16, 16)
    if to == "pipeline":
        assert type(DiffusionPipeline.from_pretrained(folder)) is cls
    with pytest.raises(RequestError, match="ComfyUI draws pictures of texts"):
        api.export(tmp_path / "run", to="comfyui")


def test_a_derivative_forward(folders):
    """Attention over pixels makes transposed views, which group norms have no derivative of."""
    teacher = load_teacher(folders["classes"])
    teacher.network.double()
    role, cond = Denoiser(teacher, teacher.network), teacher.encode(["class 3", "class 1"])
    x, t, h = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-6
    way = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = torch.func.jvp(lambda x: role(x, t, cond).raw, (x,), (way,))[1]
    difference = (role(x + h * way, t, cond).raw - role(x - h * way, t, cond).raw) / (2 * h)
    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in teacher.network.modules())


@pytest.mark.parametrize("scheduler, clock", [(CMStochasticIterativeScheduler(), 250.0), (EDMEulerScheduler(), 0.25),
                                              (EDMDPMSolverMultistepScheduler(), 0.25)])
def test_edm_s_clock(tmp_path, scheduler, clock):
    """A folder of DDPM's class with such a scheduler, whose call would leave all unscaled, is called by
    ConsistencyModelPipeline."""
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert (teacher.cls is ConsistencyModelPipeline and teacher.kind == "edm"
            and teacher.schedule == TrigFlow(atan(80.0)))
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    sigma = (atan(80.0) * t).tan()
    torch.testing.assert_close(teacher.timestep(t), clock * sigma.log())
    assert teacher.timestep(torch.zeros(1)).item() == pytest.approx(clock * log(0.002))
    seen = []
    teacher.network.register_forward_pre_hook(lambda network, args, given: seen.append(given), with_kwargs=True)
    x = torch.randn(2, 3, 16, 16)
    Denoiser(teacher, teacher.network)(x, t, teacher.encode(["", ""]))
    # x_0 + sigma eps, by c_in
    of_edm = x * (1 + sigma**2).sqrt()[:, None, None, None] / (sigma**2 + 0.25).sqrt()[:, None, None, None]
    torch.testing.assert_close(seen[0]["sample"], of_edm.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[0]["timestep"], (clock * sigma.log()).float())


@pytest.mark.parametrize("scheduler, reason", [
    (EDMEulerScheduler(sigma_data=1.0), "sigma_data: 1.0, and networks of 0.5"),
    (EDMEulerScheduler(prediction_type="v_prediction"), "v_prediction"),
    (FlowMatchEulerDiscreteScheduler(), "has no alphas_cumprod")])
def test_schedulers_that_are_not_served(tmp_path, scheduler, reason):
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=reason):
        load_teacher(tmp_path)


def test_edm_s_students_of_one_step(tmp_path):
    """Of several steps with fresh noise none can leave."""
    ConsistencyModelPipeline(tiny_unet(classes=5), EDMEulerScheduler()).save_pretrained(tmp_path / "edm")
    asked = recipe(tmp_path / "edm", {"prompts": ["class 3", "class 1"], "batch": 2})
    with pytest.raises(RequestError, match="none adds fresh noise"):
        api.train(asked, out=tmp_path / "run")
    api.train(asked | {"steps": 1}, out=tmp_path / "run")
    said = json.loads((api.export(tmp_path / "run", to="pipeline") / "stepdistill.json").read_text())
    assert (said["scheduler"] == "EDMEulerScheduler" and said["call"] == {"num_inference_steps": 1}
            and said["proof"]["difference"] <= 1e-4)


# -- what is measured of it --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, solvers", [("ddpm", {"ddim", "dpmpp_2m"}), ("classes", {"ddim", "dpmpp_2m", "euler"})])
def test_solvers_that_its_pipeline_serves(folders, name, solvers):
    """DDPM's call scales nothing, and both give a step their generator, which Heun's does not take. A bench's prompts
    are not for a pipeline that is told nothing."""
    said = []
    target = open_target(folders[name], "it").target
    rows = plans(target, (1, 3), (1.0,), tuple(SOLVERS), said.append)
    assert {row.name.removeprefix("it:") for row in rows} == solvers and target.prompted == (name == "classes")
    assert (name == "ddpm") == any("does not let a EulerDiscreteScheduler scale" in line for line in said)
    drawn = rows[0].images(["class 1" if target.prompted else "a red ring"] * 2, torch.arange(2), 0)
    assert drawn.shape == (2, 3, 16, 16)


@pytest.mark.long
def test_a_bench_without_prompts(folders, tmp_path):
    """Against a folder of images, of which nothing says what they show."""
    (tmp_path / "images").mkdir()
    for i, noise in enumerate(np.random.default_rng(0).integers(0, 256, (2 * 195, 16, 16, 3), np.uint8)):
        Image.fromarray(noise).save(tmp_path / f"images/{i}.png")
    found = api.bench(folders["ddpm"], nfe=(1,), samples=195, solvers=("ddim",), reference=tmp_path / "images",
                      out=tmp_path / "bench")
    student = next(row for row in found["rows"] if row["target"] != "real")
    assert student["metrics"]["clip_score"] is None and student["metrics"]["fd"] > 0


def test_steps_that_only_a_scaling_scheduler_takes(folders, tmp_path):
    with pytest.raises(RequestError, match="differs from our sampler"):
        api.train(recipe(folders["ddpm"], {"images": "shapes", "batch": 2}, "progressive", steps=3), out=tmp_path)
    api.train(recipe(folders["classes"], {"samples": {"prompts": ["class 1"], "steps": 2}, "count": 2, "batch": 2},
                     "progressive", steps=3), out=tmp_path)


# -- what it is asked for ----------------------------------------------------------------------------------------------

def test_prompts_are_classes_or_nothing(folders):
    told, plain = load_teacher(folders["classes"]), load_teacher(folders["ddpm"])
    assert (told.encode(["class 3", "class 0"]).label.tolist() == [3, 0]
            and plain.encode(["", ""]).label.tolist() == [0, 0])
    for prompt in ("class 5", "a red ring", "class three"):
        with pytest.raises(RequestError, match=f"class 0 to class 4; found '{prompt}'"):
            told.encode([prompt])
    with pytest.raises(RequestError, match="asked for nothing.*found 'class 1'"):
        plain.encode(["class 1"])


@pytest.mark.parametrize("name, data, more, reason", [
    ("ddpm", NONE, {"guidance": 2.0}, "guidance is 2.0, but no call of a pipeline of UNet2DModel guides"),
    ("classes", {"samples": {"prompts": ["class 1"], "guidance": 3.0}, "count": 2, "batch": 2}, {"method": "lcm"},
     "data.samples.guidance is 3.0"),
    ("ddpm", {"prompts": ["a red ring"], "batch": 2}, {}, "the teacher reads neither texts nor classes: let "
     "it be none"),
    ("ddpm", NONE, {"evaluate": {"prompts": ["a red ring"]}}, "asked for nothing"),
    ("ddpm", NONE, {"resolution": 32}, "16 x 16 pixels, and no call of its pipeline asks for others"),
    ("classes", NONE, {}, "data.prompts is none, but the teacher reads classes: name some"),
    ("classes", {"images": "shapes", "batch": 2}, {"method": "lcm"}, "class 0 to class 4; found"),
    ("ddpm", {"images": "shapes", "batch": 2}, {"method": "scm"}, "asks its pipeline for timesteps, which a call "
     "of DDPMPipeline does not take")])
def test_what_it_cannot_be_asked(folders, tmp_path, name, data, more, reason):
    with pytest.raises(RequestError, match=reason):
        api.train(recipe(folders[name], data, **more), out=tmp_path)
    assert not any(tmp_path.iterdir())


def test_guidance_is_refused_before_weights_are_read(folders, tmp_path):
    broken = tmp_path / "broken"
    ddpm().save_pretrained(broken)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RequestError, match="guidance is 2.0"):
        api.train(recipe(broken, NONE, guidance=2.0), out=tmp_path / "run")
    with pytest.raises(RequestError, match="no call of this pipeline guides"):
        api.sample(folders["ddpm"], "", steps=2, guidance=2.0)


@pytest.mark.parametrize("change, reason", [
    ({"in_channels": 1, "out_channels": 1}, "1 channels, and those of 3 are served"),
    ({"out_channels": 6}, "6 channels for 3"),
    ({"time_embedding_type": "fourier"}, "its time as fourier"),
    ({"class_embed_type": "timestep"}, "reads classes as timestep"),
    ({"classes": 4, "size": (8, 16)}, "should be squares")])
def test_networks_that_are_not_served(tmp_path, change, reason):
    pipeline = ddpm()
    pipeline.unet = tiny_unet(**change)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=reason):
        load_teacher(tmp_path)


# -- images ------------------------------------------------------------------------------------------------------------

def test_images_without_captions(folders, tmp_path):
    """A network that reads none takes them; one that reads texts does not."""
    images = pictures(tmp_path / "images", "a.png", "b.png", "deep/c.png")
    api.train(recipe(folders["ddpm"], {"images": images, "cache": True, "batch": 2}, "lcm"), out=tmp_path / "run")
    with pytest.raises(RequestError, match="a.png' has no caption"):
        api.train(recipe(save_tiny(tmp_path / "text"), {"images": images, "batch": 2}, "lcm"), out=tmp_path / "other")


def test_a_folder_of_images_for_each_class(folders, tmp_path):
    images = pictures(tmp_path / "images", "0/a.png", "03/b.png", "4/c.png")
    api.train(recipe(folders["classes"], {"images": images, "batch": 3}, "lcm"), out=tmp_path / "run")
    pictures(tmp_path / "images", "5/d.png")
    with pytest.raises(RequestError, match="class 0 to class 4; found 'class 5'"):
        api.train(recipe(folders["classes"], {"images": images, "batch": 4}, "lcm"), out=tmp_path / "other")
    pictures(tmp_path / "images", "e.png")
    with pytest.raises(RequestError, match="e.png' has no class"):
        api.train(recipe(folders["classes"], {"images": images, "batch": 4}, "lcm"), out=tmp_path / "other")


@pytest.mark.parametrize("name", ["ddpm", "classes"])
def test_its_plan(folders, name):
    data = NONE if name == "ddpm" else {"prompts": ["class 1"], "batch": 2}
    found = api.plan(Recipe.load(recipe(folders[name], data)))
    assert json.dumps(found) and found["peak"] > 0
