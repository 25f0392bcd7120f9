"""Pipelines whose parts are not the usual ones: served, or refused by one message that names the part, by plan and
training alike."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from test_sdxl import save_tiny_xl
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline

from stepdistill.errors import RequestError
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.models.families import FAMILIES
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.plan import META
from stepdistill.run.setup import setup

DEVICES = [None, "meta"]


def swapped(folder: Path, **parts) -> Path:
    pipe = tiny_pipeline()
    pipe.register_modules(**parts)
    pipe.save_pretrained(folder)
    return folder


def unet(**config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    own = {name: value for name, value in tiny_pipeline().unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**own | config)


def absent(folder: Path, *names: str, as_: object = (None, None)) -> Path:
    path = save_tiny(folder) / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(names, as_)))
    return folder


TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1)}
ASYMMETRIC = {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8),
              "down_block_types": ("DownEncoderBlock2D",) * 2,
              "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
REFUSED = {
    "tiny autoencoder": (lambda f: swapped(f, vae=AutoencoderTiny(**TINY)), "the vae of .* is an AutoencoderTiny, "
                         ".* served with an AutoencoderKL"),
    "asymmetric autoencoder": (lambda f: swapped(f, vae=AsymmetricAutoencoderKL(**ASYMMETRIC)),
                               "the vae of .* is an AsymmetricAutoencoderKL"),
    "class embeddings": (lambda f: swapped(f, unet=unet(num_class_embeds=3)), "its network reads classes or images"),
    "no text encoder": (lambda f: absent(f, "text_encoder"), "its model_index.json names no text_encoder"),
    "no tokenizer": (lambda f: absent(f, "tokenizer"), "its model_index.json names no tokenizer"),
    "a denoiser that is null": (lambda f: absent(f, "unet", as_=None), "its model_index.json names no unet"),
    "a denoiser that is a text": (lambda f: absent(f, "unet", as_="unet"), "its model_index.json names no unet"),
    "no autoencoder": (lambda f: absent(f, "vae"), "its model_index.json names no vae"),
    "no scheduler": (lambda f: absent(f, "scheduler"), "its model_index.json names no scheduler"),
    "a student already": (lambda f: swapped(f, unet=unet(time_cond_proj_dim=256)), "it is a student already"),
    "nine channels": (lambda f: swapped(f, unet=unet(in_channels=9)), "its network reads 9 channels and its "
                      "latents have 4"),
    "a flow's scheduler": (lambda f: swapped(f, scheduler=FlowMatchEulerDiscreteScheduler()),
                           "FlowMatchEulerDiscreteScheduler has no alphas_cumprod"),
    "no sample_size": (lambda f: swapped(f, unet=unet(sample_size=None)),
                       "no sample_size: let the recipe's resolution say"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_message_names_the_part(tmp_path, case):
    make, said = REFUSED[case]
    folder, messages = make(tmp_path / "teacher"), []
    for device in DEVICES:
        with pytest.raises(RequestError, match=said) as caught:
            load_teacher(folder, device=device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1], "plan and training read a teacher one way"


def test_a_network_without_sample_size_is_served_at_a_resolution(tmp_path):
    folder = swapped(tmp_path, unet=unet(sample_size=None))
    assert ([load_teacher(folder, device=device, resolution=(16, 24)).latent_shape for device in DEVICES]
            == [(4, 8, 12)] * 2)


def test_a_network_without_a_middle_is_served(tmp_path):
    teacher = load_teacher(swapped(tmp_path, unet=unet(mid_block_type=None)))
    assert teacher.default_features == ("down_blocks.1",) and "mid_block" not in teacher.feature_shapes
    roles = build_roles(teacher, {"teacher": Frozen(), "student": Trained(), "discriminator": Heads("student")},
                        {"student": Lora(2)})
    cond = teacher.encode(["a red ring"])
    assert roles["discriminator"](torch.randn(1, 4, 8, 8), torch.full((1,), 0.5, dtype=torch.float64),
                                  cond).shape[0] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_code_beside_a_pipeline_is_refused(tmp_path, device):
    path = save_tiny(tmp_path) / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": ["pipeline", "Mine"]}))
    with pytest.raises(RequestError, match="is of the class Mine of pipeline, which is code beside the pipeline "
                       "and is never run"):
        load_teacher(tmp_path, device=device)


def test_the_nearest_families_are_named_first(tmp_path):
    path = save_tiny(tmp_path) / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "StableDiffusionXLControlNetPipeline"}))
    with pytest.raises(RequestError, match="supported are StableDiffusionXLPipeline, .*docs/add_a_family.md says "
                       "how to add one") as caught:
        load_teacher(tmp_path)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_a_slip_in_targets_is_refused_alike(tmp_path):
    folder = save_tiny(tmp_path / "teacher")
    recipe = Recipe.load({"method": "lcm", "teacher": str(folder),
                          "student": {"lora": {"rank": 2, "targets": ["to_qq"]}}, "guidance": 2.0,
                          "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}})
    messages = []
    for device in (torch.device("cpu"), META):
        with pytest.raises(RequestError) as caught:
            setup(recipe, device)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "to_qq" in messages[0]


KIN = {"sd": (save_tiny, (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)),
       "sdxl": (lambda folder: save_tiny_xl(folder, True),
                (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)),
       "sd3": (save_tiny_sd3, (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline))}


@pytest.mark.long
@pytest.mark.parametrize("kind", KIN)
def test_a_pipeline_that_draws_over_pictures_is_served_as_its_kin(tmp_path, kind):
    make, classes = KIN[kind]
    known = load_teacher(make(tmp_path / "plain"))
    for cls in classes:
        folder = shutil.copytree(tmp_path / "plain", tmp_path / cls.__name__)
        more = {"requires_safety_checker": False} if kind == "sd" else {}
        cls(**known.loaded.components, **more).save_pretrained(folder)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == cls.__name__
        found, meta = load_teacher(folder), load_teacher(folder, device="meta")
        assert type(found.pipeline()) is type(known.loaded) and found.sizes == meta.sizes == known.sizes
        assert all(torch.equal(a, b) for a, b in zip(found.network.parameters(), known.network.parameters(),
                                                     strict=True))
        assert re.fullmatch("StableDiffusion(XL|3)?Pipeline", type(found.loaded).__name__)
