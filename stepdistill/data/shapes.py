"""Shapes: captioned pictures of two objects, a pure function of a seed.

Every picture shows two shaded objects that cast a shadow on a patterned background. The caption names the
objects, their relation and the background; position, size, rotation, light, and the pattern's phase, period and
angle are in no caption, so that the distribution behind one caption is wide and a sampler must commit step by step.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 32                         # pixels a side
SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLOURS = {"red": (0.90, 0.12, 0.12), "green": (0.15, 0.80, 0.20), "blue": (0.20, 0.35, 1.00),
           "yellow": (0.98, 0.90, 0.15), "magenta": (0.92, 0.20, 0.88), "cyan": (0.15, 0.88, 0.92)}
GROUNDS = {"navy": (0.10, 0.12, 0.38), "maroon": (0.36, 0.09, 0.12), "olive": (0.30, 0.30, 0.08),
           "gray": (0.42, 0.42, 0.44)}
PATTERNS = ("plain", "striped", "checkered", "dotted")
RELATIONS = ("left of", "right of", "above", "below")

# What a picture shows, slot by slot. `first` is the object at the left, or at the top.
SLOTS: dict[str, tuple[str, ...]] = {
    "axis": ("horizontal", "vertical"),
    "first_shape": SHAPES, "first_colour": tuple(COLOURS),
    "second_shape": SHAPES, "second_colour": tuple(COLOURS),
    "ground": tuple(GROUNDS), "pattern": PATTERNS,
}
UNCAPTIONED = ("along_1", "along_2", "across", "across_1", "across_2", "radius_1", "radius_2", "turn_1", "turn_2",
          "light", "phase_x", "phase_y", "period", "angle", "reverse")


@dataclass(frozen=True)
class Scenes:
    """attributes: (B, 7) int64, one column per entry of SLOTS; uncaptioned: (B, 15) float64 in [0, 1), as in
    UNCAPTIONED."""

    attributes: Tensor
    uncaptioned: Tensor

    def __len__(self) -> int:
        return len(self.attributes)


def scatter(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of 64-bit words that scatters neighbours (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniforms(ids: np.ndarray, seed: int, count: int) -> np.ndarray:
    """(B, count) float64 in [0, 1), a function of (seed, id, column) alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = scatter(np.uint64(seed) * golden + golden)
        row = scatter(ids.astype(np.uint64) * golden + key)[:, None]
        bits = scatter(row + (np.arange(count, dtype=np.uint64)[None] + np.uint64(1)) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def scenes(ids: Tensor, seed: int = 0) -> Scenes:
    """ids: (B,) int64, any non-negative numbers. The same (seed, id) is the same scene for ever."""
    counts = np.array([len(values) for values in SLOTS.values()])
    u = _uniforms(ids.cpu().numpy(), seed, len(counts) + len(UNCAPTIONED))
    attributes = np.floor(u[:, : len(counts)] * counts).astype(np.int64)
    same = attributes[:, 1] * len(COLOURS) + attributes[:, 2] == attributes[:, 3] * len(COLOURS) + attributes[:, 4]
    attributes[same, 4] = (attributes[same, 4] + 1) % len(COLOURS)      # two objects that a caption can tell apart
    return Scenes(torch.from_numpy(attributes), torch.from_numpy(u[:, len(counts):]))


def captions(scene: Scenes) -> list[str]:
    """One sentence a scene. Half of them name the second object first, with the relation turned round."""
    texts = []
    reverse = scene.uncaptioned[:, UNCAPTIONED.index("reverse")] < 0.5
    for row, turned in zip(scene.attributes.tolist(), reverse.tolist()):
        axis, shape_1, colour_1, shape_2, colour_2, ground, pattern = (
            values[i] for values, i in zip(SLOTS.values(), row))
        first, second = f"a {colour_1} {shape_1}", f"a {colour_2} {shape_2}"
        forth, back = ("left of", "right of") if axis == "horizontal" else ("above", "below")
        pair = f"{second} {back} {first}" if turned else f"{first} {forth} {second}"
        texts.append(f"{pair} on a {pattern} {ground} background")
    return texts


def attributes_of(prompt: str) -> Tensor | None:
    """The slots that a caption of this grammar asks for, (7,) int64; None for any other text."""
    words = prompt.lower().replace("left of", "left").replace("right of", "right").split()
    if len(words) != 12 or words[0] != "a" or words[4] != "a" or words[7:9] != ["on", "a"] or words[11] != "background":
        return None
    (_, colour_1, shape_1, relation, _, colour_2, shape_2), (pattern, ground) = words[:7], words[9:11]
    if relation in ("right", "below"):
        shape_1, colour_1, shape_2, colour_2 = shape_2, colour_2, shape_1, colour_1
    axis = {"left": "horizontal", "right": "horizontal", "above": "vertical", "below": "vertical"}.get(relation)
    found = (axis, shape_1, colour_1, shape_2, colour_2, ground, pattern)
    if any(value not in values for value, values in zip(found, SLOTS.values())):
        return None
    return torch.tensor([values.index(value) for value, values in zip(found, SLOTS.values())])


def render(scene: Scenes, size: int | tuple[int, int] = SIZE) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1], anti-aliased by signed distances. size: pixels of a side, or height and width,
    of which the shorter one holds the scene and the longer one more of its ground."""
    u = {name: scene.uncaptioned[:, i].float() for i, name in enumerate(UNCAPTIONED)}
    a = {name: scene.attributes[:, i] for i, name in enumerate(SLOTS)}
    sides = (size, size) if isinstance(size, int) else size
    pixels = [(torch.arange(side) + 0.5 - side / 2) * (SIZE / min(sides)) + SIZE / 2 for side in sides]
    y, x = (g[None] for g in torch.meshgrid(*pixels, indexing="ij"))
    light = 2 * math.pi * u["light"]
    towards = (light.cos()[:, None, None], light.sin()[:, None, None])

    image = _ground(a, u, x, y)
    objects = [_placed(a, u, i, x, y) for i in (1, 2)]
    for local_x, local_y, radius, shape, _ in objects:                   # both shadows lie under both objects
        shifted = _distance(shape, local_x + 1.6 * towards[0], local_y + 1.6 * towards[1], radius)
        image = image * (1 - 0.55 * _cover(shifted, 1.2))[:, None]
    for local_x, local_y, radius, shape, colour in objects:
        shade = 0.80 + 0.24 * ((local_x * towards[0] + local_y * towards[1]) / radius).clamp(-1, 1)
        paint = (colour[:, :, None, None] * shade[:, None]).clamp(0, 1)
        cover = _cover(_distance(shape, local_x, local_y, radius), 0.5)[:, None]
        image = image * (1 - cover) + paint * cover
    return image.clamp(0, 1) * 2 - 1


def _placed(a: dict, u: dict, i: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coordinates relative to object i, its radius, shape and colour; pixels are those of a 32-pixel picture."""
    along = (7.8 if i == 1 else 21.8) + 2.4 * u[f"along_{i}"]
    across = 12.0 + 8.0 * u["across"] + 3.0 * (u[f"across_{i}"] - 0.5)
    upright = a["axis"] == 1
    centre_x, centre_y = torch.where(upright, across, along), torch.where(upright, along, across)
    radius = (5.6 + 0.8 * u[f"radius_{i}"])[:, None, None]
    side = ("first", "second")[i - 1]
    turn = 0.3 * (u[f"turn_{i}"] - 0.5)
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    dx, dy = x - centre_x[:, None, None], y - centre_y[:, None, None]
    colour = torch.tensor(list(COLOURS.values()))[a[f"{side}_colour"]]
    return dx * cos + dy * sin, dy * cos - dx * sin, radius, a[f"{side}_shape"], colour


