"""Where a teacher lies, and what it is: a folder, one .safetensors file, or a Hub id. No weights are read."""
from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file as hub_file

from ..errors import RequestError, first_lines, of_the_system
from ..files import foreign, records
from .single_file import class_of_keys, published

SETTINGS = "stepdistill.json"                      # beside model_index.json
LORA_FILE = "pytorch_lora_weights.safetensors"     # as save_lora_weights names it
# keyword arguments of a call that a teacher may set for all its calls
SHAPING = tuple(records.Shaping.__annotations__)
SAMPLING = (                                       # further ones that a student's call may be given
    "num_inference_steps", "timesteps", "sigmas", "eta", "guidance_scale", "true_cfg_scale", "guidance_rescale",
    "negative_prompt")
_ELSEWHERE = {                                     # others -> where they belong
    "guidance_scale": "the recipe's guidance says it", "true_cfg_scale": "the recipe's guidance says it",
    "num_inference_steps": "the recipe's steps "
    "say it", "timesteps": "the method and the recipe's steps say them", "sigmas": "the method and the recipe's "
    "steps say them",
    "eta": "the method says it", "generator": "the seed says it", "prompt": "the data say it",
    "negative_prompt": "the recipe's negative_prompt says it",
    "guidance_rescale": "the recipe's guidance_rescale says it"}
LIBRARIES = ("diffusers", "transformers")
WORDS = {"variant": (r"\w[\w-]*", "fp16"), "revision": (r"\w[\w./-]*", "main, a tag or a commit")}
Index = Mapping[str, Any]                          # model_index.json: component -> [library, class], and _class_name

UNLOADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError,
              AssertionError, SafetensorError,
              StrictDataclassError)
"""What the libraries raise on configs and weights that do not fit each other."""


@contextmanager
def blaming(component: str, place: str | Path) -> Iterator[None]:
    """RequestError with the words of a library that cannot make a component of its files."""
    try:
        yield
    except UNLOADABLE as error:
        # no memory
        if isinstance(error, RequestError) or isinstance(error, RuntimeError) and of_the_system(error) is not None:
            raise
        raise RequestError(f"{component} cannot be read at {place}: {first_lines(error)}") from error


@dataclass(frozen=True)
class FusedLora:
    """A LoRA that is added to the weights of a teacher, `weight` times. path: a .safetensors file, a folder, or a Hub
    id, which the file's name may follow, and then its revision, as in owner/name/file.safetensors@main."""

    path: str
    weight: float = 1.0

    def find(self) -> tuple[str, str | None, str | None]:
        """(folder or Hub id, the file's name in it, the Hub's revision; None where the Hub is to choose). RequestError
        where a folder leaves it open."""
        path = Path(self.path)
        if path.is_file():
            return str(path.parent), path.name, None
        if not path.is_dir():
            name, revision = at_revision(self.path)
            owner, *rest = name.split("/")
            spelled = all(re.fullmatch(r"[\w-][\w.-]*", part) for part in (owner, *rest))
            if not spelled or not 1 <= len(rest) <= 2 or name.endswith(".safetensors") and len(rest) < 2:
                raise RequestError(f"there is no LoRA {self.path}: it should be a .safetensors file, a folder, "
                                   "or a Hub id such as owner/name or owner/name/file.safetensors")
            return "/".join((owner, rest[0])), rest[1] if len(rest) == 2 else None, revision
        files = sorted(file.name for file in path.glob("*.safetensors"))
        for file in files:
            foreign.check_link(path / file, path)
        if LORA_FILE not in files and len(files) != 1:
            raise RequestError(f"the folder {path} should hold a {LORA_FILE} or one .safetensors file; found "
                               f"{', '.join(files) or 'none'}: name the file")
        return str(path), LORA_FILE if LORA_FILE in files else files[0], None

    def file(self) -> Path:
        """The file here, which was looked at; one of the Hub is fetched into its cache. RequestError for what is no
        safetensors file or would make its loader import code, OSError where the Hub does not supply it."""
        place, name, revision = self.find()
        name = name or LORA_FILE
        if not name.endswith(".safetensors"):
            raise RequestError(f"the LoRA {self.path} is no .safetensors file. Other files of weights are pickles "
                               "or may hold one, which can run code, and are never read")
        file = Path(place) / name if Path(place).is_dir() else Path(hub_file(place, name, revision=revision))
        check_safetensors(file)
        with safe_open(file, "pt") as opened:
            foreign.check_header(opened.metadata(), file)
        return file


