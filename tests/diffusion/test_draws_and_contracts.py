from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.draws import BLOCK, Step, fractions, key

STEP = Step(seed=5, index=17, progress=0.1, update="student", repeat=0, ids=torch.tensor([40, 7, 1003, 9]))


def everything(step: Step) -> list[torch.Tensor]:
    return [step.normal("noise", (2, 3)), step.uniform("t"), step.integers("index", 50)]


def test_a_draw_does_not_change_when_another_is_added():
    alone = STEP.normal("noise", (2, 3))
    STEP.uniform("added")
    torch.randn(3)
    assert torch.equal(STEP.normal("noise", (2, 3)), alone)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2], [3]], [[3, 0], [1], [2]]])
def test_slices_draw_what_the_joined_batch_draws(parts):
    for part in parts:
        for whole, piece in zip(everything(STEP), everything(replace(STEP, ids=STEP.ids[part]))):
            assert torch.equal(whole[part], piece)
        assert replace(STEP, ids=STEP.ids[part]).shared("exit") == STEP.shared("exit")


@pytest.mark.parametrize("change", [{"seed": 6}, {"index": 18}, {"update": "critic"}, {"repeat": 1}])
def test_every_part_of_the_moment_makes_other_draws(change):
    for one, two in zip(everything(STEP), everything(replace(STEP, **change))):
        assert not torch.equal(one, two)
    assert STEP.shared("exit") != replace(STEP, **change).shared("exit")


def test_names_and_samples_are_independent_and_the_laws_right():
    many = replace(STEP, ids=torch.arange(4000))
    noise, other, u = many.normal("a", (2,)), many.normal("b", (2,)), many.uniform("u")
    both = torch.cat([noise, other], 1).T
    assert torch.allclose(both.cov(), torch.eye(4), atol=0.08) and both.mean(1).abs().max() < 0.06
    assert (u.dtype == torch.float64 and u.mean().item() == pytest.approx(0.5, abs=0.02)
            and u.var().item() == pytest.approx(1 / 12, abs=0.005))
    assert many.integers("i", 4).bincount().tolist() == pytest.approx([1000] * 4, abs=120)


def test_keys_do_not_run_together():
    """They are the same on every machine: the number stands here."""
    assert key("ab", "c") != key("a", "bc") and key(1, 23) != key(12, 3)
    assert key(5, 17, "student") == 9172374944138130150


def test_passes_under_one_name_share_their_dropout_and_leave_the_generator_where_it_stood():
    torch.manual_seed(3)
    before, masks = torch.get_rng_state(), {}
    for label, step, name in (("one", STEP, "pair"), ("two", STEP, "pair"), ("name", STEP, "other"),
                              ("step", replace(STEP, index=18), "pair"),
                              ("slice", replace(STEP, ids=STEP.ids[1:]), "pair")):
        torch.rand(len(masks))                                      # whatever was drawn before
        with step.same_dropout(name):
            masks[label] = torch.nn.functional.dropout(torch.ones(400), 0.5)
    assert torch.equal(masks["one"], masks["two"])
    for other in ("name", "step", "slice"):
        assert (masks[other] == masks["one"]).double().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.set_rng_state(before)
    with STEP.same_dropout("pair"):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


def splitmix(word: int) -> int:
    """The finaliser of Java's SplittableRandom, in integers without an end."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_a_number_is_the_hash_of_its_place_however_many_are_drawn():
    """Runs are resumed by it: the numbers of one version are those of the next. Blocks of numbers end within a row."""
    golden, seed, ids, count = 0x9E3779B97F4A7C15, 9172374944138130150, [40, 7, 1003, 9], BLOCK // 2
    found = fractions(seed, torch.tensor(ids), count)
    assert found.shape == (4, count) and BLOCK // 4 < count
    for column in (0, 1, BLOCK // 4 - 1, BLOCK // 4, count - 1):
        for row, name in enumerate(ids):
            start = splitmix((splitmix((name * golden + seed) % 2**64) + golden) % 2**64)
            word = splitmix((start + (column + 1) * golden) % 2**64)
            assert found[row, column].item() == ((word >> 12) + 0.5) * 2.0**-52
    assert torch.equal(found[:, :3], fractions(seed, torch.tensor(ids), 3))
    assert torch.equal(STEP.normal("noise", (2, 3)),
                       torch.special.ndtri(fractions(STEP._key("noise"), STEP.ids, 6)).float().view(4, 2, 3))
    large = STEP.normal("noise", (count,))
    assert torch.equal(large, torch.special.ndtri(fractions(STEP._key("noise"), STEP.ids, count)).float())
    assert fractions(seed, torch.tensor(ids)[:0], 5).shape == (0, 5)


def condition() -> Condition:
    null = Condition(text=torch.zeros(3, 4, 2), pooled=torch.zeros(3, 2))
    return Condition(text=torch.randn(3, 4, 2), pooled=torch.randn(3, 2), null=null)


def test_a_condition_is_cut_and_joined_with_its_null():
    cond = condition()
    again = Condition.cat([cond[:1], cond[1:]])
    assert len(cond) == 3 and len(cond[1:]) == 2
    for a, b in ((again, cond), (again.null, cond.null)):
        assert torch.equal(a.text, b.text) and torch.equal(a.pooled, b.pooled) and a.w is None
    assert torch.equal(cond[[2, 0]].null.text, cond.null.text[[2, 0]])
    assert cond.to(torch.float64).null.text.dtype == torch.float64


def test_joining_a_condition_and_its_null_has_no_null():
    cond = condition()
    both = Condition.cat([cond.null, cond])
    assert len(both) == 6 and both.null is None


def test_conditions_of_different_make_do_not_join():
    with pytest.raises(ValueError, match="different make.*pooled"):
        Condition.cat([condition(), Condition(text=torch.zeros(1, 4, 2))])


def test_replacing_leaves_the_original():
    cond = condition()
    assert cond.replace(w=torch.ones(3)).w is not None and cond.w is None
    assert len(Batch(torch.arange(3), cond)) == 3
