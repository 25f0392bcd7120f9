"""Writes an export folder aside, proves it, and only then gives it its name."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from safetensors import SafetensorError

from .. import resources
from ..diffusion.schedule import RectifiedFlow
from ..errors import RequestError
from ..files.lock import LOCK, locked
from ..files.whole import aside_of
from ..models.fused import Trace
from ..models.sources import Source
from ..models.stock import as_pil, some_frames
from .card import card
from .comfyui import write_workflow
from .dtypes import DTYPES, chosen
from .folder import SETTINGS, read_settings, weights_of
from .formats import WRITERS, check, keeps
from .metadata import described, stamp
from .prepare import PreparedExport, prepare
from .proof import Proof, prove, samples, tolerance
from .student import Student

SCHEMA = 2                        # of stepdistill.json: raise it when readers must know of a change

def export_student(student: Student, to: str, out: str | Path, guidance: float | None = None,
                   dtype: str | None = None, called: str | None = None) -> Proof:
    """Writes `student` as an export folder of the form `to` ("lora", "pipeline" or "comfyui") at `out`.

    guidance: the scale of a student with a guidance embedding; a LoRA is folded at it, a pipeline takes it as its
    default call. dtype: "float16", "bfloat16" or "float32" of the weights; float16 unless given, and float32 of a
    pipeline. called: what the card calls the folder, such as the Hub repository that it goes to; its path unless given.
    RequestError, with nothing at `out` changed, for what cannot be done and for an export that its proof refutes.
    """
    check(to, guidance, student.teacher.family, student.reads, student.lora is not None, student.guidance,
          student.teacher.source.quantization)
    if "w" in student.reads and guidance is None and isinstance(student.guidance, (int, float)):
        guidance = student.guidance                        # it has seen one scale
    dtype = chosen(dtype, to)
    _may_write(out := Path(out), student)
    call, scale = _call(student, to, guidance)
    prepared = prepare(student, to, call, scale, DTYPES[dtype])
    with aside(out) as folder:
        _may_write(out, student)                                   # now that nobody else does
        settings, proof = _proved(student, prepared, to, call, scale, dtype, folder)
        asked = student.teacher.family.prompts.written(prepared.pipe, student.prompts[0])
        text = card(settings, called or out.as_posix(), student.results, asked)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if to == "comfyui":
            write_workflow(settings, _sigmas(student, call), student.prompts[0], tuple(proof.images.shape[1:]),
                           student.teacher.latent_shape[0], folder)
        _picture(proof).save(folder / "samples.png")
    return proof


def _sigmas(student: Student, call: dict[str, Any]) -> list[float]:
    """Its noise levels as ComfyUI counts them: sigma / alpha, of a flow its times."""
    times, schedule = student.sampler(call).times, student.teacher.schedule
    return (times if isinstance(schedule, RectifiedFlow) else schedule.sigma(times) / schedule.alpha(times)).tolist()


def write_found(student: Student, out: str | Path, dtype: str) -> Proof:
    """Writes a LoRA of others with the call that was found for it as a folder that `load` accepts: the weights, the
    scheduler and stepdistill.json, without a card. The free folder `out`; dtype and what is raised as of
    `export_student`."""
    out = Path(out)
    may_write_new(out)
    prepared = prepare(student, "lora", student.call, None, DTYPES[dtype])
    with aside(out) as folder:
        may_write_new(out)
        return _proved(student, prepared, "lora", dict(student.call), None, dtype, folder)[1]


def _proved(student: Student, prepared: PreparedExport, to: str, call: dict[str, Any], scale: float | None, dtype: str,
            folder: Path) -> tuple[dict[str, Any], Proof]:
    """Fills a folder with weights, scheduler and stepdistill.json, and proves it. Returns what the last of these says,
    too."""
    weights = WRITERS[to](prepared.student, prepared.pipe, DTYPES[dtype], folder)
    if to != "pipeline":
        stamp(folder / weights, described(prepared.student, type(prepared.pipe), weights, scale))
    student.scheduler.save_pretrained(folder / "scheduler")
    settings = _settings(student, type(prepared.pipe).__name__, to, call, scale, weights)
    settings |= {"dtype": dtype, "schema": SCHEMA, "sha256": weights_of(folder)}
    _write(folder / SETTINGS, settings)
    proof = prove(prepared.student, folder, scale)
    rounding = 0.0 if prepared.unrounded is None else (proof.images - prepared.unrounded).abs().max().item()
    settings["proof"] = {"difference": proof.difference, "tolerance": tolerance(student.teacher),
                         "images": samples(student.teacher), "sizes": proof.sizes, "dtype": "float32",
                         "rounding": rounding}
    _write(folder / SETTINGS, settings)
    return settings, proof


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
    return {"format": to, "pipeline": pipeline, "denoiser": student.teacher.family.denoiser,
            "reads": student.teacher.family.reads(student.teacher.network), "call": call, "steps": student.steps,
            "method": student.method,
            "teacher": base.base, "revision": base.revision,
            **_beside(base, student.teacher.traces, student.teacher.source.quantization),
            "role": student.role_name, "run": student.run, "step": student.step,
            "scheduler": type(student.scheduler).__name__,
            "prediction": student.scheduler.config.get("prediction_type"), "weights": weights,
            "told": student.guidance_embedding,
            "keeps": keeps(to, student.teacher.family, student.reads),
            "within": student.teacher.guidance.within, "fixed_steps": "r" in student.reads, "guidance": scale,
            "unguided": student.teacher.guidance.none, "scale": student.teacher.guidance.scale(call),
            "trained_guidance": student.guidance, "teacher_call": dict(student.teacher.call),
            "without": list(student.teacher.without), "dropped": list(student.teacher.dropped),
            "global_noise": sampler.stochastic and not student.teacher.family.seeded_steps,
            **({"sizes": student.sizes} if student.sizes else {}),
            "told_times": student.teacher.timestep(sampler.times).tolist(),
            "versions": {name: version(name) for name in ("diffusers", "peft", "torch", "transformers")}}


def _beside(base: Source, traces: tuple[Trace, ...], quantization: str | None) -> dict[str, Any]:
    """What of the teacher is not its base's: only where there is such."""
    parts = {name: value for name, value in vars(base).items() if value is not None
             and name not in ("base", "revision", "loras")}
    loras = {"teacher_loras": [vars(lora) for lora in base.loras], "teacher_traces": [vars(trace) for trace in traces]}
    found = {"teacher_parts": parts} if parts else {}
    found |= loras if base.loras else {}
    return found if quantization is None else found | {"quantization": quantization}


