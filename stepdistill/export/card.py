"""The model card: what a reader of the Hub needs, and a snippet that runs as it stands."""
from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from .. import resources
from ..errors import printable, redacted, unmarked
from ..models.adapters import PEFT_WEIGHTS
from ..models.families import family_of
from ..models.quantized import HEAD
from ..models.sources import Source, at_revision
from ..models.with_teacher import SERVED
from .comfyui import FILE, sampler_of
from .folder import base_of

FUSED = ("pipe.fuse_lora()                      # into the weights: a call then costs what one of the base does",
         "pipe.unload_lora_weights()            # without these two lines its weight can be set, and others added")
# of pipelines that load no LoRA
PEFT = "pipe.{0} = PeftModel.from_pretrained(pipe.{0}, folder).merge_and_unload()"
HELP = ("The base takes the student's first step, and pictures of one prompt differ as its own do (arXiv:2503.10637); "
        "it is the same network without the LoRA, so nothing more is loaded. Other systems: `distillation_pp`, "
        "`adaptive`.")
COLUMNS = {"fd": "FD", "to_teacher": "to teacher", "clip_score": "CLIP score", "all_attributes": "all attributes"}


def card(settings: Mapping[str, Any], folder: str, results: Mapping[str, Any] | None, asked: str) -> str:
    """README.md. settings: stepdistill.json; folder: its path, as it was asked for; results: results.json or
    None; asked: the argument of a call that asks for a picture."""
    parts = [front_matter(settings), f"# {settings['method']}, {settings['steps']} steps", _what(settings),
             "![samples](samples.png)",
             f"## Use\n\n{block(snippet(settings, folder, asked))}", _facts(settings)]
    if _may_be_helped(settings):
        parts.append(f"## With the teacher's help\n\n{HELP}\n\n{block(helped_snippet(settings, folder, asked))}")
    if settings["format"] == "comfyui":
        parts.append(_comfyui(settings))
    if results is not None:
        parts.append(_table(results))
    return redacted("\n\n".join(parts)) + "\n"


def _comfyui(settings: Mapping[str, Any]) -> str:
    """What to set there, by the names that its nodes have. Its scheduler `simple` takes every (1000 / k)-th of 1000
    times from the last one, its sampler `lcm` draws fresh noise after each step as LCMScheduler does, and `euler` none,
    as DDIM and Euler do."""
    steps, times = settings["steps"], settings["told_times"]
    sampler = sampler_of(settings)
    simple = settings["prediction"] is not None and all(abs(time - (999 - int(i * 1000 / steps))) <= 1
                                                        for i, time in enumerate(times))
    lines = [f"Put `{settings['weights']}` into `models/loras` and load it by the node *Load LoRA* (`LoraLoader`) "
             "at strength 1, or by *LoraLoaderModelOnly*."
             + "".join(f" Before it, {code(lora['path'])} at strength {lora['weight']:g}."
                                                for lora in settings.get("teacher_loras", [])),
             f"In *KSampler*: steps {steps}, cfg {settings['scale']:g}, denoise 1, sampler_name " + (
                 f"`{sampler}`" if sampler else "none of its own: no sampler of ComfyUI's core does what a "
                 f"{settings['scheduler']} does"),
             "scheduler `simple`, whose time steps are those this student was made for:" if simple else
             "and none of its schedulers: they make their own lists of time steps, and this student was made for",
             f"{', '.join(f'{t:g}' for t in times)}."]
    if sampler:
        lines.append(f"`{FILE}` holds all of it, with this student's own sigmas: drag it into ComfyUI's window, "
                     "and choose your own files.")
    if settings["prediction"] == "v_prediction":
        lines.append("The base predicts v: where its checkpoint does not say so, put *ModelSamplingDiscrete* with "
                     "`v_prediction` before the sampler.")
    return "## ComfyUI\n\n" + " ".join(lines)


