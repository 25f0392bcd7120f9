"""LoRAs of transformers as ComfyUI reads them: the names of its layers, and its nodes. The facts of ComfyUI are of
comfy/lora.py and comfy/utils.py (`model_lora_keys_unet` and the tables that it asks), and of its nodes' inputs."""
from __future__ import annotations

import json
import re

import pytest
import torch
from families.test_matrix import CASES, folder_of
from safetensors.torch import load_file

from stepdistill.errors import RequestError
from stepdistill.export import Student, export_student
from stepdistill.export.folder import read_settings
from stepdistill.export.layers import of_wan
from stepdistill.methods.base import Frozen, Inference, Trained
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher

__all__ = ["folder_of"]

BLOCK = r"transformer_blocks\.\d+\."
TIME = r"time_text_embed\.timestep_embedder\.linear_1"
ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
DOUBLE = rf"({ATTENTION}|norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))"
ACCEPTED = {                       # what ComfyUI finds a weight for
    "sd3": rf"transformer\.({BLOCK}({DOUBLE}|attn2\.(to_[qkv]|to_out\.0))|norm_out\.linear|{TIME})",
    "flux": rf"transformer\.({BLOCK}{DOUBLE}|single_{BLOCK}(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)|proj_out"
            rf"|norm_out\.linear|{TIME})",
    "flux2": rf"transformer\.({BLOCK}({ATTENTION}|ff(_context)?\.linear_(in|out))"
             rf"|single_{BLOCK}attn\.(to_qkv_mlp_proj|to_out)|norm_out\.linear)"
             r"|lora_unet_(double_stream_modulation_(img|txt)_lin|single_stream_modulation_lin|time_in_in_layer)",
    "z_image": r"transformer\.((layers|noise_refiner|context_refiner)\.\d+\."
               r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
               r"|all_final_layer\.2-1\.adaLN_modulation\.1|t_embedder\.mlp\.0)",
    "qwen_image": rf"transformer\.({BLOCK}({ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
                  rf"|norm_out\.linear|{TIME})",
    "wan": r"diffusion_model\.(blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|time_projection\.1"
           r"|time_embedding\.0)",
    "pixart": rf"base_model\.model\.({BLOCK}(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))|adaln_single\.linear"
              r"|adaln_single\.emb\.timestep_embedder\.linear_1)",
}
OF = {"sd3": "sd3-no-t5", "flux": "flux-dev", "flux2": "flux2-klein", "z_image": "z-image", "qwen_image": "qwen-image",
      "wan": "wan",
      "pixart": "pixart-sigma"}       # a family's case in the matrix of families
