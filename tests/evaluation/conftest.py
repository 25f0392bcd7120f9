"""A CLIP folder of random weights with a judge, small and quick; its cache lives and dies with the tests."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from stepdistill.data.shapes import SLOTS

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import ASSETS  # noqa: E402

DIM = 16


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "tiny-clip"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "shapes-clip")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
                          bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32,
                              patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM))
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    heads = {f"{slot}.{part}": torch.randn(shape).half() for slot, values in SLOTS.items()
             for part, shape in (("weight", (len(values), DIM)), ("bias", (len(values),)))}
    save_file(heads, folder / "judge.safetensors",
              metadata={"slots": json.dumps({s: list(v) for s, v in SLOTS.items()})})
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