def snippet(settings: Mapping[str, Any], folder: str, asked: str) -> str:
    """Python that makes sample.png with diffusers alone; paths are relative to where the export was made."""
    given = {**settings["call"], **({"negative_prompt": settings["negative"]} if "negative" in settings else {})}
    call = "".join(f", {key}={value!r}" for key, value in given.items())
    without = "".join(f", {name}=None" for name in settings["without"])
    base, whole = base_of(settings), settings["format"] == "pipeline"
    names = [settings["pipeline"]] if whole else [settings["pipeline"], settings["scheduler"]]
    names = ["AutoencoderKL"] * (base.vae is not None and not whole) + names
    names = ["BitsAndBytesConfig", "PipelineQuantizationConfig"] * _packs(base) + names
    by_peft = ["from peft import PeftModel"] if settings["weights"] == PEFT_WEIGHTS else []
    packed = ["import transformers"] if _packs(base) and base.components_to_quantize else []
    lines = _opening(settings, base, folder, names, by_peft + packed)
    if whole:
        lines += [f"pipe = {settings['pipeline']}.from_pretrained(folder, torch_dtype=dtype{without}).to(device)"]
    else:
        name = "" if settings["format"] == "lora" else f", weight_name={quoted(settings['weights'])}"
        fused = () if "quantization" in settings else FUSED
        lines += [*base_lines(base, settings["pipeline"], without),
                  *([PEFT.format(settings["denoiser"])] if by_peft
                    else [f"pipe.load_lora_weights(folder{name})", *fused]),
                  f"pipe.scheduler = {settings['scheduler']}.from_pretrained(folder, subfolder=\"scheduler\")"]
    lines += _global_seed(settings)
    drawn = f"pipe({asked}{call}, generator=torch.Generator().manual_seed(0))"
    if _is_video(settings):
        lines[1:1] = ["from diffusers.utils import export_to_video"]
        lines += [f"frames = {drawn}.frames[0]", 'export_to_video(frames, "sample.mp4", fps=16)', ""]
    else:
        lines += [f"image = {drawn}.images[0]", 'image.save("sample.png")', ""]
    return "\n".join(lines)


def helped_snippet(settings: Mapping[str, Any], folder: str, asked: str) -> str:
    """Python that makes with_teacher.png, with the base's help in the first step."""
    base, trained = base_of(settings), settings["trained_guidance"]
    guidance = 1.0 if trained is None else trained if isinstance(trained, (int, float)) else sum(trained) / len(trained)
    names = ["AutoencoderKL"] * (base.vae is not None) + [settings["pipeline"]]
    without = "".join(f", {name}=None" for name in settings["without"])
    beside = "".join(f", {key}={value!r}" for key, value in base.guided.items())
    drawn = f"pipe({asked}, **together.call{beside}, generator=torch.Generator().manual_seed(0))"
    return "\n".join([*_opening(settings, base, folder, names, ["", "import stepdistill"]),
                      *base_lines(base, settings["pipeline"], without), "call = stepdistill.load(pipe, folder)",
                      *_global_seed(settings),
                      f'with stepdistill.with_teacher(pipe, "diversity", call, guidance={guidance:g}) as together:',
                      f"    image = {drawn}.images[0]", 'image.save("with_teacher.png")', ""])


def _may_be_helped(settings: Mapping[str, Any]) -> bool:
    """Whether the base can take the first of its steps: of a LoRA that is called without guidance, in several."""
    return (settings["format"] == "lora" and settings["pipeline"] in SERVED and settings["steps"] > 1
            and settings["scale"] == 1 and "quantization" not in settings)


def _opening(settings: Mapping[str, Any], base: Source, folder: str, names: list[str], more: list[str]) -> list[str]:
    """What is imported of diffusers and beside, and where things lie."""
    half = ("bfloat16" if "transformer" in inspect.signature(getattr(diffusers, settings["pipeline"])).parameters
            else "float16")
    return ["import torch", f"from diffusers import {', '.join(names)}", *more, "",
            *(['device, dtype = "cuda", torch.bfloat16'] if _packs(base) else [
                'device = "cuda" if torch.cuda.is_available() else "cpu"',
                f'dtype = torch.{half} if device == "cuda" else torch.float32']),
            f"folder = {quoted(folder)}          # where this card lies"]


def _global_seed(settings: Mapping[str, Any]) -> list[str]:
    return (["torch.manual_seed(0)                  # this pipeline keeps the generator from its scheduler"]
            if settings["global_noise"] else [])


def _is_video(settings: Mapping[str, Any]) -> bool:
    return "num_frames" in settings["call"]


