"""Writes an export folder aside, proves it, and only then gives it its name."""
from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from safetensors import SafetensorError

from ..diffusion.sampler import Sampler
from ..errors import RequestError
from .card import card
from .dtypes import DTYPES, chosen
from .folder import SETTINGS, read_settings
from .formats import WRITERS
from .leaving import leave
from .proof import IMAGES, TOLERANCE, Proof, prove
from .student import Student


def export_student(student: Student, to: str, out: str | Path, guidance: float | None = None,
                   dtype: str | None = None) -> Proof:
    """Writes `student` as an export folder of the form `to` ("lora", "pipeline" or "comfyui") at `out`.

    guidance: the scale of a student that is told one; a LoRA is folded at it, a pipeline takes it as its default call.
    dtype: "float16", "bfloat16" or "float32" of the weights; float16 unless given, and float32 of a pipeline.
    RequestError, with nothing at `out` changed, for what cannot be done and for an export that its proof refutes.
    """
    out = Path(out)
    if to not in WRITERS:
        raise RequestError(f"there is no export --to {to}; there are {', '.join(WRITERS)}")
    dtype = chosen(dtype, to)
    _may_write(out, student)
    call, scale = _settings(student, to, guidance)
    leaving = leave(student, to, call, scale, DTYPES[dtype])
    with _aside(out) as folder:
        weights = WRITERS[to](leaving.student, leaving.pipe, DTYPES[dtype], folder)
        student.scheduler.save_pretrained(folder / "scheduler")
        said = _said(student, type(leaving.pipe).__name__, to, call, scale, weights) | {"dtype": dtype}
        _write(folder / SETTINGS, said)
        proof = prove(leaving.student, folder, scale)
        rounding = 0.0 if leaving.unrounded is None else (proof.images - leaving.unrounded).abs().max().item()
        said["proof"] = {"difference": proof.difference, "tolerance": TOLERANCE, "images": IMAGES, "dtype": "float32",
                         "rounding": rounding}
        _write(folder / SETTINGS, said)
        (folder / "README.md").write_text(card(said, out.as_posix(), student.results, student.prompts[0]), encoding="utf-8")
        _picture(leaving.pipe, proof).save(folder / "samples.png")
    return proof


def _settings(student: Student, to: str, guidance: float | None) -> tuple[dict[str, Any], float | None]:
    """(the keyword arguments of the pipeline call, the scale that a told student is told: None for any other)."""
    call = dict(student.call)
    if not student.told:
        if guidance is not None:
            raise RequestError(f"--guidance {guidance:g} chooses the scale of a student that is told one; this student was "
                               f"not, and samples at guidance_scale={call['guidance_scale']:g}: leave --guidance out")
        return call, None
    _in_range(student, guidance)
    if to != "pipeline":
        return {**call, "guidance_scale": 1.0}, guidance
    scale = call["guidance_scale"] if guidance is None else guidance
    return {**call, "guidance_scale": scale}, scale


def _in_range(student: Student, guidance: float | None) -> None:
    if guidance is None or not isinstance(student.guidance, (tuple, list)):
        return
    low, high = student.guidance
    if not low <= guidance <= high:
        raise RequestError(f"--guidance {guidance:g} is outside what this student was trained for: choose from {low:g} to {high:g}")


def _said(student: Student, pipeline: str, to: str, call: dict[str, Any], scale: float | None, weights: str) -> dict[str, Any]:
    """What stepdistill.json says; `call` holds the literal keyword arguments of the pipeline call."""
    sampler = Sampler.of_call(student.scheduler, student.steps, student.family.schedule, call)
    return {"format": to, "pipeline": pipeline, "call": call, "steps": student.steps, "method": student.method,
            "teacher": student.teacher or student.family.source,
            "revision": student.family.revision, "role": student.role_name, "run": student.run,
            "scheduler": type(student.scheduler).__name__, "weights": weights, "told": student.told, "guidance": scale,
            "trained_guidance": student.guidance, "teacher_call": dict(student.family.call),
            "without": list(student.family.without), "global_noise": sampler.stochastic and not student.family.seeded_steps,
            "told_times": student.family.told_time(sampler.times).tolist(),
            "versions": {name: version(name) for name in ("diffusers", "peft", "torch", "transformers")}}


def _picture(pipe: DiffusionPipeline, proof: Proof) -> Any:
    pictures = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(proof.images))
    return make_image_grid(pictures, rows=1, cols=len(pictures))


def _may_write(out: Path, student: Student) -> None:
    """An existing folder may be replaced if it is empty or an earlier export of the same run."""
    if out.is_file():
        raise RequestError(f"{out} is a file; --out wants a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / SETTINGS).is_file():
        raise RequestError(f"{out} is not empty and is no export folder: choose another --out")
    found = read_settings(out).get("run")
    if found != student.run:
        raise RequestError(f"{out} holds the export of another run ({found}; this is {student.run}): choose another --out")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place on success and vanishes on any failure."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{out} could not be written: {error}; nothing there was changed") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, said: dict[str, Any]) -> None:
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
