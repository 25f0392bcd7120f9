"""How a student is run in ComfyUI: the words for its card, and a workflow that ComfyUI loads, of nodes of its core
alone."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

from ..models.families import family_of

FILE = "workflow.json"
LAST_SIGMA = 4518.76               # ComfyUI's of a schedule that ends in pure noise, where sigma / alpha has no bound
SAMPLERS = {"LCMScheduler": "lcm", "DDIMScheduler": "euler", "EulerDiscreteScheduler": "euler",
            "FlowMatchLCMScheduler": "lcm",
            "FlowMatchEulerDiscreteScheduler": "euler"}
Node = dict[str, Any]
Link = list[Any]                   # [a node's name, which of its outputs]
Add = Callable[..., str]


def sampler_of(settings: Mapping[str, Any]) -> str | None:
    """ComfyUI's name of what the student's scheduler does: `lcm` draws fresh noise after each step, `euler` none, as
    DDIM and Euler; None where its core has no such sampler."""
    return SAMPLERS.get(settings["scheduler"])


@dataclass(frozen=True)
class Base:
    """What a workflow of a family begins with. clips: files of its text encoders; kind: of the node that loads them;
    vae: its file, None where the checkpoint has it; latent: the node of an empty one."""

    clips: tuple[str, ...]
    kind: str
    vae: str | None
    latent: str = "EmptySD3LatentImage"


# a transformer's family, or the class of a pipeline that has other encoders -> its base; the names of files are those
# under which they are published for ComfyUI
BASES = {
    "sd3": Base(("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"), "sd3", None),
    "flux": Base(("clip_l.safetensors", "t5xxl_fp16.safetensors"), "flux", "ae.safetensors"),
    "flux2": Base(("qwen_3_4b.safetensors",), "flux2", "flux2-vae.safetensors", "EmptyFlux2LatentImage"),
    "Flux2Pipeline": Base(("mistral_3_small_flux2_bf16.safetensors",), "flux2", "flux2-vae.safetensors",
                          "EmptyFlux2LatentImage"),
    "z_image": Base(("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors"),
    "qwen_image": Base(("qwen_2.5_vl_7b.safetensors",), "qwen_image", "qwen_image_vae.safetensors"),
    "wan": Base(("umt5_xxl_fp16.safetensors",), "wan", "wan_2.1_vae.safetensors", "EmptyHunyuanLatentVideo"),
    "pixart": Base(("t5xxl_fp16.safetensors",), "pixart", "sdxl_vae.safetensors", "EmptyLatentImage"),
}
WAN_22 = 48                        # channels of its latents, which another node makes
RATE = 16.0                        # frames a second of a video that is saved


class Graph:
    """Nodes as they are added."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, kind: str, **inputs: Any) -> str:
        self.nodes[name := str(len(self.nodes) + 1)] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return name


def workflow(settings: Mapping[str, Any], sigmas: Sequence[float], prompt: str, shape: tuple[int, ...],
             channels: int = 4) -> dict[str, Node] | None:
    """The workflow in ComfyUI's API format, which its page loads and its /prompt runs. None where its core has no such
    sampler.

    settings: stepdistill.json; sigmas: of the student's times, in their order, sigma / alpha, of a flow the times
    themselves; shape: of its pictures, (..., height, width) in pixels, of videos (frames, 3, height, width); channels:
    of its latents. ManualSigmas is given the sigmas, so that no scheduler of ComfyUI has to make the same list. The
    names of files are the user's to choose.
    """
    if sampler_of(settings) is None:
        return None
    graph = Graph()
    add, base = graph.add, BASES.get(settings["pipeline"], BASES.get(family_of(settings["pipeline"]).name))
    model, clip, vae = _whole(add, settings) if base is None else _parts(add, base, settings)
    for lora in settings.get("teacher_loras", []):
        given = add("LoraLoader", model=model, clip=clip, lora_name=Path(lora["path"]).with_suffix(".safetensors").name,
                    strength_model=lora["weight"], strength_clip=lora["weight"])
        model, clip = [given, 0], [given, 1]
    model = [add("LoraLoaderModelOnly", model=model, lora_name=settings["weights"], strength_model=1.0), 0]
    if settings["prediction"] == "v_prediction":
        model = [add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=isinf(sigmas[0])), 0]
    told, empty = ([add("CLIPTextEncode", clip=clip, text=text), 0]
                   for text in (prompt, settings["call"].get("negative_prompt", "")))
    cfg = float(settings["scale"])
    if base is not None and settings["within"]:
        told, cfg = [add("FluxGuidance", conditioning=told, guidance=cfg), 0], 1.0
    written = ", ".join(f"{min(sigma, LAST_SIGMA):.6f}" for sigma in [*sigmas, 0.0])
    drawn = add("SamplerCustom", model=model, add_noise=True, noise_seed=0, cfg=cfg, positive=told, negative=empty,
                sampler=[add("KSamplerSelect", sampler_name=sampler_of(settings)), 0],
                sigmas=[add("ManualSigmas", sigmas=written), 0],
                latent_image=[_latent(add, base, shape, channels, vae), 0])
    _save(add, [add("VAEDecode", samples=[drawn, 0], vae=vae), 0], Path(settings["weights"]).stem, len(shape) == 4)
    return graph.nodes


def _whole(add: Add, settings: Mapping[str, Any]) -> tuple[Link, Link, Link]:
    """Model, text encoder and autoencoder of one file."""
    base = add("CheckpointLoaderSimple", ckpt_name=f"{Path(settings['teacher']).name}.safetensors")
    return [base, 0], [base, 1], [base, 2]


def _parts(add: Add, base: Base, settings: Mapping[str, Any]) -> tuple[Link, Link, Link]:
    """Model, text encoders and autoencoder of files of their own."""
    file = f"{Path(settings['teacher']).name}.safetensors"
    if base.vae is None:
        model, _, vae = _whole(add, settings)
    else:
        model, vae = ([add("UNETLoader", unet_name=file, weight_dtype="default"), 0],
                      [add("VAELoader", vae_name=base.vae), 0])
    clips = base.clips[:2] if "text_encoder_3" in settings["without"] else base.clips
    if len(clips) == 1:
        return model, [add("CLIPLoader", clip_name=clips[0], type=base.kind), 0], vae
    named = {f"clip_name{i}": clip for i, clip in enumerate(clips, 1)}
    return model, [add("DualCLIPLoader", **named, type=base.kind) if len(clips) == 2
                   else add("TripleCLIPLoader", **named), 0], vae


def _latent(add: Add, base: Base | None, shape: tuple[int, ...], channels: int, vae: Link) -> str:
    size = {"width": shape[-1], "height": shape[-2], "batch_size": 1}
    if len(shape) == 4:
        size["length"] = shape[0]
        return add("Wan22ImageToVideoLatent", vae=vae, **size) if channels == WAN_22 else add(base.latent, **size)
    return add("EmptyLatentImage" if base is None else base.latent, **size)


def _save(add: Add, images: Link, name: str, video: bool) -> None:
    if video:
        add("SaveAnimatedWEBP", images=images, filename_prefix=name, fps=RATE, lossless=False, quality=90,
            method="default")
    else:
        add("SaveImage", images=images, filename_prefix=name)


def write_workflow(settings: Mapping[str, Any], sigmas: Sequence[float], prompt: str, shape: tuple[int, ...],
                   channels: int, folder: Path) -> None:
    """workflow.json, where there is one."""
    if (nodes := workflow(settings, sigmas, prompt, shape, channels)) is not None:
        (folder / FILE).write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
