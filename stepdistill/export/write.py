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

from diffusers.utils import make_image_grid
from safetensors import SafetensorError

from .. import resources
from ..errors import RequestError
from ..models.fused import Trace
from ..models.sources import Source
from ..models.stock import as_pil
from .card import card
from .dtypes import DTYPES, chosen
from .folder import SETTINGS, read_settings
from .formats import WRITERS, check, keeps
from .prepare import prepare
from .proof import IMAGES, TOLERANCE, Proof, prove
from .student import Student


def export_student(student: Student, to: str, out: str | Path, guidance: float | None = None,
                   dtype: str | None = None) -> Proof:
    """Writes `student` as an export folder of the form `to` ("lora", "pipeline" or "comfyui") at `out`.

    guidance: the scale of a student with a guidance embedding; a LoRA is folded at it, a pipeline takes it as its
    default call.
    dtype: "float16", "bfloat16" or "float32" of the weights; float16 unless given, and float32 of a pipeline.
    RequestError, with nothing at `out` changed, for what cannot be done and for an export that its proof refutes.
    """
    out = Path(out)
    check(to, guidance, student.teacher.family, student.reads, student.lora is not None, student.guidance)
    if "w" in student.reads and guidance is None and isinstance(student.guidance, (int, float)):
        guidance = student.guidance                        # it has seen one scale
    dtype = chosen(dtype, to)
    _may_write(out, student)
    call, scale = _call(student, to, guidance)
    prepared = prepare(student, to, call, scale, DTYPES[dtype])
    with _aside(out) as folder:
        weights = WRITERS[to](prepared.student, prepared.pipe, DTYPES[dtype], folder)
        student.scheduler.save_pretrained(folder / "scheduler")
        settings = _settings(student, type(prepared.pipe).__name__, to, call, scale, weights) | {"dtype": dtype}
        _write(folder / SETTINGS, settings)
        proof = prove(prepared.student, folder, scale)
        rounding = 0.0 if prepared.unrounded is None else (proof.images - prepared.unrounded).abs().max().item()
        settings["proof"] = {"difference": proof.difference, "tolerance": TOLERANCE, "images": IMAGES,
                             "dtype": "float32", "rounding": rounding}
        _write(folder / SETTINGS, settings)
        asked = student.teacher.family.prompts.written(prepared.pipe, student.prompts[0])
        (folder / "README.md").write_text(card(settings, out.as_posix(), student.results, asked), encoding="utf-8")
        _picture(proof).save(folder / "samples.png")
    return proof


def _call(student: Student, to: str, guidance: float | None) -> tuple[dict[str, Any], float | None]:
    """(the keyword arguments of the pipeline call, the scale of a student with a guidance embedding, else None)."""
    call, spoken = dict(student.call), student.teacher.guidance
    if not student.guidance_embedding:
        return call, None
    if not keeps(to, student.teacher.family, student.reads):
        return call | spoken.none, guidance
    scale = call[spoken.embedded] if guidance is None else guidance
    return call | {spoken.embedded: scale}, scale


def _settings(student: Student, pipeline: str, to: str, call: dict[str, Any], scale: float | None,
              weights: str) -> dict[str, Any]:
    """What stepdistill.json says; `call` holds the literal keyword arguments of the pipeline call."""
    sampler, base = student.sampler(call), student.base_model or student.teacher.source
    return {"format": to, "pipeline": pipeline, "call": call, "steps": student.steps, "method": student.method,
            "teacher": base.base, "revision": base.revision, **_beside(base, student.teacher.traces),
            "role": student.role_name, "run": student.run,
            "scheduler": type(student.scheduler).__name__, "prediction": student.scheduler.config.get("prediction_type"), "weights": weights, "told": student.guidance_embedding,
            "keeps": keeps(to, student.teacher.family, student.reads),
            "within": student.teacher.guidance.within, "fixed_steps": "r" in student.reads, "guidance": scale,
            "unguided": student.teacher.guidance.none, "scale": student.teacher.guidance.scale(call),
            "trained_guidance": student.guidance, "teacher_call": dict(student.teacher.call),
            "without": list(student.teacher.without), "dropped": list(student.teacher.dropped),
            "global_noise": sampler.stochastic and not student.teacher.family.seeded_steps,
            "told_times": student.teacher.timestep(sampler.times).tolist(),
            "versions": {name: version(name) for name in ("diffusers", "peft", "torch", "transformers")}}


def _beside(base: Source, traces: tuple[Trace, ...]) -> dict[str, Any]:
    """What of the teacher is not its base's: only where there is such."""
    parts = {name: value for name, value in vars(base).items() if value is not None and name not in ("base", "revision", "loras")}
    loras = {"teacher_loras": [vars(lora) for lora in base.loras], "teacher_traces": [vars(trace) for trace in traces]}
    return ({"teacher_parts": parts} if parts else {}) | (loras if base.loras else {})


def _picture(proof: Proof) -> Any:
    pictures = as_pil(proof.images)
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
        raise RequestError(f"{out} holds the export of another run ({found}; this is {student.run}): choose another "
                           "--out")


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
        resources.share(new)
        if out.exists():
            out.rename(old)
        new.rename(out)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{out} could not be written: {error}; nothing there was changed") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