def base_lines(base: Source, pipeline: str, without: str) -> list[str]:
    """The stock pipeline that a LoRA is for, with all that its teacher had."""
    given = {name: value for name in ("revision", "variant", "config") if (value := vars(base)[name]) is not None}
    options = "".join(f", {name}={quoted(value)}" for name, value in given.items())
    lines = []
    if base.vae is not None:
        place, revision = at_revision(base.vae)
        inner = ', subfolder="vae"' if (Path(place) / "vae").is_dir() else _at(revision)
        lines, options = ([f"vae = AutoencoderKL.from_pretrained({quoted(place)}{inner}, torch_dtype=dtype)"],
                          f"{options}, vae=vae")
    loader = "from_single_file" if base.is_file else "from_pretrained"
    if _packs(base):
        family = family_of(pipeline)
        kind = 'load_in_4bit=True, bnb_4bit_quant_type="nf4"' if base.quantization == "nf4" else "load_in_8bit=True"
        encoders = [name for name in base.components_to_quantize or () if name != family.denoiser]
        packed = [f"{quoted(family.denoiser)}: bits", *(f"{quoted(name)}: encoder_bits" for name in encoders)]
        lines += [f"bits = BitsAndBytesConfig({kind}, llm_int8_skip_modules=[{quoted(family.time.first)}])",
                  *([f"encoder_bits = transformers.BitsAndBytesConfig({kind}, llm_int8_skip_modules=[{quoted(HEAD)}])"]
                    if encoders else []),
                  f"bits = PipelineQuantizationConfig(quant_mapping={{{', '.join(packed)}}})"]
        options = f"{options}, quantization_config=bits"
    lines += [f"pipe = {pipeline}.{loader}({quoted(base.place)}, torch_dtype=dtype{options}{without}).to(device)"]
    for lora in base.loras:
        place, file, revision = lora.find()
        weights = ("" if file is None else f", weight_name={quoted(file)}") + _at(revision)
        lines += [f"pipe.load_lora_weights({quoted(place)}{weights})",
                  f"pipe.fuse_lora(lora_scale={lora.weight:g})         # the student was trained on these weights",
                  "pipe.unload_lora_weights()"]
    return lines


def _at(revision: str | None) -> str:
    return "" if revision is None else f", revision={quoted(revision)}"


def _packs(base: Source) -> bool:
    """Whether the stock pipeline is asked to quantise its network; the loader of a single file cannot be."""
    return base.quantization is not None and not base.is_file


