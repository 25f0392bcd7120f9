"""The files of weights in a pipeline's folder: which there are, and what they must hold. Only headers are read."""
from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import RequestError, first_lines
from .families import FAMILIES, text_to_image
from .quantized import check_installed, saved_as
from .sources import (
    LIBRARIES,
    UNLOADABLE,
    Index,
    Source,
    blaming,
    check_safetensors,
    config_folder,
    is_processor,
    listed,
)

_FILE = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>\w+))?"
                   r"(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
_LAID = re.compile(r"\.base_layer\.|\.lora_[AB]\.")
_ADAPTER, _INDEX = "adapter_config.json", "*.safetensors.index*.json"
_PIECES = "*.model"                                # a vocabulary of sentencepiece, from which any tokenizer is made
DENOISERS = ("unet", "transformer")
MODULES = dict(zip(LIBRARIES, (diffusers, transformers)))


def settled(source: Source, index: Index) -> Source:
    """The source with the quantisation that its denoiser was saved in; of a local folder also with the variant of its
    weights, where that is the only one there.

    RequestError for a variant that is not there, where there are several and none is asked for, and for another
    quantisation.
    """
    if text_to_image(index["_class_name"]) in FAMILIES and {*DENOISERS} & index.keys():
        source = _quantized(source, index)
    if not Path(source.place).is_dir():
        return source
    held = {folder.name: variants for folder in folders(Path(source.place), index) if (variants := _variants(folder))}
    every = sorted({variant for variants in held.values() for variant in variants if variant is not None})
    if source.variant is not None:
        if source.variant not in every:
            raise RequestError(f"{source} has no weights of the variant {source.variant}; it has "
                               f"{', '.join(every) or 'the plain ones alone'}")
        return source
    lacking = [variants for variants in held.values() if None not in variants]
    if not lacking:
        return source
    common = sorted(set.intersection(*lacking))
    if len(common) != 1:
        raise RequestError(f"{source} has no plain weights; its files are of the variants {' and '.join(every)}: "
                           "choose one by variant")
    return replace(source, variant=common[0])


def _quantized(source: Source, index: Index) -> Source:
    denoiser = next(name for name in DENOISERS if name in index)
    folder = config_folder(source, denoiser)
    found = None if folder is None else saved_as(folder)
    if found is None or source.quantization in (None, found):
        return source if found is None else replace(source, quantization=found)
    raise RequestError(f"quantization is {source.quantization}, but the {denoiser} of {source} was saved quantised as "
                       f"{found}: leave it out")


def folders(place: Path, index: Index) -> Iterator[Path]:
    """Of the components that a local pipeline lists."""
    return (folder for name in listed(index) if (folder := place / name).is_dir())


def check_files(source: Source) -> None:
    """RequestError for a damaged file of weights in a local pipeline."""
    if Path(source.place).is_dir():
        for file in sorted(Path(source.place).rglob("*.safetensors")):
            check_safetensors(file)


def _variants(folder: Path) -> set[str | None]:
    """Of its files of weights; None stands for the plain ones."""
    return {found["variant"] for path in folder.iterdir() if (found := _FILE.fullmatch(path.name))}


# -- what the files hold -----------------------------------------------------------------------------------------------

def check_components(place: Path, source: Source, index: Index, dropped: Container[str] = ()) -> None:
    """RequestError for a component whose files lack one of its tensors, or hold one that it has not; for weights that
    were saved under a LoRA; and for a tokenizer without a vocabulary. Loaders report those in their logs alone, and
    train on random numbers.

    place: the local folder of the pipeline that `source` names, with its index. dropped: components that are not read
    from it. Those without files of weights are left to from_pretrained.
    """
    kinds = {folder: PreTrainedTokenizerFast if is_processor(folder.name, index[folder.name][1])
             else class_of(folder.name, *index[folder.name])
             for folder in folders(place, index) if folder.name not in dropped}
    networks = {folder: kind for folder, kind in kinds.items() if issubclass(kind, nn.Module)}
    if Path(source.place).is_dir():                    # what the Hub has not supplied yet lacks nothing
        _check_whole(source, networks)
    for folder, kind in kinds.items():
        if issubclass(kind, PreTrainedTokenizerBase):
            _check_vocabulary(source, folder, kind)
    for folder, kind in networks.items():
        if (saved := saved_as(folder)) is not None:
            check_installed(saved)
            continue                                   # its tensors are compared when it is read
        files, variant = weight_files(folder, source.variant)
        found = {key: shape for file in files for key, shape in _shapes(file).items()}
        _check_saved_plain(source, folder, found)
        if found and issubclass(kind, ModelMixin):
            _refuse(source, folder.name, *_compared(kind, folder, found))
        elif found:
            _refuse(source, folder.name, *_reported(source, kind, folder, variant))


def _check_whole(source: Source, networks: Iterable[Path]) -> None:
    """RequestError for a network's folder without its config, without weights beside others' weights, or with parts of
    weights that no index puts together. A denoiser without weights is left to from_pretrained: plans are made before it
    is downloaded."""
    held = {folder: weight_files(folder, source.variant)[0] for folder in networks}
    for folder, files in held.items():
        if (folder / _ADAPTER).is_file():
            continue                                   # which says more of what is wrong
        lacking = (["config.json"] if not (folder / "config.json").is_file()
                   else ["weights"] if not files and any(held.values()) and folder.name not in DENOISERS
                   else [f"{_INDEX}, which says what its {len(files)} parts hold"]
                   if any("-of-" in file.name for file in files) and not [*folder.glob(_INDEX)] else [])
        if lacking:
            raise RequestError(f"{source} is not complete: the folder of its {folder.name} has no {lacking[0]}. "
                               "Save or download the teacher anew")


