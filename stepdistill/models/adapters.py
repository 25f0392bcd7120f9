"""Many roles on one frozen network: named LoRA adapters of which at most one is active.

Three traps are handled here and nowhere else:
- peft's own `set_adapter` also switches `requires_grad` off for every other adapter: only the active name changes here;
- plain activation checkpointing recomputes under whichever adapter is active during backward, and the gradients are
  wrong without an error: `AdapterBank.checkpoint` re-enters the adapter of the forward pass;
- an adapter takes its base's dtype, and 16-bit weights lose small updates: adapters are float32 on any base.
"""
from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.draws import key
from ..errors import RequestError
from . import lora_layers
from .quantized import dequantized
from .recompute import recomputed

PEFT_WEIGHTS = "adapter_model.safetensors"


def lora_config(rank: int, targets: Sequence[str], alpha: float | None = None) -> LoraConfig:
    """targets: ends of module names, such as "to_q" or "ff.net.2". alpha: rank unless given; the adapter counts
    alpha / rank times. A starts as N(0, 1 / rank^2), B as zero, so that a new adapter changes nothing."""
    if rank < 1:
        raise RequestError(f"the rank of a LoRA is at least 1, found {rank}")
    if not targets:
        raise RequestError("a LoRA without targets trains nothing: name modules, or leave `targets` out for the usual "
                           "ones")
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets),
                      init_lora_weights="gaussian")


