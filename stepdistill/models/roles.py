"""The roles that a method needs, made from one teacher: adapters on its network, networks of their own, and heads on
them."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.guidance import SelfGuided, self_guided
from ..diffusion.mixing import Mixing
from ..diffusion.sampler import Sampler
from ..methods.base import FIXED, Codec, Features, Follows, Frozen, Heads, Need, Reward, Trained
from .adapters import AdapterBank, LoraConfig, lora_config
from .attention import set_attention
from .denoiser import Denoiser
from .discriminator import Discriminator, chosen, paired
from .ema import Ema
from .extra_embedding import install
from .heads import Shape, prompt_vector
from .recompute import recomputed
from .teacher import Teacher
from .vision import PictureHeads


@dataclass(frozen=True)
class Lora:
    """A role as an adapter. alpha: rank unless given. targets: ends of module names, the family's own unless given."""

    rank: int = 32
    alpha: float | None = None
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Full:
    """A role as a float32 network of its own."""


@dataclass(frozen=True)
class Solver:
    """A role as the frozen base under a solver of its own. steps: of its sampler."""

    steps: int


class Shares(nn.Module):
    """What is trained of a `Solver`: (steps - 1,), of the steps after the first."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.zeros(steps - 1))


@dataclass(frozen=True)
class Places:
    """A role as heads on the outputs of these modules of a network, the network's usual ones unless given.

    network: where the heads are on pictures, the folder or Hub id of the vision network; the published one unless
    given.
    """

    features: tuple[str, ...] | None = None
    network: str | None = None


Setting = Lora | Full | Solver | Places


@dataclass(frozen=True)
class Weights:
    """A student of another run on the same base. state: of its adapter or its network, with the layers of the numbers
    it `reads`."""

    setting: Lora | Full
    state: Mapping[str, Tensor]
    reads: tuple[str, ...] = ()


Role = (Denoiser | Discriminator | SelfGuided | Mixing | PictureHeads | nn.Module
        | Callable[[Tensor], Tensor])


class Roles(Mapping[str, Role]):
    """roles["student"](x_t, t, cond) -> Prediction; roles["discriminator"](x_t, t, cond) -> logits. Made by
    `build_roles`.

    bank holds the adapter roles (None without any), networks the full ones, solvers what is trained of those that are
    the base under a solver of their own; the other names are the frozen base. A
    frozen role of another run's weights has its guidance within.
    features: role -> the modules on whose outputs its heads lie, and their shapes. visions: the networks that see
    pictures and are never trained, by role: features of a discriminator, a reward.
    seed: of the heads' first values.
    """

    def __init__(self, teacher: Teacher, needs: Mapping[str, Need], reads: Mapping[str, tuple[str, ...]],
                 bank: AdapterBank | None,
                 networks: Mapping[str, nn.Module], features: Mapping[str, Mapping[str, Shape]],
                 visions: Mapping[str, nn.Module], solvers: Mapping[str, Shares],
                 seed: int) -> None:
        self.teacher, self.needs, self.reads, self.bank, self.networks = (teacher, dict(needs), dict(reads), bank,
                                                                          dict(networks))
        self.visions = dict(visions)
        pixels = {name: teacher.pixels for name, need in needs.items() if isinstance(need, Codec)}
        self._denoisers = {name: self._denoiser(name) for name, need in needs.items()
                           if not isinstance(need, Heads | Codec | Features | Reward)}
        self._discriminators = {name: self._discriminator(needs[name], shapes, seed)
                                for name, shapes in features.items()}
        taught = {name: self_guided(self._denoisers[name], "w" in reads[name] or teacher.scale is not None)
                  for name, need in needs.items()
                  if isinstance(need, Frozen) and need.within and (name in networks or self.is_lora(name))}
        within = {name: self._within(role) for name, role in self._denoisers.items()}
        solved = {name: Mixing(within[name], own.shares, needs[_leader(name, needs)].solver)
                  for name, own in solvers.items()}
        self._roles: dict[str, Role] = within | self._discriminators | self.visions | pixels | taught | solved
        self._modules = self.networks | self._discriminators | dict(solvers)
        self._averages = [(need, name, Ema(self.parameters(name), self.parameters(need.leader), need.decay))
                          for name, need in needs.items() if isinstance(need, Follows)]

    def _denoiser(self, name: str) -> Denoiser:
        if name in self.networks:
            return Denoiser(self.teacher, self.networks[name], reads=self.reads[name])
        return self._on_base(name if self.is_lora(name) else None, self.reads.get(name, ()))

    def _discriminator(self, need: Heads, shapes: Mapping[str, Shape], seed: int) -> Discriminator | PictureHeads:
        if need.of not in self.visions:
            return Discriminator(self._denoisers[need.of], shapes, seed, need.kind, need.nodes)
        width = prompt_vector(self.teacher.encode([self.teacher.null_prompt])).shape[-1]
        return PictureHeads(shapes, width, seed)

    def _on_base(self, adapter: str | None, reads: tuple[str, ...] = ()) -> Denoiser:
        context = nullcontext if self.bank is None else partial(self.bank.use, adapter)
        return Denoiser(self.teacher, self.teacher.network, context, reads)

    def _within(self, role: Denoiser) -> Denoiser | SelfGuided:
        """A role whose network reads its guidance scale by itself is given the scale, and never guided."""
        return role if self.teacher.scale is None else self_guided(role, True)

    @property
    def base(self) -> Denoiser | SelfGuided:
        """The pipeline's own network, which is the teacher unless that is another run's student."""
        return self._within(self._on_base(None))

    def __getitem__(self, name: str) -> Role:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.needs)

    def __len__(self) -> int:
        return len(self.needs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.needs)

    def is_lora(self, name: str) -> bool:
        return self.bank is not None and name in self.bank.configs

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Float32, in a fixed order; none for the base."""
        if self.is_lora(name):
            return self.bank.parameters_of(name)
        return list(self._modules[name].parameters()) if name in self._modules else []

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint holds of a role: its adapter or its network (with the layers of the numbers it reads), its
        heads, its solver's shares, or nothing for the base. The tensors are the living ones."""
        if self.is_lora(name):
            return self.bank.state_dict(name)
        return dict(self._modules[name].state_dict()) if name in self._modules else {}

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """ValueError unless the names and shapes are exactly the role's."""
        if self.is_lora(name):
            self.bank.load_state_dict(name, state)
            return
        own = self.state_dict(name)
        wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if wrong:
            earlier = "" if not isinstance(self.needs[name], Heads) else (
                ". Heads of ladd and add that were trained before they judged every position are of another form, and "
                "no run goes on with them: its student can be sampled and exported as it is, and training be "
                "begun anew, from it with student: {from: EXPORT}")
            raise ValueError(f"these are not the weights of role {name!r}: {len(wrong)} of {len(own)} tensors are "
                             f"missing, unknown or of another shape, the first is {wrong[0]}{earlier}")
        if name in self._modules:
            self._modules[name].load_state_dict(state)

    def follow(self, leader: str, step: int = 0) -> None:
        """After an update of `leader` in a training step, counted from 0: steps the roles that still follow it, and
        those that follow them."""
        for need, name, average in self._averages:
            if need.leader == leader and (need.until is None or step < need.until):
                average.update()
                self.follow(name, step)

    def to(self, device: torch.device | str) -> Roles:
        """Moves the teacher and every role; parameters stay the same objects."""
        self.teacher.to(device)
        for module in (*self._modules.values(), *self.visions.values()):
            module.to(device)
        return self

    def network(self, name: str) -> nn.Module:
        """The role as a new float32 network, an adapter merged into it: stock, for `network.save_pretrained`, unless it
        reads numbers that its class has no input for."""
        reads = self.reads.get(name, ())
        if name in self.networks:
            return self.teacher.fresh_network(self.networks[name].state_dict(), reads)
        if self.bank is None:
            return self.teacher.fresh_network(self.teacher.network.state_dict(), reads)
        return self.teacher.fresh_network(self.bank.merged(name if self.is_lora(name) else None), reads)

    def stock_network(self, name: str, sampler: Sampler, w: float | None = None) -> nn.Module:
        """As `network`, but always of the stock class: where it reads numbers that this has no input for, all that it
        reads are folded into its weights, as they are in this sampler's steps; w: the guidance scale. (One of them left
        to the class's own input would be read through the folded weights.)"""
        network, reads, time = self.network(name), self.reads.get(name, ()), self.teacher.family.time
        if not time.own(reads):
            return network
        state, key = dict(network.state_dict()), f"{time.first}.weight"
        layers = {f"{path}.weight": state.pop(f"{path}.weight").cpu() for path in time.layers(reads)}
        a, b = self.teacher.folded(layers, reads, state[key].cpu(), sampler, w)
        state[key] = state[key] + (b.double() @ a.double()).to(state[key])
        return self.teacher.fresh_network(state)

    def lora_state_dict(self, name: str) -> dict[str, Tensor]:
        """For `save_lora_weights(unet_lora_layers=...)`; pass `lora_metadata` with it, or alpha is lost."""
        return self.bank.lora_state_dict(name)

    def lora_metadata(self, name: str) -> dict[str, Any]:
        """For `save_lora_weights(unet_lora_adapter_metadata=...)`: the adapter's LoraConfig as plain values."""
        return self.bank.metadata(name)


