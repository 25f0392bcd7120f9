from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from stepdistill.api import train
from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.schedule import like
from stepdistill.errors import RequestError
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
    """Denoisers k x + (1 - k) m in x_t / alpha: the guided one's k is w k_c - (w - 1) k_u, and (1 - k) m = w (1 - k_c)
    m_c."""
    s, kind, t = *SCHEDULES["vp"], torch.tensor([0.501], dtype=torch.float64)
    ratio2 = (s.sigma(t) / s.alpha(t)).item() ** 2
    given, without = 0.5 / (0.5 + ratio2), 2 / (2 + ratio2)
    k = w * given - (w - 1) * without
    m, v = w * (1 - given) * 0.8 / (1 - k), k * ratio2 / (1 - k)
    assert k > 0 and (w == 1 or (v < 0.5 and m > 0.8))
    for shift, moves in ((0.0, False), (0.3, True)):
        student = affine(s, m + shift, v**0.5)
        method = make(student, gaussian(s, m + shift, v, kind), TwoLaws(), w, t_range=(0.5, 0.5004),
                      critic_training_guidance=1.0)
        assert method.level(torch.tensor([0.0, 0.99])).tolist() == [0.501, 0.501]
        method.student_loss(prompted(), moment(COUNT))["identity"].backward()
        size = student.m.grad.abs() + student.s.grad.abs()
        assert size > 1e-2 if moves else size < 1e-5


def test_scales_left_out_are_the_teacher_s():
    student = affine(SCHEDULES["vp"][0], 0.0, 1.0)
    scales = lambda w, **settings: (lambda m: (m.critic_training_guidance, m.critic_guidance,
                                               m.drop))(make(student, guidance=w, **settings))
    assert scales(1.0) == (1.0, 1.0, 0.0), "nothing is guided, and no prompt need be dropped"
    assert scales(3.0) == (3.0, 3.0, 0.1) and scales((2.0, 5.0)) == (3.5, 3.5, 0.1)
    assert scales(3.0, critic_training_guidance=1.0) == (1.0, 1.0, 0.0)
    assert scales(3.0, critic_training_guidance=1.0, critic_guidance=1.5, drop=0.2) == (1.0, 1.5, 0.2)


def test_a_scale_of_zero_asks_the_critic_without_the_prompt_in_one_pass():
    """Zero-CFG, and what Anti-CFG asks: null + kappa (prompt - null)."""
    student, critic, teacher = TwoLaws(), TwoLaws(), TwoLaws()
    method = make(student, critic, teacher, guidance=1.0, critic_training_guidance=0.0)
    assert method.drop == 0, "nothing is guided"
    for loss, update in ((method.critic_loss, "critic"), (method.student_loss, "student")):
        critic.critic_condition.clear()
        loss(prompted(), moment(COUNT, update))
        (told,) = critic.critic_condition
        assert told.shape == (COUNT, 1) and not told.any()
    assert all((text == 1).all() for text in teacher.critic_condition + student.critic_condition), (
        "both are told the prompt")
    anti = make(student, critic, teacher, guidance=1.0, critic_training_guidance=-1.0)
    assert (anti.critic_guidance, anti.drop) == (-1.0, 0.1)
    critic.critic_condition.clear()
    anti.student_loss(prompted(), moment(COUNT))
    assert critic.critic_condition[0].flatten().tolist() == [0.0] * COUNT + [1.0] * COUNT


class Judge:
    """A discriminator of the critic's features: here logits of two maps, and what it was shown."""

    def __init__(self, *logits: float) -> None:
        self.logits, self.shown = torch.tensor(logits, dtype=torch.float64).requires_grad_(), []

    def __call__(self, x_t, t, cond):
        self.shown.append((x_t, t, cond))
        both = self.logits.expand(len(x_t), -1) + 0 * x_t
        return [both[:, :3], both[:, 3:]]


def judged(judge: Judge, **settings) -> SiD:
    s, kind = SCHEDULES["vp"]
    roles = {"teacher": gaussian(s, REAL_MEAN, REAL_VARIANCE, kind), "student": affine(s, -0.3, 1.2),
             "critic": gaussian(s, -0.3, 1.44, kind),
             "discriminator": judge}
    return SiD(Settings(gan_weight=0.01, **settings), roles, 1.0, few_steps(1))


