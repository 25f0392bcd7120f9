from __future__ import annotations

import pytest
import torch
from tiny import reading

from stepdistill.errors import RequestError
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.models.extra_embedding import embedding
from stepdistill.models.roles import Full, Lora, Weights, build_roles
from stepdistill.models.teacher import load_teacher

NEEDS = {"teacher": Frozen(), "student": Trained(), "target": Follows("student", 0.5), "ema": Follows("student", 0.75)}
SETTINGS = pytest.mark.parametrize("setting", [Lora(rank=4), Full()], ids=["lora", "full"])


def clones(roles, name):
    return [parameter.detach().clone() for parameter in roles.parameters(name)]


@SETTINGS
@pytest.mark.parametrize("told_w", [(), ("student",)], ids=["plain", "told"])
def test_at_the_start_every_role_is_the_teacher(family, inputs, setting, told_w):
    before = family.predict(family.network, *inputs)
    roles = build_roles(family, reading(NEEDS, *told_w), {"student": setting})
    x, t, cond = inputs
    assert tuple(roles) == roles.names == tuple(NEEDS)
    for name in roles:
        scaled = cond.replace(w=torch.tensor([1.0, 4.0, 9.0]))
        torch.testing.assert_close(roles[name](x, t, scaled).raw, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(roles["teacher"](x, t, cond).raw, before)


@SETTINGS
def test_the_teacher_stays_bit_identical_while_the_student_moves(family, inputs, perturb, setting):
    before = family.predict(family.network, *inputs)
    roles = build_roles(family, NEEDS, {"student": setting}, gradient_checkpointing=True)
    perturb(roles.parameters("student"))
    assert torch.equal(roles["teacher"](*inputs).raw, before)
    assert (roles["student"](*inputs).raw - before).abs().max() > 1e-2
    torch.testing.assert_close(roles["target"](*inputs).raw, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(roles["teacher"](*inputs).raw, before)


@SETTINGS
def test_followers_step_in_float32_and_others_stay(family, perturb, setting):
    roles = build_roles(family, NEEDS | {"slow": Follows("ema", 0.9)}, {"student": setting})
    first = clones(roles, "student")
    perturb(roles.parameters("student"))
    student = clones(roles, "student")
    roles.follow("student")
    for start, leader, target, ema, slow in zip(first, student, roles.parameters("target"), roles.parameters("ema"),
                                                roles.parameters("slow"), strict=True):
        assert target.dtype == torch.float32 and not target.requires_grad
        torch.testing.assert_close(target, 0.5 * start + 0.5 * leader)
        torch.testing.assert_close(ema, 0.75 * start + 0.25 * leader)
        torch.testing.assert_close(slow, start + 0.1 * 0.25 * (leader - start))
    assert all(torch.equal(a, b) for a, b in zip(student, roles.parameters("student"), strict=True))
    assert all(parameter.requires_grad for parameter in roles.parameters("student"))
    assert roles.parameters("teacher") == []


@SETTINGS
def test_a_record_is_its_leader_of_the_step_before_it_stood_still(family, perturb, setting):
    needs = {"teacher": Frozen(), "student": Trained(), "record": Follows("student", 0.0, until=2),
             "slow": Follows("record", 0.0)}
    roles, passed = build_roles(family, needs, {"student": setting}), []
    for step in range(4):
        perturb(roles.parameters("student"))
        passed.append(clones(roles, "student"))
        roles.follow("student", step)
        for name in ("record", "slow"):
            pairs = zip(passed[min(step, 1)], roles.parameters(name), strict=True)
            assert all(torch.equal(known, found) and not found.requires_grad for known, found in pairs)
    assert not torch.equal(passed[1][0], passed[3][0])


@SETTINGS
def test_only_the_student_gets_gradients(family, inputs, perturb, setting):
    roles = build_roles(family, reading(NEEDS, "student"), {"student": setting}, gradient_checkpointing=True)
    perturb(roles.parameters("student"))
    x, t, cond = inputs
    scaled = cond.replace(w=torch.tensor([2.0, 3.0, 4.0]))
    with torch.no_grad():
        wanted = roles["target"](x, t, scaled).x0
    prediction = roles["student"](x, t, scaled)
    roles["teacher"](x, t, scaled)                                       # another role is the last that ran forward
    (prediction.x0 - wanted).square().mean().backward()
    assert all(parameter.grad is not None for parameter in roles.parameters("student"))
    others = [*family.network.parameters(), *roles.parameters("target"), *roles.parameters("ema")]
    own = {id(parameter) for parameter in roles.parameters("student")}
    assert all(parameter.grad is None for parameter in others if id(parameter) not in own)


@SETTINGS
def test_checkpointing_changes_no_gradient(folders, perturb, setting, inputs):
    found = []
    for checkpointing in (False, True):
        roles = build_roles(load_teacher(folders["epsilon"]), NEEDS, {"student": setting},
                            gradient_checkpointing=checkpointing)
        perturb(roles.parameters("student"))
        prediction = roles["student"](*inputs)
        roles["target"](*inputs)
        prediction.raw.square().mean().backward()
        found.append([parameter.grad for parameter in roles.parameters("student")])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@SETTINGS
def test_states_round_trip(folders, inputs, perturb, setting):
    one, two = (build_roles(load_teacher(folders["epsilon"]), reading(NEEDS, "student"), {"student": setting})
                for _ in range(2))
    for seed, name in enumerate(("student", "target", "ema")):
        perturb(one.parameters(name), seed)
        two.load_state_dict(name, one.state_dict(name))
    two.load_state_dict("teacher", one.state_dict("teacher"))
    x, t, cond = inputs
    cond = cond.replace(w=torch.tensor([2.0, 3.0, 4.0]))
    for name in one:
        torch.testing.assert_close(two[name](x, t, cond).raw, one[name](x, t, cond).raw, rtol=1e-5, atol=1e-6)
    assert "time_embedding.cond_proj.weight" in one.state_dict("ema")
    with pytest.raises(ValueError, match="missing, unknown"):
        two.load_state_dict("student", {"other": torch.zeros(1)})


@SETTINGS
def test_a_told_student_reads_w_and_the_teacher_does_not(family, inputs, perturb, setting):
    roles = build_roles(family, reading(NEEDS, "student"), {"student": setting})
    perturb([roles.state_dict("student")["time_embedding.cond_proj.weight"]], size=0.5)
    x, t, cond = inputs
    low, high = (cond.replace(w=torch.full((3,), w)) for w in (2.0, 9.0))
    assert torch.equal(roles["teacher"](x, t, low).raw, roles["teacher"](x, t, cond).raw)
    assert (roles["student"](x, t, low).raw - roles["student"](x, t, high).raw).abs().max() > 1e-3
    assert torch.equal(roles["target"](x, t, low).raw, roles["target"](x, t, high).raw), "its own layer is still zero"
    roles.follow("student")
    assert not torch.equal(roles["target"](x, t, low).raw, roles["target"](x, t, high).raw)
    with pytest.raises(ValueError, match="no w"):
        roles["student"](x, t, cond)


def test_an_untold_student_does_not_see_w(family, inputs, perturb):
    roles = build_roles(family, NEEDS, {"student": Lora(4)})
    perturb(roles.parameters("student"))
    x, t, cond = inputs
    assert torch.equal(roles["student"](x, t, cond.replace(w=torch.full((3,), 9.0))).raw,
                       roles["student"](x, t, cond).raw)


@SETTINGS
@pytest.mark.parametrize("told_w", [(), ("student",)], ids=["plain", "told"])
def test_a_role_leaves_as_a_stock_network(family, inputs, perturb, tmp_path, setting, told_w):
    roles = build_roles(family, reading(NEEDS, *told_w), {"student": setting})
    perturb(roles.parameters("student"))
    roles.network("student").save_pretrained(tmp_path)
    stock = type(family.network).from_pretrained(tmp_path)
    x, t, cond = inputs
    w = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    embedded = embedding("w", w) if told_w else None
    raw = stock(x, torch.tensor([999, 499, 19]), cond.text, timestep_cond=embedded).sample
    torch.testing.assert_close(raw, roles["student"](x, t, cond.replace(w=w)).raw, rtol=1e-4, atol=1e-5)
    teacher = family.predict(roles.network("teacher"), x, t, cond)
    torch.testing.assert_close(teacher, roles["teacher"](x, t, cond).raw, rtol=1e-5, atol=1e-6)


def test_a_told_student_runs_in_a_stock_pipeline_at_any_guidance_scale(family, perturb):
    roles = build_roles(family, reading(NEEDS, "student"), {"student": Lora(4)})
    perturb(roles.parameters("student"))
    x, scale = torch.randn(1, *family.latent_shape), 4.3
    stock = family.pipeline(roles.network("student"))
    theirs = stock("a red circle", num_inference_steps=1, guidance_scale=scale, latents=x, output_type="latent").images
    w = torch.tensor([scale], dtype=torch.float64)
    t = torch.ones(1, dtype=torch.float64)
    ours = roles["student"](x * stock.scheduler.init_noise_sigma, t, family.encode(["a red circle"]).replace(w=w)).x0
    torch.testing.assert_close(theirs, ours.detach(), rtol=1e-4, atol=1e-3)


def test_a_lora_and_a_full_role_side_by_side(family, inputs, perturb):
    needs = {"teacher": Frozen(), "student": Trained(), "critic": Trained(), "judge": Trained("critic")}
    roles = build_roles(family, needs, {"student": Lora(4), "critic": Full()})
    assert roles.is_lora("student") and not roles.is_lora("critic") and not roles.is_lora("judge")
    before = roles["teacher"](*inputs).raw
    perturb(roles.parameters("critic"))
    assert torch.equal(roles["teacher"](*inputs).raw, before)
    torch.testing.assert_close(roles["student"](*inputs).raw, before, rtol=1e-5, atol=1e-6)


def test_full_roles_are_float32_on_a_bfloat16_teacher(folders, inputs):
    roles = build_roles(load_teacher(folders["epsilon"], dtype=torch.bfloat16), NEEDS, {"student": Full()})
    assert {parameter.dtype for parameter in roles.parameters("student")} == {torch.float32}
    assert roles["student"](*inputs).raw.isfinite().all()


def test_moving_keeps_the_parameters(family):
    roles = build_roles(family, reading(NEEDS, "student"), {"student": Lora(4)})
    before = list(map(id, roles.parameters("student")))
    assert list(map(id, roles.to("cpu").parameters("student"))) == before


@pytest.mark.parametrize(("needs", "settings", "error", "says"), [
    (NEEDS, {}, ValueError, "'student' is trained, but nothing says how"),
    (NEEDS, {"studnet": Lora()}, ValueError, "studnet.*student"),
    ({"teacher": Frozen(), "ema": Follows("student", 0.9)}, {}, ValueError, "'ema' follows 'student'"),
    (NEEDS, {"student": Lora(targets=("to_qq",))}, RequestError, "to_qq.*to_q"),
    (NEEDS, {"student": Lora(rank=0)}, RequestError, "rank"),
])
def test_what_cannot_be_built_is_refused(family, needs, settings, error, says):
    with pytest.raises(error, match=says):
        build_roles(family, needs, settings)


@SETTINGS
def test_a_critic_that_is_told_begins_as_a_teacher_that_is_not(folders, family, inputs, perturb, setting):
    """The teacher is another run's student."""
    x, t, cond = inputs
    before = build_roles(family, {"teacher": Frozen(), "student": Trained()}, {"student": setting})
    perturb(before.parameters("student"))
    weights = Weights(setting, {name: value.clone() for name, value in before.state_dict("student").items()})
    wanted = before["student"](x, t, cond).raw.detach()
    family = load_teacher(folders["epsilon"])
    needs = {"teacher": Frozen(), "student": Trained(), "critic": Trained()}
    roles = build_roles(family, reading(needs, "critic"), {"student": setting, "critic": setting},
                        begin={"teacher": weights})
    assert {name for name, numbers in roles.reads.items() if numbers} == {"critic"}
    for name in needs:
        found = roles[name](x, t, cond.replace(w=torch.tensor([1.0, 2.0, 4.0]))).raw
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
