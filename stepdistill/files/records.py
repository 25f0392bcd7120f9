"""JSON that is read back, each file by its schema: what does not fit is named with its entry, and nothing else is
raised.

A schema is a type: str, int, float (any finite number), bool, None, Any, a union, list[...], dict[str, ...], Literal or
a TypedDict. Entries that a TypedDict does not name are left alone: a later version may have written them.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shorten
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..errors import RequestError

MOST = 64 << 20                                # bytes of a file
WORDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false", NoneType: "null",
         list: "a list", dict: "a table"}

# -- the files that are read back ------------------------------------------------------------------------------------

Metrics = dict[str, float]                     # a line of metrics.jsonl: the step, its losses, norms and rates
# a line of signals.jsonl: the step and its signals, or what was not finite
Signals = dict[str, float | str]


class Timing(TypedDict):
    """A line of timings.jsonl. seconds: of training, from the beginning."""

    step: int
    seconds: float


class Checksums(TypedDict):
    """checksums.json of a checkpoint: file -> its sha256."""

    step: int
    sha256: dict[str, str]


class _Row(TypedDict):

    target: str
    method: str | None
    nfe: int
    steps: int
    guidance: float | None
    samples: int
    seed: int
    metrics: dict[str, float | None]
    latency_ms: float | None
    images_per_s: float | None


class Row(_Row, total=False):
    """A row of results.json. made: where and when it was measured, and of which weights; also: distances in further
    features."""

    made: dict[str, Any]
    also: dict[str, dict[str, float | None]]


class _Protocol(TypedDict):
    id: str
    features: str | None
    reference: str
    samples: int


class Protocol(_Protocol, total=False):
    """Of results.json: its entries that are read. A bench against the teacher's own pictures has no dim, and need not
    have features."""

    dim: int
    also: list[str]


class Composed(TypedDict):
    """Of results.json of a bench under other LoRAs: one of them at one guidance scale. scales: a table of figures for
    each strength; verdict: what they mean, in words."""

    lora: str
    guidance: float
    scales: list[dict[str, float | None]]
    verdict: str


class _Results(TypedDict):
    protocol: Protocol
    rows: list[Row]


class Results(_Results, total=False):
    """results.json of a bench. compose: of one under other LoRAs. words: what was found, in sentences."""

    compose: list[Composed]
    words: list[str]


class Unfinished(TypedDict):
    """unfinished.json of a bench that was stopped. measured: (target, nfe, guidance) of its rows; targets: name ->
    identity."""

    protocol: str
    targets: dict[str, str]
    measured: list[list[Any]]


class Evaluated(_Row):
    """A line of evaluations.jsonl: a row, and the step of the training that it was measured after."""

    step: int


class ModelIndex(TypedDict):
    """model_index.json of a pipeline. A class that is code beside it is a list."""

    _class_name: str | list[Any]


class StudentCall(TypedDict, total=False):
    """stepdistill.json of an export, as its teacher's calls are read from it."""

    teacher_call: dict[str, Any]


class Shaping(TypedDict, total=False):
    """The keyword arguments of a call that shape its conditions and sizes."""

    max_sequence_length: int
    height: int
    width: int
    num_frames: int
    clip_skip: int | None
    complex_human_instruction: list[str] | None
    use_resolution_binning: bool
    text_encoder_out_layers: list[int]
    clean_caption: bool
    system_prompt: str | None
    frame_rate: float


class TeacherCall(TypedDict):
    """stepdistill.json of a teacher: what every call of it is given."""

    call: Shaping


class NetworkConfig(TypedDict, total=False):
    """config.json of a network: its entries that are read."""

    quantization_config: dict[str, Any] | None


class _CacheRows(TypedDict):
    texts: list[str]


class CacheRows(_CacheRows, total=False):
    """Of a cache's file, beside its tensors. Earlier versions wrote no digest."""

    digest: str


class Toy(TypedDict):
    """toy.json: a mixture of the plane."""

    seed: int
    noise: Literal["vp", "flow"]
    labels: list[int]
    weights: list[float]
    means: list[list[float]]
    covariances: list[list[list[float]]]


class Call(TypedDict, total=False):
    """The keyword arguments of a student's call, those of them that say how it samples."""

    num_inference_steps: int
    timesteps: list[float]
    sigmas: list[float]
    eta: float
    guidance_scale: float
    true_cfg_scale: float
    guidance_rescale: float
    negative_prompt: str


class _Parts(TypedDict, total=False):
    """What of a student's teacher is not its base's."""

    variant: str
    subfolder: str
    config: str
    vae: str
    scheduler: str
    clip_skip: int
    quantization: Literal["nf4", "int8"]
    components_to_quantize: list[str]
    negative_prompt: str
    guidance_rescale: float


