"""A LoRA of anybody's as a file: what it says of itself, and which base it is for. No network is loaded."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from safetensors import safe_open

from .. import resources
from ..diffusion.times import LEVELS
from ..errors import RequestError
from ..export import read_settings
from ..export.folder import check_weights, is_export, read_scheduler
from ..export.student import UNKNOWN
from ..methods.base import Inference
from ..models.sources import FusedLora
from ..models.teacher import Teacher
from .few_step import TCD_NOISE, Way, evaluations_of, way_of

HINT = re.compile(r"\b(\d+)[ -]steps?\b(?: of (\w+))?", re.IGNORECASE)
GUIDED = re.compile(r"\bguidance (\d+(?:\.\d+)?)")
# metadata in which a call is said in words
SPOKEN = ("modelspec.usage_hint", "ss_training_comment")
BASES = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")    # and the base
ENCODERS = ("text_encoder", "lora_te", "text_model", "te_", "te1_", "te2_")
DETERMINISTIC = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
RENOISING = ("LCMScheduler", "FlowMatchLCMScheduler")
# of the text that attn2 reads
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
NAMES = (("single_transformer_blocks|single_blocks", "Flux"),
         ("joint_blocks|attn[._]add_k_proj", "Stable Diffusion 3 or one of its kind"),
         (r"blocks[._]\d+[._](self|cross)_attn", "Wan"),
         ("down_blocks|input_blocks|mid_block", "a UNet such as Stable Diffusion's"),
         ("transformer_blocks", "a diffusion transformer"))


@dataclass(frozen=True)
class Claim:
    """How a LoRA says that it is called. source: "contract", its stepdistill.json, or "metadata", of its file."""

    source: str
    way: Way
    method: str = UNKNOWN


@dataclass(frozen=True)
class ForeignLora:
    """path: as it was named; file: its weights; settings: its stepdistill.json, None where it is a file alone. keys:
    its tensors' names with their shapes."""

    path: str
    file: Path
    settings: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    keys: Mapping[str, tuple[int, ...]]
    half: bool

    @classmethod
    def open(cls, path: str | Path) -> ForeignLora:
        """A .safetensors file, a folder with one, or an export folder. RequestError for a pickle, for what is no LoRA,
        and for one that is of a text encoder alone."""
        path = str(resources.locate(path) or path)
        settings = None
        if Path(path).is_dir() and is_export(Path(path)):
            settings = read_settings(path)
            if settings["format"] == "pipeline":
                raise RequestError(f"{path} is a whole pipeline and no LoRA: its {len(settings['call'])} keyword "
                                   "arguments stand in its stepdistill.json, and `stepdistill bench` measures it")
            check_weights(path, settings)
        file = FusedLora(path if settings is None else str(Path(path) / settings["weights"])).file()
        with safe_open(file, "pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            keys = {key: tuple(tensor.get_shape()) for key, tensor in slices.items()}
            half = all(tensor.get_dtype() == "F16" for key, tensor in slices.items() if not key.endswith("alpha"))
            found = cls(path, file, settings, opened.metadata() or {}, keys, half)
        found._check()
        return found

    def _check(self) -> None:
        layers = [key for key in self.keys if re.search(r"lora[._]", key)]
        if not layers:
            first = min(self.keys, default="nothing")
            raise RequestError(f"{self.path} is no LoRA: none of its {len(self.keys)} tensors is a factor of one; "
                               f"the first is {first}")
        if all(key.startswith(ENCODERS) for key in layers):
            raise RequestError(f"{self.path} is a LoRA of a text encoder alone, and how many steps a pipeline takes "
                               "is its denoiser's: name one of a UNet or a transformer")

    @property
    def has_alpha(self) -> bool:
        """Whether its file says how much it counts."""
        return "lora_adapter_metadata" in self.metadata or any(key.endswith(".alpha") for key in self.keys)

    @property
    def told_scale(self) -> float | None:
        """What it counts by kohya's metadata, where its tensors have lost their alpha."""
        dim, alpha = self.metadata.get("ss_network_dim", ""), self.metadata.get("ss_network_alpha", "")
        numbers = [float(text) for text in (alpha, dim) if re.fullmatch(r"\d+(\.\d+)?", text)]
        return None if self.has_alpha or len(numbers) < 2 or not min(numbers) else numbers[0] / numbers[1]

    @property
    def made_for(self) -> str:
        """The base that would fit, as well as its metadata and its tensors say."""
        said = [self.metadata[name] for name in BASES if self.metadata.get(name)]
        if self.settings is not None:
            said = [self.settings["teacher"]]
        widths = {shape[1] for key, shape in self.keys.items() if re.search("attn2[._]to_[kv]", key)
                  and re.search("lora[._](A|down)", key)}
        shown = next((name for names, name in NAMES if any(re.search(names, key) for key in self.keys)),
                     "no network that is known here")
        if len(widths) == 1:
            width = widths.pop()
            shown = WIDTHS.get(width, f"a UNet that reads a text of {width} numbers a token")
        return f"its tensors are of {shown}" + (f", and it says that it is for {said[0]}" if said else "")

    def claim(self, teacher: Teacher) -> Claim | None:
        """The contract of its folder, else what its metadata say; None where they say nothing that a stock scheduler
        does."""
        if self.settings is not None:
            call, scheduler = self.settings["call"], read_scheduler(self.path)
            return Claim("contract", self._way(teacher, scheduler, call), self.settings["method"])
        for text in (self.metadata[name] for name in SPOKEN if name in self.metadata):
            if (found := HINT.search(text)) and (told := _inference(int(found[1]), found[2], teacher)) is not None:
                guided = GUIDED.search(text)
                way = way_of(teacher, told, float(guided[1]) if guided else 1.0, self.told_scale or 1.0)
                return None if way is None else Claim("metadata", way)
        return None

    def _way(self, teacher: Teacher, scheduler: SchedulerMixin, call: Mapping[str, Any]) -> Way:
        scale, steps = teacher.guidance.scale(call), self.settings["steps"]
        return Way(scheduler, dict(call), evaluations_of(teacher, steps, scale), steps, scale)


def _inference(steps: int, scheduler: str | None, teacher: Teacher) -> Inference | None:
    """What so many steps of a stock scheduler are; of none that is named, those with fresh noise."""
    if not 1 <= steps <= LEVELS:
        return None
    if scheduler in DETERMINISTIC:
        return Inference(steps)
    if scheduler == "TCDScheduler":
        return Inference(steps, TCD_NOISE, end=1 / LEVELS)
    return Inference(steps, 1.0) if scheduler in (None, *RENOISING) else None