NODES = {                          # the inputs that each asks for, and what it gives
    "UNETLoader": ({"unet_name": str, "weight_dtype": str}, ("MODEL",)), "VAELoader": ({"vae_name": str}, ("VAE",)),
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "CLIPLoader": ({"clip_name": str, "type": str}, ("CLIP",)),
    "DualCLIPLoader": ({"clip_name1": str, "clip_name2": str, "type": str}, ("CLIP",)),
    "TripleCLIPLoader": ({"clip_name1": str, "clip_name2": str, "clip_name3": str}, ("CLIP",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": float}, ("CONDITIONING",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)), "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    **{name: ({"width": int, "height": int, "batch_size": int}, ("LATENT",))
       for name in ("EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage")},
    "EmptyHunyuanLatentVideo": ({"width": int, "height": int, "length": int, "batch_size": int}, ("LATENT",)),
    "SamplerCustom": ({"model": "MODEL", "add_noise": bool, "noise_seed": int, "cfg": float, "positive": "CONDITIONING",
                       "negative": "CONDITIONING",
                       "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"}, ("LATENT", "LATENT")),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
    "SaveAnimatedWEBP": ({"images": "IMAGE", "filename_prefix": str, "fps": float, "lossless": bool, "quality": int,
                          "method": str}, ())}


@pytest.fixture
def student(folder_of):
    """student(family, noise=1, reads=()): with random weights, at an alpha other than its rank."""
    def made(name: str, noise: float = 1.0, reads: tuple[str, ...] = ()) -> Student:
        case = CASES[OF.get(name, name)]
        teacher = load_teacher(folder_of(OF.get(name, name)), scale=2.0, resolution=case.sizes[1], frames=case.frames)
        roles = build_roles(teacher, {"teacher": Frozen(), "student": Trained("teacher", reads)},
                            {"student": Lora(rank=4, alpha=6.0)})
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, weight in roles.state_dict("student").items():
                weight += (0.3 if ".lora_B." in key or ".layer." in key else 0.02) * torch.randn(weight.shape,
                                                                                                 generator=generator)
        stock = teacher.stock_call(Inference(2, noise=noise))
        return Student.of(roles, "student", stock, "lcm", "run-1", prompts=case.prompts, guidance=2.0)
    return made


@pytest.mark.parametrize("name, reads",
                         [*((name, ()) for name in OF), *((name, ("w",)) for name in ("sd3", "flux2", "wan"))])
def test_comfyui_finds_a_weight_for_every_layer(student, tmp_path, name, reads):
    made = student(name, reads=reads)
    export_student(made, "comfyui", tmp_path / "out", dtype="float32")
    settings = read_settings(tmp_path / "out")
    state = load_file(tmp_path / "out" / settings["weights"])
    keys = {key.split(".lora_")[0] for key in state}
    known = {key for key in keys if re.fullmatch(ACCEPTED[name], key)}
    assert not any(key.endswith(".alpha") for key in state)
    # where a number is folded in, the layer of the time
    layers = len(made.lora.modules) + len(reads)
    assert len(known) == layers, sorted(keys - known)[:5]
    if name != "flux2":
        assert keys == known
    written = [state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"] for key in known]
    own = [1.5 * made.lora.state[f"{m}.lora_B.weight"] @ made.lora.state[f"{m}.lora_A.weight"]
           for m in made.lora.modules]
    total = lambda deltas: sorted(delta.abs().sum().item() for delta in deltas)
    found = total(written)
    # 6 / 4 is in the weights
    assert all(any(abs(value - other) < 1e-3 * value for other in found) for value in total(own))


@pytest.mark.parametrize("name", OF)
@pytest.mark.parametrize("noise, sampler", [(1.0, "lcm"), (0.0, "euler")])
def test_the_workflow_is_the_student_s_own_call(student, tmp_path, name, noise, sampler):
    made = student(name, noise)
    export_student(made, "comfyui", tmp_path / "out", dtype="float32")
    nodes, settings = json.loads((tmp_path / "out/workflow.json").read_text()), read_settings(tmp_path / "out")
    for node in nodes.values():
        asked, _ = NODES[node["class_type"]]
        assert set(asked) == set(node["inputs"]), node
        for entry, kind in asked.items():
            given = node["inputs"][entry]
            assert NODES[nodes[given[0]]["class_type"]][1][given[1]] == kind if isinstance(kind, str) else type(
                given) is kind, (node, entry)
    by_kind = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert (by_kind["KSamplerSelect"]["sampler_name"] == sampler and by_kind["LoraLoaderModelOnly"]["lora_name"]
            == settings["weights"])
    times = made.sampler(made.call).times
    sigmas = [float(number) for number in by_kind["ManualSigmas"]["sigmas"].split(", ")]
    schedule = made.teacher.schedule
    right = times if name != "pixart" else schedule.sigma(times) / schedule.alpha(times)
    assert sigmas == pytest.approx([*right.tolist(), 0.0], abs=1e-6, rel=1e-5)
    assert by_kind["SamplerCustom"]["cfg"] == 1.0 and ("FluxGuidance" in by_kind) == (name == "flux")
    if name == "flux":
        assert by_kind["FluxGuidance"]["guidance"] == 2.0
    latent = next(inputs for kind, inputs in by_kind.items() if kind.startswith("Empty"))
    assert ((latent["height"], latent["width"]) == CASES[OF[name]].sizes[1]
            and latent.get("length") == CASES[OF[name]].frames)
    assert f"sampler_name `{sampler}`" in (tmp_path / "out/README.md").read_text()


def test_layers_that_wan_s_first_release_has_not_are_no_file():
    with pytest.raises(ValueError, match="ComfyUI has no name for the layer patch_embedding"):
        of_wan("patch_embedding")


def test_what_comfyui_does_not_load_is_refused(student, tmp_path):
    with pytest.raises(RequestError, match="ComfyUI's core loads no network of the family sana; it loads UNets "
                       "and sd3, flux, .*: use --to lora"):
        export_student(student("sana"), "comfyui", tmp_path / "out")