def build_roles(teacher: Teacher, needs: Mapping[str, Need], settings: Mapping[str, Setting], *,
                begin: Mapping[str, Weights] | None = None, gradient_checkpointing: bool = False,
                attention: str = "auto", reward: nn.Module | None = None,
                seed: int = 0) -> Roles:
    """settings: role -> Lora, Full or Solver, for each role that a recipe configures; a follower is what its leader is,
    and a trained role that is not in `settings` what its `start` is, or the student where that is the teacher. Heads ->
    Places, the family's own unless given.

    A role reads the numbers of cond.extra that its need names, and its followers with it; the layers that read them
    start at zero. Every role equals its start at first. attention: of all networks, see attention.py. begin: trained
    and frozen roles that are another run's student at first; a frozen one stays it. reward: what a `Reward` is. seed:
    of the first values of adapters and heads. ValueError for needs and settings that do not go together, RequestError
    for LoRA targets and features that the network has not.
    """
    _check(needs, settings)
    frozen = {name: weights for name, weights in (begin or {}).items() if isinstance(needs[name], Frozen)}
    settings = {**settings, **{name: weights.setting for name, weights in frozen.items()}}
    made = {name: _setting(name, needs, settings) for name, need in needs.items()
            if not isinstance(need, (Heads, *FIXED)) or name in frozen}
    reads = {name: frozen[name].reads if name in frozen else needs[_leader(name, needs)].reads for name in made}
    states = {name: _state(teacher, weights, made[name], reads[name]) for name, weights in (begin or {}).items()}
    networks = {name: teacher.fresh_network(teacher.network.state_dict(), reads[name])
                for name, setting in made.items() if isinstance(setting, Full)}
    configs = {name: _config(teacher, setting) for name, setting in made.items() if isinstance(setting, Lora)}
    bank = _bank(teacher, teacher.network, configs, {name: reads[name] for name in configs}, seed) if configs else None
    features, visions = _discriminator_inputs(teacher, needs, settings)
    visions |= {name: reward for name, need in needs.items() if isinstance(need, Reward)}
    solvers = {name: Shares(setting.steps) for name, setting in made.items() if isinstance(setting, Solver)}
    roles = Roles(teacher, needs, reads, bank, networks, features, visions, solvers, seed)
    for name, state in states.items():
        roles.load_state_dict(name, state)
    for name, need in needs.items():
        _start(roles, name, need, name in states)
    again = {teacher.network: recomputed if bank is None else bank.checkpoint,
             **dict.fromkeys(networks.values(), recomputed)}
    for network, checkpoint in again.items():
        set_attention(network, attention)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpoint)
    return roles


