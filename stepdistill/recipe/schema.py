"""A recipe: the choices of one distillation run, read from YAML and refused where they cannot be meant.

Nothing here imports torch until `method_settings`, so a typo costs a fraction of a second.
"""
from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    with_config,
)
from ruamel.yaml import YAML

from .. import resources
from ..errors import RequestError
from ..methods import KINDS, METHODS, load_method
from . import plugins as outside
from .catalogue import find
from .messages import complaint, current, unknown
from .resolved import resolved
from .stages import staged
from .values import read_guidance, read_prompts, read_resolution, under
from .yaml import EntryPath, Source


def _full_or_lora(value: Any) -> Any:
    if value == "full":
        return {"lora": None}
    if isinstance(value, RoleChoice | Critic) or isinstance(value, Mapping) and value:
        return value
    raise ValueError("should be full, or {lora: {rank: 32}}")


Trackers = list[Literal["tensorboard", "wandb"]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TeacherLora(Strict):
    path: str                                    # a .safetensors file, a folder, or a Hub id with or without the file's
                                                 # name
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
    vae: str | None = None                       # another AutoencoderKL of the same latents, a folder or Hub id
    scheduler: str | None = None                 # a folder with another scheduler_config.json, or a Hub id
    clip_skip: int | None = Field(None, ge=1, le=100)    # last layers of its CLIP encoders that are left out, as in a
                                                         # call of its pipeline
    quantization: Literal["nf4", "int8"] | None = None    # of its denoiser's linear layers (pip install
                                                          # stepdistill[bitsandbytes])

    @property
    def plain(self) -> str | dict[str, Any]:
        """As a recipe writes it: a text where there is nothing but a base; paths hold from anywhere."""
        given = {name: value for name, value in self.model_dump().items() if value not in (None, [])}
        for name in PLACES & given.keys():
            given[name] = resources.portable(given[name])
        if self.loras:
            given["loras"] = [lora | {"path": resources.portable(lora["path"])} for lora in given["loras"]]
        return given["base"] if given.keys() == {"base"} else given


SAID = 8                                         # complaints about one recipe
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


class Critic(Strict):
    """As the student's; all weights with a rate of their own are {lora: null, lr: 1e-5}."""

    lora: Lora | None                            # a LoRA on the base; none: all weights
    lr: float | None = Field(None, gt=0, le=1e30) # none: train.lr


class Discriminator(Strict):
    features: list[str] | None = Field(None, min_length=1)   # modules that its heads read; none: the family's own
    network: str | None = None                   # vision transformer that sees pictures, a folder or Hub id; none:
                                                 # DINOv2 small
    lr: float | None = Field(None, gt=0, le=1e30) # none: train.lr


Resolution = Annotated[int | tuple[int, int], PlainValidator(read_resolution, json_schema_input_type=int
                                                             | Annotated[list[int], Field(min_length=2, max_length=2)])]
Guidance = Annotated[float | tuple[float, float], PlainValidator(read_guidance, json_schema_input_type=float
                                                                 | Annotated[list[float],
                                                                             Field(min_length=2, max_length=2)])]
Prompts = Annotated[str | tuple[str, ...], PlainValidator(read_prompts, json_schema_input_type=str | list[str])]
Choice = Annotated[RoleChoice, BeforeValidator(_full_or_lora, json_schema_input_type=Literal["full"] | RoleChoice)]


class Samples(Strict):
    """The teacher's own pictures, made once with a solver of diffusion/solvers.py and kept."""

    prompts: Prompts                             # shapes, a .txt file of one prompt a line, a list, or none
    solver: str = "dpmpp_2m"                     # of diffusion/solvers.py
    steps: int = Field(25, ge=1, le=10_000)      # of the solver
    guidance: float | None = Field(None, ge=1, le=1000)  # guidance scale; none: the recipe's, of a range its middle


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


class Recipe(Strict):
    """One run. Of a recipe in stages (see stages.py) it is the last one's, and knows those before it."""

    method: str                                  # a name of `stepdistill methods`
    teacher: Annotated[Teacher, BeforeValidator(under("base"), json_schema_input_type=str | Teacher)]
        # a folder, a Hub id, a file; or a table
    resolution: Resolution | None = None         # pixels: 768, or [height, width]; none: the teacher's own
    frames: int | None = Field(None, ge=1, le=10_000)    # of a video; none: as many as the teacher's pipeline makes
    student: Choice = RoleChoice(lora=Lora())    # full, {lora: {rank: 32}}, or {from: a LoRA}
    critic: Annotated[Critic, BeforeValidator(_full_or_lora, json_schema_input_type=Literal["full"]
                                              | Critic)] | None = None
        # none: as the student
    discriminator: Discriminator | None = None   # what a discriminator reads, of methods that have one
    guidance: Guidance = 1.0                     # scale, or a range [low, high]; 1 is none
    negative_prompt: str | None = None           # that a guided teacher is drawn away from; none: its pipeline's own,
                                                 # mostly an empty text
    guidance_rescale: float | None = Field(None, ge=0, le=1)     # of a guided teacher (arXiv:2305.08891); none: 0
    steps: int = Field(4, ge=1, le=1000)         # network evaluations of the student
    settings: dict[str, Any] = {}                # the method's own dataclass
    data: Data
    train: Train
    evaluate: Evaluate = Evaluate()
    plugins: Annotated[Plugins, BeforeValidator(under("folder"), json_schema_input_type=str | Plugins)] | None = None
        # a folder of one's own; a run's recipe.yaml has its hash
    _source: Source = PrivateAttr()              # of this stage
    _given: Source = PrivateAttr()               # of the whole recipe
    _previous: Recipe | None = PrivateAttr(None)
    _taught_by: str = PrivateAttr("base")
    _plugged: outside.Folder | None = PrivateAttr(None)

    @classmethod
    def load(cls, recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
        """recipe: a path, a built-in name such as shapes/lcm, or a mapping. overrides: dotted name -> value.

        RequestError names file and line, what was found, and the nearest valid name.
        """
        overrides = {name: str(value) if isinstance(value, Path) else value
                     for name, value in (overrides or {}).items()}
        folder = overrides["plugins"] if isinstance(overrides.get("plugins"), str) else overrides.get("plugins.folder")
        source = Source.of_mapping(recipe) if isinstance(recipe, Mapping) else Source.of_file(find(recipe, folder))
        source = current(source, overrides).bounded()
        made: Recipe | None = None
        complaints: list[str] = []
        for taught_by, own in staged(source):
            try:
                stage = cls.model_validate(own.values)
            except ValidationError as error:
                complaints += [complaint(own, (*e["loc"],), e, _fields) for e in error.errors()[:SAID]]
                complaints += [f"and {more} more entries are wrong"] if (more := error.error_count() - SAID) > 0 else []
                continue
            stage._source, stage._given, stage._previous, stage._taught_by = own, source, made, taught_by
            made = stage
        if complaints:
            raise RequestError("\n".join(dict.fromkeys(complaints)))
        for stage in made.stages:
            stage._check()
        return made

    @classmethod
    def of(cls, recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any]) -> Recipe:
        """A recipe as it is, or loaded with these entries changed."""
        return recipe if isinstance(recipe, Recipe) else cls.load(recipe, overrides)

    @property
    def previous(self) -> Recipe | None:
        """The stage before, whose student this one begins with; None for the first, and without stages."""
        return self._previous

    @property
    def plugged(self) -> outside.Folder | None:
        """The folder of plugins, as it was when the recipe was read."""
        return self._plugged

    @property
    def taught_by_previous(self) -> bool:
        """Whether the teacher is the student of the stage before, rather than the pipeline."""
        return self._taught_by == "previous"

    @property
    def stages(self) -> tuple[Recipe, ...]:
        """From the first to this one, which is the only one where there are no stages."""
        return (*(() if self.previous is None else self.previous.stages), self)

    def refuse(self, path: str, message: str) -> RequestError:
        """The error that says where in the recipe a choice was made: `raise recipe.refuse("steps", ...)`."""
        return RequestError(f"{self._source.where(tuple(path.split('.')))}: {path} {message}")

    @contextmanager
    def blaming(self, path: str, says: str) -> Iterator[None]:
        """A RequestError from inside also says where in the recipe the choice was made: `with recipe.blaming("teacher",
        "cannot be loaded")`."""
        try:
            yield
        except RequestError as error:
            raise self.refuse(path, f"{says}: {error}") from error

    def method_settings(self) -> Any:
        """The method's dataclass, filled and checked. Imports torch."""
        kind = load_method(self.method).Settings
        names = [f.name for f in dataclasses.fields(kind)]
        for name in self.settings:
            if name not in names:
                raise self.refuse(f"settings.{name}", unknown(name, names, f"setting of {self.method}"))
        try:
            return TypeAdapter(with_config(ConfigDict(allow_inf_nan=False))(kind)).validate_python(self.settings)
        except ValidationError as error:
            raise RequestError("\n".join(complaint(self._source, ("settings", *e["loc"]), e, _fields)
                                         for e in error.errors())) from None

    @property
    def name(self) -> str:
        return Path(self._given.name).stem

    @property
    def arguments(self) -> str:
        """This recipe as a command takes it."""
        return self._given.arguments

    def resolved(self) -> dict[str, Any]:
        """Every entry in plain types, those left to their defaults too; paths hold from anywhere.

        In stages, the last one's, and what each changes in them.
        """
        return resolved(self)

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        text = io.StringIO()
        writer = YAML()
        writer.default_flow_style = False
        writer.dump(self.resolved(), text)
        return text.getvalue()

    def pinned(self, revision: str) -> Recipe:
        """The same recipe with the teacher's revision fixed."""
        return Recipe.load(self.resolved(), {"teacher.revision": revision})

    def _check(self) -> None:
        """What can be known to fail without loading anything but the method of a plugin."""
        self._plugged = self._open_plugins()
        with self.blaming("method", f"is {self.method}, of a plugin"):
            outside.load("methods", self.method, METHODS, self._plugged)
        if self.method not in METHODS:
            known = [*METHODS, *outside.names("methods", self._plugged)]
            raise self.refuse("method", f"is {self.method!r}, which " + unknown(self.method, known, "method"))
        with self.blaming("teacher", "cannot be loaded"):
            resources.pipeline(self.teacher.base)
        given = [name for name in KINDS if getattr(self.data, name) is not None]
        if len(given) != 1:
            raise self.refuse("data", "should name one source, images, prompts, samples or pairs; found "
                              f"{' and '.join(given) or 'none'}")
        takes = METHODS[self.method].data
        if given[0] not in takes:
            raise self.refuse(f"data.{given[0]}", f"is given, but {self.method} trains on {' or '.join(takes)}"
                              + " (samples: the teacher makes its own images from prompts)" * ("samples" in takes))
        if self.student.begins_with is not None and self.student.lora is None:
            raise self.refuse("student.from", f"is {self.student.begins_with}, a LoRA, but student.lora is null, which "
                                              "trains all weights: leave one out")
        self._check_counts()

    def _open_plugins(self) -> outside.Folder | None:
        if self.plugins is None:
            return None
        with self.blaming("plugins", "cannot be used"):
            folder = outside.Folder.open(self.plugins.folder)
        if self.plugins.sha256 not in (None, folder.sha256):
            raise self.refuse("plugins.sha256", f"is {self.plugins.sha256[:12]}..., but the .py files of {folder.path} "
                              f"are {folder.sha256[:12]}...: they have changed. Put them back as they were; without "
                              "sha256 they are taken as they are")
        return folder

    def _check_counts(self) -> None:
        data = self.data
        if data.kind == "prompts" and (data.count or data.cache):
            raise self.refuse("data", "has count or cache, but prompts alone hold no images to count or keep")
        if data.flip and (data.images is None or data.images == "shapes"):
            raise self.refuse("data.flip", "is on, but the captions of Shapes tell left from right: leave it off"
                              if data.images else
                              f"is on, but data.{data.kind} have no images of yours to mirror: leave it off")
        if data.caption_dropout and data.pairs is not None:
            raise self.refuse("data.caption_dropout", f"is {data.caption_dropout:g}, but pairs are ways that the "
                              "teacher took by their captions: leave it out")
        if data.made is not None and data.count is None:
            raise self.refuse("data", f"gives {data.kind} without a count: say how many the teacher shall make, "
                              "such as count: 4096")
        if data.pairs is not None and data.pairs.steps % data.pairs.nodes:
            raise self.refuse("data.pairs.nodes", f"is {data.pairs.nodes}, which does not divide the "
                              f"{data.pairs.steps} steps")
        if data.images == "shapes" and data.cache and data.count is None:
            raise self.refuse("data.cache", "is on, but Shapes are endless: say how many to keep, such as count: 20000")
        if data.batch % self.train.accumulate:
            raise self.refuse("train.accumulate", f"is {self.train.accumulate}, which does not divide the batch "
                              f"of {data.batch}")


def _fields(path: EntryPath) -> list[str]:
    """The entries that the table at `path` can have."""
    model: type[BaseModel] = Recipe
    for key in (key for key in path if isinstance(key, str)):
        annotation = model.model_fields[key].annotation
        model = next(a for a in (annotation, *_arguments(annotation)) if isinstance(a, type)
                     and issubclass(a, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()] + ["stages"] * (model is Recipe)


def _arguments(annotation: Any) -> list[Any]:
    return [inner for a in get_args(annotation) for inner in (a, *_arguments(a))]
