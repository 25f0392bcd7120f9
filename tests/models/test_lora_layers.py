"""The bank's layers against peft's own: one network with both forwards."""
from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners import lora
from torch import nn

from stepdistill.models.adapters import AdapterBank, LoraConv2d, LoraLinear, lora_config

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")

NAMES = ("student", "critic")
LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (3, 7, 12)),
    "linear without bias, many places": (lambda: nn.Linear(12, 20, bias=False), (4, 50, 12)),
    "linear of one vector": (lambda: nn.Linear(12, 20), (12,)),
    "convolution 1x1": (lambda: nn.Conv2d(12, 20, 1), (3, 12, 8, 8)),
    "convolution 3x3 of stride 2": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (3, 12, 9, 9)),
    "convolution of few places": (lambda: nn.Conv2d(12, 20, 3), (1, 12, 4, 4)),
    "convolution 5x3 with groups": (lambda: nn.Conv2d(12, 20, (5, 3), padding=(2, 1), groups=4), (3, 12, 8, 8)),
    "convolution padded in a circle": (lambda: nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular"), (3, 12, 8, 8)),
}


def made(layer, perturb, dtype=torch.float32):
    """A bank of two adapters, alpha other than rank, on a network of this one layer."""
    torch.manual_seed(0)
    network = nn.Sequential(layer()).to(dtype)
    bank = AdapterBank(network, {name: lora_config(4, ("0",), alpha=6) for name in NAMES})
    assert type(network[0]) in (LoraLinear, LoraConv2d)
    for seed, name in enumerate(NAMES):
        perturb(bank.parameters_of(name), seed, 0.3)
    return bank


def both(bank, call):
    """call() with the bank's forward, and with peft's own."""
    ours = call()
    layer = bank.network[0]
    own, layer.__class__ = type(layer), type(layer).__base__
    try:
        assert type(layer) in (lora.Linear, lora.Conv2d)
        return ours, call()
    finally:
        layer.__class__ = own


def gradients(bank, x, name, autocast=False):
    def call():
        bank.network.zero_grad()
        given = x.clone().requires_grad_()
        with bank.use(name), torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False):
            out = bank.network(given)
        out.float().square().sum().backward()
        return [out, given.grad, *(parameter.grad for parameter in bank.parameters_of(name))]
    return call


def close(ours, peft, tolerance):
    """Relative to the largest value of a tensor."""
    for found, right in zip(ours, peft, strict=True):
        assert found.dtype == right.dtype and found.shape == right.shape
        assert (found.double() - right.double()).abs().max() <= tolerance * right.double().abs().max()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_pefts(kind, name, perturb):
    layer, shape = LAYERS[kind]
    bank = made(layer, perturb)
    close(*both(bank, gradients(bank, torch.randn(shape), name)), 1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_gradients_too(kind, perturb):
    """Where W + s B A is formed, and where it is not; and another adapter, or none, is not in it."""
    layer, shape = LAYERS[kind]
    bank, x = made(layer, perturb), torch.randn(shape)
    found = {}
    for name in (*NAMES, None):
        with torch.no_grad(), bank.use(name):
            ours, peft = both(bank, lambda: bank.network(x))
        close([ours], [peft], 1e-6)
        found[name] = ours
    assert torch.equal(found[None], bank.network[0].base_layer(x))
    assert (found["student"] - found["critic"]).abs().max() > 0.1 < (found["student"] - found[None]).abs().max()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False),
                                                 (torch.float16, False)])
