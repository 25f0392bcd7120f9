"""Teachers of real size with random weights, made on the device: a folder of configs whose denoiser no file holds.

What is held beside the denoiser is small on purpose: conditions and latents count as cached, so text encoders and the
codec have one tiny layer, in the widths that conditions need.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import ROOT
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CONFIGS = Path(__file__).parent / "configs"
DENOISERS = {"StableDiffusionPipeline": "unet", "StableDiffusionXLPipeline": "unet",
             "StableDiffusion3Pipeline": "transformer"}


def config_of(name: str) -> dict[str, Any]:
    """configs/<name>.json: the pipeline's class, its denoiser's class and config, its scheduler, its tokens."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def write_pipeline(name: str, folder: Path) -> Path:
    """A pipeline folder that lacks the denoiser's weights: `random_weights` makes them."""
    config = config_of(name)
    cls, denoiser = getattr(diffusers, config["pipeline"]), getattr(diffusers, config["denoiser"]["_class_name"])
    with torch.device("meta"):
        network = denoiser.from_config(config["denoiser"])
    parts = _encoders(config) | {DENOISERS[config["pipeline"]]: network, "vae": _codec(network.config.in_channels)}
    parts["scheduler"] = getattr(diffusers, config["scheduler"]["_class_name"]).from_config(config["scheduler"])
    optional = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = cls(**parts, **(optional if config["pipeline"] == "StableDiffusionPipeline" else {}))
    for part, module in parts.items():
        if module is network:
            module.save_config(folder / part)
        else:
            module.save_pretrained(folder / part)
    pipeline.save_config(folder)
    return folder


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Inside, denoisers are not read from files but made on the device, in the dtype that is asked for."""
    classes = [diffusers.UNet2DConditionModel, diffusers.SD3Transformer2DModel]
    before = [vars(cls).get("from_pretrained") for cls in classes]

    def made(cls: type, source: str | Path, *args: Any, dtype: torch.dtype = torch.float32,
             torch_dtype: torch.dtype | None = None,
             **options: Any) -> torch.nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch_dtype or dtype)
        try:
            with torch.device(device):
                return cls.from_config(cls.load_config(source, **{"subfolder": options.get("subfolder")})).eval()
        finally:
            torch.set_default_dtype(default)

    for cls in classes:
        cls.from_pretrained = classmethod(made)
    try:
        yield
    finally:
        for cls, old in zip(classes, before, strict=True):
            delattr(cls, "from_pretrained") if old is None else setattr(cls, "from_pretrained", old)


def _codec(channels: int) -> diffusers.AutoencoderKL:
    """Eight pixels a latent, 8 channels wide."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4,
                                   up_block_types=("UpDecoderBlock2D",) * 4,
                                   block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=channels,
                                   norm_num_groups=4,
                                   shift_factor=0.06 if channels == 16 else None)


def _encoders(config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets/shapes-clip")
    tokenizer.model_max_length = config["tokens"]

    def clip(width: int, projected: bool) -> Any:
        clip_config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64,
                                     num_hidden_layers=2,
                                num_attention_heads=4, max_position_embeddings=config["tokens"], projection_dim=width,
                                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id)
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(clip_config).eval()

    first, *others = config["text_widths"]
    if config["pipeline"] == "StableDiffusionPipeline":
        return {"text_encoder": clip(first, False), "tokenizer": tokenizer}
    flow = config["pipeline"] == "StableDiffusion3Pipeline"
    parts = {"text_encoder": clip(first, flow), "tokenizer": tokenizer,
             "text_encoder_2": clip(others[0], True), "tokenizer_2": tokenizer}
    return parts | (_t5(others[1]) if flow else {})


def _t5(width: int) -> dict[str, Any]:
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in ("prompt", *map(str, range(64))))]
    tokenizer = T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0,
                                model_max_length=512)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return {"text_encoder_3": T5EncoderModel(config).eval(), "tokenizer_3": tokenizer}