def matching(network: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Those of `targets` that name at least one linear layer or convolution of the network."""
    names = _layers(network)
    return tuple(target for target in targets if any(_matches(name, target) for name in names))


class LoraLinear(lora.Linear):
    """peft's layer with a forward of our own, for a base that is torch's own linear layer."""

    forward = lora_layers.linear


class LoraConv2d(lora.Conv2d):
    """peft's layer with a forward of our own, for a base that is torch's own convolution."""

    forward = lora_layers.convolution


# A quantised base has classes of its own, in torch's and in peft's terms: those keep peft's forward.
OURS = {(lora.Linear, nn.Linear): LoraLinear, (lora.Conv2d, nn.Conv2d): LoraConv2d}


class AdapterLinear(nn.Module):
    """A linear layer without bias that some adapters have, each of its own width, and the base has not: x (B, I) -> (B,
    O).

    All start at zero. widths: I of each adapter; `active` is the bank's list of active adapters.
    """

    def __init__(self, widths: Mapping[str, int], out_features: int, active: list[str]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: torch.zeros(out_features, width) for name, width in widths.items()})
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        if not self.active or self.active[0] not in self.weights:
            raise ValueError(f"only {list(self.weights)} have this layer; active is {self.active or 'the base'}")
        return F.linear(x, self.weights[self.active[0]].to(x.dtype))


class _Use:
    """Makes an adapter active; can be entered again, as backward does on a graph that is kept."""

    def __init__(self, active: list[str], wanted: list[str]) -> None:
        self.active, self.wanted, self.before = active, wanted, []

    def __enter__(self) -> None:
        self.before.append(self.active[:])
        self.active[:] = self.wanted

    def __exit__(self, *_) -> None:
        self.active[:] = self.before.pop()


class AdapterBank:
    """Owns a network's adapters. Outside `use` none is active, and the network is exactly the base.

    All LoRA layers share one list of active names, so switching costs the same for ten layers as for a thousand.
    seed: the adapters' first values are a function of (seed, name, layer), not of the global generator.
    """

    def __init__(self, network: nn.Module, configs: Mapping[str, LoraConfig], seed: int = 0) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            raise ValueError("this network carries adapters already: make one bank with all roles, or load the network "
                             "anew")
        for name, config in configs.items():
            _check_targets(network, config.target_modules)
            if other := [key for key in ("lora_dropout", "use_dora", "lora_bias") if getattr(config, key)]:
                raise ValueError(f"adapter {name!r} has {', '.join(other)}; those of a bank are plain LoRA: take "
                                 "`lora_config`")
        self.network = network.requires_grad_(False)
        self.configs = {name: _layers_alone(network, config) for name, config in configs.items()}
        self._active: list[str] = []
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _same_device(network):
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            for name, config in self.configs.items():
                inject_adapter_in_model(config, network, adapter_name=name)
        self._layers = {path: m for path, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
        for layer in self._layers.values():
            layer._active_adapter = self._active
            layer.__class__ = OURS.get((type(layer), type(layer.base_layer)), type(layer))
        self._parameters = {name: self._collect(name) for name in self.configs}
        self._initialise(seed)

    def _collect(self, name: str) -> dict[str, nn.Parameter]:
        """peft's names, without the adapter's: "mid_block.attentions.0.proj_in.lora_A.weight"."""
        found = {}
        for path, layer in self._layers.items():
            for inner, parameter in layer.named_parameters():
                kind, owner, *leaf = inner.split(".")
                if kind in layer.adapter_layer_names and owner == name:
                    found[".".join((path, kind, *leaf))] = parameter
        return found

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for name, parameters in self._parameters.items():
            for path, parameter in parameters.items():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                if ".lora_A." in path and not parameter.is_meta:
                    generator = torch.Generator().manual_seed(key(seed, "adapter", name, path))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu")
                                    / self.configs[name].r)

    def add_linear(self, path: str, widths: Mapping[str, int], out_features: int) -> None:
        """Puts an AdapterLinear at `path` (where the base has None) and makes its weights part of the adapters in
        `widths`."""
        parent, _, leaf = path.rpartition(".")
        layer = AdapterLinear(widths, out_features, self._active).to(next(self.network.parameters()).device)
        setattr(self.network.get_submodule(parent), leaf, layer)
        for name in widths:
            self._parameters[name][f"{path}.weight"] = layer.weights[name]

    @property
    def active(self) -> str | None:
        return self._active[0] if self._active else None

    def use(self, name: str | None) -> _Use:
        """`with bank.use("student"): network(...)`; None is the base. What was active before returns afterwards."""
        if name is not None and name not in self.configs:
            raise ValueError(f"no adapter {name!r} in this bank, which has {list(self.configs)}")
        return _Use(self._active, [] if name is None else [name])

    def checkpoint(self, module: nn.Module, *args):
        """For `network.enable_gradient_checkpointing(bank.checkpoint)`: recomputes under the forward's adapter."""
        name = self.active
        return recomputed(module, *args, again=lambda: self.use(name))

    def parameters(self) -> list[nn.Parameter]:
        """Those of all adapters."""
        return [parameter for name in self._parameters for parameter in self.parameters_of(name)]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Float32, in a fixed order."""
        return list(self._parameters[name].values())

    def state_dict(self, name: str) -> dict[str, Tensor]:
        return {path: parameter.detach() for path, parameter in self._parameters[name].items()}

    @torch.no_grad()
    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """ValueError unless the names and shapes are exactly this adapter's."""
        own = self._parameters[name]
        wrong = sorted(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"these are not the weights of adapter {name!r} (rank {self.configs[name].r}): "
                             f"{len(wrong)} of "
                             f"{len(own)} tensors are missing, unknown or of another shape, the first is {wrong[0]}")
        for path, parameter in own.items():
            parameter.copy_(state[path])

    def copy(self, src: str, dst: str) -> None:
        """Gives `dst` the weights of `src`."""
        self.load_state_dict(dst, self.state_dict(src))

    def lora_state_dict(self, name: str) -> dict[str, Tensor]:
        """What `save_lora_weights(unet_lora_layers=...)` takes: the LoRA weights alone, without `add_linear`'s."""
        return {path: value for path, value in self.state_dict(name).items() if ".lora_" in path}

    def metadata(self, name: str) -> dict[str, Any]:
        """The adapter's LoraConfig as plain values, sets as sorted lists."""
        return {key: sorted(value) if isinstance(value, set) else value
                for key, value in self.configs[name].to_dict().items()}

    @torch.no_grad()
    def merged(self, name: str | None) -> dict[str, Tensor]:
        """The float32 state dict of a plain network that computes what the base does with this adapter (None: the
        base).

        W + (alpha / rank) B A takes the place of W, which of a quantised layer is what its numbers stand for. The
        tensors are copies.
        """
        own = {id(parameter) for layer in self.network.modules() if isinstance(layer, (BaseTunerLayer, AdapterLinear))
               for path, parameter in layer.named_parameters() if not path.startswith("base_layer.")}
        plain = {path.replace(".base_layer.", "."): value.detach().float().clone()
                 for path, value in self.network.state_dict(keep_vars=True).items() if id(value) not in own}
        for path, weight in dequantized(self.network).items():
            layer = path.removesuffix(".base_layer")
            statistics = [key for key in plain if key.startswith(f"{layer}.weight") or key == f"{layer}.SCB"]
            plain = {key: value for key, value in plain.items() if key not in statistics} | {f"{layer}.weight": weight}
        if name is not None:
            for path, layer in self._layers.items():
                if name in layer.lora_A:
                    plain[f"{path}.weight"] += layer.get_delta_weight(name).float()
            plain |= {path: value.clone() for path, value in self.state_dict(name).items() if ".lora_" not in path}
        return plain


# peft's own folders ---------------------------------------------------------------------------------------------------

PREFIX = "base_model.model."                       # of a weight's name in them


def save_adapter(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """Writes an adapter as peft.PeftModel.from_pretrained(network, folder) reads it, and returns the name of its
    weights file.

    state: as `AdapterBank.lora_state_dict`; config: keyword arguments of LoraConfig."""
    LoraConfig(**config, inference_mode=True).save_pretrained(str(folder))
    save_file({PREFIX + key: value.contiguous() for key, value in state.items()}, Path(folder) / PEFT_WEIGHTS,
              {"format": "pt"})
    return PEFT_WEIGHTS


def load_adapter(network: nn.Module, folder: str | Path, name: str) -> list[str]:
    """Puts such an adapter beside the network's weights and other adapters, and returns what does not fit; then nothing
    of it stays.

    ValueError where none of its modules is there, RuntimeError for weights of another shape."""
    state = {key.removeprefix(PREFIX): value for key, value in load_file(Path(folder) / PEFT_WEIGHTS).items()}
    wrong, active = ["nothing of it could be read"], active_adapters(network)
    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), network, adapter_name=name)
        found = set_peft_model_state_dict(network, state, adapter_name=name)
        wrong = [f"unknown {key}" for key in found.unexpected_keys] + [f"missing {key}" for key in found.missing_keys
                                                                       if ".lora_" in key and f".{name}." in key]
    finally:
        if wrong:
            drop_adapter(network, name, active)
    return wrong