def _bank(teacher: Teacher, network: nn.Module, configs: Mapping[str, LoraConfig], reads: Mapping[str, tuple[str, ...]],
          seed: int = 0) -> AdapterBank:
    """Adapters on a network, each with layers for the numbers that it reads."""
    bank, time = AdapterBank(network, configs, seed), teacher.family.time
    widths: dict[str, dict[str, int]] = {}
    for name, numbers in reads.items():
        for path, width in time.layers(numbers).items():
            widths.setdefault(path, {})[name] = width
    if any(time.own(numbers) for numbers in reads.values()):
        install(network, time.sinusoids)
    for path, own in widths.items():
        bank.add_linear(path, own, time.out(network, path))
    return bank


def _discriminator_inputs(
    teacher: Teacher, needs: Mapping[str, Need], settings: Mapping[str, Setting],
) -> tuple[dict[str, dict[str, Shape]], dict[str, nn.Module]]:
    """What each discriminator's heads lie on, and the vision networks among that."""
    features: dict[str, dict[str, Shape]] = {}
    visions: dict[str, nn.Module] = {}
    for name, need in needs.items():
        if isinstance(need, Heads):
            places = settings.get(name, Places())
            if isinstance(needs[need.of], Features):
                vision_config = teacher.family.vision(places.network)
                features[name] = vision_config.read(places.features)
                visions[need.of] = vision_config.features(tuple(features[name]), teacher.device)
            else:
                shapes = chosen(teacher.feature_shapes, teacher.default_features if places.features is None
                                else places.features)
                features[name] = paired(shapes) if need.pair else shapes
    return features, visions


