"""Every family against its own stock pipeline: calls, conditions, features, adapters, and two updates that leave and
are proved."""
from __future__ import annotations

import json
import pkgutil
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill import api
from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.sampler import Sampler
from stepdistill.methods.base import Frozen, Trained
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.discriminator import tap
from stepdistill.models.families import FAMILIES, family_of, text_to_image
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.stock import pictures
from stepdistill.models.teacher import load_teacher

from .case import Case

MODULES = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "case"
           and not module.name.startswith("test_")]
CASES: dict[str, Case] = {name: case for module in MODULES
                          for name, case in import_module(f".{module}", __package__).CASES.items()}
CALLS = [pytest.param(name, size, scale, marks=() if (size, scale) == (case.sizes[-1], case.scales[-1])
                      else pytest.mark.long)
         for name, case in CASES.items() for size in case.sizes for scale in case.scales]
TRAINED = [(name, method) for name, case in CASES.items() for method in case.methods]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("family") / name
            CASES[name].build().save_pretrained(made[name])
            (made[name] / "stepdistill.json").write_text(json.dumps({"call": dict(CASES[name].call)}), encoding="utf-8")
        return made[name]
    return folder


def test_every_family_has_a_case(folder_of):
    served = {family_of(text_to_image(type(case.build()).__name__)).name for case in CASES.values()}
    assert served == {*FAMILIES.values()} - {"toy"}


@pytest.mark.parametrize("name, size, scale", CALLS)
def test_the_stock_call_is_our_sampler(folder_of, name, size, scale):
    """With the pipeline's own scheduler, from the same noise: latents and pictures, with and without guidance."""
    case, teacher = CASES[name], load_teacher(folder_of(name), resolution=size, scale=scale)
    stock, seed = teacher.pipeline(), lambda: torch.Generator().manual_seed(7)
    stock.set_progress_bar_config(disable=True)
    grid, spelled = recorded(stock), teacher.family.prompts
    asked = {"num_inference_steps": 3, **teacher.guidance.call(scale), **teacher.call}
    theirs = case.latents(stock, {**spelled.call(stock, case.prompts, asked), "generator": seed()})
    shape = (2, *teacher.latent_shape)
    sampler = Sampler.of(stock.scheduler, 3, teacher.schedule, **grid)
    role = Denoiser(teacher, teacher.network)
    role = guided(role, scale) if teacher.scale is None else role
    with torch.no_grad():
        generator = seed()
        # the start, and where the scheduler draws too, of its steps
        noise = lambda: torch.randn(shape, generator=generator)
        ours = sampler(role, noise(), teacher.encode(list(case.prompts)), lambda i: noise())
    torch.testing.assert_close(ours, case.unpacked(theirs, shape), rtol=1e-4, atol=1e-4)
    drawn = pictures(stock, spelled, case.prompts, generator=seed(), **asked)
    torch.testing.assert_close(teacher.decode(ours) / 2 + 0.5, drawn, rtol=1e-4, atol=1e-4)
    assert drawn.shape[1:] == case.picture(size) and drawn.std() > 1e-3


def recorded(stock: Any) -> dict[str, Any]:
    """What the pipeline asks of its scheduler's set_timesteps, filled by the next call."""
    grid: dict[str, Any] = {}
    own = stock.scheduler.set_timesteps

    @wraps(own)                                       # pipelines look at what it takes
    def keep(num_inference_steps=None, device=None, **more):
        grid.update({key: list(value) if key == "sigmas" else value for key, value in more.items()
                     if value is not None})
        return own(num_inference_steps, device=device, **more)

    stock.scheduler.set_timesteps = keep
    return grid


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_conditions_have_the_shapes_that_plans_count(folder_of, name):
    teacher, meta = load_teacher(folder_of(name)), load_teacher(folder_of(name), device="meta")
    cond, shapes = teacher.encode(list(CASES[name].prompts)), meta.encode(["a", "b"])
    assert meta.latent_shape == teacher.latent_shape and meta.feature_shapes == teacher.feature_shapes
    for real, planned in ((cond, shapes), (cond.null, shapes.null)):
        assert [(t.shape, t.dtype) for t in real.tensors()] == [(t.shape, t.dtype) for t in planned.tensors()]


