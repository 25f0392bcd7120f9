"""AccVideo beyond its identities: which head judges which node, who is judged where, and what is refused."""
import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.methods.trajectory.accvideo import AccVideo, Settings
from stepdistill.proofs.accvideo import made
from stepdistill.proofs.kd import traveller
from stepdistill.proofs.problem import NAMES, FunctionRole, Problem
from stepdistill.recipe import Recipe
from stepdistill.run.setup import setup

from .players import spelled


@pytest.mark.parametrize("noise", NAMES)
def test_the_regression_is_of_landings_times_the_steps_squared(noise):
    """A student whose x_0 is off by d lands off by (alpha_r - alpha_t sigma_r / sigma_t) d."""
    problem, d = Problem(1, noise), 0.5
    batch, step, right = problem.paired(64, nodes=4), problem.step(64), traveller(problem, 4, 1.0)
    student = FunctionRole(problem.schedule, lambda x, t, cond: right(x, t, cond).x0 + d, problem.kind)
    t = 1 - step.integers("leg", 4).double() / 4
    s, r = problem.schedule, t - 0.25
    share = s.alpha(r) - s.alpha(t) * s.sigma(r) / s.sigma(t)
    found = made(problem, student).student_loss(batch, step)["regression"].item()
    assert found == pytest.approx((16 * (share * d) ** 2).mean().item(), rel=1e-9)
    if noise == "flow":                                   # there d off in x_0 is d / t in the velocity
        assert found == pytest.approx(((d / t) ** 2).mean().item(), rel=1e-9)


def test_the_heads_pull_the_landing_towards_what_they_call_real():
    """Heads that say c x: the gradient in x_0 of the whole is that of -0.3 c x, x the landing."""
    problem = Problem(2, "flow")
    batch, step, c = problem.paired(32, nodes=4), problem.step(32), 1.7
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    right = traveller(problem, 4, 1.0)
    student = FunctionRole(problem.schedule, lambda x, t, cond: right(x, t, cond).x0 + shift, problem.kind)
    method = made(problem, student, discriminator=lambda x, t, cond: [c * x], gan_weight=0.3)
    slope, = torch.autograd.grad(sum(method.student_loss(batch, step).values()), shift)
    t = 1 - step.integers("leg", 4).double() / 4
    assert slope.item() == pytest.approx((-0.3 * c * 0.25 / t).mean().item(), rel=1e-6)


def test_a_position_within_its_margin_is_not_outvoted():
    """Logits 3 and -1 at two positions have a mean beyond its margin; of themselves one is 2 short as real, one 4 as
    fake."""
    problem = Problem(3, "flow")
    heads = lambda x, t, cond: [torch.tensor([3.0, -1.0], dtype=torch.float64).expand(len(x), 2)]
    method = made(problem, traveller(problem, 4, 1.0), discriminator=heads, gan_weight=0.5)
    batch, step = problem.paired(16, nodes=4), problem.step(16)
    assert method.student_loss(batch, step)["gan"].item() == pytest.approx(-0.5 * (3 - 1) / 2)
    critic = problem.step(16, "discriminator", kept=step.kept)
    assert method.critic_loss(batch, critic)["discriminator"].item() == pytest.approx((0 + 2) / 2 + (4 + 0) / 2)


def test_a_head_of_its_own_judges_each_node(tiny_teacher):
    table = {"method": "accvideo", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
             "settings": {"nodes": 2}, "train": {"updates": 1},
             "data": {"pairs": {"prompts": ["a red ring"], "solver": "ddim", "steps": 4, "nodes": 2}, "count": 4,
                      "batch": 4}}
    roles = setup(Recipe.load(table), torch.device("cpu")).roles
    judge, x = roles["discriminator"], torch.randn(3, *roles.teacher.latent_shape)
    cond = roles.teacher.encode(["a red ring"] * 3)
    t = torch.tensor([0.001, 0.5, 0.5], dtype=torch.float64)
    whole, = judge(x, t, cond)
    states = {node: roles.state_dict("discriminator") for node in range(2)}
    keys = {node: [key for key in states[0] if f".each.{node}." in key] for node in range(2)}
    assert keys[0] and len(keys[0]) == len(keys[1]) and len(states[0]) == 2 * len(keys[0])
    with torch.no_grad():
        for key in keys[1]:
            states[0][key].zero_()
    blind, = judge(x, t, cond)
    assert torch.equal(blind[0], whole[0]) and (blind[1:] == 0).all() and (whole[1:] != 0).all()


def test_roles_updates_and_steps():
    needs = {"teacher": Frozen(), "student": Trained("teacher")}
    assert AccVideo.needs(Settings(gan_weight=0.0), False) == needs
    assert AccVideo.needs(Settings(), True) == needs | {"discriminator": Heads("teacher", kind="tokens", nodes=5)}
    problem = Problem(0, "flow")
    student = traveller(problem, 4, 1.0)
    assert [u.trains for u in made(problem, student).updates()] == [("student",)]
    updates = made(problem, student, discriminator=lambda *_: None, critic_steps=2).updates()
    assert [(u.trains, u.repeat, u.shares) for u in updates] == [(("student",), 1, 0), (("discriminator",), 2, 2)]
    assert AccVideo.waypoints(Settings(), 5) == 5
    assert spelled(AccVideo, Settings(), 5, "flow").call["sigmas"] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(ValueError, match="heads for each of its nodes, 5, .* whose steps divide them; found 4 steps"):
        spelled(AccVideo, Settings(), 4, "flow")


def test_pairs_that_lack_the_nodes_are_refused():
    problem = Problem(0, "flow")
    with pytest.raises(RequestError, match="pairs keep 2: data.pairs.nodes should be a multiple of 4"):
        made(problem, traveller(problem, 4, 1.0)).student_loss(problem.paired(8, nodes=2), problem.step(8))


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"gan_weight": -0.1}, {"critic_steps": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
