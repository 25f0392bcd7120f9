"""What CIFAR-10 is measured with and distilled from: a classifier, and a class-conditional teacher by EDM's recipe.

Both lie between calls in half precision, and a call that goes on with a teacher begins its optimizer anew.
"""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import internals
import torch
import torch.nn.functional as F
from cifar_data import CLASSES, Pictures, augmented, scaled
from common import Clock
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
P_MEAN, P_STD = -1.2, 1.2             # of ln(sigma) in training: Karras et al. 2022, arXiv:2206.00364, table 1
# half-life of the averaged weights in pictures: the paper's, and at most a share of those seen
EMA_IMAGES, EMA_SHARE = 500_000, 0.05
LOG = 100                             # updates; only here the host waits for the card


@dataclass(frozen=True)
class Sizes:
    """Of the two networks and their trainings. teacher_images counts pictures seen over all calls."""

    side: int = 32
    classifier: tuple[int, ...] = (24, 48, 128)       # widths of its stages; the last is that of the features
    teacher: tuple[int, ...] = (64, 96, 128)          # widths of its resolutions
    layers: int = 2                                   # residual blocks of a resolution
    groups: int = 32
    batch: int = 512
    epochs: int = 40                                  # of the classifier
    teacher_images: int = 12_600_000
    teacher_lr: float = 1e-3
    warmup: int = 200                                 # updates after each begin


# -- the classifier ----------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """He et al. 2016, arXiv:1512.03385: two convolutions and the way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        around = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.around = nn.Identity() if (before, stride) == (width, 1) else around

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.around(x))


class Classifier(nn.Module):
    """A small ResNet. features: (B, 3, H, W) in [-1, 1] -> (B, D), what the last layer reads."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        stages, before = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()], widths[0]
        for i, width in enumerate(widths):
            stages += [Block(before, width, 1 if i == 0 else 2), Block(width, width, 1)]
            before = width
        self.body, self.last = nn.Sequential(*stages), nn.Linear(before, CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        return self.body(pixels).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.features(pixels))


def train_classifier(data: Pictures, file: Path, sizes: Sizes) -> None:
    """Writes the weights of a classifier of these pictures: SGD, the learning rate up and down in straight lines."""
    torch.manual_seed(0)
    device, updates = data.labels.device, sizes.epochs * (len(data) // sizes.batch)
    network = Classifier(sizes.classifier).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1 * sizes.batch / 128, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / (0.15 * updates),
                                                                          (updates - i) / (0.85 * updates)))
    for i, (rows, generator) in zip(range(updates), batches(len(data), sizes.batch, device, 0)):
        seen = data[rows]
        with autocast(device):
            logits = network(augmented(seen.pixels, sizes.side // 8,
                                       generator).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), seen.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % LOG == 0:
            print(f"classifier: update {i} of {updates}, loss {loss.item():.3f}", flush=True)
    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    _written(file, lambda aside: save_file({name: value.contiguous() for name, value in state.items()}, aside))


def load_classifier(file: Path, sizes: Sizes, device: torch.device) -> Classifier:
    """In float32, as its file in half precision has it."""
    network = Classifier(sizes.classifier)
    network.load_state_dict({name: value.float() if value.is_floating_point() else value
                             for name, value in load_file(file).items()})
    return network.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def accuracy(network: Classifier, data: Pictures) -> float:
    right = [network(scaled(block.pixels)).argmax(1) == block.labels
             for block in (data[i:i + 1000] for i in range(0, len(data), 1000))]
    return torch.cat(right).float().mean().item()


def batches(count: int, size: int, device: torch.device, seed: int) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Rows of epochs of their own order, and a generator for what is drawn beside; all on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    while True:
        yield from ((rows, generator) for rows in torch.randperm(count, generator=generator, device=device).split(size)
                    if len(rows) == size)


# -- the teacher -------------------------------------------------------------------------------------------------------

def teacher_network(sizes: Sizes) -> UNet2DModel:
    """Attention at the second resolution and in the middle."""
    count = len(sizes.teacher)
    down = tuple("AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in range(count))
    return UNet2DModel(sample_size=sizes.side, block_out_channels=sizes.teacher, layers_per_block=sizes.layers,
                       down_block_types=down,
                       up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
                       norm_num_groups=sizes.groups,
                       attention_head_dim=sizes.groups, num_class_embeds=CLASSES)


def preconditioned(network: nn.Module, noised: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip x, c_out, F): Karras et al. 2022, eq. 7, whose denoiser is c_skip x + c_out F(c_in x, c_noise).

    noised x = x_0 + sigma eps (B, 3, H, W); sigma (B,). c_noise is that of consistency models, a thousand times the
    paper's.
    """
    wide = sigma[:, None, None, None]
    total = (wide.square() + SIGMA_DATA ** 2).sqrt()
    raw = network(noised / total, 250 * sigma.log(), labels, return_dict=False)[0]
    return noised * (SIGMA_DATA / total) ** 2, wide * SIGMA_DATA / total, raw


