"""Folders of videos with captions: animations, films, and folders of frames."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import RequestError
from .cache import fingerprint
from .decoding import check_count, readable
from .folders import captions_of, digest_of, files_in
from .picture import Size, as_tensor, named, read_picture, upright

ANIMATIONS = (".gif", ".webp")
FILMS = (".mp4", ".webm", ".mov", ".mkv")         # which PyAV decodes
FRAMES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
KINDS = f"{', '.join(kind[1:] for kind in (*ANIMATIONS, *FILMS))} files, or folders of numbered pictures"


@dataclass(frozen=True)
class VideoImages:
    """A folder of videos, of which the first `frames` frames count, at the rate that they have. They are scaled to
    cover their size and cropped about the centre. sides: the height and width of each.

    A video is a .gif or .webp file, a film that PyAV reads, or a folder that holds its frames as pictures, in the order
    of their names. Captions are those of `FolderImages`: beside a folder NAME lies NAME.txt.
    """

    size: Size
    frames: int
    files: tuple[Path, ...]
    texts: tuple[str, ...]
    sides: tuple[tuple[int, int], ...]
    name: str
    key: str

    @classmethod
    def open(cls, folder: Path, size: Size, frames: int, count: int | None = None) -> VideoImages:
        """Reads all captions, and decodes every video once, so that what is missing, damaged or too short is found
        before training. count: takes the first ones in the order of their paths."""
        if not folder.is_dir():
            raise RequestError(f"videos: '{folder}' is not a folder. Give a folder of {KINDS}.")
        files = video_files(folder)
        if not files:
            raise RequestError(f"videos: '{folder}' holds no video. Put {KINDS} there, each with a caption.")
        check_decoder(files)
        captions = captions_of(folder, files, is_video=True)
        check_count(count, len(files), folder)
        files, captions = files[:count], captions[:count]
        names = [path.relative_to(folder).as_posix() for path in files]
        marks = [f"{name} {fingerprint(path)}" for name, path in zip(names, files, strict=True)]
        decoded = digest_of(files, [f"{mark}, {frames} frames" for mark in marks])
        kept = readable(decoded, names, lambda i: read_video(files[i], frames), str(folder))
        files, captions, marks = ([of[i] for i in kept] for of in (files, captions, marks))
        return cls(size, frames, tuple(files), tuple(captions), tuple(kept.values()), folder.name,
                   digest_of(files, marks, captions))

    @property
    def count(self) -> int:
        return len(self.files)

    @property
    def identity(self) -> dict[str, object]:
        return {"videos": self.name, "files": self.count, "digest": self.key, "size": self.size, "frames": self.frames}

    def captions(self, indices: Tensor) -> list[str]:
        return [self.texts[i] for i in indices.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, F, 3, H, W) float32 in [-1, 1]."""
        return torch.stack([read_video(self.files[i], self.frames, self.size) for i in indices.tolist()])


def video_files(folder: Path) -> list[Path]:
    """Every video under a folder, by name: animations and films, and the folders in it that hold frames."""
    found = set()
    for path in files_in(folder):
        if path.suffix.lower() in (*ANIMATIONS, *FILMS):
            found.add(path)
        elif path.suffix.lower() in FRAMES and path.parent != folder:
            found.add(path.parent)
    return sorted(found)


def check_decoder(files: Sequence[Path]) -> None:
    """RequestError for films without the library that decodes them."""
    films = [path for path in files if path.suffix.lower() in FILMS and path.is_file()]
    if films and find_spec("av") is None:
        raise RequestError(f"videos: '{films[0]}' is a film, which PyAV decodes, and that is not installed: pip "
                           "install 'stepdistill[video]', or give folders of frames, or .gif or .webp animations")


def read_video(path: Path, frames: int, size: Size | None = None) -> Tensor:
    """The first frames, (F, 3, H, W) float32 in [-1, 1], of their own size unless given. RequestError for what cannot
    be read, and for fewer."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAMES)
        pictures = [read_picture(file, size) for file in files[:frames]]
        if len({picture.shape for picture in pictures}) > 1:
            raise RequestError(f"videos: the frames in '{path}' are of several sizes")
    else:
        with named(path):
            pictures = [as_tensor(picture, size)
                        for picture in islice(_animation(path) if path.suffix.lower() in ANIMATIONS
                                              else _film(path), frames)]
    if len(pictures) < frames:
        raise RequestError(f"videos: '{path}' has {len(pictures)} frames, fewer than {frames}: let the recipe's "
                           "frames be fewer, or remove it")
    return torch.stack(pictures)


def _animation(path: Path) -> Iterator[Image.Image]:
    with Image.open(path, formats=("GIF", "WEBP")) as opened:
        for i in range(opened.n_frames):
            opened.seek(i)
            yield upright(opened)


def _film(path: Path) -> Iterator[Image.Image]:
    import av

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()
    except (av.FFmpegError, IndexError) as error:              # IndexError: it has no pictures
        raise ValueError(error) from error
