"""The tables of a recipe: what each entry may be, and what it is unless it is given."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr

from .. import resources
from ..methods import KINDS
from .values import read_guidance, read_prompts, read_resolution, under


def full_or_lora(value: Any) -> Any:
    if value == "full":
        return {"lora": None}
    if isinstance(value, RoleChoice | Critic) or isinstance(value, Mapping) and value:
        return value
    raise ValueError("should be full, or {lora: {rank: 32}}")


def solver_too(value: Any) -> Any:
    if value != "solver":
        return full_or_lora(value)
    choice = RoleChoice(lora=None)
    choice._solver = True
    return choice


Trackers = list[Literal["tensorboard", "wandb"]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TeacherLora(Strict):
    path: str                                    # a .safetensors file, a folder, or a Hub id with or without the file's
                                                 # name, which @ and a revision may follow
    weight: float = 1.0                          # lora_scale of fuse_lora


class Teacher(Strict):
    """A pipeline, and what of it comes from elsewhere. A plain text is its base."""

    base: str                                    # a folder, a Hub id, a single .safetensors file
    loras: list[Annotated[TeacherLora, BeforeValidator(under("path"), json_schema_input_type=str | TeacherLora)]] = []
        # fused into its weights before anything lies on them
    revision: str | None = None                  # branch, tag or commit of a Hub id
    variant: str | None = None                   # of its weights' files, such as fp16; none: the plain ones, else the
                                                 # only one in its folder
    subfolder: str | None = None                 # of a local base, where the pipeline lies
    config: str | None = None                    # of a single file: a folder or Hub id with the configs of its pipeline
    vae: str | None = None                       # another AutoencoderKL of the same latents, a folder or Hub id, which
                                                 # @ and a revision may follow
    scheduler: str | None = None                 # a folder with another scheduler_config.json, or a Hub id, which @
                                                 # and a revision may follow
    clip_skip: int | None = Field(None, ge=1, le=100)    # last layers of its CLIP encoders that are left out, as in a
                                                         # call of its pipeline
    quantization: Literal["nf4", "int8"] | None = None    # of its denoiser's linear layers (pip install
                                                          # stepdistill[bitsandbytes])
    components_to_quantize: list[str] | None = Field(None, min_length=1)    # the denoiser and text encoders that it is
                                                                            # for; none: the denoiser alone

    @property
    def plain(self) -> str | dict[str, Any]:
        """As a recipe writes it: a text where there is nothing but a base; paths hold from anywhere."""
        given = {name: value for name, value in self.model_dump().items() if value not in (None, [])}
        for name in PLACES & given.keys():
            given[name] = resources.portable(given[name])
        if self.loras:
            given["loras"] = [lora | {"path": resources.portable(lora["path"])} for lora in given["loras"]]
        return given["base"] if given.keys() == {"base"} else given


PLACES = {"base", "config", "vae", "scheduler"}  # entries of a teacher that may be a folder or a Hub id


class Lora(Strict):
    rank: int = Field(32, ge=1, le=16_384)                    # r of peft's LoraConfig
    alpha: float | None = Field(None, gt=0, le=1e6)          # lora_alpha; none: the rank, a scale of 1
    targets: list[str] | None = Field(None, min_length=1)    # ends of module names, such as to_q; none: the family's
                                                             # own list


class RoleChoice(Strict):
    """lora none: all weights are trained. A student that begins with a LoRA has its rank, alpha and targets."""

    lora: Lora | None = Lora()                   # a LoRA on the base; none: all weights
    begins_with: str | None = Field(None, alias="from")      # a LoRA of any format that its pipeline loads: a folder, a
                                                             # .safetensors file, a Hub id
    _solver: bool = PrivateAttr(False)

    @property
    def solver(self) -> bool:
        """Whether it is no network that is trained, but a solver."""
        return self._solver


class Critic(Strict):
    """As the student's; all weights with a rate of their own are {lora: null, lr: 1e-5}."""

    lora: Lora | None                            # a LoRA on the base; none: all weights
    lr: float | None = Field(None, gt=0, le=1e30) # none: train.lr


class Discriminator(Strict):
    features: list[str] | None = Field(None, min_length=1)   # modules that its heads read; none: the family's own
    network: str | None = None                   # vision transformer that sees pictures, a folder or Hub id; none:
                                                 # DINOv2 small
    lr: float | None = Field(None, gt=0, le=1e30) # none: train.lr


TWO = Field(min_length=2, max_length=2)


class Buckets(Strict):
    """Sizes of pictures. Every batch is of one of them."""

    buckets: list[list[int]] = Field(min_length=2, max_length=64)    # [height, width] each, the usual one first


Resolution = Annotated[int | tuple[int, int] | str | dict[str, Any],
                       PlainValidator(read_resolution, json_schema_input_type=int | Annotated[list[int], TWO]
                                      | Literal["buckets"] | Buckets)]
Guidance = Annotated[float | tuple[float, float],
                     PlainValidator(read_guidance, json_schema_input_type=float | Annotated[list[float], TWO])]
Prompts = Annotated[str | tuple[str, ...], PlainValidator(read_prompts, json_schema_input_type=str | list[str])]
Choice = Annotated[RoleChoice, BeforeValidator(solver_too, json_schema_input_type=Literal["full", "solver"]
                                               | RoleChoice)]


