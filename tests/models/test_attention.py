"""Each backend really computes the attention of each family, gives the same, goes with adapters and recomputation, and
has a JVP."""
from __future__ import annotations

import types
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor
from test_sdxl import save_tiny_xl
from tiny import save_tiny, save_tiny_sd3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.errors import RequestError
from stepdistill.losses.tangent import exact
from stepdistill.methods.base import Frozen, Trained
from stepdistill.models import attention
from stepdistill.models.attention import check_backend, differentiable, head_sizes, refusal, set_attention
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.roles import Full, Lora, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run import setup as work

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMPTS = ["a red circle", "a blue square"]
KERNELS = {"sdpa": "math", "flash": "flash", "xformers": "xformers"}
NEEDS = {"teacher": Frozen(), "student": Trained("teacher")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {"sd": save_tiny(folder / "sd"), "sdxl": save_tiny_xl(folder / "sdxl", True),
            "sd3": save_tiny_sd3(folder / "sd3")}


class Calls(TorchDispatchMode):
    """Counts the kernels that ran: attention by torch's flash kernel, by a softmax that is written out, or by
    xformers."""

    def __init__(self):
        super().__init__()
        self.flash = self.math = self.xformers = 0

    def __torch_dispatch__(self, kernel, kinds, args=(), kwargs=None):
        self.flash += "flash_attention_for_cpu.default" in str(kernel)
        self.math += "aten._safe_softmax" in str(kernel) or "aten._softmax.default" in str(kernel)
        return kernel(*args, **(kwargs or {}))

    @property
    def found(self):
        return {"flash": self.flash, "math": self.math, "xformers": self.xformers}


@pytest.fixture
def calls(monkeypatch):
    """And an xformers that computes the right thing: (B, M, K), or (B, M, H, K), times the scale, plus the bias."""
    counted = Calls()

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        counted.xformers += 1
        assert p == 0.0 and query.is_contiguous() and query.ndim in (3, 4)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        equation = "bmk,bnk->bmn" if query.ndim == 3 else "bmhk,bnhk->bhmn"
        logits = torch.einsum(equation, query, key) * scale + (0 if attn_bias is None else attn_bias)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)           # no softmax that would be counted
        return torch.einsum("bmn,bnk->bmk" if query.ndim == 3 else "bhmn,bnhk->bmhk", weights, value)

    fake = types.SimpleNamespace(ops=types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention))
    monkeypatch.setattr(attention_processor, "xformers", fake)
    monkeypatch.setattr(attention_dispatch, "xops", fake.ops)
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    return counted


def inputs(family):
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.3004, 0.9003], dtype=torch.float64), family.encode(PROMPTS)


def count(network):
    return sum(isinstance(module, Attention) for module in network.modules())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@torch.no_grad()
