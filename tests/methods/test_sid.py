from collections import Counter

import pytest
import torch

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.schedule import like
from stepdistill.methods.distribution.sid import Settings, SiD
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

from .closed import predict
from .players import REAL_MEAN, REAL_VARIANCE, SCHEDULES, affine, few_steps, gaussian, moment, prompts

COUNT = 64


def make(student, critic=None, teacher=None, guidance=1.0, steps=1, **settings) -> SiD:
    s, kind = SCHEDULES["vp"]
    roles = {"teacher": teacher or gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": student,
             "critic": critic or gaussian(s, -0.3, 1.44, kind)}
    return SiD(Settings(**settings), roles, guidance, few_steps(steps))


class TwoLaws:
    """N(0.8, 0.5) given the prompt, whose text is 1, and N(0, 2) without. It notes what it was asked for."""

    schedule = SCHEDULES["vp"][0]

    def __init__(self) -> None:
        self.critic_condition: list[torch.Tensor] = []

    def __call__(self, x_t, t, cond):
        self.critic_condition.append(cond.text)
        m, v = 0.8 * cond.text, 2 - 1.5 * cond.text
        alpha, sigma = like(self.schedule.alpha(t), x_t), like(self.schedule.sigma(t), x_t)
        return predict(m + alpha * v * (x_t - alpha * m) / (alpha**2 * v + sigma**2), x_t, t, self.schedule, "v")


def prompted(count: int = COUNT) -> Batch:
    text = torch.ones(count, 1, dtype=torch.float64)
    return Batch(torch.arange(count), Condition(text=text, null=Condition(text=torch.zeros_like(text))), shape=(1,))


@pytest.mark.parametrize("w", [1.0, 1.2, 1.4])
def test_at_one_noise_level_the_guided_fixed_point_is_narrower_and_beyond_the_mean(w):
    """Denoisers k x + (1 - k) m in x_t / alpha: the guided one's k is w k_c - (w - 1) k_u, and (1 - k) m = w (1 - k_c) m_c."""
    s, kind, t = *SCHEDULES["vp"], torch.tensor([0.501], dtype=torch.float64)
    ratio2 = (s.sigma(t) / s.alpha(t)).item() ** 2
    given, without = 0.5 / (0.5 + ratio2), 2 / (2 + ratio2)
    k = w * given - (w - 1) * without
    m, v = w * (1 - given) * 0.8 / (1 - k), k * ratio2 / (1 - k)
    assert k > 0 and (w == 1 or (v < 0.5 and m > 0.8))
    for shift, moves in ((0.0, False), (0.3, True)):
        student = affine(s, m + shift, v**0.5)
        method = make(student, gaussian(s, m + shift, v, kind), TwoLaws(), w, t_range=(0.5, 0.5004), critic_training_guidance=1.0)
        assert method.level(torch.tensor([0.0, 0.99])).tolist() == [0.501, 0.501]
        method.student_loss(prompted(), moment(COUNT))["identity"].backward()
        size = student.m.grad.abs() + student.s.grad.abs()
        assert size > 1e-2 if moves else size < 1e-5


def test_scales_left_out_are_the_teacher_s():
    student = affine(SCHEDULES["vp"][0], 0.0, 1.0)
    scales = lambda w, **settings: (lambda m: (m.critic_training_guidance, m.critic_guidance, m.drop))(make(student, guidance=w, **settings))
    assert scales(1.0) == (1.0, 1.0, 0.0), "nothing is guided, and no prompt need be dropped"
    assert scales(3.0) == (3.0, 3.0, 0.1) and scales((2.0, 5.0)) == (3.5, 3.5, 0.1)
    assert scales(3.0, critic_training_guidance=1.0) == (1.0, 1.0, 0.0)
    assert scales(3.0, critic_training_guidance=1.0, critic_guidance=1.5, drop=0.2) == (1.0, 1.5, 0.2)


def test_student_and_critic_miss_the_same_prompts():
    critic, student, asked = TwoLaws(), TwoLaws(), moment(1000, "critic")
    make(student, critic, TwoLaws(), guidance=3.0).critic_loss(prompted(1000), asked)
    (sampled,), (seen,) = student.critic_condition, critic.critic_condition
    torch.testing.assert_close(torch.cat([torch.zeros_like(sampled), sampled]), seen)       # guided: without, then given
    assert 60 < (sampled == 0).sum() < 140
    make(student, critic, TwoLaws(), guidance=3.0).student_loss(prompted(), moment(COUNT))
    assert (student.critic_condition[-1] == 1).all(), "the student learns from whole prompts"