def _distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the outline of each object, negative inside. shape: (B,); x, y: (B, H, W)."""
    length = (x * x + y * y).sqrt()
    box = torch.maximum(x.abs(), y.abs())
    arms = torch.minimum(torch.maximum(x.abs() - r, y.abs() - 0.36 * r), torch.maximum(y.abs() - r, x.abs() - 0.36 * r))
    # y grows downwards: the apex points up
    triangle = torch.maximum(0.866 * x.abs() + 0.5 * -y - 0.55 * r, y - 0.75 * r)
    outlines = torch.stack([length - r, box - 0.86 * r, triangle, (length - 0.72 * r).abs() - 0.28 * r, arms])
    return outlines.gather(0, shape[None, :, None, None].expand(1, *length.shape))[0]


def _cover(distance: Tensor, softness: float) -> Tensor:
    """1 inside, 0 outside, linear over 2 `softness` pixels."""
    return (0.5 - distance / (2 * softness)).clamp(0, 1)


def _ground(a: dict, u: dict, x: Tensor, y: Tensor) -> Tensor:
    """The background, (B, 3, H, W) in [0, 1]: its colour, brightened where the pattern is."""
    direction = (4 * u["angle"]).floor()                # one of four, and a little off it
    angle = (math.pi / 4 * (direction + 0.2 * (4 * u["angle"] - direction - 0.5)))[:, None, None]
    frequency = (2 * math.pi / (5.8 + 1.2 * u["period"]))[:, None, None]
    px, py = (2 * math.pi * u[f"phase_{axis}"][:, None, None] for axis in "xy")
    across = ((x * angle.cos() + y * angle.sin()) * frequency + px).sin()
    along = ((y * angle.cos() - x * angle.sin()) * frequency + py).sin()
    waves = torch.stack([torch.full_like(across, -1.0), across, across * along * 1.5, (across + along) - 1.0])
    wave = waves.gather(0, a["pattern"][None, :, None, None].expand(1, *across.shape))[0]
    bright = (0.5 + 1.2 * wave).clamp(0, 1)
    colour = torch.tensor(list(GROUNDS.values()))[a["ground"]][:, :, None, None]
    return (colour * (1 + 0.75 * bright[:, None])).clamp(0, 1)
