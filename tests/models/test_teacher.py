"""What all families share: the meta device, codecs, and noise that cannot be distilled."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL
from test_sdxl import save_tiny_xl
from tiny import save_tiny, save_tiny_sd3

from stepdistill.diffusion.toy import write
from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Heads, Inference, Trained
from stepdistill.models.codecs import normalised
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import family_at, load_teacher

MAKE = {"unet": save_tiny, "sdxl": lambda folder: save_tiny_xl(folder, True), "sd3": save_tiny_sd3,
        "sd3-t5": lambda folder: save_tiny_sd3(folder, True, {"max_sequence_length": 6}),
        "toy": lambda folder: write(folder, 2, "flow")}


@pytest.fixture(params=MAKE)
def folder(request, tmp_path):
    return MAKE[request.param](tmp_path / "teacher")


def test_on_the_meta_device_all_has_the_shapes_that_it_has_when_loaded(folder, monkeypatch):
    real = load_teacher(folder)
    if real.loaded is not None:
        monkeypatch.setattr(type(real.loaded), "from_pretrained", None)
    meta = load_teacher(folder, device="meta")
    assert {p.device.type for p in meta.network.parameters()} == {"meta"}
    assert (meta.sizes == {name: size for name, size in real.sizes.items()} and meta.schedule == real.schedule
            and meta.kind == real.kind)
    assert (meta.latent_shape, meta.feature_shapes, meta.default_targets) == (real.latent_shape, real.feature_shapes,
                                                                              real.default_targets)
    prompts = ["class 0", ""] if real.name == "toy" else ["a red ring", "a"]
    for found, known in ((meta.encode(prompts), real.encode(prompts)),
                         (meta.encode(prompts).null, real.encode(prompts).null)):
        shapes = [{name: (value.shape, value.dtype) for name, value in cond._tensors()} for cond in (found, known)]
        assert shapes[0] == shapes[1] and all(value.is_meta for _, value in found._tensors())
    assert type(meta.scheduler) is type(real.scheduler) and meta.sampler(meta.stock_call(Inference(4))).nfe == 4
    needs = {"teacher": Frozen(), "student": Trained("teacher", ("w",)), "discriminator": Heads("student")}
    roles = [build_roles(teacher, needs, {"student": Lora(2)}) for teacher in (meta, real)]
    sizes = [{name: sum(p.numel() for p in made.parameters(name)) for name in made} for made in roles]
    assert sizes[0] == sizes[1] and sizes[0]["student"] > 0


def test_a_family_is_known_by_its_index_alone(folder):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    family = family_at(str(folder))
    assert (family.samples == "points") == (family.no_pipeline is not None) == ("evaluate.reference" in family.unserved)


def test_latents_normalised_by_channel_are_the_pipeline_s(tmp_path):
    """SDXL's own decoding of a codec that says latents_mean and latents_std."""
    folder, mean, std = save_tiny_xl(tmp_path, True), [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": mean, "latents_std": std}))
    teacher = load_teacher(folder)
    stock, x = teacher.pipeline(), torch.randn(2, *teacher.latent_shape)
    stock.set_progress_bar_config(disable=True)
    calls = []
    decode = stock.vae.decode
    stock.vae.decode = lambda z, **options: calls.append(z) or decode(z, **options)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": x, "height": 16, "width": 16}
    pictures = stock(["a", "b"], **call, output_type="pt").images
    stock.vae.decode = decode
    latents = stock(["a", "b"], **call, output_type="latent").images
    torch.testing.assert_close(teacher.decode(latents) / 2 + 0.5, pictures, rtol=1e-4, atol=1e-5)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    z = teacher.codec.network.encode(pixels).latent_dist.mode()
    known = ((z - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
             * teacher.codec.network.config.scaling_factor)
    torch.testing.assert_close(teacher.encode_images(pixels), known)
    moved = latents.clone().requires_grad_()
    teacher.pixels(moved).square().mean().backward()
    assert moved.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.codec.network.parameters())


def test_a_codec_undoes_itself():
    class Mirror(torch.nn.Module):
        dtype, device, config = (torch.float32, torch.device("cpu"),
                                 AutoencoderKL(latents_mean=[1, 2, 3, 4], latents_std=[2, 3, 4, 5]).config)

        def encode(self, x):
            return type("Out", (), {"latent_dist": type("Dist", (), {"mode": staticmethod(lambda: x)})})

        def decode(self, z, return_dict):
            return (z,)

    codec, x = normalised(Mirror()), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(codec.pixels(codec.encode(x)), x)
    assert not torch.allclose(codec.encode(x), x)


NOISE = {
    "zero terminal snr": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True.*prediction_type: "
                          "v_prediction"),
    "trained betas": ({"trained_betas": [0.01] * 999 + [1.0]}, "ends in pure noise.*prediction_type: "
                      "epsilon.*trained_betas"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, "ends in pure noise.*beta_schedule: squaredcos_cap_v2"),
    "500 times": ({"num_train_timesteps": 500}, "num_train_timesteps: 500"),
}


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("case", NOISE)
def test_noise_of_which_no_picture_follows_is_refused_by_name(tmp_path, case, device):
    """By training and by a plan alike; with v, which tells x_0 at any noise, only the number of times is."""
    changes, says = NOISE[case]
    for kind in ("epsilon", "v_prediction"):
        folder = save_tiny(tmp_path / kind, kind)
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        if kind == "epsilon" or "num_train_timesteps" in changes:
            with pytest.raises(RequestError, match=says):
                load_teacher(folder, device=device)
        else:
            assert load_teacher(folder, device=device).kind == "v"
