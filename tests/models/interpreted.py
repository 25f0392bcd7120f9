"""The kernel of attention and its tangent, run by Triton's interpreter on the CPU. On a card: scripts/gpu/jvp.sh.

Triton reads TRITON_INTERPRET when it is imported, so test_triton_attention.py runs this file in a process of its own.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import save_tiny
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.losses.tangent import exact
from stepdistill.models import attention, triton_attention
from stepdistill.models.attention import differentiable
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.teacher import load_teacher
from stepdistill.models.triton_attention import attention_jvp


def given(batch, heads, rows, keys, width, dtype=torch.float32):
    """q, k, v, and their tangents."""
    made = torch.Generator().manual_seed(rows)
    return [torch.randn(batch, heads, length, width, generator=made).to(dtype)
            for length in (rows, keys, keys, rows, keys, keys)]


def known(q, k, v, dq, dk, dv, mask=None, scale=None):
    """O and dO in float64, by torch's own derivative of the math kernel."""
    q, k, v, dq, dk, dv = (tensor.double() for tensor in (q, k, v, dq, dk, dv))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=scale),
                              (q, k, v), (dq, dk, dv))


def off(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("shape", "dtype", "tolerance"), [
    ((2, 3, 70, 45, 40), torch.float32, 1e-6),                     # rows, keys and widths that fill no block
    ((1, 2, 64, 64, 64), torch.float32, 1e-6),
    ((1, 1, 5, 77, 160), torch.float32, 1e-6),                     # text of 77 tokens, the widest head of SD 1.5
    ((1, 2, 33, 20, 8), torch.float16, 2e-3),
])
def test_it_is_attention_and_its_derivative(shape, dtype, tolerance):
    tensors = given(*shape, dtype)
    out, tangent = attention_jvp(*tensors)
    assert out.dtype == tangent.dtype == dtype
    for found, expected in zip((out, tangent), known(*tensors), strict=True):
        assert off(found, expected) < tolerance


@pytest.mark.parametrize("kind", ["boolean, of keys", "added, of a head", "of each row"])
def test_masks_and_a_scale_of_ones_own_are_served(kind):
    tensors, made = given(2, 2, 20, 50, 16), torch.Generator().manual_seed(1)
    mask = {"boolean, of keys": torch.rand(2, 1, 1, 50, generator=made) > 0.3,
            "added, of a head": torch.randn(1, 2, 20, 50, generator=made),
            "of each row": torch.rand(2, 2, 20, 50, generator=made) > 0.3}[kind]
    for found, expected in zip(attention_jvp(*tensors, mask, 0.2), known(*tensors, mask, 0.2), strict=True):
        assert off(found, expected) < 1e-6


def test_a_row_without_keys_is_zero_and_spoils_no_other():
    tensors, mask = given(1, 1, 4, 40, 16), torch.ones(1, 1, 4, 40, dtype=torch.bool)
    mask[:, :, 2] = False
    out, tangent = attention_jvp(*tensors, mask)
    assert not out[0, 0, 2].any() and not tangent[0, 0, 2].any() and out.isfinite().all()
    plain = attention_jvp(*tensors)
    torch.testing.assert_close(out[0, 0, 3], plain[0][0, 0, 3])


def test_scores_that_all_grow_alike_change_nothing_and_values_go_through():
    """In closed form: a softmax does not see what all scores share, and equal scores are means."""
    q, k, v, *_ = given(1, 1, 6, 40, 16)
    alike = torch.ones_like(k)
    _, tangent = attention_jvp(q, alike, v, torch.randn_like(q), torch.zeros_like(k), torch.zeros_like(v))
    assert tangent.abs().max() < 1e-6
    out, tangent = attention_jvp(q, 0 * k, v, 0 * q, 0 * k, 2 * v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(tangent, 2 * out)


def test_large_scores_do_not_overflow():
    tensors = given(1, 1, 16, 48, 16)
    tensors[0] = 100 * tensors[0]
    for found, expected in zip(attention_jvp(*tensors), known(*tensors), strict=True):
        assert off(found, expected) < 1e-4


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A network's role, and what it is asked about."""
    teacher = load_teacher(save_tiny(tmp_path_factory.mktemp("teachers") / "sd"))
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.encode(["a red circle", "a blue square"])
    return Denoiser(teacher, teacher.network), x, torch.tensor([0.3, 0.8], dtype=torch.float64), cond


@pytest.fixture
def fused(monkeypatch):
    """Networks on the CPU go to the kernel too; how often."""
    calls = []
    kernel = triton_attention.attention_jvp
    monkeypatch.setattr(attention, "TRITON", ("cpu",))
    monkeypatch.setattr(triton_attention, "attention_jvp", lambda *rest: (calls.append(1), kernel(*rest))[1])
    return calls


@torch.no_grad()
def test_a_networks_derivative_is_that_of_the_math_kernel(fused, monkeypatch, asked):
    role, x, t, cond = asked
    field = lambda x, t: role(x, t, cond).v
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    found = exact(field, x, t, dx, 0.5)
    assert fused, "the kernel was asked"
    monkeypatch.setattr(attention, "TRITON", ())
    count, expected = len(fused), exact(field, x, t, dx, 0.5)
    assert len(fused) == count and off(found, expected.double()) < 1e-5


def test_what_it_does_not_serve_is_left_to_the_math_kernel(fused):
    q, dq = (torch.randn(1, 1, 5, 8, dtype=torch.float64) for _ in range(2))
    network = torch.nn.Identity()
    with differentiable(network):
        causal = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (q,), (dq,))[1]
        precise = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, q, q), (q,), (dq,))[1]
        plain = F.scaled_dot_product_attention(q, q, q)
    assert not fused and causal.isfinite().all() and precise.dtype == torch.float64
    assert forward_ad.unpack_dual(plain).tangent is None