def block(code: str, language: str = "python") -> str:
    """Code in Markdown, between more backticks than it holds in a row."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}{fence}"


def code(text: str) -> str:
    """A name as code in Markdown, between more backticks than it holds in a row."""
    text = " ".join(printable(text).split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def front_matter(settings: Mapping[str, Any]) -> str:
    task = "text-to-video" if _is_video(settings) else "text-to-image"
    task = "unconditional-image-generation" if settings["reads"] == "nothing" else task
    tags = ["diffusers", task, "distillation", "stepdistill", settings["method"]]
    tags += [] if settings["format"] == "pipeline" else ["lora"]
    base = {"base_model": settings["teacher"]} if resources.is_hub_id(settings["teacher"]) else {}
    rows = {**base, "library_name": "diffusers", "license": "other",
            "license_name": "that-of-the-base-model", "pipeline_tag": task, "tags": tags}
    return "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in rows.items()) + "\n---"


def _what(settings: Mapping[str, Any]) -> str:
    form = {"lora": "A LoRA", "comfyui": "A LoRA, with keys that ComfyUI reads,",
            "pipeline": "A whole pipeline"}[settings["format"]]
    loras = "".join(f" with the LoRA {code(lora['path'])} at {lora['weight']:g}"
                    for lora in settings.get("teacher_loras", []))
    return (f"{form} that makes {code(settings['teacher'])}{loras} sample in {settings['steps']} "
            f"step{'s' * (settings['steps'] != 1)}, trained with "
            f"`{settings['method']}` by stepdistill. The weights are those of the role `{settings['role']}`."
            + (f" While it was trained, its base was quantised ({settings['quantization']})."
               if "quantization" in settings else ""))


def _facts(settings: Mapping[str, Any]) -> str:
    call = settings["call"]
    arguments = ", ".join(code(f"{key}={value!r}") for key, value in call.items())
    proof = settings["proof"]
    return (f"## Settings\n\n- scheduler: `{settings['scheduler']}`, as in `scheduler/scheduler_config.json`\n- call: "
            f"{arguments}\n"
            f"- guidance at inference: {_guidance(settings)}\n{_steps(settings)}{_sizes(settings)}{_dropped(settings)}"
            f"- proved at export: a fresh stock pipeline gave the trainer's own images to {proof['difference']:.1e} on "
            f"[0, 1] pixels (at most {proof['tolerance']:.0e}; float32, CPU, {proof['images']} images)\n- "
            f"{_rounding(settings)}")


def _rounding(settings: Mapping[str, Any]) -> str:
    if settings["dtype"] == "float32":
        return "weights: float32, as they were trained"
    return (f"weights: {settings['dtype']}, rounded before the proof; on its images the largest difference to the "
            "student "
            f"before it was rounded is {settings['proof']['rounding']:.1e} on [0, 1] pixels")


def _steps(settings: Mapping[str, Any]) -> str:
    return (f"- steps: exactly {settings['steps']}, whose landings are folded into the weights\n"
            if settings["fixed_steps"] else "")


def _sizes(settings: Mapping[str, Any]) -> str:
    """Of a student of buckets: what height and width may be."""
    if "sizes" not in settings:
        return ""
    sizes, proved = ([f"{height} x {width}" for height, width in found]
                     for found in (settings["sizes"], settings["proof"]["sizes"]))
    return (f"- trained on pictures of {', '.join(sizes)} (height x width), of which a call may ask any; proved "
            f"at {' and '.join(proved)}\n")


def _dropped(settings: Mapping[str, Any]) -> str:
    """Of a pipeline that leaves whole. A LoRA is loaded into the base, which has all of its own."""
    if settings["format"] != "pipeline" or not settings["dropped"]:
        return ""
    names = ", ".join(f"`{name}`" for name in settings["dropped"])
    return (f"- not in this folder: {names} of {code(settings['teacher'])}; who wants it loads it from there and "
            "hands it to `from_pretrained`\n")


def _guidance(settings: Mapping[str, Any]) -> str:
    scale, off = settings["scale"], ", ".join(f"`{name}` {value:g}" for name, value in settings["unguided"].items())
    if settings["within"] or settings["told"] and settings["keeps"]:
        return f"the network reads the scale, so it costs no second evaluation; {scale:g} here{_range(settings)}"
    if settings["told"]:
        return f"the scale {settings['guidance']:g} is folded into the weights; leave {off}"
    if scale > 1:
        return f"classifier-free with scale {scale:g}: two evaluations a step{_kept(settings)}"
    trained = settings["trained_guidance"]
    against = settings.get("teacher_parts", {}).get("negative_prompt")
    away = "" if against is None else f", away from {code(quoted(against))}"
    return f"none ({off})" + ("" if trained is None else f": the scale {_span(trained)} was trained in{away}")


def _kept(settings: Mapping[str, Any]) -> str:
    if "negative" not in settings:
        return ""
    return (f", {2 * settings['steps']} in all. The student was trained so, and a negative prompt acts on it, such as "
            f"{code('negative_prompt=' + quoted(settings['negative']))}")


def _range(settings: Mapping[str, Any]) -> str:
    return "" if settings["trained_guidance"] is None else f", trained for {_span(settings['trained_guidance'])}"


def _span(scale: Any) -> str:
    return f"{scale:g}" if isinstance(scale, (int, float)) else " to ".join(f"{end:g}" for end in scale)


def _table(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    columns = {key: title for key, title in COLUMNS.items() if any(key in row["metrics"] for row in rows)}
    lines = ["| target | NFE | guidance | " + " | ".join(columns.values()) + " |",
             "|---|---|---|" + "---|" * len(columns)]
    for row in rows:
        values = [row["metrics"].get(key) for key in columns]
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        lines.append(f"| {unmarked(row['target'])} | {_blank(row['nfe'])} | {_blank(row['guidance'])} | "
                     + " | ".join(cells) + " |")
    features = results["protocol"]["features"]
    return ("## Measured\n\n" + "\n".join(lines) + "\n\nFeatures "
            f"{'none' if features is None else unmarked(features)}, reference "
            f"{unmarked(results['protocol']['reference'])}, protocol {unmarked(results['protocol']['id'])}. NFE "
            "counts network evaluations: a guided step is two.")


def _blank(value: Any) -> str:
    return "" if value is None else f"{value:g}"