@dataclass(frozen=True)
class Source:
    """A teacher as it is asked for: all that says which weights and configs are loaded.

    base: a pipeline's folder, a Hub id or a .safetensors file. revision: branch, tag or commit of a Hub id. variant: of
    its weights' files, such as fp16. subfolder: of a local base, where the pipeline lies. config: a folder or Hub id
    with the configs of a single file. vae, scheduler: folders or Hub ids of components that take the place of the
    base's; @ and a revision may follow an id. clip_skip: last layers of its CLIP encoders that every call leaves out.
    quantization: of its denoiser's linear layers, nf4 or int8, or as they were saved; components_to_quantize: of which
    networks else, None for the denoiser alone. loras: are fused into the weights. negative_prompt, guidance_rescale: of
    its guided calls, none unless given; no others are given them.
    """

    base: str
    revision: str | None = None
    variant: str | None = None
    subfolder: str | None = None
    config: str | None = None
    vae: str | None = None
    scheduler: str | None = None
    clip_skip: int | None = None
    quantization: str | None = None
    components_to_quantize: tuple[str, ...] | None = None
    loras: tuple[FusedLora, ...] = ()
    negative_prompt: str | None = None
    guidance_rescale: float | None = None

    @classmethod
    def of(cls, source: str | Path | Source) -> Source:
        return source if isinstance(source, Source) else cls(str(source))

    @property
    def place(self) -> str:
        """The folder, file or Hub id that is read."""
        return self.base if self.subfolder is None else str(Path(self.base) / self.subfolder)

    @property
    def guided(self) -> dict[str, Any]:
        """The keyword arguments of its guided calls, beside their scale."""
        return {name: value for name in ("negative_prompt", "guidance_rescale")
                if (value := vars(self)[name]) is not None}

    @property
    def is_file(self) -> bool:
        """Whether it is one file of weights."""
        return self.place.endswith(".safetensors")

    def __str__(self) -> str:
        return self.place


def index_at(source: Source) -> Index:
    """What a pipeline is made of. RequestError for what is no pipeline. Of a single file without the configs of its
    pipeline at hand, the class alone."""
    _check_spelling(source)
    index = _index_at(source)
    if not isinstance(index["_class_name"], str):
        raise RequestError(f"{source} is of the class {' of '.join(map(str, reversed(index['_class_name'])))}, "
                           "which is code beside the pipeline and is never run: supported are classes of diffusers")
    if not index["_class_name"].isidentifier():
        raise RequestError(f"{source} is of the class {index['_class_name'][:80]!r}, which is no name of a class "
                           "of diffusers")
    listed(index)
    return index


def listed(index: Index) -> dict[str, tuple[str, str]]:
    """The components that a pipeline has: name -> library and class. RequestError for what is neither, and for other
    libraries' code."""
    found = {name: made_by for name, made_by in index.items() if isinstance(made_by, (list, tuple))
             and name != "_class_name"
             and any(isinstance(word, str) for word in made_by[:1])}
    for name, made_by in found.items():
        if not name.isidentifier() or len(made_by) != 2 or not all(isinstance(word, str) and word.isidentifier()
                                                                   for word in made_by):
            raise RequestError(f"model_index.json lists {name[:80]!r} as {list(made_by)!r}; a component is a name "
                               "with a library and a class, such as "
                               '"unet": ["diffusers", "UNet2DConditionModel"]')
        _check_library(name, *made_by)
    return {name: (made_by[0], made_by[1]) for name, made_by in found.items()}


def is_processor(component: str, class_name: str) -> bool:
    """Whether a component in a tokenizer's place reads pictures too, as that of FLUX.2 dev. Its tokenizer alone is
    read: no prompt needs the rest, and that wants torchvision."""
    return component.startswith("tokenizer") and class_name.endswith("Processor")