class _Lora(TypedDict):
    path: str
    weight: float


class _Trace(TypedDict):
    lora: int
    component: str
    weight: str
    at: list[int]
    plain: list[float]
    fused: list[float]


class _Proof(TypedDict):
    difference: float
    tolerance: float
    images: int


class Proof(_Proof, total=False):
    """sizes: height and width of the pictures that were compared."""

    sizes: list[list[int]]


class _Export(TypedDict):
    format: Literal["lora", "pipeline", "comfyui"]
    pipeline: str
    call: Call
    steps: int
    method: str
    teacher: str
    revision: str | None
    scheduler: str
    weights: str
    trained_guidance: float | list[float] | None


class Export(_Export, total=False):
    """stepdistill.json of an export. schema: from 2 on, its weights' files have their sha256 here."""

    schema: int
    denoiser: str
    reads: str
    quantization: str
    sha256: dict[str, str]
    run: str
    role: str
    step: int | None
    dtype: str
    guidance: float | None
    teacher_call: dict[str, Any]
    teacher_loras: list[_Lora]
    teacher_traces: list[_Trace]
    teacher_parts: _Parts
    without: list[str]
    dropped: list[str]
    fixed_steps: bool
    told_times: list[float]
    negative: str
    proof: Proof
    sizes: list[list[int]]


class SchedulerConfig(TypedDict):
    _class_name: str


# -- reading ---------------------------------------------------------------------------------------------------------

def read(path: Path, schema: Any, right: str, infinite: bool = False) -> Any:
    """What a JSON file holds. right: what to do about a file that is damaged. infinite: diffusers wrote it, whose
    configs may hold infinities as Python spells them.

    RequestError: "{path} is damaged: {what and where}. {right}".
    """
    try:
        if (size := path.stat().st_size) > MOST:
            raise ValueError(f"it has {size:,} bytes, and such a file has at most {MOST:,}")
        return checked(path.read_bytes(), schema, infinite)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} is damaged: {error.strerror if isinstance(error, OSError) else error}. "
                           f"{right}") from error


def checked(text: str | bytes, schema: Any, infinite: bool = False) -> Any:
    """What JSON text holds. ValueError where it is none, or not what the schema says. infinite: it may hold
    infinities."""
    try:
        value = json.loads(text, parse_constant=_number if infinite else _no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if fault := _fault(value, schema, ""):
        raise ValueError(fault)
    return value


def lines(text: bytes, schema: Any) -> Iterator[tuple[int, bytes, Any]]:
    """Of JSON lines (number from 1, the line with its end, its value); of a damaged one the value is a ValueError, and
    of a last one that was torn off nothing is said."""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            yield number, line, checked(line, schema)
        except ValueError as error:
            if line.endswith(b"\n"):
                yield number, line, error


def _number(text: str) -> float:
    return float(text) if text != "NaN" else _no_number(text)


def _no_number(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no number of JSON")


def _fault(value: Any, schema: Any, path: str) -> str | None:
    """The first entry that is not what the schema says; None where all are."""
    if is_typeddict(schema):
        if not isinstance(value, dict):
            return _wrong(path, value, dict)
        kinds, missing = get_type_hints(schema), sorted(schema.__required_keys__ - value.keys())
        if missing:
            return f"{_at(path)} has no {', '.join(missing)}"
        return _first((value[name], kinds[name], _join(path, name)) for name in kinds if name in value)
    kind, inner = get_origin(schema) or schema, get_args(schema)
    if kind in (Union, UnionType):
        return None if any(_fault(value, one, path) is None for one in inner) else _wrong(path, value, *inner)
    if kind is Literal:
        return (None if value in inner else f"{_at(path)} is {shorten(value)}, and should be "
                f"{' or '.join(map(repr, inner))}")
    if not _is(value, kind):
        return _wrong(path, value, schema)
    if kind is list and inner:
        return _first((one, inner[0], f"{path}[{i}]") for i, one in enumerate(value))
    return _first((one, inner[1], _join(path, name)) for name, one in value.items()) if kind is dict and inner else None


def _first(asked: Iterator[tuple[Any, Any, str]]) -> str | None:
    return next((fault for one in asked if (fault := _fault(*one))), None)


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, kind)


def _finite(value: int | float) -> bool:
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _wrong(path: str, value: Any, *kinds: Any) -> str:
    return (f"{_at(path)} is {shorten(value)}, and should be "
            f"{' or '.join(WORDS[get_origin(kind) or (dict if is_typeddict(kind) else kind)] for kind in kinds)}")


def _at(path: str) -> str:
    return path or "what it holds"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
