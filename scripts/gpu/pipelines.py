"""Teachers of real size with random weights, made on the device: a folder of configs whose denoiser no file holds.

What is held beside the denoiser is small on purpose: conditions and latents count as cached, so text encoders and the
codec are thin, in the widths that conditions and latents need.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from common import ROOT
from tokenizers.pre_tokenizers import ByteLevel

CONFIGS, TINY = ROOT / "tests/configs", Path(__file__).parent / "tiny.json"
DENOISERS = ("unet", "transformer")
OPTIONAL = {"StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None,
                                        "requires_safety_checker": False}}
CHAT = ("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}")


def config_of(name: str) -> dict[str, Any]:
    """{pipeline: its class, index: more entries of model_index.json, components: name -> (library, class, config)} of a
    published pipeline, or of `tiny`."""
    path = TINY if name == "tiny" else CONFIGS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def denoiser_of(name: str) -> tuple[str, type, dict[str, Any]]:
    """Its name among the components, its class, and its config."""
    (found, (_, cls, config)), = ((part, made) for part, made in config_of(name)["components"].items()
                                  if part in DENOISERS)
    return found, getattr(diffusers, cls), config


def write_pipeline(name: str, folder: Path) -> Path:
    """A pipeline folder that lacks the denoiser's weights: `random_weights` makes them. One that is there stays as it
    is."""
    if folder.is_dir():
        return folder
    config, (denoiser, cls, network) = config_of(name), denoiser_of(name)
    with torch.device("meta"):
        parts = {denoiser: cls.from_config(network)}
    for part, (library, class_name, values) in config["components"].items():
        if part == "scheduler":
            parts[part] = getattr(diffusers, class_name).from_config(values)
        elif library == "transformers":
            parts |= _encoder(part, class_name, values)
        elif part != denoiser:
            parts[part] = _codec(getattr(diffusers, class_name), values)
    pipeline = getattr(diffusers, config["pipeline"])(**parts, **OPTIONAL.get(config["pipeline"], {}),
                                                      **config["index"])
    for part, module in parts.items():
        module.save_config(folder / part) if part == denoiser else module.save_pretrained(folder / part)
    pipeline.save_config(folder)
    return folder


@contextmanager
def random_weights(name: str, device: torch.device) -> Iterator[None]:
    """Inside, the denoiser of `name` is not read from files but made on the device, in the dtype that is asked for."""
    _, cls, _ = denoiser_of(name)
    before = vars(cls).get("from_pretrained")

    def made(cls: type, source: str | Path, *args: Any, dtype: torch.dtype = torch.float32,
             torch_dtype: torch.dtype | None = None, subfolder: str | None = None, **options: Any) -> torch.nn.Module:
        return random_network(cls, cls.load_config(source, subfolder=subfolder), torch_dtype or dtype, device)

    cls.from_pretrained = classmethod(made)
    try:
        yield
    finally:
        delattr(cls, "from_pretrained") if before is None else setattr(cls, "from_pretrained", before)


def random_network(cls: type, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """In evaluation mode."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return cls.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)


# -- beside the denoiser -----------------------------------------------------------------------------------------------

def _codec(cls: type, config: Mapping[str, Any]) -> torch.nn.Module:
    """As many pixels a latent, 8 channels wide."""
    torch.manual_seed(0)
    thin = {"block_out_channels": (8,) * len(config.get("block_out_channels", (0,) * 4)), "layers_per_block": 1,
            "norm_num_groups": 4}
    return cls.from_config({**config, **thin})


def _encoder(part: str, class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder and its tokenizer: as wide as the published one, its layers thin."""
    tokenizer = {"CLIP": _clip_tokenizer, "T5En": _t5_tokenizer, "Qwen": _qwen_tokenizer}[class_name[:4]](config)
    thin = {"CLIP": {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
            "T5En": {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 64},
            "Qwen": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
                     "intermediate_size": 32}}[class_name[:4]]
    cls = getattr(transformers, class_name)
    made = cls.config_class(**{**config, **thin, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    return {part: cls(made).eval(), part.replace("text_encoder", "tokenizer"): tokenizer}


def _clip_tokenizer(config: Mapping[str, Any]) -> Any:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ROOT / "assets/shapes-clip")
    tokenizer.model_max_length = config["max_position_embeddings"]
    return tokenizer


def _t5_tokenizer(config: Mapping[str, Any]) -> Any:
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in ("prompt", *map(str, range(64))))]
    return transformers.T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0,
                                        model_max_length=512)


def _qwen_tokenizer(config: Mapping[str, Any]) -> Any:
    return transformers.Qwen2Tokenizer({byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, [],
                                       chat_template=CHAT,
                                       additional_special_tokens=["<|im_start|>", "<|im_end|>"])