class Samples(Strict):
    """The teacher's own pictures, made once with a solver of diffusion/solvers.py and kept."""

    prompts: Prompts                             # shapes, a .txt file of one prompt a line, a list, or none
    solver: str = "dpmpp_2m"                     # of diffusion/solvers.py; own: the pipeline's own scheduler and `call`
    steps: int = Field(25, ge=1, le=10_000)      # of the solver
    guidance: float | None = Field(None, ge=1, le=1000)  # guidance scale; none: the recipe's, of a range its middle
    call: dict[str, Any] | None = None           # of solver own: its keyword arguments, {num_inference_steps: 4}


class Pairs(Strict):
    """The teacher's ways from noise to its own pictures, made once with a deterministic solver and kept."""

    prompts: Prompts                             # shapes, a .txt file of one prompt a line, a list, or none
    solver: str = "dpmpp_2m"                     # a deterministic one of diffusion/solvers.py
    steps: int = Field(25, ge=1, le=10_000)      # of the solver
    guidance: float | None = Field(None, ge=1, le=1000)  # guidance scale; none: the recipe's, of a range its middle
    nodes: int = Field(1, ge=1)                  # states of a way that are kept beside its noise, evenly spaced, the
                                                 # last its end
    path: str | None = None                      # a folder that `stepdistill pairs --out` wrote; none: the cache


class Data(Strict):
    """Exactly one of images, prompts, samples and pairs."""

    images: str | None = None                    # shapes; with captions (concepts.md) a folder, .tar shards, .parquet
                                                 # files or a dataset of the Hub
    prompts: Prompts | None = None               # prompts alone: shapes, a .txt, .csv, .jsonl or .parquet file, a list,
                                                 # or none
    samples: Samples | None = None               # pictures that the teacher makes
    pairs: Pairs | None = None                   # noises, and the pictures that the teacher makes of them
    count: int | None = Field(None, ge=1, le=10**9)      # of images, samples or pairs; none: all of a folder, endless
                                                         # Shapes
    cache: bool = False                          # encode latents once, and keep them on disk ($STEPDISTILL_CACHE)
    batch: int = Field(ge=1, le=1_000_000)       # samples an optimizer step, over all ranks
    caption_dropout: float = Field(0.0, ge=0, lt=1)      # share of captions that give way to the one that guidance
                                                         # subtracts
    flip: bool = False                           # of a folder's images the mirror images too; not where captions tell
                                                 # left from right

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if self.__dict__[name] is not None)

    @property
    def made(self) -> Samples | Pairs | None:
        """What the teacher is to make."""
        return self.samples or self.pairs


class Negatives(Strict):
    """Negative prompts that act on the student: its own guided prediction is trained, and a call guides it."""

    prompts: Prompts                             # that it learns to be drawn away from: as of data.prompts
    share: float = Field(0.5, gt=0, le=1)        # of samples that are drawn away from one; the others from the null
    scale: float | None = Field(None, gt=1, le=1000)     # at which the student is guided, and called; none: guidance's


class Train(Strict):
    updates: int = Field(ge=1, le=10**9)         # training steps, each of all updates that are due
    lr: float = Field(1e-4, gt=0, le=1e30)        # of AdamW
    warmup: int = Field(0, ge=0)                 # updates of linear warm-up
    decay: Literal["constant", "cosine"] = "constant"    # of the learning rate after the warm-up
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
        # of AdamW; for adversaries [0, 0.99]
    weight_decay: float = Field(0.01, ge=0, le=100)      # of AdamW
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"   # adamw8bit: moments of 8 bits (pip install
                                                         # stepdistill[bitsandbytes])
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the passes; trained weights stay float32
    ema: float | None = Field(None, gt=0, lt=1)  # decay an update of the averaged student; none: no average
    clip: float | None = Field(1.0, gt=0)        # largest norm of a role's gradient; none: any
    accumulate: int = Field(1, ge=1)             # micro-batches that a batch is cut into
    seed: int = Field(0, ge=0)                   # of data, noise and first weights
    checkpoint_every: int | None = Field(None, ge=1)     # updates; none: at the end only
    keep: int | None = Field(None, ge=1)         # checkpoints that are kept, the newest ones; none: all
    log_every: int = Field(10, ge=1)             # updates
    trackers: Trackers = ["tensorboard"]         # losses and pictures are shown there too; wandb: pip install
                                                 # stepdistill[wandb]
    doctor: Literal["warn", "rollback", "stop", "off"] = "warn"    # what follows where a signal leaves its band for
                                                                   # long
    doctor_every: int = Field(100, ge=1)         # updates between its looks
    gradient_checkpointing: bool = False         # activations are computed again in backward: less memory, more time
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"    # its kernel; auto: what diffusers chose
    compile: bool = False                        # torch.compile, by repeated block
    fsdp: bool = False                           # several processes: each holds a part of the frozen base (FSDP2)


class Evaluate(Strict):
    every: int | None = Field(None, ge=1)        # updates between previews; none: at the end only
    nfe: list[Annotated[int, Field(ge=1, le=10_000)]] = Field([1, 2, 4], min_length=1)
        # network evaluations at which figures are taken
    samples: int = Field(1000, ge=2, le=10**7)   # pictures a figure is taken of
    prompts: list[str] = []                      # of the preview; none: the first of the data
    reference: str | None = None                 # figures are measured against it: shapes, a folder of images; none: no
                                                 # figures
    features: str = "assets/shapes-clip"         # their feature space: a CLIPModel's folder, or inception


class Plugins(Strict):
    """Methods, families, metrics and data from outside (plugins.md). A plain text is their folder."""

    folder: str                                  # a file for each name lies in its methods/, families/, metrics/ or
                                                 # data/
    sha256: str | None = None                    # of its .py files, which then must be these; none: whatever they are
