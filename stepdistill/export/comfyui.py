"""How a student is run in ComfyUI: the words for its card, and a workflow that ComfyUI loads, of nodes of its core
alone."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isinf
from pathlib import Path
from typing import Any

FILE = "workflow.json"
LAST_SIGMA = 4518.76               # ComfyUI's of a schedule that ends in pure noise, where sigma / alpha has no bound
SAMPLERS = {"LCMScheduler": "lcm", "DDIMScheduler": "euler", "EulerDiscreteScheduler": "euler"}
Node = dict[str, Any]


def sampler_of(settings: Mapping[str, Any]) -> str | None:
    """ComfyUI's name of what the student's scheduler does: `lcm` draws fresh noise after each step, `euler` none, as
    DDIM and Euler; None where its core has no such sampler."""
    return SAMPLERS.get(settings["scheduler"])


def workflow(settings: Mapping[str, Any], sigmas: Sequence[float], prompt: str,
             size: tuple[int, int]) -> dict[str, Node] | None:
    """The workflow in ComfyUI's API format, which its page loads and its /prompt runs. None where its core has no such
    sampler.

    settings: stepdistill.json; sigmas: sigma / alpha of the student's times, in their order; size: height and width in
    pixels. ManualSigmas is given them, so that no scheduler of ComfyUI has to make the same list. The checkpoint's name
    is the user's to choose.
    """
    if sampler_of(settings) is None:
        return None
    nodes: dict[str, Node] = {}

    def add(kind: str, **inputs: Any) -> str:
        nodes[name := str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return name

    base = add("CheckpointLoaderSimple", ckpt_name=f"{Path(settings['teacher']).name}.safetensors")
    model, clip = [base, 0], [base, 1]
    for lora in settings.get("teacher_loras", []):
        given = add("LoraLoader", model=model, clip=clip, lora_name=Path(lora["path"]).with_suffix(".safetensors").name,
                    strength_model=lora["weight"], strength_clip=lora["weight"])
        model, clip = [given, 0], [given, 1]
    model = [add("LoraLoaderModelOnly", model=model, lora_name=settings["weights"], strength_model=1.0), 0]
    if settings["prediction"] == "v_prediction":
        model = [add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=isinf(sigmas[0])), 0]
    told, empty = (add("CLIPTextEncode", clip=clip, text=text) for text in (prompt, ""))
    written = ", ".join(f"{min(sigma, LAST_SIGMA):.6f}" for sigma in [*sigmas, 0.0])
    drawn = add("SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=float(settings["scale"]),
                positive=[told, 0], negative=[empty, 0],
                sampler=[add("KSamplerSelect", sampler_name=sampler_of(settings)), 0],
                sigmas=[add("ManualSigmas", sigmas=written), 0],
                latent_image=[add("EmptyLatentImage", width=size[1], height=size[0], batch_size=1), 0])
    add("SaveImage", images=[add("VAEDecode", samples=[drawn, 0], vae=[base, 2]), 0],
        filename_prefix=Path(settings["weights"]).stem)
    return nodes


def write_workflow(settings: Mapping[str, Any], sigmas: Sequence[float], prompt: str, size: tuple[int, int],
                   folder: Path) -> None:
    """workflow.json, where there is one."""
    if (nodes := workflow(settings, sigmas, prompt, size)) is not None:
        (folder / FILE).write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
