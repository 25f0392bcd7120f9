"""What may happen to a training's surroundings ends it cleanly: a message, and the last checkpoint as it was."""
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import stepdistill
from stepdistill.data.images import read_picture
from stepdistill.errors import RequestError, Stopped
from stepdistill.training import checkpoints

ROOT = Path(__file__).parents[2]
TOY = {"method": "lcm", "teacher": "assets/toy", "student": {"lora": {"rank": 2}}, "steps": 2, "guidance": 2.0,
       "data": {"images": "assets/toy", "batch": 4}, "train": {"updates": 6, "checkpoint_every": 2, "log_every": 1}}


def fails(monkeypatch: pytest.MonkeyPatch, code: int, from_step: int) -> None:
    """Every write to the disk of a checkpoint from this step on: the system's own error. Root may write where others
    may not, so that rights alone would not show it."""
    plain = checkpoints.save_file

    def save_file(tensors, path, *rest):
        if int(path.parent.name.split("step-")[1][:6]) >= from_step:
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code), str(path))
        return plain(tensors, path, *rest)
    monkeypatch.setattr(checkpoints, "save_file", save_file)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more_keeps_the_last_checkpoint(tmp_path, monkeypatch, code):
    run = tmp_path / "run"
    fails(monkeypatch, code, 4)
    with pytest.raises(Stopped, match="the checkpoint of step 4 could not be "
                       f"written.*{os.strerror(code)}.*step-000002 is kept"):
        stepdistill.train(TOY, out=run)
    assert ([path.name for path in checkpoints.found(run)] == ["step-000002"]
            and checkpoints.load(checkpoints.latest(run)))
    assert not [path for path in run.rglob("*") if path.name.startswith(".")]
    monkeypatch.undo()
    assert checkpoints.latest(stepdistill.train(run / "recipe.yaml", out=run, resume=True)).name == "step-000006"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_picture_keeps_the_last_checkpoint(tmp_path, monkeypatch, code):
    def cloud(_, path):
        raise OSError(code, os.strerror(code), str(path))
    monkeypatch.setattr("stepdistill.run.preview.cloud", cloud)
    with pytest.raises(Stopped, match=f"stopped after step 6: .*{os.strerror(code)}.*step-000006 is kept"):
        stepdistill.train(TOY, out=tmp_path / "run")
    assert checkpoints.load(checkpoints.latest(tmp_path / "run"))


@pytest.fixture
def pictures(tmp_path: Path, tiny_teacher: Path) -> dict:
    """A recipe of a tiny teacher on six pictures."""
    for i in range(6):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"picture {i}")
    return TOY | {"teacher": str(tiny_teacher), "data": {"images": str(tmp_path / "pictures"), "batch": 4},
                  "evaluate": {"nfe": [1]}}


def test_a_picture_that_vanishes_keeps_the_last_checkpoint(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))

    def on_step(step: int) -> None:
        if step == 3:
            for path in (tmp_path / "pictures").glob("*.png"):
                path.unlink()
    with pytest.raises(RequestError, match="cannot be read as an image .*No such file.*Replace or remove it"):
        stepdistill.train(pictures, out=tmp_path / "run", on_step=on_step)
    assert (checkpoints.latest(tmp_path / "run").name == "step-000002"
            and checkpoints.load(checkpoints.latest(tmp_path / "run")))


def test_a_picture_of_12000_by_12000_is_read(tmp_path):
    """144 million pixels, of one colour but for its middle: what is cut out of it is right."""
    image = Image.new("L", (12_000, 12_000), 255)
    image.paste(0, (3000, 3000, 9000, 9000))
    image.save(tmp_path / "large.png", compress_level=1)
    found = read_picture(tmp_path / "large.png", 8)
    assert (found.shape == (3, 8, 8) and torch.allclose(found[:, 3:5, 3:5], torch.tensor(-1.0), atol=0.02)
            and torch.allclose(found[:, 0], torch.tensor(1.0)))


WORKER = """
import os, sys
import stepdistill
from stepdistill import cli
from stepdistill.parallel import rank
recipe = {recipe!r}
def on_step(step):
    if step == 3 and rank() == 1:
        os.kill(os.getpid(), {signal})
cli.answer(lambda: stepdistill.train(recipe, out="run", on_step=on_step))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_process_of_two_that_dies_ends_the_other_cleanly(tmp_path):
    """Started by hand, with nobody who would end the other one."""
    (tmp_path / "worker.py").write_text(WORKER.format(recipe=TOY, signal=int(signal.SIGKILL)))
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": "29611",
              "WORLD_SIZE": "2"}
    processes = [subprocess.Popen([sys.executable, "worker.py"], cwd=tmp_path, env=os.environ | common
                                  | {"RANK": str(i), "LOCAL_RANK": str(i)},
                                  stderr=subprocess.PIPE, text=True) for i in range(2)]
    began, (_, said) = time.perf_counter(), processes[0].communicate(timeout=500)
    processes[1].communicate()
    assert processes[1].returncode == -signal.SIGKILL and processes[0].returncode == 1, said[-3000:]
    assert "another process of this training has ended" in said and "Traceback" not in said, said[-3000:]
    assert ("step-000002 is kept" in said and checkpoints.load(checkpoints.latest(tmp_path / "run"))
            and time.perf_counter() - began < 500)