def loss_of(network: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Eq. 8 of the paper, whose weight lambda c_out^2 is 1: F is compared with what it should say."""
    drawn = {"generator": generator, "device": x.device}
    sigma = (P_MEAN + P_STD * torch.randn(len(x), **drawn)).exp().clamp(SIGMA_MIN, SIGMA_MAX)
    noised = x + sigma[:, None, None, None] * torch.randn(x.shape, **drawn)
    skipped, out, raw = preconditioned(network, noised, sigma, labels)
    return F.mse_loss(raw.float(), (x - skipped) / out)


@dataclass(frozen=True)
class Progress:
    """Of a teacher: pictures seen, seconds of training and calls, all together."""

    images: int = 0
    seconds: float = 0.0
    calls: int = 0

    @classmethod
    def of(cls, folder: Path) -> Progress:
        file = folder / "progress.json"
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()


def train_teacher(data: Pictures, folder: Path, sizes: Sizes, clock: Clock, compiled: bool = False) -> Progress:
    """Goes on with the teacher in `folder`, a pipeline with progress.json, until it has seen its pictures or the clock
    has run out."""
    before, device, begun = Progress.of(folder), data.labels.device, time.monotonic()
    torch.manual_seed(before.calls)
    averaged = (UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32) if before.calls
                else teacher_network(sizes))
    averaged, network = averaged.to(device).requires_grad_(False), teacher_network(sizes).to(device)
    network.load_state_dict(averaged.state_dict())
    called = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=sizes.teacher_lr, betas=(0.9, 0.99),
                                  weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / sizes.warmup))
    images, rows = before.images, batches(len(data), sizes.batch, device, before.calls)
    while images < sizes.teacher_images and clock.left > 0:
        index, generator = next(rows)
        seen = data[index]
        with autocast(device):
            loss = loss_of(called, augmented(seen.pixels, 0, generator), seen.labels, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        images += sizes.batch
        follow(averaged, network, sizes.batch, images)
        if images // sizes.batch % LOG == 0:
            rate = (images - before.images) / (time.monotonic() - begun)
            print(f"teacher: {images:,} pictures, loss {loss.item():.4f}, {rate:,.0f} a second", flush=True)
    progress = Progress(images, before.seconds + time.monotonic() - begun, before.calls + 1)
    save_teacher(averaged, folder, progress)
    return progress


@torch.no_grad()
def follow(averaged: nn.Module, network: nn.Module, batch: int, images: int) -> None:
    """One update of the average. images: seen in all."""
    decay = 0.5 ** (batch / min(EMA_IMAGES, EMA_SHARE * images))
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def save_teacher(network: UNet2DModel, folder: Path, progress: Progress) -> None:
    """The pipeline folder, in half precision. Weights that are not finite are not written."""
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise SystemExit(f"the teacher's weights are not finite after {progress.images:,} pictures: {folder} is "
                         "left as it was. A lower teacher_lr may help")
    pipeline = ConsistencyModelPipeline(network.float(),
                                        CMStochasticIterativeScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX,
                                                                                        sigma_data=SIGMA_DATA))

    def write(aside: Path) -> None:
        internals.save_pipeline(pipeline, aside, torch.float16)
        (aside / "progress.json").write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
    _written(folder, write)


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Written aside, then put in the place of what was there."""
    aside = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(aside)
    if path.is_dir():
        shutil.rmtree(path)
    aside.replace(path)
