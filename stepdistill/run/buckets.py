"""The sizes that a recipe's pictures have, where it asks for buckets."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..data.buckets import Bucketed, Chosen, Sides, farthest, filled, standard, told
from ..data.cache import Cache
from ..data.datasets import Encoders, Samples, cached_images, live_images, prompts_only
from ..data.images import BothWays, FolderImages, Images, ShapesImages
from ..data.prompts import Captions
from ..data.shards import ShardImages
from ..data.sources import Outside
from ..data.tables import TableImages
from ..data.videos import VideoImages
from ..errors import RequestError
from ..models.families import Family
from ..models.teacher import Teacher, load_teacher
from ..recipe import Recipe
from ..recipe.values import buckets_of, size_of
from .sources import source_of

Pictures = FolderImages | ShardImages | TableImages | VideoImages       # which are of some size before they are scaled


def bucket_sizes(recipe: Recipe, teacher: Teacher) -> tuple[Sides, ...]:
    """Height and width of each bucket, the teacher's own first; of a recipe without buckets none. RequestError, with
    the recipe's line, for a size that the teacher does not draw."""
    sizes = buckets_of(recipe.resolution)
    if sizes is None:
        return ()
    with recipe.blaming("resolution", "asks for buckets, which cannot be"):
        multiple = teacher.family.multiple(teacher.parts)
        sizes = sizes or standard(own_sides(teacher), multiple)
        for size in sizes:
            teacher.shape_at(size)
        if len(sizes) == 1:
            height, width = sizes[0]
            raise RequestError(f"of about the area of {height} x {width} pixels, with sides of a multiple of {multiple}"
                               ", there is but one: list sizes, such as {buckets: [[1024, 1024], [832, 1216]]}, or "
                               "leave it out")
    return sizes


def own_sides(teacher: Teacher) -> Sides:
    """Height and width of its pictures in pixels, of a teacher that draws several sizes."""
    least = teacher.family.multiple(teacher.parts)
    pixels = least // teacher.shape_at((least, least))[-1]
    height, width = (pixels * side for side in teacher.latent_shape[-2:])
    return height, width


def check_buckets(recipe: Recipe, family: Family) -> tuple[Sides, ...]:
    """As `bucket_sizes`, by the teacher's configs alone. RequestError for a family of one size, and for data that are
    not cut to several."""
    if buckets_of(recipe.resolution) is None:
        return ()
    if family.multiple is None:
        raise recipe.refuse("resolution", f"asks for buckets, but a teacher of the family {family.name} draws one "
                            "size alone: leave it out")
    if recipe.data.made is not None:
        raise recipe.refuse("resolution", f"asks for buckets, but data.{recipe.data.kind} are the teacher's own "
                            "pictures, which it makes of one size: give one, such as 768 or [832, 1216], or take "
                            "prompts or images")
    with recipe.blaming("resolution", "asks for buckets, which cannot be"):
        teacher = load_teacher(source_of(recipe), device="meta", resolution=size_of(recipe.resolution),
                               frames=recipe.frames)
    return bucket_sizes(recipe, teacher)


def at_largest(recipe: Recipe, family: Family) -> Recipe:
    """A recipe of buckets with the size of most pixels in their place, whose passes take most memory; another as it
    is."""
    sizes = check_buckets(recipe, family)
    return recipe.model_copy(update={"resolution": max(sizes, key=lambda size: size[0] * size[1])}) if sizes else recipe


def views(teacher: Teacher, sizes: tuple[Sides, ...]) -> list[Teacher]:
    """A teacher as it is, and, of buckets, at the aspect that is farthest from its own: what holds at both is not of
    squares alone."""
    return [teacher, *([teacher.at(farthest(sizes))] if sizes else [])]


def bucketed(recipe: Recipe, teacher: Teacher, source: Captions, encoders: Encoders, cache: Cache) -> Bucketed:
    """The data of a recipe with buckets: its pictures, each in the bucket of its aspect; prompts, and pictures that are
    made at any size, are in all of them."""
    sizes, data = bucket_sizes(recipe, teacher), recipe.data
    if data.kind == "prompts":
        samples = prompts_only(source, encoders, cache)
        return _at(teacher, [(size, samples, told([size], size)) for size in sizes], own=False)
    keep = partial(cached_images if data.cache else live_images, encoders=encoders, cache=cache)
    way = BothWays if data.flip else lambda images: images
    if not isinstance(source, Pictures):
        return _at(teacher, [(size, keep(way(_resized(source, size))), told([size], size)) for size in sizes],
                   own=False)
    parts = []
    for size, numbers in filled(source.sides, sizes, data.batch):
        rows = told([source.sides[i] for i in numbers.tolist()], size)
        parts.append((size, keep(way(Chosen(replace(source, size=size), numbers))), rows.repeat_interleave(2, 0)
                      if data.flip else rows))
    return _at(teacher, parts, own=True)


def _resized(images: Images, size: Sides) -> Images:
    """Of what makes its pictures at any size."""
    if isinstance(images, Outside):
        return replace(images, source=images.open(size))
    if not isinstance(images, ShapesImages):
        raise TypeError(f"pictures of a {type(images).__name__} are of one size")
    return replace(images, size=size)


def _at(teacher: Teacher, parts: list[tuple[Sides, Samples, Tensor]], own: bool) -> Bucketed:
    """Samples by size, with what is told of each picture's, a row for all or one a sample."""
    return Bucketed(tuple(_telling(teacher, samples, rows) for _, samples, rows in parts),
                    tuple(teacher.shape_at(size) for size, *_ in parts), own)


def _telling(teacher: Teacher, samples: Samples, rows: Tensor) -> Samples:
    """The same samples, their conditions told of the sizes."""
    of, text = lambda indices: rows.expand(len(indices), -1) if len(rows) == 1 else rows[indices], samples.text
    return replace(samples, text=lambda indices: teacher.sized(text(indices), of(indices)))