def test_images_and_samples_are_told_apart_under_one_noise_at_one_level():
    judge, step = Judge(1.0, -2.0, 0.5, 30.0, -0.5), moment(COUNT, "critic")
    method, images = judged(judge), torch.full((COUNT, 1), 5.0, dtype=torch.float64)
    losses = method.critic_loss(replace(prompts(COUNT), x0=images), step)
    (real, at, _), (fake, same, _) = judge.shown
    x = -0.3 + 1.2 * step.normal("start", (1,)).double()
    assert torch.equal(at, same)
    torch.testing.assert_close(real - fake, like(method.schedule.alpha(at), x) * (images - x), rtol=1e-5, atol=1e-6)
    both = softplus(-judge.logits.clamp(-10, 10)) + softplus(judge.logits.clamp(-10, 10))
    known = (both[:3].mean() + both[3:].mean()) / 2
    assert losses["discriminator"].item() == pytest.approx(0.5 * known.item())
    slope, = torch.autograd.grad(losses["discriminator"], judge.logits)
    assert slope[3] == 0 and slope[:3].all(), "no gradient beyond 10"


def test_the_student_is_taken_for_an_image_from_its_start_on_at_the_weight_of_the_identity():
    judge, method = Judge(1.0, -2.0, 0.5, 0.3, -0.5), judged(Judge(0.0), gan_start=3)
    method.discriminator = judge
    before, after = (method.student_loss(prompts(COUNT), moment(COUNT, index=index)) for index in (2, 3))
    assert before["gan"] == 0 and after["gan"] > 0 and set(after) == {"identity", "gan"}
    step, (x_t, t, _) = moment(COUNT, index=3), judge.shown[-1]
    x = -0.3 + 1.2 * step.normal("start", (1,)).double()
    real = method.teacher(x_t.detach(), t, None).x0
    fooled = (softplus(-judge.logits[:3]).mean() + softplus(-judge.logits[3:]).mean()) / 2
    assert after["gan"].item() == pytest.approx((0.01 * (1 / (x - real).abs().mean(1)).mean() * fooled).item(),
                                                rel=1e-5)


def test_images_are_wanted_where_they_weigh():
    assert SiD.refusal(Settings(), "prompts") is None and SiD.refusal(Settings(gan_weight=0.01), "images") is None
    assert "give data.images, or set gan_weight: 0" in SiD.refusal(Settings(gan_weight=0.01), "prompts")
    assert SiD.needs(Settings(gan_weight=0.01), False)["discriminator"].kind == "channels"


def test_a_discriminator_without_weights_trains_with_the_critic_and_is_not_saved(tiny_teacher, tmp_path):
    made = {"method": "sid", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "critic": {"lora": {"rank": 2}, "lr": 1e-4},
            "steps": 1, "settings": {"gan_weight": 0.01, "gan_start": 0, "critic_training_guidance": 0,
                                     "start_time": 0.626},
            "data": {"images": "shapes", "count": 4, "batch": 2}, "train": {"updates": 2, "checkpoint_every": 1}}
    run = train(Recipe.load(made), out=tmp_path / "run")
    files = {path.name for path in (run / "checkpoints/step-000002").iterdir()}
    assert "role-critic.safetensors" in files and "role-discriminator.safetensors" not in files
    with pytest.raises(RequestError, match="discriminator.lr is 0.001, but the discriminator of sid .* has no weights"):
        plan(Recipe.load(made | {"discriminator": {"lr": 1e-3}}))


def test_student_and_critic_miss_the_same_prompts():
    critic, student, asked = TwoLaws(), TwoLaws(), moment(1000, "critic")
    make(student, critic, TwoLaws(), guidance=3.0).critic_loss(prompted(1000), asked)
    (sampled,), (seen,) = student.critic_condition, critic.critic_condition
    # guided: without, then given
    torch.testing.assert_close(torch.cat([torch.zeros_like(sampled), sampled]), seen)
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
    method = SiD(Settings(alpha=1.2), {"teacher": teacher, "student": student, "critic": teacher}, 1.0,
                 few_steps(1, "flow"))
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
    """Teacher and critic as one network with an adapter, frozen and recomputed in backward, against two plain
    networks."""
    family = load_teacher(tiny_teacher)
    cond = family.encode(["a red ring", "a blue square"])
    roles = build_roles(family, SiD.needs(Settings(), full=False), {"student": Lora(2), "critic": Lora(4)},
                        gradient_checkpointing=True)
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
    """Forward: the critic's update has a sample and the critic, the student's a sample, teacher and critic; guided ones
    count twice. All but the critic's sample go back."""
    made = {"method": "sid", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": guidance, "steps": 1,
            "data": {"prompts": "shapes", "batch": 4}, "train": {"updates": 2}}
    assert plan(Recipe.load(made))["passes"] == {"forward": forward, "backward": backward, "batch": 4, "updates": 2}


@pytest.mark.parametrize("changes", [{"critic_steps": 0}, {"drop": 1.0}, {"gan_weight": -1.0},
                                     {"critic_gan_weight": -1.0}, {"gan_start": -1},
                                     {"t_range": (0.5, 0.5)}, {"t_range": (0.0, 1.2)}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must"):
        Settings(**changes)
