from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import RequestError
from stepdistill.models.adapters import AdapterBank, lora_config


class Chain(nn.Module):
    """Two blocks that are checkpointed one by one by the function in `remember`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.remember = None

    def forward(self, x):
        for block in (self.first, self.second):
            step = lambda h, block=block: block(h).tanh()
            x = step(x) if self.remember is None else self.remember(step, x)
        return x


@pytest.fixture
def bank(perturb):
    torch.manual_seed(0)
    made = AdapterBank(Chain(), {name: lora_config(4, ("first", "second")) for name in ("student", "critic")})
    perturb(made.parameters_of("student"), seed=1, size=0.5)
    perturb(made.parameters_of("critic"), seed=2, size=0.5)
    return made


def gradients(bank, remember, during_backward, times=1):
    """The student's, with another adapter active when backward runs."""
    bank.network.zero_grad()
    bank.network.remember = remember
    with bank.use("student"):
        loss = bank.network(torch.ones(5, 8) / 3).square().sum()
    with bank.use(during_backward):
        for i in range(times):
            bank.network.zero_grad()
            loss.backward(retain_graph=i < times - 1)
    return [parameter.grad for parameter in bank.parameters_of("student")]


def test_plain_checkpointing_gives_another_adapters_gradients_and_the_banks_does_not(bank):
    right = gradients(bank, None, "student")
    plain = gradients(bank, lambda f, x: checkpoint(f, x, use_reentrant=False), "critic")
    assert any(found is None or (found - true).norm() > 0.1 * true.norm()
               for found, true in zip(plain, right, strict=True))
    for other in ("critic", None, "student"):
        torch.testing.assert_close(gradients(bank, bank.checkpoint, other), right)
        assert bank.active is None
    torch.testing.assert_close(gradients(bank, bank.checkpoint, "critic", times=2), right)


@pytest.mark.parametrize("during", ["critic", None])
def test_a_checkpointed_unet_has_the_same_gradients(family, inputs, perturb, during):
    names = ("student", "critic")
    bank = AdapterBank(family.network, {name: lora_config(4, family.default_targets) for name in names})
    for seed, name in enumerate(names):
        perturb(bank.parameters_of(name), seed)

    def of_student():
        family.network.zero_grad()
        with bank.use("student"):
            raw = family.predict(family.network, *inputs)
        with bank.use(during):
            raw.square().mean().backward()
        return [parameter.grad.clone() for parameter in bank.parameters_of("student")]

    right = of_student()
    family.network.enable_gradient_checkpointing(bank.checkpoint)
    torch.testing.assert_close(of_student(), right, rtol=1e-5, atol=1e-8)
    assert all(parameter.grad is None for parameter in bank.parameters_of("critic"))


def test_switching_leaves_requires_grad_alone_where_pefts_own_does_not(bank):
    every = bank.parameters_of("student") + bank.parameters_of("critic")
    for name in ("critic", "student", None):
        with bank.use(name):
            assert all(parameter.requires_grad for parameter in every)
    for layer in (bank.network.first, bank.network.second):
        layer.set_adapter("critic")
    assert not any(parameter.requires_grad for parameter in bank.parameters_of("student"))


def test_what_was_active_returns_also_after_an_error(bank):
    with bank.use("student"):
        with pytest.raises(ZeroDivisionError), bank.use(None):
            assert bank.active is None
            raise ZeroDivisionError
        assert bank.active == "student"
    assert bank.active is None


def test_without_an_adapter_the_base_is_bit_identical(family, inputs, perturb):
    before = family.predict(family.network, *inputs)
    bank = AdapterBank(family.network, {"student": lora_config(4, family.default_targets)})
    perturb(bank.parameters_of("student"))
    assert torch.equal(family.predict(family.network, *inputs), before)
    with bank.use("student"):
        assert (family.predict(family.network, *inputs) - before).abs().max() > 1e-2


def test_first_values_are_a_function_of_the_seed_and_the_name():
    def bank_of(seed, *names):
        chain = Chain()
        state = torch.random.get_rng_state()
        bank = AdapterBank(chain, {name: lora_config(4, ("first",)) for name in names}, seed)
        assert torch.equal(torch.random.get_rng_state(), state), "making adapters moved the global generator"
        return bank

    one, two, other = bank_of(3, "student"), bank_of(3, "critic", "student"), bank_of(4, "student")
    assert torch.equal(one.state_dict("student")["first.lora_A.weight"],
                       two.state_dict("student")["first.lora_A.weight"])
    assert not torch.equal(two.state_dict("critic")["first.lora_A.weight"],
                           two.state_dict("student")["first.lora_A.weight"])
    assert not torch.equal(one.state_dict("student")["first.lora_A.weight"],
                           other.state_dict("student")["first.lora_A.weight"])
    assert not one.state_dict("student")["first.lora_B.weight"].any()


def test_adapters_are_float32_on_a_bfloat16_base(family, inputs, perturb):
    family.network.bfloat16()
    bank = AdapterBank(family.network, {"student": lora_config(4, family.default_targets)})
    assert {parameter.dtype for parameter in bank.parameters_of("student")} == {torch.float32}
    perturb(bank.parameters_of("student"))
    with bank.use("student"):
        raw = family.predict(family.network, *inputs)
    assert raw.dtype == torch.float32 and raw.isfinite().all()


def test_states_round_trip_and_are_checked(bank):
    state = {path: value.clone() for path, value in bank.state_dict("critic").items()}
    assert set(state) == {f"{layer}.lora_{part}.weight" for layer in ("first", "second") for part in "AB"}
    bank.copy("critic", "student")
    assert all(torch.equal(value, state[path]) for path, value in bank.state_dict("student").items())
    with pytest.raises(ValueError, match="rank 4.*first.lora_A.weight"):
        bank.load_state_dict("student", {path: value[:1] for path, value in state.items()})
    with pytest.raises(ValueError, match="1 of 4 tensors"):
        bank.load_state_dict("student", dict(list(state.items())[:3]))


@pytest.mark.parametrize(("targets", "says"), [
    (("to_qq",), "to_qq.*near names.*to_q"),
    (("to_q", "attention.to_v"), "attention.to_v"),
    (("norm1",), "norm1"),
    (("zzzzzzzz",), "names that exist"),
    ((), "without targets"),
])
def test_targets_that_match_nothing_are_refused_with_near_names(family, targets, says):
    with pytest.raises(RequestError, match=says):
        AdapterBank(family.network, {"student": lora_config(4, targets)})


def test_bad_requests_to_a_bank(bank):
    with pytest.raises(RequestError, match="rank"):
        lora_config(0, ("first",))
    with pytest.raises(ValueError, match="'nobody'.*student"):
        bank.use("nobody")
    with pytest.raises(ValueError, match="carries adapters already"):
        AdapterBank(bank.network, {"third": lora_config(4, ("first",))})


@pytest.mark.parametrize("alpha", [None, 16])
def test_a_stock_pipeline_loads_the_adapter(family, inputs, perturb, tmp_path, alpha):
    """With the metadata, alpha other than rank survives; the loaded network computes what the adapter does."""
    bank = AdapterBank(family.network, {"student": lora_config(4, family.default_targets, alpha)})
    perturb(bank.parameters_of("student"))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=bank.lora_state_dict("student"),
                                              unet_lora_adapter_metadata=bank.metadata("student"))
    pipeline = family.pipeline()
    pipeline.load_lora_weights(tmp_path)
    x, t, cond = inputs
    with bank.use("student"):
        ours = family.predict(family.network, x, t, cond)
    stock = pipeline.unet(x, torch.tensor([999, 499, 19]), cond.text).sample
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5)
