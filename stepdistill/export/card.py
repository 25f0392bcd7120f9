"""The model card: what a reader of the Hub needs, and a snippet that runs as it stands."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.sources import Source
from .folder import base_of

COLUMNS = {"fd": "FD", "clip_score": "CLIP score", "all_attributes": "all attributes"}


def card(said: Mapping[str, Any], folder: str, results: Mapping[str, Any] | None, prompt: str) -> str:
    """README.md. said: stepdistill.json; folder: its path, as it was asked for; results: results.json or None."""
    parts = [_front_matter(said), f"# {said['method']}, {said['steps']} steps", _what(said), "![samples](samples.png)",
             f"## Use\n\n```python\n{snippet(said, folder, prompt)}```", _facts(said)]
    if said["format"] == "comfyui":
        parts.append(f"## ComfyUI\n\nPut `{said['weights']}` into `models/loras` and load it with *Load LoRA* at strength 1, "
                     f"{said['steps']} steps, cfg {said['scale']:g}. ComfyUI makes its own list of time steps: "
                     f"those this student was made for are {', '.join(f'{t:g}' for t in said['told_times'])}."
                     + "".join(f" Before it, `{lora['path']}` at strength {lora['weight']:g}." for lora in said.get("teacher_loras", [])))
    if results is not None:
        parts.append(_table(results))
    return "\n\n".join(parts) + "\n"


def snippet(said: Mapping[str, Any], folder: str, prompt: str) -> str:
    """Python that makes sample.png with diffusers alone; paths are relative to where the export was made."""
    call = "".join(f", {key}={value!r}" for key, value in said["call"].items())
    without = "".join(f", {name}=None" for name in said["without"])
    base = base_of(said)
    names = [said["pipeline"]] if said["format"] == "pipeline" else [said["pipeline"], said["scheduler"]]
    names = ["AutoencoderKL"] * (base.vae is not None and said["format"] != "pipeline") + names
    lines = ["import torch", f"from diffusers import {', '.join(names)}", "", f"folder = {_quoted(folder)}          # where this card lies"]
    if said["format"] == "pipeline":
        lines += [f"pipe = {said['pipeline']}.from_pretrained(folder{without})"]
    else:
        name = "" if said["format"] == "lora" else f", weight_name={_quoted(said['weights'])}"
        lines += [*_base(base, said["pipeline"], without),
                  f"pipe.load_lora_weights(folder{name})",
                  "pipe.fuse_lora()                      # into the weights: a call then costs what one of the base does",
                  "pipe.unload_lora_weights()            # without these two lines its weight can be set, and others added",
                  f"pipe.scheduler = {said['scheduler']}.from_pretrained(folder, subfolder=\"scheduler\")"]
    if said["global_noise"]:
        lines += ["torch.manual_seed(0)                  # this pipeline keeps the generator from its scheduler"]
    lines += [f"image = pipe({_quoted(prompt)}{call}, generator=torch.Generator().manual_seed(0)).images[0]",
              'image.save("sample.png")', ""]
    return "\n".join(lines)


def _base(base: Source, pipeline: str, without: str) -> list[str]:
    """The stock pipeline that a LoRA is for, with all that its teacher had."""
    given = {name: value for name in ("revision", "variant", "config") if (value := vars(base)[name]) is not None}
    options = "".join(f", {name}={_quoted(value)}" for name, value in given.items())
    lines = []
    if base.vae is not None:
        inner = ', subfolder="vae"' if (Path(base.vae) / "vae").is_dir() else ""
        lines, options = [f"vae = AutoencoderKL.from_pretrained({_quoted(base.vae)}{inner})"], f"{options}, vae=vae"
    loader = "from_single_file" if base.is_file else "from_pretrained"
    lines += [f"pipe = {pipeline}.{loader}({_quoted(base.place)}{options}{without}).to(torch.float32)"]
    for lora in base.loras:
        place, file = lora.find()
        weights = "" if file is None else f", weight_name={_quoted(file)}"
        lines += [f"pipe.load_lora_weights({_quoted(place)}{weights})",
                  f"pipe.fuse_lora(lora_scale={lora.weight:g})         # the student was trained on these weights",
                  "pipe.unload_lora_weights()"]
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _front_matter(said: Mapping[str, Any]) -> str:
    tags = ["diffusers", "text-to-image", "distillation", "stepdistill", said["method"]]
    tags += [] if said["format"] == "pipeline" else ["lora"]
    rows = {"base_model": said["teacher"], "library_name": "diffusers", "license": "other",
            "license_name": "that-of-the-base-model", "pipeline_tag": "text-to-image", "tags": tags}
    return "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in rows.items()) + "\n---"


def _what(said: Mapping[str, Any]) -> str:
    form = {"lora": "A LoRA", "comfyui": "A LoRA with kohya's keys", "pipeline": "A whole pipeline"}[said["format"]]
    loras = "".join(f" with the LoRA `{lora['path']}` at {lora['weight']:g}" for lora in said.get("teacher_loras", []))
    return (f"{form} that makes `{said['teacher']}`{loras} sample in {said['steps']} step{'s' * (said['steps'] != 1)}, trained with "
            f"`{said['method']}` by stepdistill. The weights are those of the role `{said['role']}`.")


def _facts(said: Mapping[str, Any]) -> str:
    call = said["call"]
    settings = ", ".join(f"`{key}={value!r}`" for key, value in call.items())
    proof = said["proof"]
    return (f"## Settings\n\n- scheduler: `{said['scheduler']}`, as in `scheduler/scheduler_config.json`\n- call: {settings}\n"
            f"- guidance at inference: {_guidance(said)}\n{_steps(said)}{_dropped(said)}"
            f"- proved at export: a fresh stock pipeline gave the trainer's own images to {proof['difference']:.1e} on [0, 1] "
            f"pixels (at most {proof['tolerance']:.0e}; float32, CPU, {proof['images']} images)\n- {_rounding(said)}")


def _rounding(said: Mapping[str, Any]) -> str:
    if said["dtype"] == "float32":
        return "weights: float32, as they were trained"
    return (f"weights: {said['dtype']}, rounded before the proof; on its images the largest difference to the student "
            f"before it was rounded is {said['proof']['rounding']:.1e} on [0, 1] pixels")


def _steps(said: Mapping[str, Any]) -> str:
    return f"- steps: exactly {said['steps']}, whose landings are folded into the weights\n" if said["fixed_steps"] else ""


def _dropped(said: Mapping[str, Any]) -> str:
    """Of a pipeline that leaves whole. A LoRA is loaded into the base, which has all of its own."""
    if said["format"] != "pipeline" or not said["dropped"]:
        return ""
    names = ", ".join(f"`{name}`" for name in said["dropped"])
    return f"- not in this folder: {names} of `{said['teacher']}`; who wants it loads it from there and hands it to `from_pretrained`\n"


def _guidance(said: Mapping[str, Any]) -> str:
    scale, off = said["scale"], ", ".join(f"`{name}` {value:g}" for name, value in said["unguided"].items())
    if said["told"] and said["keeps"]:
        return f"the network is told the scale, so it costs no second evaluation; {scale:g} here{_range(said)}"
    if said["told"]:
        return f"the scale {said['guidance']:g} is folded into the weights; leave {off}"
    if scale > 1:
        return f"classifier-free with scale {scale:g}: two evaluations a step"
    trained = said["trained_guidance"]
    return f"none ({off})" + ("" if trained is None else f": the scale {_span(trained)} was trained in")


def _range(said: Mapping[str, Any]) -> str:
    return "" if said["trained_guidance"] is None else f", trained for {_span(said['trained_guidance'])}"


def _span(scale: Any) -> str:
    return f"{scale:g}" if isinstance(scale, (int, float)) else " to ".join(f"{end:g}" for end in scale)


def _table(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    columns = {key: title for key, title in COLUMNS.items() if any(key in row["metrics"] for row in rows)}
    lines = ["| target | NFE | guidance | " + " | ".join(columns.values()) + " |", "|---|---|---|" + "---|" * len(columns)]
    for row in rows:
        values = [row["metrics"].get(key) for key in columns]
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        lines.append(f"| {row['target']} | {_blank(row['nfe'])} | {_blank(row['guidance'])} | " + " | ".join(cells) + " |")
    return ("## Measured\n\n" + "\n".join(lines) + f"\n\nFeatures {results['protocol']['features']}, reference "
            f"{results['protocol']['reference']}, protocol {results['protocol']['id']}. NFE counts network evaluations: a guided "
            "step is two.")


def _blank(value: Any) -> str:
    return "" if value is None else f"{value:g}"
