"""Whether a teacher's text encoders read prompts: one that is blind to them, or gives numbers that are none, would be
seen in no loss."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

if TYPE_CHECKING:
    from .teacher import Teacher

PROMPTS = ["a red blue", "a blue red"]             # of the same words: their order must make a difference


@torch.no_grad()
def check_prompts(teacher: Teacher) -> None:
    """RequestError where one of what two different prompts are encoded as is the same for both, where a text encoder
    gives both the same, and where anything that it gives is not finite."""
    if "text" not in teacher.told:
        return
    cond = teacher.encode(PROMPTS)
    found: dict[str, Iterable[Tensor]] = {}
    for name, part in teacher.parts.items():
        tokenizer = teacher.parts.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and part is not None and isinstance(tokenizer, PreTrainedTokenizerBase):
            found[f"the {name} of {teacher.source} encodes"] = [_read(part, tokenizer, prompt) for prompt in PROMPTS]
    found[f"the teacher {teacher.source} encodes"] = cond.text
    if cond.pooled is not None:
        found[f"the pooled embedding of {teacher.source} encodes"] = cond.pooled
    for what, (first, second) in found.items():
        if not (first.isfinite().all() and second.isfinite().all()):
            raise RequestError(f"{what} prompts as numbers that are not finite: NaN or infinities stand among its "
                               "weights. Save or download the teacher anew")
        if torch.equal(first, second):
            raise RequestError(f"{what} two different prompts alike: its tokenizer knows none of their words, or its "
                               "text encoder reads none of their tokens. Save or download the teacher anew")


def _read(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """What an encoder gives for one prompt, (1, L, D) or (1, D)."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return encoder(input_ids=ids.to(next(encoder.parameters()).device))[0].float()
