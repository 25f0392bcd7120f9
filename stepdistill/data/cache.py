"""What is made once and read ever after: rows of tensors, a text each, in safetensors files on disk.

A store is a folder named after a hash of all that made it, so that whatever changes leads to another store. Its files
hold a fixed number of rows; each is written aside, synced and renamed, so that a file is there whole or not at all, and
work that was interrupted goes on from the files that it finished. A file's digest is checked when it is opened, and
what is damaged is made again. Rows are mapped into memory, never loaded. A store may also lie in a folder that a person
named, which then must say of itself (about.json) that it was made as asked. One process at a time makes what is
missing, and others wait for it.
"""
from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shorten
from typing import Callable, Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .. import parallel
from ..errors import RequestError
from ..files import records
from ..files.digests import DIGEST, digest
from ..files.lock import LOCK, locked
from ..files.whole import sweep, write_whole

ABOUT = "about.json"
ROWS = "rows"                     # the one entry of a file's metadata: of several the order is left to chance
FORMAT = 1                        # raise it when the files of old can no longer be read
log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]                             # (what is made, rows done, rows in all)
Make = Callable[[Tensor], tuple[Mapping[str, Tensor], list[str]]]    # indices (B,) -> tensors (B, ...), B texts


def silent(what: str, done: int, total: int) -> None:
    """The report of those who do not watch."""


def default_root() -> Path:
    """$STEPDISTILL_CACHE, or ~/.cache/stepdistill."""
    return Path(os.environ.get("STEPDISTILL_CACHE") or Path.home() / ".cache" / "stepdistill")


def fingerprint(source: str | Path) -> str:
    """Changes when a file under the folder `source` does: its name, size or time of change. Another text is its own
    print."""
    folder = Path(source)
    if not folder.exists():
        return str(source)
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _hash(stats)


def contents(source: str | Path) -> str:
    """The print of a pipeline by what its files hold: the same on every machine, and slower to take than `fingerprint`.

    Of a folder, the files of its parts and model_index.json count; another text is its own print.
    """
    folder = Path(source)
    if not folder.exists():
        return str(source)
    parts = [folder / "model_index.json", *folder.glob("*/**/*")]
    files = [folder] if folder.is_file() else sorted(path for path in parts if path.is_file())
    return _hash([("" if path == folder else path.relative_to(folder).as_posix(), _hash_of_file(path))
                  for path in files])


