"""What the contract sees on a real pipeline, whole and broken."""
from __future__ import annotations

import pytest
import torch

from stepdistill.models.adapters import AdapterBank
from stepdistill.proofs.contract import contract, moves, recipe
from stepdistill.run.setup import setup
from stepdistill.training import checkpoints

CPU = torch.device("cpu")


def failed(checks) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_a_whole_contract(tmp_path):
    checks = list(contract("lcm", 3, tmp_path))
    assert len(checks) == 11 and not failed(checks)


def test_swapped_adapters_are_seen(tmp_path, monkeypatch):
    """The critic's losses then train the student's adapter, which takes no gradients at that moment."""
    use, other = AdapterBank.use, {"student": "critic", "critic": "student"}
    monkeypatch.setattr(AdapterBank, "use", lambda self, name: use(self, other.get(name, name)))
    try:
        red = failed(moves(setup(recipe("dmd2"), CPU), tmp_path / "run"))
    except RuntimeError as error:                       # nothing that requires a gradient has been asked
        red = [str(error)]
    assert red


def test_a_teacher_that_moves_is_seen(tmp_path):
    work = setup(recipe("lcm"), CPU)
    loss = work.method.loss

    def shaken(batch, step):
        with torch.no_grad():
            next(p for name, p in work.teacher.network.named_parameters() if "lora_" not in name).add_(1e-6)
        return loss(batch, step)
    work.method.loss = shaken
    assert failed(moves(work, tmp_path / "run")) == ["tensors of the teacher's network that moved"]


def test_a_role_that_stays_is_seen(tmp_path, monkeypatch):
    work = setup(recipe("lcm"), CPU)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    assert failed(moves(work, tmp_path / "run")) == ["roles that updates train, or that follow one, and that "
                                                     "did not move"]


@pytest.mark.long
def test_a_resume_that_forgets_is_seen(tmp_path, monkeypatch):
    """As if a checkpoint did not hold all of what training goes on from."""
    load, drop = checkpoints.load, "optimizer-student"

    def forgetful(folder):
        found = load(folder)
        return found | {drop: {name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
                               for name, value in found[drop].items()}} if "resumed" in str(
                                   folder) and "000001" in str(folder) else found
    monkeypatch.setattr(checkpoints, "load", forgetful)
    red = failed(contract("lcm", 3, tmp_path))
    assert red == ["tensors of a run that was stopped and resumed which differ from the whole run's"]