def test_the_chosen_backend_computes_every_attention_of_the_network(sources, calls, name, backend):
    family = load_teacher(sources[name])
    x, t, cond = inputs(family)
    expected = Denoiser(family, family.network)(x, t, cond).raw
    set_attention(family.network, backend)
    with sdpa_kernel(SDPBackend.MATH), calls:          # what computes by sdpa takes the kernel that torch is left with
        found = Denoiser(family, family.network)(x, t, cond).raw
    assert calls.found == {kernel: count(family.network) * (kernel == KERNELS[backend]) for kernel in KERNELS.values()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_auto_leaves_a_network_as_diffusers_made_it(sources):
    network = load_teacher(sources["sd"]).network
    before = dict(network.attn_processors)
    set_attention(network, "auto")
    assert all(network.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("setting", [Lora(4), Full()], ids=["lora", "full"])
@pytest.mark.parametrize("backend", ["flash", "xformers"])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_goes_with_adapters_and_with_recomputation(sources, calls, perturb, name, backend, setting):
    """Gradients are those of plain attention without recomputation, and every attention runs twice: forward, and in
    backward."""
    def gradients(counting, **more):
        family = load_teacher(sources[name])
        roles = build_roles(family, NEEDS, {"student": setting}, **more)
        perturb(roles.parameters("student"), size=0.05)
        given = inputs(family)
        with sdpa_kernel(SDPBackend.MATH), counting:
            loss = roles["student"](*given).raw.square().sum()
            before = dict(calls.found)
            loss.backward()
        return roles, before, [parameter.grad for parameter in roles.parameters("student")]
    _, _, expected = gradients(nullcontext())
    roles, forward, found = gradients(calls, attention=backend, gradient_checkpointing=True)
    layers = count(roles.teacher.network)
    assert forward == {kernel: layers * (kernel == backend) for kernel in forward}
    again = {kernel: layers * (2 if kernel == backend else 0) for kernel in forward}
    assert all(again[kernel] - 3 <= calls.found[kernel] <= again[kernel] for kernel in again), (
        "one may lie outside of the blocks")
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", *KERNELS])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_it_has_a_derivative_forward(sources, calls, perturb, name, backend):
    """Along x, against central differences in float64 (the norms of SD3 are computed in float32), with adapters and
    recomputation; afterwards the chosen backend is back."""
    family = load_teacher(sources[name])
    roles = build_roles(family, NEEDS, {"student": Lora(2)}, gradient_checkpointing=True, attention=backend)
    perturb(roles.parameters("student"))
    family.network.double()
    x, t, cond = inputs(family)
    x, dx = x.double(), torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    field = lambda x, t: roles["student"](x, t, cond).v
    with calls:
        found = exact(field, x, t, dx, 0.0)
    assert calls.flash == calls.xformers == 0
    width = 1e-3
    with torch.no_grad(), calls:
        difference = (field(x + width * dx, t) - field(x - width * dx, t)) / (2 * width)
    assert ((found - difference).norm() / found.norm()).item() < 5e-6
    kernel = {"auto": "flash", "sdpa": "flash"}.get(backend, backend)                 # torch's own choice on a CPU
    assert calls.found[kernel] == 2 * count(family.network)


@pytest.mark.parametrize("which", ["x", "t", "w"])
def test_a_tangent_of_any_input_is_noticed(sources, which):
    """By its numbers, not by an error: outside of `differentiable` the flash kernel has no derivative at all."""
    family = load_teacher(sources["sd"])
    needs = {"teacher": Frozen(), "student": Trained("teacher", reads=("w",))}
    roles = build_roles(family, needs, {"student": Full()}, attention="flash")
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x, t, cond = inputs(family)
    given = {"x": x, "t": t, "w": torch.tensor([1.5, 3.0], dtype=torch.float64)}

    def field(value):
        now = given | {which: value}
        return roles["student"](now["x"], now["t"], cond.replace(w=now["w"])).v
    with torch.no_grad():
        _, found = torch.func.jvp(field, (given[which],), (torch.ones_like(given[which]),))
    assert found.abs().max() > 0


def test_the_kernels_have_no_derivative_of_their_own():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (q,))


# -- networks that ask diffusers' dispatcher ---------------------------------------------------------------------------

def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                  num_attention_heads=2,
                                  joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)).eval()


def through(network):
    made = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return network(hidden_states=made(1, 16, 4), encoder_hidden_states=made(1, 5, 32), pooled_projections=made(1, 8),
                   timestep=torch.ones(1),
                   txt_ids=torch.zeros(5, 3), img_ids=torch.zeros(16, 3), return_dict=False)[0]


