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
from .entries import (
    Choice,
    Critic,
    Data,
    Discriminator,
    Evaluate,
    Guidance,
    Lora,
    Negatives,
    Plugins,
    Resolution,
    RoleChoice,
    Strict,
    Teacher,
    Train,
    full_or_lora,
)
from .messages import complaint, current, unknown
from .resolved import resolved
from .stages import staged
from .values import under
from .yaml import EntryPath, Source

SAID = 8                                         # complaints about one recipe


class Recipe(Strict):
    """One run. Of a recipe in stages (see stages.py) it is the last one's, and knows those before it."""

    method: str                                  # a name of `stepdistill methods`
    teacher: Annotated[Teacher, BeforeValidator(under("base"), json_schema_input_type=str | Teacher)]
        # a folder, a Hub id, a file; or a table
    resolution: Resolution | None = None         # pixels: 768, [height, width], buckets, or {buckets: [[height, width],
                                                 # ...]}; none: the teacher's own
    frames: int | None = Field(None, ge=1, le=10_000)    # of a video; none: as many as the teacher's pipeline makes
    student: Choice = RoleChoice(lora=Lora())    # full, {lora: {rank: 32}}, {from: a LoRA}, or solver, of d_ode
    critic: Annotated[Critic, BeforeValidator(full_or_lora, json_schema_input_type=Literal["full"]
                                              | Critic)] | None = None
        # none: as the student
    discriminator: Discriminator | None = None   # what a discriminator reads, of methods that have one
    reward: str | None = None                    # that a method raises: pickscore, hpsv2=FOLDER, ...
                                                 # (measuring.md); none: of Shapes its own
    guidance: Guidance = 1.0                     # scale, or a range [low, high]; 1 is none
    negative_prompt: str | None = None           # that a guided teacher is drawn away from; none: its pipeline's own,
                                                 # mostly an empty text
    negatives: Negatives | None = None           # the student keeps its guidance, at two evaluations a step, and a
                                                 # negative prompt acts
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

    @property
    def trains_solver(self) -> bool:
        """Whether the student is the teacher's own network under a solver that is trained."""
        return self.student.solver

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
