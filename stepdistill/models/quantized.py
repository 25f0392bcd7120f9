"""Networks whose linear layers hold few bits a weight: NF4 (arXiv:2305.14314) or int8 (arXiv:2208.07339), by
bitsandbytes; and those that were saved so, by torchao too.

Weights are rounded to bfloat16 first, in which pipelines are usually loaded: so a base is the same in training, in an
export and in a stock call, whatever the precision. Convolutions, norms and the time embedding's first layer stay as
they are: its dtype is the network's, and numbers that a student reads are folded into it. So does the head of a
language model that encodes texts, which no prompt passes.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RequestError
from ..files import records

BLOCK = 64                                         # weights of NF4 that share a scale
# Of a linear layer's weight (rows, columns): its numbers, and its float32 scales.
BYTES = {
    "nf4": lambda rows, columns: rows * columns // 2 + 4 * -(-rows * columns // BLOCK),
    "int8": lambda rows, columns: rows * columns + 4 * rows,
}
CLASSES = {"Linear4bit": "nf4", "Linear8bitLt": "int8"}
TORCHAO = "torchao"                                # of a saved network: its tensors know their kind themselves
HEAD = "lm_head"
OUTLIER = 6.0                                      # of LLM.int8: columns of an input beyond it stay in 16 bits


def check_installed(kind: str = "nf4") -> None:
    """RequestError where the library of this kind is missing."""
    library, wanted = (TORCHAO, TORCHAO) if kind == TORCHAO else ("bitsandbytes", "stepdistill[bitsandbytes]")
    if find_spec(library) is None:
        raise RequestError(f"a quantised base wants {library}, and that is not installed: pip install {wanted}")


def layers(network: nn.Module, first: str) -> dict[str, nn.Linear]:
    """The linear layers that are quantised, by their names without adapters. first: that of the time embedding, which
    is not."""
    kept = (first, *(network._keep_in_fp32_modules or ()))
    plain = {path.removesuffix(".base_layer"): module for path, module in network.named_modules()
             if type(module) is nn.Linear and ".lora_" not in path}
    spared = lambda path: any(path == name or f".{name}." in f".{path}." for name in kept)
    return {path: module for path, module in plain.items() if not spared(path)}


def packed_bytes(network: nn.Module, kind: str, first: str) -> tuple[int, int]:
    """(weights that this quantisation of a plain network packs, the bytes that they take then). Of torchao, whose kinds
    are many, as of int8."""
    shapes, kind = [module.weight.shape for module in layers(network, first).values()], BYTES.get(kind, BYTES["int8"])
    return sum(rows * columns for rows, columns in shapes), sum(kind(*shape) for shape in shapes)


def quantization_of(network: nn.Module) -> str | None:
    """How the layers of a network are quantised; None where they are not."""
    return next((kind for module in network.modules() if (kind := _kind(module)) is not None), None)


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith(TORCHAO):
        return TORCHAO
    return CLASSES.get(type(layer).__name__)


def quantize_(network: nn.Module, kind: str, first: str) -> None:
    """Quantises the linear layers of a network in place. kind: nf4 or int8."""
    check_installed()
    for path, layer in layers(network, first).items():
        _put(network, path, _quantized(layer, kind))


def half_(network: nn.Module) -> None:
    """The network in float16, its quantised layers too, which compute in a dtype of their own."""
    network.half()
    for module in network.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float16


@torch.no_grad()
def dequantized(network: nn.Module) -> dict[str, Tensor]:
    """The weights of its quantised layers in float32, by the layers' names."""
    return {path: _plain(module) for path, module in network.named_modules() if _kind(module) is not None}


def _quantized(layer: nn.Linear, kind: str) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Params4bit  # an extra, looked for before
    weight, dtype = layer.weight.data.to(torch.bfloat16).to(layer.weight.dtype), layer.weight.dtype
    if kind == "nf4":
        new = _four_bits(layer, dtype, "nf4")
        new.weight = Params4bit(weight, requires_grad=False, blocksize=BLOCK, compress_statistics=False,
                                quant_type="nf4", module=new).to(weight.device)
    else:
        new = _eight_bits(layer)
        new.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        new.init_8bit_state()
    new.bias = layer.bias
    return new.eval()


def _four_bits(layer: nn.Linear, dtype: torch.dtype, quant_type: str) -> nn.Linear:
    """Without weights."""
    from bitsandbytes.nn import Linear4bit
    new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype,
                     compress_statistics=False, quant_type=quant_type, device="meta")
    keep_packed_(new)
    return new


