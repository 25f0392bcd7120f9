"""Numbers beside the time on every family: contribute nothing at first, train, stay apart from role to role, and leave
the base alone."""
from __future__ import annotations

import pytest
import torch
from tiny import save_tiny, save_tiny_sd3

from stepdistill.diffusion.guidance import guided
from stepdistill.diffusion.toy import write
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.models.roles import Full, Lora, Weights, build_roles
from stepdistill.models.teacher import load_teacher


@pytest.fixture(params=["unet", "sd3", "toy"])
def teacher(request, tmp_path):
    made = {"unet": lambda: save_tiny(tmp_path),
            "sd3": lambda: save_tiny_sd3(tmp_path, call={"max_sequence_length": 0}),
            "toy": lambda: write(tmp_path, 2, "vp")}
    return load_teacher(made[request.param]())


def moment(teacher):
    x = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = ["class 0", "class 1", ""] if teacher.name == "toy" else ["a red ring", "a", ""]
    return x, torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64), teacher.encode(prompts)


@pytest.mark.parametrize("setting", [Lora(2), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("numbers", [("w",), ("r",), ("w", "r")], ids="+".join)
def test_a_role_reads_numbers_that_say_nothing_at_first(teacher, perturb, setting, numbers):
    if teacher.name == "toy" and setting != Full():
        pytest.skip("adapters of Toy lie before a layer that is zero")
    needs = {"teacher": Frozen(), "student": Trained("teacher", numbers), "critic": Trained(),
             "ema": Follows("student", 0.0)}
    roles = build_roles(teacher, needs, {"student": setting, "critic": setting})
    x, t, cond = moment(teacher)
    low, high = (cond.replace(w=torch.full((3,), w), r=torch.full((3,), r)) for w, r in ((2.0, 0.1), (7.0, 0.4)))
    base = roles["teacher"](x, t, low).raw
    torch.testing.assert_close(roles["student"](x, t, low).raw, base, rtol=1e-5, atol=1e-5)
    perturb(roles.parameters("student"))
    apart = (roles["student"](x, t, low).raw - roles["student"](x, t, high).raw).abs().amax((1, 2, 3))
    assert (apart > 1e-5).all() and torch.equal(roles["teacher"](x, t, high).raw, base)
    torch.testing.assert_close(roles["critic"](x, t, high).raw, base, rtol=1e-5, atol=1e-5)
    roles["student"](x, t, low).raw.square().mean().backward()
    paths = teacher.family.time.layers(numbers)
    own = dict(roles.networks["student"].named_parameters()) if "student" in roles.networks else \
        dict(zip(roles.state_dict("student"), roles.parameters("student"), strict=True))
    assert all(own[f"{path}.weight"].grad.any() for path in paths)
    roles.follow("student")
    torch.testing.assert_close(roles["ema"](x, t, low).raw, roles["student"](x, t, low).raw)
    torch.testing.assert_close(teacher.predict(roles.network("student"), x, t,
                                               low.replace(extra={n: low.extra[n] for n in numbers})),
                               roles["student"](x, t, low).raw, rtol=1e-4, atol=1e-5)
    missing = numbers[-1]
    with pytest.raises(ValueError, match=f"the condition has no {missing}: pass cond.replace"):
        roles["student"](x, t, low.replace(**{missing: None}))


@pytest.mark.parametrize("before, after", [(Lora(2), Lora(2)), (Lora(2), Full()), (Full(), Full())])
def test_a_student_of_another_run_goes_on_and_may_read_more(teacher, perturb, before, after):
    needs = lambda numbers: {"teacher": Frozen(), "student": Trained("teacher", numbers)}
    old = build_roles(teacher, needs(("w",)), {"student": before})
    perturb(old.parameters("student"))
    x, t, cond = moment(teacher)
    cond = cond.replace(w=torch.full((3,), 2.0), r=torch.full((3,), 0.1))
    known, state = old["student"](x, t, cond).raw, {k: v.clone() for k, v in old.state_dict("student").items()}
    again = load_teacher(teacher.source)
    # one layer of ours reads all of its numbers: its width is fixed
    stock = "w" in teacher.family.time.stock
    roles = build_roles(again, needs(("w", "r") if stock else ("w",)), {"student": after},
                        begin={"student": Weights(before, state, ("w",))})
    torch.testing.assert_close(roles["student"](x, t, cond).raw, known, rtol=1e-4, atol=1e-5)


def test_a_network_that_reads_nothing_says_so(teacher):
    x, t, cond = moment(teacher)
    with pytest.raises(ValueError, match="has no layer that reads r"):
        teacher.predict(teacher.network, x, t, cond.replace(r=torch.zeros(3)))


def test_guidance_mixes_as_the_family_says(teacher):
    """Of a family whose pipeline keeps the larger of both, say."""
    from dataclasses import replace
    roles = build_roles(teacher, {"teacher": Frozen()}, {})
    x, t, cond = moment(teacher)
    plain = roles["teacher"](x, t, cond).raw, roles["teacher"](x, t, cond.null).raw
    torch.testing.assert_close(guided(roles["teacher"], 3.0)(x, t, cond).raw, plain[1] + 3 * (plain[0] - plain[1]),
                               rtol=1e-4, atol=1e-4)
    teacher.family = replace(teacher.family, combine=lambda given, without, w: torch.maximum(given, without))
    torch.testing.assert_close(guided(roles["teacher"], 3.0)(x, t, cond).raw, torch.maximum(*plain),
                               rtol=1e-4, atol=1e-4)
