"""What a cycle of dmd2 costs, counted with torch's own counter: one student update and five of the critic, GAN and
guidance on."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.diffusion.contracts import Batch
from stepdistill.methods.distribution.dmd2 import DMD2, Settings
from stepdistill.models.roles import Full, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.training import TrainConfig, Trainer

from ..tiny import save_tiny
from .players import few_steps


class Data:
    def __init__(self, family, count: int = 2) -> None:
        self.cond, self.shape, self.count = family.encode(["a red ring"] * count), family.latent_shape, count

    def batch(self, step, update, repeat=0, rank=0, world=1, micro=0, micros=1) -> Batch:
        return Batch(torch.arange(self.count), self.cond, torch.ones(self.count, *self.shape))


def flops(run) -> int:
    """Of networks alone: the heads of a discriminator are another matter."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(counter.get_flop_counts()["UNet2DConditionModel"].values())


@pytest.mark.parametrize("shared, full, partial", [(False, 25, 16), (True, 21, 16)])
def test_passes_of_a_cycle(tmp_path, shared, full, partial):
    """25 + 16 e full forwards: 5 rollouts, the student's backward 2, its critic 1, guidance 2, five critics at 3, and
    of the encoder five times 3 for real images and 1 to fool the discriminator. With one rollout 4 fewer."""
    settings = Settings(critic_steps=5, share_rollout=shared)
    family = load_teacher(save_tiny(tmp_path / "teacher"))
    roles = build_roles(family, DMD2.needs(settings, full=True), {"student": Full(), "critic": Full()})
    data = Data(family)
    trainer = Trainer(DMD2(settings, roles, 3.0, few_steps(1)), roles, data, TrainConfig(updates=1), tmp_path / "run")
    x, t = data.batch(0, "").x0, torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        forward = flops(lambda: roles["teacher"](x, t, data.cond))
        encoder = flops(lambda: roles["discriminator"](x, t, data.cond)) / forward
    spent = flops(lambda: trainer.step(0)) / forward
    assert 0.2 < encoder < 0.8
    assert full - 1 < spent - partial * encoder < full + 0.1