@pytest.mark.parametrize("backend", KERNELS)
@torch.no_grad()
def test_the_dispatcher_is_given_the_backend_and_other_networks_are_not(calls, backend):
    network, other = flux(), flux()
    expected = through(network)
    set_attention(network, backend)
    with sdpa_kernel(SDPBackend.MATH), calls:
        found = through(network)
    assert calls.found == {kernel: 3 * (kernel == KERNELS[backend]) for kernel in KERNELS.values()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with sdpa_kernel(SDPBackend.MATH), calls:
        through(other)
    assert calls.math == 3 + 3 * (backend == "sdpa") and calls.flash == 3 * (backend == "flash")


@pytest.mark.parametrize("backend", KERNELS)
@torch.no_grad()
def test_a_dispatched_network_can_be_differentiated(calls, backend):
    network = flux().double()
    set_attention(network, backend)
    with differentiable(network):
        network_input = torch.randn(1, 16, 4, dtype=torch.float64)
        field = lambda x: network(hidden_states=x, encoder_hidden_states=torch.ones(1, 5, 32).double(),
                                  timestep=torch.ones(1).double(),
                                  pooled_projections=torch.ones(1, 8).double(), txt_ids=torch.zeros(5, 3),
                                  img_ids=torch.zeros(16, 3),
                                  return_dict=False)[0]
        found = torch.func.jvp(field, (network_input,), (torch.ones_like(network_input),))[1]
        width = 1e-3
        difference = (field(network_input + width) - field(network_input - width)) / (2 * width)
    assert ((found - difference).norm() / found.norm()).item() < 5e-6
    assert ({layer.processor._attention_backend for layer in attention._attentions(network)}
            == {attention.DISPATCHER[backend]})


# -- what is refused ---------------------------------------------------------------------------------------------------

def test_attention_of_another_kind_is_refused_and_nothing_is_changed(sources):
    network = load_teacher(sources["sd"]).network
    last = [module for module in network.modules() if isinstance(module, Attention)][-1]
    last.set_processor(AttnProcessor())
    before = dict(network.attn_processors)
    with pytest.raises(RequestError, match="AttnProcessor of diffusers has no form for flash: choose auto"):
        set_attention(network, "flash")
    assert all(network.attn_processors[name] is processor for name, processor in before.items())


def test_a_network_without_attention_is_refused():
    network = load_teacher("assets/toy").network
    set_attention(network, "sdpa")
    with pytest.raises(RequestError, match="a ToyNetwork has no attention that flash could compute"):
        set_attention(network, "flash")


@pytest.mark.parametrize(("backend", "device", "dtype", "heads", "message"), [
    ("auto", CPU, torch.float32, (7,), None),
    ("sdpa", CUDA, torch.float64, (7,), None),
    ("xformers", CPU, torch.float32, (64,), "CUDA alone, and this runs on cpu"),
    ("xformers", CUDA, torch.float64, (64,), "16 bits or float32, found torch.float64"),
    ("xformers", CUDA, torch.bfloat16, (64, 20), "a multiple of 8 in torch.bfloat16, and this network's are 20"),
    ("xformers", CUDA, torch.float32, (20, 6), "a multiple of 4 in torch.float32, and this network's are 6"),
    ("xformers", CUDA, torch.float32, (20, 64), None),
    ("xformers", CUDA, torch.bfloat16, (40, 80, 160), None),
    ("flash", CPU, torch.float64, (300,), None),
    ("flash", torch.device("mps"), torch.float16, (64,), "CUDA and the CPU, and this runs on mps"),
    ("flash", CUDA, torch.float32, (64,), "16 bits alone, found torch.float32: let train.precision be bf16"),
    ("flash", CUDA, torch.bfloat16, (64, 300), "at most 256, and this network's are 300"),
    ("flash", CUDA, torch.bfloat16, (64,), None),
])
def test_what_a_backend_cannot_serve_is_said(calls, monkeypatch, backend, device, dtype, heads, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    found = refusal(backend, device, dtype, heads)
    assert found is None if message is None else message in found


def test_old_gpus_and_a_missing_xformers_are_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 8.0 or newer, found 7.5" in refusal("flash", CUDA, torch.float16, (64,))
    monkeypatch.setattr(attention, "is_xformers_available", lambda: False)
    assert "xformers is not installed: pip install xformers" in refusal("xformers", CUDA, torch.float16, (64,))


def test_head_sizes_are_read_off_a_config(sources, calls):
    assert head_sizes(load_teacher(sources["sd"]).network) == (2, 4)
    assert head_sizes(load_teacher(sources["sd3"]).network) == (8,)
    with pytest.raises(RequestError, match="a multiple of 4 in torch.float32, and this network's are 2"):
        check_backend("xformers", CUDA, torch.float32, load_teacher(sources["sd"], device="meta").network)
    check_backend("xformers", CUDA, torch.bfloat16, load_teacher(sources["sd3"], device="meta").network)


def asked(source, backend, **train):
    return Recipe.load({"method": "lcm", "teacher": str(source), "student": {"lora": {"rank": 2}},
                        "data": {"images": "shapes", "batch": 2},
                        "train": {"updates": 1, "attention": backend, **train}})


def test_a_recipe_is_refused_at_its_line_before_anything_is_loaded(sources, monkeypatch):
    monkeypatch.setattr(work, "load_teacher", None)
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    with pytest.raises(RequestError, match=r": train.attention is xformers, which cannot serve: .* this runs on cpu"):
        work.setup(asked(sources["sd"], "xformers"), CPU)
    with pytest.raises(RequestError, match=r"train.attention is flash, which cannot serve: .* let "
                       r"train.precision be bf16"):
        work.setup(asked(sources["sd"], "flash"), CUDA)


@torch.no_grad()
def test_a_recipe_chooses_for_every_network_that_it_builds(sources, calls):
    made = work.setup(asked(sources["sd"], "flash"), CPU)
    x, t, cond = inputs(made.teacher)
    with sdpa_kernel(SDPBackend.MATH), calls:
        for role in ("teacher", "student"):
            made.roles[role](x, t, cond.replace(w=torch.full((2,), 2.0)))
    assert calls.flash == 2 * count(made.teacher.network) and calls.math == 0


@pytest.mark.skipif(find_spec("xformers") is None or not torch.cuda.is_available(), reason="xformers and a GPU")
@torch.no_grad()
def test_the_real_xformers_gives_the_same():
    torch.manual_seed(0)
    network = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
                                   cross_attention_dim=16, norm_num_groups=8,
                                   down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
                                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).cuda().eval()
    x, text = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 5, 16, device="cuda")
    expected = network(x, 500, text).sample
    assert refusal("xformers", CUDA, torch.float32, head_sizes(network)) is None
    set_attention(network, "xformers")
    torch.testing.assert_close(network(x, 500, text).sample, expected, rtol=1e-3, atol=1e-3)