def class_of(component: str, library: str, class_name: str) -> type:
    """The class of a component. RequestError for code of its own, and for a class that the installed library has
    not."""
    if library not in LIBRARIES:
        raise RequestError(f"its component {component} is a {class_name} of {library}, which is code beside the "
                           f"pipeline and is never run: a component is of {' or '.join(LIBRARIES)}")
    found = getattr(MODULES[library], class_name) if class_name in dir(MODULES[library]) else None
    if not isinstance(found, type) or "from_pretrained" not in dir(found):
        raise RequestError(f"its component {component} is a {class_name}, which {library} "
                           f"{MODULES[library].__version__} does not have"
                           + " as a class that is read from a folder" * (found is not None))
    return found


def pipeline_class(class_name: str) -> type[DiffusionPipeline]:
    """A pipeline of diffusers by its name. RequestError for another class."""
    found = class_of("pipeline", "diffusers", class_name)
    if not issubclass(found, DiffusionPipeline):
        raise RequestError(f"its pipeline is a {class_name}, which is no pipeline of diffusers, such as "
                           "StableDiffusionPipeline")
    return found


def scheduler_class(class_name: str) -> type[SchedulerMixin]:
    """As `class_of`, of a config's scheduler. RequestError for a class that is none."""
    found = class_of("scheduler", "diffusers", class_name)
    if not issubclass(found, SchedulerMixin):
        raise RequestError(f"its component scheduler is a {class_name}, which is no scheduler of diffusers, such "
                           "as DDIMScheduler")
    return found


def _compared(kind: type[ModelMixin], folder: Path, found: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names that its class has and the files have not, and the other way round. RequestError for another shape."""
    with blaming(f"the config of {folder.name}", folder), torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    known = network.state_dict()
    found = dict(network._fix_state_dict_keys_on_load(found))         # as files of early versions name them
    for key in (key for key in known if key in found and known[key].shape != found[key].shape):
        raise RequestError(f"{folder / 'config.json'} does not fit the weights beside it: {key} should have the shape "
                           f"{tuple(known[key].shape)}; found {tuple(found[key].shape)}")
    ignored = kind._keys_to_ignore_on_load_unexpected or []
    return ([key for key in known if key not in found],
            [key for key in found if key not in known and not any(re.search(p, key) for p in ignored)])


def _reported(source: Source, kind: type[PreTrainedModel], folder: Path,
              variant: str | None) -> tuple[list[str], list[str]]:
    """As transformers itself reports them, which knows of tied weights, earlier names and what may be missing. On the
    meta device nothing is read but headers."""
    try:
        _, report = kind.from_pretrained(folder, variant=variant, output_loading_info=True, device_map="meta",
                                         use_safetensors=True, ignore_mismatched_sizes=True)
    except UNLOADABLE as error:
        raise RequestError(f"the {folder.name} of {source} does not fit its config: {first_lines(error)}") from error
    if report["mismatched_keys"]:
        key, found, known = min(report["mismatched_keys"])
        raise RequestError(f"the {folder.name} of {source} does not fit its config: {key} should have the shape "
                           f"{tuple(known)}; found {tuple(found)}")
    return sorted(report["missing_keys"]), sorted(report["unexpected_keys"])


def _refuse(source: Source, component: str, missing: list[str], unexpected: list[str]) -> None:
    wrong = [f"{len(keys)} {name}, first {keys[0]}"
             for name, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if wrong:
        raise RequestError(f"the {component} of {source} is not what its config.json says: of its tensors "
                           f"{'; '.join(wrong)}. Save or download the teacher anew")


def _check_saved_plain(source: Source, folder: Path, keys: Iterable[str]) -> None:
    """An adapter beside a text encoder is loaded with it, on the base that the adapter names, which may be another."""
    laid = [key for key in keys if _LAID.search(key)]
    beside = (folder / _ADAPTER).is_file()
    if laid or beside:
        signs = (f"{len(laid)} of its tensors are the LoRA's or under it, first {laid[0]}" if laid
                 else f"{_ADAPTER} lies beside its weights")
        raise RequestError(f"the {folder.name} of {source} was saved while a LoRA lay on it ({signs}): call "
                           "pipe.fuse_lora() and pipe.unload_lora_weights() before pipe.save_pretrained, or name the "
                           "plain pipeline and the LoRA by loras")


def _check_vocabulary(source: Source, folder: Path, kind: type[PreTrainedTokenizerBase]) -> None:
    names = dict(kind.vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    if not (folder / whole).is_file() and not [*folder.glob(_PIECES)]:
        lacking = [name for name in names.values() if not (folder / name).is_file()]
        if lacking or not names:
            raise RequestError(f"the {folder.name} of {source} has no vocabulary: there is neither {whole} nor "
                               f"{' and '.join(lacking) or _PIECES} in its folder. Save or download the teacher anew")


def weight_files(folder: Path, variant: str | None) -> tuple[list[Path], str | None]:
    """The .safetensors files that from_pretrained reads, and their variant: the plain ones where there is none of the
    one asked for."""
    held = variant if variant in _variants(folder) else None
    named = ((path, _FILE.fullmatch(path.name)) for path in sorted(folder.glob("*.safetensors")))
    return [path for path, found in named if found and found["variant"] == held], held


def _shapes(file: Path) -> dict[str, Tensor]:
    """Its tensors' names, with tensors of their shapes on the meta device."""
    with safe_open(file, framework="pt") as tensors:
        return {key: torch.empty(tensors.get_slice(key).get_shape(), device="meta") for key in tensors.keys()}
