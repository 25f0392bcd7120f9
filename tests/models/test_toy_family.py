from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.toy import SHAPE, Toy, write
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Full, Lora, build_roles
from stepdistill.models.teacher import load_teacher


@pytest.fixture(params=["vp", "flow"])
def family(request, tmp_path):
    return load_teacher(write(tmp_path / "toy", 2, request.param))


def moment(family, count=64):
    toy = Toy(family.source.place)
    x0, labels = toy.points(torch.arange(count))
    t = torch.linspace(0.01, 1, count, dtype=torch.float64)
    return (family.schedule.add_noise(x0, torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0)), t),
            t, labels)


def test_the_teacher_is_the_mixture_itself(family):
    x, t, labels = moment(family)
    cond = family.encode([f"class {label}" for label in labels.tolist()])
    found, known = (Denoiser(family, family.network)(x, t, cond),
                    Toy(family.source.place).law(family.schedule, family.kind)(x, t, cond))
    assert found.kind == family.kind and torch.equal(found.raw, known.raw)
    null = Denoiser(family, family.network)(x, t, cond.null)
    assert not torch.allclose(null.x0, found.x0, atol=1e-3)


@pytest.mark.parametrize("setting", [Full(), Lora(rank=4)])
def test_students_begin_as_their_teacher_and_learn(family, setting):
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained("teacher"), "discriminator": Heads("teacher")},
                        {"student": setting})
    x, t, labels = moment(family)
    cond = family.encode(["class 0"] * len(x))
    teacher, student = roles["teacher"](x, t, cond), roles["student"](x, t, cond)
    assert torch.equal(teacher.raw, student.raw) and roles["discriminator"](x, t, cond).shape == (len(x), 1)
    student.raw.square().mean().backward()
    assert (any(p.grad is not None and p.grad.abs().max() > 0 for p in roles.parameters("student"))
            == isinstance(setting, Full))
    assert all(p.grad is None for p in family.network.parameters() if not p.requires_grad)


def test_a_student_can_be_told_its_scale(family):
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained("teacher", reads=("w",))}, {"student": Full()})
    x, t, _ = moment(family)
    cond = family.encode(["class 1"] * len(x)).replace(w=torch.full((len(x),), 3.0))
    assert torch.equal(roles["student"](x, t, cond).raw, roles["teacher"](x, t, cond).raw)
    assert "w_in.weight" in roles.state_dict("student")


def test_it_has_no_pipeline_and_computes_in_float32(family):
    with pytest.raises(RequestError, match="no pipeline in diffusers"):
        family.pipeline()
    with pytest.raises(RequestError, match="computed in float32"):
        load_teacher(family.source, dtype=torch.bfloat16)