def _check_library(name: str, library: str, class_name: str) -> None:
    """RequestError for a library that from_pretrained would import by its name. A module of diffusers.pipelines is code
    of diffusers."""
    if library not in LIBRARIES and not (Path(diffusers.__file__).parent / "pipelines" / library).is_dir():
        raise RequestError(f"its component {name} is a {class_name} of {library}, which is code beside the pipeline "
                           f"and is never run: a component is of {' or '.join(LIBRARIES)}")


def at_revision(place: str) -> tuple[str, str | None]:
    """(folder or file, None), or of a Hub id, which @ and a branch, tag or commit may follow, (id, revision).
    RequestError for what is no name of a revision."""
    if Path(place).exists():
        return place, None
    name, _, revision = place.partition("@")
    if revision:
        _check_word("revision", revision)
    return name, revision or None


def _check_spelling(source: Source) -> None:
    """RequestError for entries that would lead out of the folder or the repository that they belong to."""
    if source.subfolder is not None and (Path(source.subfolder).is_absolute() or ".." in Path(source.subfolder).parts):
        raise RequestError(f"subfolder is {source.subfolder}, which leads out of {source.base}: it is a part of "
                           "that folder, such as pipeline")
    for name in WORDS:
        if (value := vars(source)[name]) is not None:
            _check_word(name, value)


def _check_word(name: str, value: str) -> None:
    pattern, right = WORDS[name]
    if not re.fullmatch(pattern, value) or ".." in value:
        raise RequestError(f"{name} is {value[:80]!r}, which is no such name: it should be one such as {right}")


def _index_at(source: Source) -> Index:
    path = Path(source.place)
    if source.subfolder is not None and not Path(source.base).is_dir():
        raise RequestError(f"subfolder is {source.subfolder}, but {source.base} is no folder here: from_pretrained "
                           "finds no pipeline in a part of a Hub repository; download it and name the folder")
    if path.is_file():
        return _index_of_file(source)
    if source.config is not None:
        raise RequestError(f"config is {source.config}, which holds the configs of a single .safetensors file, "
                           f"but {source} is none")
    return _index_of_folder(path) if path.is_dir() else _index_on_hub(source.place, source.revision)


def class_at(source: Source) -> str:
    """The class of a pipeline. RequestError for what is none."""
    return index_at(source)["_class_name"]


def absent_parts(index: Index) -> dict[str, None]:
    """The parts that a pipeline lists as null, for from_pretrained: it wants to be told them again where its class does
    not know them as optional."""
    return {name: None for name, made_by in index.items() if isinstance(made_by, (list, tuple)) and made_by[0] is None}


def configs_of(source: Source) -> str:
    """Where the configs of a pipeline lie: itself, or of a single file what `config` names, else the Hub repository
    that diffusers takes for such a file."""
    if not source.is_file:
        return source.place
    return source.config or published(Path(source.place))


def call_of(source: Source | str) -> dict[str, Any]:
    """The keyword arguments that every call of a pipeline is given, as its stepdistill.json and its source say.
    RequestError for those that do not shape conditions or sizes.

    The file of an exported student says under "call" how the student samples; what its teacher's calls are given stands
    under "teacher_call".
    """
    source = Source.of(source)
    path = Path(source.place) / SETTINGS
    asked = {} if source.clip_skip is None else {"clip_skip": source.clip_skip}
    if not path.is_file():
        return asked
    right = 'It should hold {"call": {keyword: value}} for calls of the pipeline'
    if "method" in records.read(path, dict[str, Any], right):
        call = records.read(path, records.StudentCall, right).get("teacher_call", {})
    else:
        call = records.read(path, records.TeacherCall, right)["call"]
    if wrong := [name for name in call if name not in SHAPING]:
        where = _ELSEWHERE.get(wrong[0], "no call of a teacher is given it")
        raise RequestError(f"{path} gives every call of this pipeline {wrong[0]}: {call[wrong[0]]!r}, which does "
                           f"not shape what its network is told: {where}. What may stand there is {', '.join(SHAPING)}")
    if (sides := {"height", "width"} & call.keys()) and len(sides) == 1:
        raise RequestError(f"{path} gives every call of this pipeline {' '.join(sides)} alone: a size is a height and "
                           "a width")
    for name, least in (("height", 1), ("width", 1), ("num_frames", 1), ("clip_skip", 1), ("max_sequence_length", 0)):
        if (value := call.get(name)) is not None and value < least:
            raise RequestError(f"{path} gives every call of this pipeline {name}: {value}, which should be {least} or "
                               "more")
    return call | asked