def keep_packed_(network: nn.Module) -> None:
    """On processors with 16-bit instructions bitsandbytes packs a weight anew at the first pass without gradients,
    where its size allows, and from then on the layer gives none: that is left off."""
    for module in network.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _eight_bits(layer: nn.Linear) -> nn.Linear:
    """Without weights. Its scales lie beside its parameters, and follow them to another device."""
    from bitsandbytes.nn import Linear8bitLt
    new = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
                       threshold=OUTLIER, device="meta")
    own = new._apply

    def apply(fn: Any, recurse: bool = True) -> nn.Module:
        own(fn, recurse)
        new.state.CB, new.state.SCB = new.weight.data, new.state.SCB.to(new.weight.device)
        return new

    new._apply = apply
    return new


def _plain(layer: nn.Linear) -> Tensor:
    if _kind(layer) == TORCHAO:
        return layer.weight.dequantize().float()
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.state.CB.float() * layer.state.SCB[:, None].float() / 127


def _put(network: nn.Module, path: str, layer: nn.Module) -> None:
    place, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(place), leaf, layer)


# -- folders that were saved quantised -------------------------------------------------------------------------------

def saved_as(folder: Path) -> str | None:
    """How the weights in a component's folder are quantised; None where they are not. RequestError for a kind that is
    not served."""
    path = folder / "config.json"
    read = (records.read(path, records.NetworkConfig, "Save or download the teacher anew", infinite=True)
            if path.is_file() else {})
    config = read.get("quantization_config")
    if config is None:
        return None
    if config.get("quant_method") == TORCHAO:
        return TORCHAO
    found = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else None
    found = "int8" if config.get("load_in_8bit") else found
    if config.get("quant_method") != "bitsandbytes" or found not in BYTES:
        raise RequestError(f"the weights in {folder} are quantised by "
                           f"{config.get('quant_method')}{'' if found is None else f' as {found}'}; a base is "
                           f"served in {' or '.join(BYTES)} of bitsandbytes, or by torchao: name its plain pipeline, "
                           f"and choose one by quantization")
    return found


class _WithoutWeights(TorchFunctionMode):
    """Within, what a layer makes for its weights has no bytes; tables that a class computes have theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def read_saved(kind: type[ModelMixin], folder: Path, files: list[Path], dtype: torch.dtype, first: str) -> ModelMixin:
    """A network as it was saved quantised. RequestError where its files do not hold what its config says."""
    check_installed(saved_as(folder))
    if saved_as(folder) == TORCHAO:
        network = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        _put(network, first, _whole(network.get_submodule(first), dtype))
        return network
    config = {name: value for name, value in kind.load_config(folder).items() if name != "quantization_config"}
    with _WithoutWeights():
        network = kind.from_config(config)
    state = {key: value for file in files for key, value in load_file(file).items()}
    for path, layer in [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)]:
        if (new := _restored(layer, path, state, dtype)) is not None:
            _put(network, path, new)
    plain = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    if unexpected := network.load_state_dict(plain, strict=False, assign=True).unexpected_keys:
        raise RequestError(f"the weights in {folder} are not what its config.json says: {len(unexpected)} unexpected, "
                           f"first {unexpected[0]}")
    if missing := [name for name, parameter in network.named_parameters() if parameter.is_meta]:
        raise RequestError(f"the weights in {folder} are not what its config.json says: {len(missing)} missing, first "
                           f"{missing[0]}")
    if _kind(layer := network.get_submodule(first)) is not None:
        _put(network, first, _whole(layer, dtype))
    return network


def _restored(layer: nn.Linear, path: str, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Linear | None:
    """The layer with its quantised weight, which is taken out of the state; None for one that is not quantised."""
    from bitsandbytes.nn import Int8Params, Params4bit
    key = f"{path}.weight"
    if f"{path}.SCB" in state:
        new, weight = _eight_bits(layer), state.pop(key)
        new.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.state.CB, new.state.SCB = new.weight.data, state.pop(f"{path}.SCB")
        state.pop(f"{path}.weight_format", None)
    elif statistics := {name: state.pop(name) for name in [*_within(state, key)]}:
        kind = next(name.rpartition("__")[2] for name in statistics if ".quant_state." in name)
        new = _four_bits(layer, dtype, kind)
        new.weight = Params4bit.from_prequantized(state.pop(key), statistics, device="cpu", module=new)
    else:
        return None
    new.bias = None if layer.bias is None else nn.Parameter(state.pop(f"{path}.bias").to(dtype), requires_grad=False)
    return new.eval()


def _within(state: Mapping[str, Tensor], key: str) -> Iterator[str]:
    return (name for name in state if name.startswith(f"{key}."))


def _whole(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A quantised layer as a plain one."""
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    new.weight = nn.Parameter(_plain(layer).to(dtype), requires_grad=False)
    new.bias = layer.bias
    return new