@pytest.mark.parametrize("name", CASES)
def test_every_input_matters(folder_of, name):
    teacher = load_teacher(folder_of(name), scale=2.0)
    role, cond = Denoiser(teacher, teacher.network), teacher.encode(list(CASES[name].prompts)).replace(null=None)
    other = teacher.encode(list(reversed(CASES[name].prompts)))
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
    fields = [field for field in ("text", "mask", "pooled", "time_ids", "label") if getattr(cond, field) is not None]
    with torch.no_grad():
        raw = role(x, t, cond).raw
        assert not close(role(x + 0.1, t, cond).raw, raw) and not close(role(x, t + 0.1, cond).raw, raw)
        assert teacher.scale is None or not close(role(x, t, teacher.scaled(cond.replace(w=torch.full((2,), 5.0)))).raw,
                                                  raw)
        for field in fields:
            changed = role(x, t,
                           cond.replace(**{field: different(field, getattr(cond, field), getattr(other, field))})).raw
            assert close(changed, raw) == (field in CASES[name].ignored), field
        alone = role(x[1:], t[1:], cond[1:]).raw
    # of float32 sums
    torch.testing.assert_close(alone, raw[1:], rtol=1e-4, atol=1e-5 * max(1.0, raw.abs().max().item()))


def different(field: str, own: Tensor, other: Tensor) -> Tensor:
    if field == "mask":
        return torch.cat([own[:, :1], torch.zeros_like(own[:, 1:])], 1)
    return other if not torch.equal(own, other) else own + 1


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_features_are_maps_of_the_shapes_that_heads_are_made_for(folder_of, name):
    teacher = load_teacher(folder_of(name), resolution=CASES[name].sizes[1])
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
    with torch.no_grad(), tap(teacher.network, tuple(teacher.feature_shapes)) as found:
        Denoiser(teacher, teacher.network)(x, t, teacher.encode(list(CASES[name].prompts)))
    assert list(found) == list(teacher.feature_shapes), "they are listed in the order in which they run"
    assert ({place: tuple(teacher.feature_map(output, x).shape[1:]) for place, output in found.items()}
            == teacher.feature_shapes)
    assert {*teacher.default_features} <= {*teacher.feature_shapes}


@pytest.mark.parametrize("name", CASES)
def test_every_adapter_weight_gets_a_gradient(folder_of, name):
    teacher = load_teacher(folder_of(name))
    cond = teacher.encode(list(CASES[name].prompts))
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
    roles = build_roles(teacher, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(4)},
                        gradient_checkpointing=True)
    before = roles["teacher"](x, t, cond).raw.detach()
    assert torch.equal(roles["student"](x, t, cond).raw, before)
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    roles["student"](x, t, cond).raw.square().mean().backward()
    names = roles.state_dict("student")
    still = {key for key, p in zip(names, roles.parameters("student"), strict=True) if p.grad is None
             or not p.grad.any()}
    assert still == {key for key in names if any(part in key for part in CASES[name].still)}
    assert torch.equal(roles["teacher"](x, t, cond).raw, before)
    torch.testing.assert_close(teacher.predict(roles.network("student"), x, t, teacher.scaled(cond)),
                               roles["student"](x, t, cond).raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_codec_is_the_pipelines(folder_of, name):
    """Its latents, back in pixels, are the autoencoder's own reconstruction; that of latents alone is a call's
    pictures, see above."""
    case, teacher = CASES[name], load_teacher(folder_of(name), resolution=CASES[name].sizes[1])
    pixels = torch.rand(2, *case.picture(case.sizes[1]), generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = teacher.encode_images(pixels)
    assert latents.shape[1:] == teacher.latent_shape and latents.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(teacher.pixels(latents), case.reconstructed(teacher.codec.network, pixels),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name, method", TRAINED)
def test_two_updates_leave_and_are_proved(folder_of, tmp_path, name, method):
    """An export is refused unless the stock pipeline, reloaded, draws our sampler's pictures to 1e-4."""
    case, lora = CASES[name], {"lora": {"rank": 2}}
    recipe: dict[str, Any] = {
        "method": method, "teacher": str(folder_of(name)), "resolution": list(case.sizes[0]), "student": lora,
        "guidance": case.guidance,
        "steps": 2,
        "settings": dict(case.methods[method]), "data": dict(case.data),
        "train": {"updates": 2, "lr": 1e-2}, "evaluate": {"prompts": list(case.prompts)}}
    if method == "dmd2":
        recipe["critic"] = lora
    api.train(recipe, out=tmp_path / "run")
    for to in case.forms:
        folder = api.export(tmp_path / "run", to=to)
        proof = json.loads((folder / "stepdistill.json").read_text())["proof"]
        assert proof["difference"] <= 1e-4