def config_folder(source: Source, component: str) -> Path | None:
    """Where the config of a component lies: in a local folder, or, of a Hub id, in the cache, to which it is fetched
    where the Hub can be asked. None where it has none, and for a single file."""
    if source.is_file or Path(source.place).is_dir():
        return None if source.is_file else Path(source.place) / component
    name = f"{component}/config.json"
    found = cached_file(source.place, name, source.revision)
    if found is None and unreachable() is None:
        found = hub_file(source.place, name, revision=source.revision, _raise_exceptions_for_missing_entries=False,
                         _raise_exceptions_for_connection_errors=False)
    return None if found is None else Path(found).parent


def cached_file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a Hub repository as the cache holds it; None where it is not there. Asks nothing of the network."""
    found = hub_file(source, name, revision=revision, local_files_only=True,
                     _raise_exceptions_for_missing_entries=False,
                     _raise_exceptions_for_connection_errors=False)
    return None if found is None else Path(found)


def commit_of(source: str, name: str, revision: str | None) -> str | None:
    """The commit of a Hub repository of which the cache holds a file; None where it does not."""
    held = cached_file(source, name, revision)
    return None if held is None else held.parent.name


def _index_of_folder(folder: Path) -> Index:
    index = folder / "model_index.json"
    if not index.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise RequestError(f"{folder} is no diffusers pipeline: it has no model_index.json (it holds {held}). "
                           "A teacher is a folder that `pipeline.save_pretrained` wrote")
    foreign.check_config(index)
    parts = records.read(index, records.ModelIndex, "Save or download the teacher anew")
    missing = [name for name in listed(parts) if name != "safety_checker" and not (folder / name).is_dir()]
    if missing:
        raise RequestError(f"{folder} is not complete: its model_index.json lists {', '.join(missing)}, but there is "
                           "no such "
                           "folder beside it; save or download the teacher anew")
    foreign.check_folder(folder, listed(parts))
    return parts


def _index_of_file(source: Source) -> Index:
    """With `config`, that of its configs, whose class is that of the file."""
    class_name = class_of_keys(_keys(Path(source.place)), source.place)
    if source.config is None:
        return {"_class_name": class_name}
    index = (_index_of_folder(Path(source.config)) if Path(source.config).is_dir()
             else _index_on_hub(source.config, source.revision))
    if index["_class_name"] != class_name:
        raise RequestError(f"config is {source.config}, which holds the configs of a {index['_class_name']}, but "
                           f"the file {source} is a {class_name}")
    return index


def _keys(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        raise RequestError(f"{file} is no .safetensors file: a teacher is a folder, a Hub id or one .safetensors file")
    return check_safetensors(file)


def _index_on_hub(source: str, revision: str | None) -> Index:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith(".") or Path(source).parent.is_dir():
        raise RequestError(f"there is no folder or file {source} (looked in {Path.cwd()}): a teacher is a pipeline "
                           "folder, "
                           "a Hub id such as owner/name, or one .safetensors file")
    away = unreachable()
    if away is not None and cached_file(source, "model_index.json", revision) is None:
        raise RequestError(f"there is no folder {source} here, and the Hub cannot be asked for such a pipeline "
                           f"({away}): check the network, or download it where there is one and name its folder")
    try:
        return DiffusionPipeline.load_config(source, revision=revision, local_files_only=away is not None)
    except (OSError, ValueError) as error:
        reason = first_lines(error)
        raise RequestError(f"there is no folder {source} here, and the Hub did not supply such a "
                           f"pipeline: {reason}") from error


def unreachable() -> str | None:
    """Why the Hub has no address from here; None where it has one, or a proxy knows. Asked first: its library tries
    again for half a minute."""
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        if not getproxies():
            socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{host}: {error.strerror}"
    return None


def check_safetensors(file: Path) -> list[str]:
    """The names of its tensors. Reads the header only, which also tells how long the file must be."""
    foreign.check_weights(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise RequestError(f"{file} is damaged or cut short ({error}; it has {file.stat().st_size:,} bytes): "
                           "copy or download it anew") from error