def test_in_16_bits_they_are_as_near_the_exact_ones_as_pefts(kind, dtype, autocast, perturb):
    """By the mean of the relative errors over outputs and gradients, of ten inputs."""
    layer, shape = LAYERS[kind]
    bank = made(layer, perturb, dtype)
    exact = made(lambda: deepcopy(bank.network[0].base_layer).double(), perturb, torch.float64)
    errors = []
    for _ in range(10):
        x = torch.randn(shape).to(dtype)
        right = gradients(exact, x.double(), "student")()
        for found in zip(*both(bank, gradients(bank, x, "student", autocast)), right, strict=True):
            assert found[0].dtype == found[1].dtype
            errors.append([((value - found[2]).norm() / found[2].norm()).item() for value in found[:2]])
    ours, peft = torch.tensor(errors).mean(0).tolist()
    assert ours <= 1.03 * peft < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_too_small_for_a_16_bit_weight_is_kept(dtype, perturb):
    """2^-12 added to weights of 1 would be lost in each of them. The base's output is 0 here, and the adapter's is
    not."""
    bank = made(lambda: nn.Linear(64, 4, bias=False), perturb, dtype)
    bank.network[0].base_layer.weight.data.fill_(1.0)
    a, b = (parameter.data.zero_() for parameter in bank.parameters_of("student"))
    a[0, :32], b[:, 0] = 2.0**-12, 1 / 1.5
    x = torch.ones(500, 64, dtype=dtype)
    x[:, 32:] = -1
    with torch.no_grad(), bank.use("student"):
        assert torch.equal(bank.network(x), torch.full((500, 4), 32 * 2.0**-12, dtype=dtype))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wanted", [True, False])
def test_the_forward_derivative_is_pefts(kind, wanted, perturb):
    layer, shape = LAYERS[kind]
    bank = made(layer, perturb)
    x, dx = torch.randn(2, *shape)
    with bank.use("student"), torch.set_grad_enabled(wanted):
        ours, peft = both(bank, lambda: torch.func.jvp(bank.network, (x,), (dx,)))
        close(ours, peft, 1e-6)
        a_constant = lambda y: bank.network(x) * y.mean()     # whose input carries no tangent
        close(*both(bank, lambda: torch.func.jvp(a_constant, (x,), (dx,))), 1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", LAYERS)
def test_many_inputs_at_once_under_vmap(kind, perturb):
    layer, shape = LAYERS[kind]
    bank = made(layer, perturb)
    with bank.use("student"):
        close(*([out] for out in both(bank, lambda: torch.func.vmap(bank.network)(torch.ones(2, *shape)))), 1e-6)


def test_what_a_layer_was_given_stays_as_it_was(perturb):
    for layer, shape in LAYERS.values():
        bank, x = made(layer, perturb), torch.randn(shape)
        before, weight = x.clone(), bank.network[0].base_layer.weight.clone()
        with bank.use("student"):
            bank.network(x)
            with torch.no_grad():
                bank.network(x)
        assert torch.equal(x, before) and torch.equal(bank.network[0].base_layer.weight, weight)


def test_a_layer_without_the_active_adapter_is_the_base(perturb):
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bank = AdapterBank(network, {"student": lora_config(2, ("0",)), "critic": lora_config(2, ("0", "1"))})
    for name in ("student", "critic"):
        perturb(bank.parameters_of(name))
    x = torch.randn(5, 8)
    with bank.use("student"):
        assert torch.equal(network[1](x), network[1].base_layer(x))
        assert not torch.equal(network[0](x), network[0].base_layer(x))


def test_what_is_not_plain_lora_is_refused():
    config = lora_config(4, ("0",))
    config.lora_dropout = 0.1
    with pytest.raises(ValueError, match="lora_dropout.*lora_config"):
        AdapterBank(nn.Sequential(nn.Linear(8, 8)), {"student": config})


def test_a_trained_adapter_computes_the_same_in_a_stock_pipeline(family, inputs, tmp_path):
    """Trained by the bank's layers, saved by peft's names, loaded by diffusers and computed by peft's layers."""
    bank = AdapterBank(family.network, {"student": lora_config(4, family.default_targets, 8)})
    adam = torch.optim.Adam(bank.parameters_of("student"), lr=1e-2)
    before = family.predict(family.network, *inputs)
    for _ in range(5):
        with bank.use("student"):
            family.predict(family.network, *inputs).square().mean().backward()
        adam.step()
        adam.zero_grad()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=bank.lora_state_dict("student"),
                                              unet_lora_adapter_metadata=bank.metadata("student"))
    pipeline = family.pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert any(type(module) is lora.Linear for module in pipeline.unet.modules())
    x, _, cond = inputs
    with bank.use("student"):
        ours = family.predict(family.network, *inputs)
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(pipeline.unet(x, torch.tensor([999, 499, 19]), cond.text).sample, ours,
                               rtol=0, atol=1e-5)