def test_every_step_is_trained_and_each_update_draws_its_own_sample():
    timesteps = Counter()

    class Student(TwoLaws):
        def __call__(self, x_t, t, cond):
            timesteps[round(t[0].item() * 1000) - 1] += 1
            return predict(0.5 * x_t, x_t, t, self.schedule, "x0")

    method, exits = make(Student(), TwoLaws(), TwoLaws(), steps=4), Counter()
    for index in range(100):
        step = moment(2, index=index)
        timesteps.clear()
        method.student_loss(prompted(2), step)
        exits[min(timesteps)] += 1
        assert not step.kept
    assert exits.keys() == {999, 749, 499, 249} and min(exits.values()) > 12
    assert [(u.trains, u.repeat, u.shares) for u in method.updates()] == [(("critic",), 1, 0), (("student",), 1, 0)]
    assert make(Student(), critic_steps=3).updates()[0].repeat == 3


def test_a_guided_critic_may_be_told_the_exit_of_its_sample():
    scales: list[float] = []

    class Critic(TwoLaws):
        def __call__(self, x_t, t, cond):
            scales.extend(cond.w.unique().tolist())
            return super().__call__(x_t, t, cond)

    class Student(TwoLaws):
        def __call__(self, x_t, t, cond):
            assert cond.w is None
            return predict(0.5 * x_t, x_t, t, self.schedule, "x0")

    method = make(Student(), Critic(), TwoLaws(), guidance=2.0, steps=4, exit_embedding=True)
    assert method.needs(method.settings, False)["critic"].reads
    for index in range(12):
        for loss, update in ((method.critic_loss, "critic"), (method.student_loss, "student")):
            step = moment(2, update, index=index)
            loss(prompted(2), step)
            assert scales == [1 + int(step.shared("exit") * 4)]
            scales.clear()


def test_a_critic_that_is_the_teacher_gives_no_gradient():
    s, kind = SCHEDULES["flow"]
    teacher, student = gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), affine(s, -2.0, 3.0)
    method = SiD(Settings(alpha=1.2), {"teacher": teacher, "student": student, "critic": teacher}, 1.0, few_steps(1, "flow"))
    loss = method.student_loss(prompts(COUNT), moment(COUNT))["identity"]
    loss.backward()
    assert loss == 0 and student.m.grad.abs() < 1e-7 and student.s.grad.abs() < 1e-7      # two halves that cancel


class Sample:
    """A student that answers x whatever it is asked."""

    def __init__(self, schedule, x) -> None:
        self.schedule, self.x = schedule, x

    def __call__(self, x_t, t, cond):
        return predict(self.x, x_t, t, self.schedule, "x0")


def slope(teacher, critic, cond) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    roles = {"teacher": teacher, "student": Sample(teacher.schedule, x), "critic": critic}
    step, batch = moment(2), Batch(torch.arange(2), cond, shape=(4, 8, 8))
    SiD(Settings(alpha=1.2), roles, 3.0, few_steps(1)).student_loss(batch, step)["identity"].backward()
    return x.grad


def test_gradients_pass_through_adapters_and_dropped_activations_to_what_networks_are_shown(tiny_teacher):
    """Teacher and critic as one network with an adapter, frozen and recomputed in backward, against two plain networks."""
    family = load_teacher(tiny_teacher)
    cond = family.encode(["a red ring", "a blue square"])
    roles = build_roles(family, SiD.needs(Settings(), full=False), {"student": Lora(2), "critic": Lora(4)}, gradient_checkpointing=True)
    with torch.no_grad():
        for i, parameter in enumerate(roles.parameters("critic")):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
            parameter.requires_grad_(False)
    found = slope(roles["teacher"], roles["critic"], cond)
    known = slope(*(Denoiser(family, roles.network(name)) for name in ("teacher", "critic")), cond)
    assert found.abs().max() > 0 and (found - known).norm() < 1e-4 * known.norm()
    assert all(parameter.grad is None for parameter in family.network.parameters())


@pytest.mark.parametrize("guidance, forward, backward", [(1.0, 5, 4), (2.0, 8, 7)])
def test_passes_of_a_step(tiny_teacher, guidance, forward, backward):
    """Forward: the critic's update has a sample and the critic, the student's a sample, teacher and critic; guided ones count
    twice. All but the critic's sample go back."""
    made = {"method": "sid", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "guidance": guidance, "steps": 1,
            "data": {"prompts": "shapes", "batch": 4}, "train": {"updates": 2}}
    assert plan(Recipe.load(made))["passes"] == {"forward": forward, "backward": backward, "batch": 4, "updates": 2}


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"drop": 1.0}, {"t_range": (0.5, 0.5)}, {"t_range": (0.0, 1.2)}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must be|at least 1"):
        Settings(**changes)
