"""LCM trained by the real loop on a problem whose solution is known."""
import pytest
import torch
from torch import nn

from stepdistill.diffusion.consistency import consistency
from stepdistill.diffusion.contracts import Batch
from stepdistill.diffusion.draws import key
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import like
from stepdistill.methods.consistency.lcm import LCM, Settings
from stepdistill.training import TrainConfig, Trainer

from .closed import SCHEDULES, STD, Teacher, batch, contraction, guided_mean

NODES = 4


class Student(nn.Module):
    """The teacher plus a small network of x_t, t and w that says nothing at first."""

    def __init__(self, teacher: Teacher, guidance_embedding: bool) -> None:
        super().__init__()
        self.teacher, self.guidance_embedding, self.schedule = teacher, guidance_embedding, teacher.schedule
        self.net = nn.Sequential(nn.Linear(4 + guidance_embedding, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                                 nn.Linear(64, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, cond) -> Prediction:
        guess = self.teacher(x_t, t, cond.replace(w=None))
        angle = self.schedule.angle(t)[:, None]
        inputs = [x_t, angle.to(x_t), angle.cos().to(x_t)] + ([cond.w[:, None].to(x_t)]
                                                              if self.guidance_embedding else [])
        return Prediction(guess.raw + self.net(torch.cat(inputs, 1)), x_t, t, self.schedule, guess.kind)


class Roles(dict):
    def __init__(self, networks, decay) -> None:
        super().__init__(networks)
        self.decay = decay

    names = property(tuple)
    def parameters(self, name): return list(self[name].net.parameters())
    def state_dict(self, name): return dict(self[name].net.state_dict())

    @torch.no_grad()
    def follow(self, leader, step):
        if "target" in self:
            torch._foreach_lerp_(self.parameters("target"), self.parameters(leader), 1 - self.decay)


class Data:
    def batch(self, step, update, repeat=0, rank=0, world=1, micro=0, micros=1) -> Batch:
        data = batch(64, offset=64 * step)
        f = lambda tensor: tensor.float()
        return Batch(data.ids, data.cond.map(f), f(data.x0))


def distance(student: Student, w: float) -> float:
    """How far f(x_1, 1) is from the discrete fixed point, in standard deviations of the data, from 512 noises."""
    data, t = batch(512), torch.ones(512, dtype=torch.float64)
    x = torch.randn(512, 2, generator=torch.Generator().manual_seed(key("test")))
    m, alpha = guided_mean(data.cond, w), student.schedule.alpha(t)
    wanted = m + like(contraction(student.schedule, t, NODES), m) * (x - like(alpha, m) * m)
    cond = data.cond.map(lambda tensor: tensor.float()).replace(w=torch.full((512,), w))
    with torch.no_grad():
        x0 = consistency(student(x, t, cond))
    return ((x0 - wanted).square().mean().sqrt() / STD).item()


@pytest.mark.parametrize("schedule, guidance_embedding, full", [("vp", False, False), ("flow", True, True)])
def test_a_student_learns_the_guided_flow_map(tmp_path, schedule, guidance_embedding, full):
    torch.manual_seed(0)
    teacher = Teacher(*SCHEDULES[schedule])
    settings = Settings(nodes=NODES, loss="squared", guidance_embedding=guidance_embedding)
    needs = LCM.needs(settings, full)
    roles = Roles({"teacher": teacher} | {name: Student(teacher, guidance_embedding) for name in needs
                                          if name != "teacher"},
                  needs["target"].decay if full else 0)
    for name in needs.keys() - {"teacher"}:
        roles[name].net.load_state_dict(roles["student"].net.state_dict())
    guidance, asked = ((1.0, 3.0), (1.5, 2.5)) if guidance_embedding else (2.0, (2.0,))
    before = [distance(roles["student"], w) for w in asked]
    config = TrainConfig(updates=300, lr=5e-3, warmup=10, decay="cosine", weight_decay=0.0, log_every=100)
    Trainer(LCM(settings, roles, guidance, None), roles, Data(), config, tmp_path).train()
    after = [distance(roles["student"], w) for w in asked]
    assert all(b > 0.8 for b in before) and all(a < 0.15 * b for a, b in zip(after, before, strict=True)), (
        (before, after))