def _picture(proof: Proof) -> Any:
    """A row of pictures, or a row of frames for each video."""
    rows = proof.images[None] if proof.images.ndim == 4 else some_frames(proof.images)
    return make_image_grid(as_pil(rows.flatten(0, 1)), *rows.shape[:2])


def may_write_new(out: Path) -> None:
    """RequestError unless `out` is free, or an empty folder."""
    if _holds(out):
        raise RequestError(f"{out} is not empty: choose another --out")


def _holds(out: Path) -> bool:
    if out.is_file():
        raise RequestError(f"{out} is a file; --out wants a folder")
    return out.is_dir() and any(out.iterdir())


def _may_write(out: Path, student: Student) -> None:
    """An existing folder may be replaced if it is empty or an earlier export of the same run."""
    if not _holds(out):
        return
    if not (out / SETTINGS).is_file():
        raise RequestError(f"{out} is not empty and is no export folder: choose another --out")
    found = read_settings(out).get("run")
    if found != student.run:
        raise RequestError(f"{out} holds the export of another run ({found}; this is {student.run}): choose another "
                           "--out")


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place on success and vanishes on any failure; nobody else writes there
    meanwhile. What a killed export left is cleared, and the folder that it was about to replace put back."""
    out = out.resolve()
    work = aside_of(out)
    new, old = work / "new", work / "old"
    with locked(out.with_name(f".{out.name}{LOCK}"), str(out)):
        try:
            _restore(out, old)
            shutil.rmtree(work, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
            resources.share(new)
            if out.exists():
                out.rename(old)
            new.rename(out)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{out} could not be written: {error}; nothing there was changed") from error
        finally:
            _restore(out, old)
            shutil.rmtree(work, ignore_errors=True)


def _restore(out: Path, old: Path) -> None:
    if old.exists() and not out.exists():
        old.rename(out)


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