def _hash_of_file(path: Path) -> str:
    made = hashlib.blake2b(digest_size=12)            # as it stands in the about.json of pairs that are kept
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def _hash(identity: object) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Store:
    """Rows 0 .. count - 1, memory-mapped, `per_file` in each of `files` but perhaps the last. texts: one a row."""

    files: tuple[Mapping[str, Tensor], ...]
    texts: tuple[str, ...]
    per_file: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files[0])

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """indices: (B,) int64, on the CPU. Returns (B, ...), on the CPU; numbers stored in half precision come in
        float32."""
        rows = torch.stack([self.files[i // self.per_file][name][i % self.per_file] for i in indices.tolist()])
        return rows.float() if rows.is_floating_point() else rows


@dataclass(frozen=True)
class StoreSpec:
    """Where a store lies or is to lie, in JSON everything that its rows depend on, and the tensors that its files
    hold."""

    folder: Path
    about: Mapping[str, object]
    names: frozenset[str]

    @property
    def files(self) -> list[tuple[Path, range]]:
        """The files that belong there, each with its rows."""
        count, per_file = self.about["count"], self.about["per_file"]
        return [(self.folder / f"{i:05d}.safetensors", range(low, min(low + per_file, count)))
                for i, low in enumerate(range(0, count, per_file))]

    def made(self) -> int:
        """How many of the rows lie there."""
        return sum(len(rows) for path, rows in self.files if self.opened(path, rows) is not None)

    def opened(self, path: Path, rows: range) -> tuple[dict[str, Tensor], list[str]] | None:
        """The tensors and texts of one of its files, mapped; None if it is not there, or (which is said) damaged."""
        return _open(path, len(rows), self.names) if path.is_file() else None

    def found_otherwise(self) -> list[str]:
        """What the folder says of itself, entry by entry, where that is not what is asked; of an empty folder, nothing.

        RequestError for a folder of other files.
        """
        if not self.folder.exists() or self.folder.is_dir() and all(path.name.startswith(".")
                                                                    for path in self.folder.iterdir()):
            return []                                  # hidden ones: a lock, and what a killed write left
        found = flat(records.read(self.folder / ABOUT, dict[str, object], f"'{self.folder}' holds other files than "
                                  "a cache's: name another folder"))
        wanted = flat(json.loads(json.dumps(self.about)))
        return [f"{name} is {shorten(found.get(name))} there and {shorten(wanted.get(name))} here"
                for name in found | wanted if found.get(name) != wanted.get(name)]


def flat(table: Mapping[str, object], path: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    return {key: value for name, inner in table.items()
            for key, value in (flat(inner, f"{path}{name}.") if isinstance(inner, dict)
                               else {f"{path}{name}": inner}).items()}


@dataclass(frozen=True)
class Cache:
    """Opens stores under `root`, and makes what is missing in them.

    dtype: of the floating-point numbers on disk. batch: how many rows are made at once. report: is called with the
    progress.
    """

    root: Path = field(default_factory=default_root)
    dtype: torch.dtype = torch.float32
    batch: int = 64
    report: Report = silent

    def store(self, name: str, identity: Mapping[str, object], count: int, tensors: Iterable[str], make: Make,
              per_file: int = 2000) -> Store:
        """The store of `count` rows that `make` makes; `identity` (JSON) says everything that its rows depend on.
        tensors: their names."""
        return self.fill(self.spec(name, identity, count, tensors, per_file), make)

    def spec(self, name: str, identity: Mapping[str, object], count: int, tensors: Iterable[str], per_file: int = 2000,
             folder: Path | None = None) -> StoreSpec:
        """Where that store lies: under `root`, unless a folder is named."""
        about = {"format": FORMAT, "name": name, "count": count, "dtype": str(self.dtype),
                 "per_file": per_file, **identity}
        return StoreSpec(self.root / f"{name}-{_hash(about)}" if folder is None else folder, about, frozenset(tensors))

    def fill(self, spec: StoreSpec, make: Make) -> Store:
        """The store, once `make` has made the rows that are missing. Several ranks, all of which must come here, share
        the files."""
        files = {path: spec.opened(path, rows) for path, rows in spec.files}
        with ExitStack() as held:
            if parallel.rank() == 0 and None in files.values():
                self._prepare(spec, held)
            parallel.barrier()                         # all have looked, and what another process was making is there
            files |= {path: spec.opened(path, rows) for path, rows in spec.files if files[path] is None}
            # as rank 0 has it, and before any rank makes a file: the shares are of one list
            missing = parallel.gather_objects([(path, rows) for path, rows in spec.files if files[path] is None])[0]
            own = parallel.share(missing)
            for i, (path, rows) in enumerate(own):
                tensors, texts = self._make(spec.about["name"], rows, spec.about["count"], make)
                to_come = len(missing) - i * parallel.world_size()
                _write(path, save(tensors, {ROWS: json.dumps({"texts": texts, DIGEST: digest(tensors, texts)})}),
                       files_to_come=to_come)
            parallel.barrier()
        files |= {path: _open(path, len(rows), spec.names) for path, rows in spec.files if files[path] is None}
        return Store(tuple(tensors for tensors, _ in files.values()),
                     tuple(text for _, texts in files.values() for text in texts),
                     spec.about["per_file"])

    @torch.no_grad()
    def _make(self, name: str, rows: range, count: int, make: Make) -> tuple[dict[str, Tensor], list[str]]:
        chunks: list[Mapping[str, Tensor]] = []
        texts: list[str] = []
        for low in range(rows.start, rows.stop, self.batch):
            indices = torch.arange(low, min(low + self.batch, rows.stop))
            made, new_texts = make(indices)
            chunks.append({key: self._narrow(name, key, value, low) for key, value in made.items()})
            texts.extend(new_texts)
            self.report(name, int(indices[-1]) + 1, count)
        return {key: torch.cat([chunk[key] for chunk in chunks]).contiguous() for key in chunks[0]}, texts

    def _narrow(self, name: str, key: str, value: Tensor, low: int) -> Tensor:
        if not value.is_floating_point():
            return value.cpu()
        value = value.to(device="cpu", dtype=self.dtype)
        if not value.isfinite().all():
            raise RequestError(f"cache: {name} from row {low} on: '{key}' holds numbers that are not finite in "
                               f"{self.dtype}. "
                               "Some autoencoders overflow in half precision: load the teacher in float32 and cache in "
                               "float32.")
        return value

    def _prepare(self, spec: StoreSpec, held: ExitStack) -> None:
        """Holds the store's folder until `held` ends, clears what killed writes left there, and says what it is."""
        try:
            held.enter_context(locked(spec.folder / LOCK, f"the cache {spec.folder}", wait=True))
            sweep(spec.folder)
            write_whole(spec.folder / ABOUT, json.dumps(spec.about, indent=1).encode())
        except OSError as error:
            raise RequestError(f"cache: cannot write into '{spec.folder}' ({error.strerror}). Set "
                               "STEPDISTILL_CACHE, or `cache` in the "
                               "recipe, to a folder that can be written, on a disk with room.") from None


def _open(path: Path, rows: int, names: frozenset[str]) -> tuple[dict[str, Tensor], list[str]] | None:
    """The tensors and texts of a file, mapped; None if it is (which is said) damaged. Files of earlier versions have no
    digest: of them the numbers are taken as they are."""
    try:
        with safe_open(path, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata() or {}
        said: records.CacheRows = records.checked(metadata[ROWS] if ROWS in metadata else f'{{"texts": '
                                                  f'{metadata.get("texts", "null")}}}', records.CacheRows)
        texts = said["texts"]
        problem = _problem(tensors, texts, rows, names, said.get(DIGEST))
    except (SafetensorError, OSError, ValueError) as error:
        problem = str(error)
    if problem is None:
        return tensors, texts
    log.warning("cache: '%s' is damaged (%s) and will be made again", path, problem)
    return None


def _problem(tensors: Mapping[str, Tensor], texts: list[str], rows: int, names: frozenset[str],
             said: str | None) -> str | None:
    if tensors.keys() != names:
        return f"it holds {', '.join(sorted(tensors)) or 'nothing'}, and should hold {', '.join(sorted(names))}"
    if len(texts) != rows or not all(tensor.dim() and len(tensor) == rows for tensor in tensors.values()):
        return f"it should hold {rows} rows"
    return ("its numbers or texts are not those that were written" if said is not None
            and digest(tensors, texts) != said else None)


def _write(path: Path, blob: bytes, files_to_come: int) -> None:
    """Writes aside, syncs, renames. A disk without room for this and the files to come is refused before it is
    filled."""
    try:
        if shutil.disk_usage(path.parent).free < len(blob) * files_to_come:
            raise OSError(errno.ENOSPC, "no space left")
        write_whole(path, blob)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise RequestError(f"cache: '{path.parent}' needs {len(blob) * files_to_come / 2**20:,.0f} MiB more, and its "
                           "disk has "
                           f"{free / 2**20:,.0f} MiB free. Make room, ask for fewer samples or a half-precision cache, "
                           "or set "
                           "STEPDISTILL_CACHE to a folder on another disk. What is finished is kept.") from None
