"""The trainer with a real pipeline's network: adapters and full weights, told and untold, on checkpointed
activations."""
import pytest
import torch

from stepdistill.diffusion.contracts import Batch
from stepdistill.methods.base import Follows
from stepdistill.methods.consistency.lcm import LCM, Settings
from stepdistill.models.roles import Full, Lora, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.training import TrainConfig, Trainer, checkpoints

from ..tiny import save_tiny


class Data:
    """Four latents a step and their prompts."""

    def __init__(self, family) -> None:
        self.cond = family.encode(["a red ring", "a blue square", "a green cross", "a cyan circle"])

    def batch(self, step, update, repeat=0, rank=0, world=1, micro=0, micros=1) -> Batch:
        ids = 4 * step + torch.arange(4)
        part = slice(4 * micro // micros, 4 * (micro + 1) // micros)
        x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        return Batch(ids[part], self.cond[part], x0[part])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teacher"), "v_prediction")


@pytest.mark.parametrize("setting, guidance_embedding, precision",
                         [(Lora(rank=4), False, "fp32"), (Full(), True, "fp32"), (Lora(rank=4), True, "bf16")])
def test_training_resumes_bit_for_bit(tmp_path, teacher, setting, guidance_embedding, precision):
    def trainer(run_dir, updates, **config):
        family = load_teacher(teacher)
        settings = Settings(guidance_embedding=guidance_embedding)
        needs = LCM.needs(settings, isinstance(setting, Full)) | {"ema": Follows("student", 0.9)}
        roles = build_roles(family, needs, {"student": setting}, gradient_checkpointing=True)
        method = LCM(settings, roles, (2.0, 4.0) if guidance_embedding else 3.0, None)
        config = TrainConfig(updates=updates, lr=1e-2, accumulate=2, precision=precision, **config)
        return Trainer(method, roles, Data(family), config, run_dir)

    whole = trainer(tmp_path / "whole", 4)
    start = {name: [p.detach().clone() for p in whole.roles.parameters(name)] for name in whole.roles.names}
    base = {name: value.clone() for name, value in whole.roles.teacher.network.state_dict().items()
            if "lora" not in name}
    whole.train()
    for name in ("student", "ema"):                       # cond_proj moves once w is told; every weight gets a gradient
        moved = [not torch.equal(p, q) for p, q in zip(whole.roles.parameters(name), start[name], strict=True)]
        assert sum(moved) > 0.9 * len(moved)
    assert all(torch.equal(value, whole.roles.teacher.network.state_dict()[name]) for name, value in base.items()
               if "cond_proj" not in name)

    trainer(tmp_path / "parts", 2).train()
    (tmp_path / "parts/checkpoints/step-000002").rename(tmp_path / "two")
    parts = trainer(tmp_path / "parts", 4, checkpoint_every=2)
    (tmp_path / "two").rename(tmp_path / "parts/checkpoints/step-000002")
    parts.train(resume=True)
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("whole", "parts"))
    assert one.keys() == two.keys() >= {"role-student", "role-ema", "optimizer-student"}
    for name in one:
        for key in one[name]:
            assert torch.equal(one[name][key], two[name][key]), (name, key)
