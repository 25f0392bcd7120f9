"""DisBack beyond its identities: what is recorded when, the way back, runs that are resumed, and what is refused."""
import pytest
import torch

from stepdistill.api import train
from stepdistill.methods.base import Follows
from stepdistill.methods.distribution.disback import DisBack, Settings
from stepdistill.proofs.contract import resumed
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan
from stepdistill.training import checkpoints

from .players import SCHEDULES, affine, few_steps, gaussian, moment, prompts

SHORT = {"records": 2, "record_every": 1, "interval": 2, "critic_steps": 2}
FULL = {"method": "disback", "teacher": "assets/toy", "student": "full", "steps": 1, "settings": SHORT,
        "data": {"prompts": "assets/toy", "batch": 8},
        "train": {"updates": 8, "lr": 1e-3, "checkpoint_every": 1, "seed": 3, "ema": 0.9}}


def states(run) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Of all roles, after each step."""
    return [checkpoints.load(folder) for folder in sorted((run / "checkpoints").glob("step-*"))]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(Recipe.load(FULL), out=tmp_path_factory.mktemp("disback") / "run")


def test_records_are_the_critic_of_their_moment_for_good_and_the_student_waits(run):
    after = states(run)
    for i, found in enumerate(after):                                        # after step i + 1
        for number in (1, 2):
            moment = min(i, number - 1)
            assert same(found[f"role-record{number}"], after[moment]["role-critic"])
        assert same(found["role-student"], after[0]["role-student"]) == (i < 3)
    assert not same(after[0]["role-critic"], after[1]["role-critic"])
    assert "role-ema" in after[0] and "role-teacher" not in after[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, tmp_path):
    assert resumed(Recipe.load(FULL), run, tmp_path / "again") == 0


def test_records_do_not_move_when_a_run_is_made_longer(run, tmp_path):
    longer = Recipe.load(FULL, {"train.updates": 10})
    after = states(train(longer, out=tmp_path / "run"))
    assert same(after[9]["role-record2"], after[1]["role-critic"]) and len(after) == 10


def real_at(index: int, **settings) -> float:
    """The mean of the law that is the real score of a step: 1 of the first record, 2 of the second, -1 of the
    teacher."""
    s, kind = SCHEDULES["vp"]
    roles = {name: gaussian(s, mean, 0.5, kind) for name, mean in (("teacher", -1.0), ("record1", 1.0),
                                                                   ("record2", 2.0), ("critic", 0.0))}
    method = DisBack(Settings(**{**SHORT, **settings}), roles | {"student": affine(s, 0.0, 1.0)}, 1.0, few_steps(1))
    seen = method.real(moment(4, index=index))
    return round(seen.mean.item(), 6)


def test_the_way_back_ends_at_the_teacher():
    assert [real_at(index) for index in range(3, 10)] == [2, 2, 1, 1, -1, -1, -1]
    assert [real_at(index, interval=1, record_every=2) for index in (6, 7, 8, 1000)] == [2, 1, -1, -1]


def test_the_student_s_update_begins_after_the_last_record():
    method = DisBack(Settings(**SHORT), {"student": affine(SCHEDULES["vp"][0], 0.0, 1.0), **dict.fromkeys(
        ("teacher", "critic", "record1", "record2"), gaussian(SCHEDULES["vp"][0], 0.0, 1.0, "v"))}, 1.0, few_steps(1))
    student, critic = method.updates()
    assert [student.due(i) for i in range(5)] == [False] * 3 + [True] * 2 and all(critic.due(i) for i in range(5))
    kept = moment(8, "critic")
    assert method.critic_loss(prompts(8), kept)["denoising"] > 0 and "sample" not in kept.kept


def test_records_of_an_adapter_are_adapters(tiny_teacher):
    made = {"method": "disback", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": 2.0, "steps": 1,
            "settings": SHORT, "data": {"prompts": "shapes", "batch": 4}, "train": {"updates": 4}}
    found = plan(Recipe.load(made))
    assert found["passes"]["forward"] == 7 and found["passes"]["backward"] == 3
    needs = DisBack.needs(Settings(**SHORT), False)
    assert {name: need for name, need in needs.items() if isinstance(need, Follows)} == {
        "record1": Follows("critic", 0.0, 1), "record2": Follows("critic", 0.0, 2)}


@pytest.mark.parametrize("changes", [{"records": 0}, {"record_every": 0}, {"interval": 0}, {"critic_steps": 0},
                                     {"record_guidance": 0.5}, {"t_range": (0.5, 0.2)}])
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        Settings(**changes)


def test_only_one_step_is_served():
    with pytest.raises(ValueError, match="one-step students, found 2 steps"):
        DisBack.inference(Settings(), 2, SCHEDULES["vp"][0])
