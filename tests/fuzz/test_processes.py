"""Twenty bad requests as real processes: what a shell sees."""
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from .command import Done, check_message

pytestmark = pytest.mark.long
TOY = {"method": "lcm", "teacher": "assets/toy", "steps": 2, "data": {"images": "assets/toy", "batch": 4},
       "train": {"updates": 1}}


def written(name: str, data: bytes | dict):
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return make


def folder_of(name: str, **files: bytes):
    def make(folder: Path) -> None:
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file.replace("__", ".")).write_bytes(data)
    return make


REQUESTS = {
    "no recipe": (None, ("train", "nowhere.yaml")),
    "no text": (written("a.yaml", b"\xff\xfe\0"), ("plan", "a.yaml")),
    "nothing": (written("a.yaml", b""), ("train", "a.yaml")),
    "brackets": (written("a.yaml", b"[" * 50_000), ("plan", "a.yaml")),
    "python": (written("a.yaml", b"a: !!python/object/apply:os.system [id]"), ("train", "a.yaml")),
    "a pickle": (written("a.yaml", b"\x80\x02cos\nsystem\n(S'id'\ntR."), ("train", "a.yaml")),
    "an unknown entry": (written("a.yaml", TOY | {"nothing": 1}), ("train", "a.yaml")),
    "a wrong kind": (written("a.yaml", TOY | {"steps": [1]}), ("train", "a.yaml")),
    "a wrong number": (written("a.yaml", TOY | {"train": {"updates": -1}}), ("train", "a.yaml")),
    "an escape": (written("a.yaml", TOY | {"method": "\x1b[31mlcm"}), ("train", "a.yaml")),
    "a teacher that is a folder": (folder_of("t"), ("sample", "t", "--prompt", "a")),
    "a teacher without parts": (folder_of("t", model_index__json=b'{"_class_name": "StableDiffusionPipeline"}'),
                                ("sample", "t", "--prompt", "a")),
    "a teacher of a class": (folder_of("t", model_index__json=b'{"_class_name": "os.system"}'),
                             ("sample", "t", "--prompt", "a")),
    "an index of brackets": (folder_of("t", model_index__json=b"[" * 90_000), ("sample", "t", "--prompt", "a")),
    "an export of nothing": (folder_of("e", stepdistill__json=b'{"method": "lcm"}'), ("sample", "e", "--prompt", "a")),
    "a run of nothing": (folder_of("r", recipe__yaml=b"{}"), ("export", "r")),
    "a run that is none": (folder_of("r"), ("export", "r")),
    "prompts of nothing": (written("p.txt", b""), ("bench", "./nowhere", "--prompts", "p.txt")),
    "pictures that are none": (folder_of("p", a__png=b"%!PS", a__txt=b"a"), ("bench", "./nowhere", "--reference", "p")),
    "a number that is none": (None, ("sample", "./nowhere", "--prompt", "a", "--steps", "1e9")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_ends_as_a_shell_expects(stepdistill, tmp_path, name):
    make, arguments = REQUESTS[name]
    if make is not None:
        make(tmp_path)
    before, began = sorted(tmp_path.rglob("*")), time.perf_counter()
    ended = stepdistill(*arguments, timeout=200)
    assert ended.returncode == 2 and time.perf_counter() - began < 200, ended.stderr
    check_message(Done(arguments, 2, ended.stdout, ended.stderr))
    assert sorted(tmp_path.rglob("*")) == before