def _config(teacher: Teacher, setting: Lora) -> LoraConfig:
    return lora_config(setting.rank, teacher.default_targets if setting.targets is None
                       else setting.targets, setting.alpha)


def _state(teacher: Teacher, weights: Weights, setting: Lora | Full, reads: tuple[str, ...]) -> dict[str, Tensor]:
    """These weights as a role of this setting holds them. The teacher's network must not carry adapters yet."""
    state = dict(weights.state)
    if isinstance(weights.setting, Lora) and isinstance(setting, Full):
        network = teacher.fresh_network(teacher.network.state_dict())
        bank = _bank(teacher, network, {"student": _config(teacher, weights.setting)}, {"student": weights.reads})
        bank.load_state_dict("student", state)
        state = bank.merged("student")
    return teacher.silent(reads) | state


def _start(roles: Roles, name: str, need: Need, begun: bool) -> None:
    """Gives a role the weights of its start, unless it has begun with others, and its parameters their
    requires_grad."""
    start = need.leader if isinstance(need, Follows) else need.start if isinstance(need, Trained) else None
    if start is not None and not begun and (state := roles.state_dict(start)):
        whole = roles.is_lora(start) and not roles.is_lora(name)
        state = dict(roles.network(start).state_dict() if whole else state)
        roles.load_state_dict(name, roles.teacher.silent(roles.reads[name]) | state)
    for parameter in roles.parameters(name):
        parameter.requires_grad_(isinstance(need, Trained | Heads))


def _check(needs: Mapping[str, Need], settings: Mapping[str, Setting]) -> None:
    heads = {name: need for name, need in needs.items() if isinstance(need, Heads)}
    trained = [name for name, need in needs.items() if isinstance(need, Trained)]
    if unknown := sorted({*settings} - {*trained, *heads}):
        raise ValueError(f"there is no trained role {', '.join(unknown)}; the method trains "
                         f"{', '.join((*trained, *heads))}")
    if wrong := [name for name, setting in settings.items() if isinstance(setting, Places) != (name in heads)]:
        raise ValueError(f"{', '.join(wrong)}: heads are made at Places, networks as Lora or Full; found "
                         f"{settings[wrong[0]]}")
    lonely = [name for name, need in needs.items() if isinstance(need, Features)
              and [h.of for h in heads.values()].count(name) != 1]
    if lonely:
        raise ValueError(f"{', '.join(lonely)}: the features of pictures are read by one discriminator, whose settings "
                         "say which")
    for name, need in heads.items():
        if need.of not in needs or need.of in heads or isinstance(needs[need.of], Codec | Reward):
            networks = ", ".join(role for role in needs if role not in heads)
            raise ValueError(f"role {name!r} judges features of {need.of!r}, which is no network: {networks} are")
    if "critic" in needs and "student" not in needs:
        raise ValueError(f"a critic follows the samples of a student, and these needs have none: {', '.join(needs)}. "
                         "Call the role that is sampled `student`")


def _leader(name: str, needs: Mapping[str, Need]) -> str:
    """The trained role at the head of a line of followers."""
    seen = [name]
    while isinstance(need := needs[seen[-1]], Follows):
        if need.leader not in needs or need.leader in seen or isinstance(needs[need.leader], Heads):
            raise ValueError(f"role {seen[-1]!r} follows {need.leader!r}, which is no role that can lead it: "
                             f"{', '.join(needs)}")
        seen.append(need.leader)
    return seen[-1]


def _setting(name: str, needs: Mapping[str, Need], settings: Mapping[str, Setting]) -> Setting:
    name = _leader(name, needs)
    need = needs[name]
    if name in settings:
        return settings[name]
    like = need.start if isinstance(need, Trained) else name
    like = "student" if isinstance(needs.get(like), Frozen) and like != name else like
    if like == name or like not in needs:
        raise ValueError(f"role {name!r} is trained, but nothing says how: settings has "
                         f"{', '.join(settings) or 'no role'}")
    return _setting(like, needs, settings)