def active_adapters(network: nn.Module) -> list[str]:
    """The adapters that a pass of the network computes with. RequestError where one is merged while its layers stay: in
    those, peft computes no other."""
    active: dict[str, None] = {}
    for layer in _tuned(network):
        if layer.merged:
            raise RequestError(f"the adapter {', '.join(layer.merged_adapters)} is fused into the weights of this "
                               f"{type(network).__name__} and its layers are still there, so that no other adapter "
                               "would be computed: call pipe.unload_lora_weights() first, which leaves the "
                               "fused weights")
        active |= dict.fromkeys(layer.active_adapters)
    return list(active)


def activate(network: nn.Module, names: Sequence[str]) -> None:
    """Lets a pass compute with these adapters, each at the weight that it has."""
    for layer in _tuned(network):
        layer.set_adapter(list(names))


def adapter_names(network: nn.Module) -> set[str]:
    """All that lie on the network, active or not."""
    return {name for layer in _tuned(network) for name in layer.lora_A}


def adapter_state(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The LoRA's weights of one adapter, as they lie on the network: "<module>.lora_A.weight"."""
    part = re.compile(rf"\.lora_([AB])\.{re.escape(name)}\.")
    return {part.sub(r".lora_\1.", key): value for key, value in network.state_dict().items() if part.search(key)}


def drop_adapter(network: nn.Module, name: str, active: Sequence[str]) -> None:
    """The network without this adapter, and with these of the others active."""
    for layer in _tuned(network):
        if name in layer.lora_A:
            layer.delete_adapter(name)
    if not adapter_names(network):
        take_off(network, merge=False)
        return
    vars(network)["peft_config"].pop(name, None)
    activate(network, active)


def _tuned(network: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


def take_off(network: nn.Module, merge: bool) -> None:
    """The network without adapters, merge: which are added to its weights first."""
    for path, layer in [(path, m) for path, m in network.named_modules() if isinstance(m, BaseTunerLayer)]:
        if merge:
            layer.merge()
        place, _, leaf = path.rpartition(".")
        setattr(network.get_submodule(place), leaf, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):        # peft's, and that of a loader of diffusers
        vars(network).pop(mark, None)


def _same_device(network: nn.Module) -> AbstractContextManager:
    """Within, what is made lies on the meta device where the network does, and has no bytes either."""
    return torch.device("meta") if next(network.parameters()).is_meta else nullcontext()


@dataclass(frozen=True)
class LoraPair:
    """One layer of a LoRA: W + scale B A. a: (r, in, ...), b: (out, r, ...), float32."""

    a: Tensor
    b: Tensor
    scale: float


def pairs_of(network: nn.Module, name: str) -> dict[str, LoraPair]:
    """Copies of an adapter that lies on a network, by its layers. ValueError for one with more than A and B."""
    found: dict[str, LoraPair] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.scaling:
            held = {inner for inner, _ in layer.named_parameters() if name in inner.split(".")}
            if more := held - {f"lora_A.{name}.weight", f"lora_B.{name}.weight"}:
                raise ValueError(f"its layer {path} has {sorted(more)[0].replace(f'.{name}', '')}")
            down, up = (factors[name].weight.detach().float().clone() for factors in (layer.lora_A, layer.lora_B))
            found[path] = LoraPair(down, up, float(layer.scaling[name]))
    return found


def named_layers(network: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that targets name."""
    names = [name for name in _layers(network) if any(_matches(name, target) for target in targets)]
    return {name: network.get_submodule(name) for name in names}


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layers_alone(network: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config, told to pass over modules that a target names but that are no layers, such as an activation of the
    same name."""
    others = {name for name, _ in network.named_modules()
              if any(_matches(name, target) for target in config.target_modules)}
    if not (others := others - {*_layers(network)}):
        return config
    spared = copy(config)
    spared.exclude_modules = others
    return spared


def _check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    names = _layers(network)
    ends = {".".join(parts[-count:]) for parts in (name.split(".") for name in names) for count in (1, 2, 3)}
    for target in sorted(targets):
        if not any(_matches(name, target) for name in names):
            near = get_close_matches(target, sorted(ends), n=5, cutoff=0.5)
            known = (f"near names: {', '.join(near)}" if near
                     else f"names that exist: {', '.join(sorted(ends)[:12])} ...")
            raise RequestError(f"the LoRA target {target!r} matches no linear layer or convolution of this "
                               f"{type(network).__name__}; {known}")
