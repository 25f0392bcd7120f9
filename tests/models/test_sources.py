"""A teacher as it is asked for: a base, and what of it comes from elsewhere."""
from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline, tiny_sd3

from stepdistill.errors import RequestError
from stepdistill.models.fused import Trace
from stepdistill.models.sources import FusedLora, Source, index_at
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

FILE = "pytorch_lora_weights.safetensors"


def save_lora(folder: Path, pipe=None, encoder: bool = False, seed: int = 0, targets=("to_q", "to_v")) -> Path:
    """A LoRA with clearly visible weights, as training scripts of diffusers save it."""
    pipe = pipe or tiny_pipeline()
    torch.manual_seed(seed)
    denoiser = "unet" if "unet" in pipe.components else "transformer"
    layers = {denoiser: list(targets)} | ({"text_encoder": ["q_proj", "v_proj"]} if encoder else {})
    for name, modules in layers.items():
        network = pipe.components[name]
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=modules, init_lora_weights=False))
        layers[name] = get_peft_model_state_dict(network)
    pipe.save_lora_weights(folder, **{f"{name}_lora_layers": state for name, state in layers.items()})
    return folder


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def stock_fused(base: Path, *loras: tuple[Path, float]) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    for folder, weight in loras:
        pipe.load_lora_weights(folder, weight_name=FILE)
        pipe.fuse_lora(lora_scale=weight)
        pipe.unload_lora_weights()
    return pipe


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key])
                                                        for key in states[0])


# ---- LoRAs

def test_loras_are_fused_as_the_stock_pipeline_fuses_them(tmp_path, base):
    one, two = save_lora(tmp_path / "one", encoder=True), save_lora(tmp_path / "two", seed=1, targets=("to_k", "conv1"))
    plain = load_teacher(base)
    teacher = load_teacher(Source(str(base), loras=(FusedLora(str(one), 0.7), FusedLora(str(two / FILE), -0.5))))
    known = stock_fused(base, (one, 0.7), (two, -0.5))
    assert same(teacher.network, known.unet) and same(teacher.parts["text_encoder"], known.text_encoder)
    assert not same(teacher.network, plain.network) and not same(teacher.parts["text_encoder"],
                                                                 plain.parts["text_encoder"])
    assert not torch.equal(teacher.encode(["a red ring"]).text, plain.encode(["a red ring"]).text)
    again = teacher.pipeline()
    assert same(again.unet, known.unet) and same(again.text_encoder, known.text_encoder), (
        "the shared encoder is fused once")
    assert again.unet is not teacher.network and again.text_encoder is teacher.parts["text_encoder"]
    given = teacher.pipeline(plain.network)
    assert given.unet is plain.network and same(given.unet, load_teacher(base).network)


def test_a_lora_is_added_in_float32_whatever_the_dtype(tmp_path, base):
    lora = save_lora(tmp_path / "lora")
    teacher = load_teacher(Source(str(base), loras=(FusedLora(str(lora)),)), dtype=torch.bfloat16)
    assert same(teacher.network, stock_fused(base, (lora, 1.0)).unet.to(torch.bfloat16))


def test_a_trace_tells_fused_weights_from_plain_ones(tmp_path, base):
    lora = save_lora(tmp_path / "lora", encoder=True)
    traces = load_teacher(Source(str(base), loras=(FusedLora(str(lora), 0.5),))).traces
    assert [(trace.lora, trace.component) for trace in traces] == [(0, "unet"), (0, "text_encoder")]
    plain, fused = StableDiffusionPipeline.from_pretrained(base, safety_checker=None), stock_fused(base, (lora, 0.5))
    for trace in traces:
        weights = [pipe.components[trace.component].state_dict()[trace.weight].flatten()[list(trace.at)]
                   for pipe in (plain, fused)]
        assert torch.equal(torch.tensor(trace.plain), weights[0]) and torch.equal(torch.tensor(trace.fused), weights[1])
        assert trace.shows(fused) and not trace.shows(plain)
    assert all(trace.shows(fused.to(torch.float16)) for trace in traces)
    assert not Trace(0, "unet", traces[0].weight, traces[0].at, traces[0].fused, traces[0].plain).shows(fused)


def test_a_lora_of_a_transformer_is_fused_too(tmp_path):
    folder, lora = save_tiny_sd3(tmp_path / "sd3"), save_lora(tmp_path / "lora", tiny_sd3())
    known = tiny_sd3()
    known.load_lora_weights(lora, weight_name=FILE)
    known.fuse_lora()
    known.unload_lora_weights()
    assert same(load_teacher(Source(str(folder), loras=(FusedLora(str(lora)),))).network, known.transformer)


def wider(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "of-another", tiny_sd3())


def misshapen(tmp_path: Path) -> Path:
    state = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24),
             "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 2)}
    (tmp_path / "misshapen").mkdir()
    save_file(state, tmp_path / "misshapen" / FILE)
    return tmp_path / "misshapen"


def of_other_layers(tmp_path: Path) -> Path:
    state = {f"unet.down_blocks.7.nothing.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    (tmp_path / "other-layers").mkdir()
    save_file(state, tmp_path / "other-layers" / FILE)
    return tmp_path / "other-layers"


def partly_of_other_layers(tmp_path: Path) -> Path:
    from safetensors.torch import load_file
    folder = save_lora(tmp_path / "partly")
    state = load_file(folder / FILE) | {f"unet.down_blocks.7.nothing.to_q.lora_{side}.weight": torch.ones(2, 2)
                                        for side in "AB"}
    save_file(state, folder / FILE)
    return folder


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("make", [wider, misshapen, of_other_layers, partly_of_other_layers])
def test_a_lora_that_does_not_fit_is_refused_by_training_and_plan_alike(tmp_path, base, device, make):
    lora = make(tmp_path)
    with pytest.raises(RequestError, match=f"the LoRA {lora} does not fit this StableDiffusionPipeline"):
        load_teacher(Source(str(base), loras=(FusedLora(str(lora)),)), device=device)


def test_a_lora_that_fits_changes_no_shape_on_the_meta_device(tmp_path, base):
    source = Source(str(base), loras=(FusedLora(str(save_lora(tmp_path / "lora", encoder=True))),))
    meta, plain = load_teacher(source, device="meta"), load_teacher(base, device="meta")
    assert meta.sizes == plain.sizes and not [name for name, _ in meta.network.named_parameters() if "lora" in name]


def test_where_a_lora_lies(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors")
    assert (FusedLora(str(tmp_path / "mine.safetensors")).find() == FusedLora(str(tmp_path)).find()
            == (str(tmp_path), "mine.safetensors", None))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="found mine.safetensors, other.safetensors: name the file"):
        FusedLora(str(tmp_path)).find()
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    assert FusedLora(str(tmp_path)).find() == (str(tmp_path), FILE, None)
    assert FusedLora("owner/name").find() == ("owner/name", None, None)
    assert FusedLora("owner/name/a.safetensors").find() == ("owner/name", "a.safetensors", None)
    assert FusedLora("owner/name/a.safetensors@v2").find() == ("owner/name", "a.safetensors", "v2")
    for name in ("nowhere.safetensors", "./nowhere/x", "owner/mine.safetensors"):
        with pytest.raises(RequestError, match=f"there is no LoRA {name}"):
            FusedLora(name).find()


# ---- other components

def test_another_autoencoder_takes_the_base_s_place(tmp_path, base):
    torch.manual_seed(5)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(base, subfolder="vae") | {"scaling_factor": 0.5})
    other.save_pretrained(tmp_path / "vae")
    pipeline = shutil.copytree(base, tmp_path / "pipeline")
    other.save_pretrained(pipeline / "vae")
    for place in (tmp_path / "vae", pipeline):
        teacher = load_teacher(Source(str(base), vae=str(place)))
        assert same(teacher.parts["vae"], other) and teacher.codec.scale == 0.5 and same(teacher.pipeline().vae, other)
        assert load_teacher(Source(str(base), vae=str(place)), device="meta").codec.scale == 0.5


def test_an_autoencoder_of_other_latents_is_refused(tmp_path, base):
    config = dict(AutoencoderKL.load_config(base, subfolder="vae"))
    for name, changed, said in (("channels", {"latent_channels": 8}, "latent_channels should be 4; found 8"),
                                ("deeper", {"block_out_channels": (8, 8, 8),
                                            "down_block_types": ("DownEncoderBlock2D",) * 3,
                                            "up_block_types": ("UpDecoderBlock2D",) * 3},
                                            "pixels a latent should be 2; found 4")):
        AutoencoderKL.from_config(config | changed).save_pretrained(tmp_path / name)
        for device in (None, "meta"):
            with pytest.raises(RequestError, match=said):
                load_teacher(Source(str(base), vae=str(tmp_path / name)), device=device)
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny")
    with pytest.raises(RequestError, match="its class should be AutoencoderKL; found AutoencoderTiny"):
        load_teacher(Source(str(base), vae=str(tmp_path / "tiny")))
    with pytest.raises(RequestError, match="vae cannot be read at .*nowhere"):
        load_teacher(Source(str(base), vae=str(tmp_path / "nowhere")))


def test_another_scheduler_takes_the_base_s_place(tmp_path, base):
    DDPMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear",
                  prediction_type="v_prediction").save_pretrained(tmp_path / "noise")
    for device in (None, "meta"):
        teacher = load_teacher(Source(str(base), scheduler=str(tmp_path / "noise")), device=device)
        assert (type(teacher.scheduler) is DDPMScheduler and teacher.kind == "v"
                and teacher.scheduler.config.beta_start == 0.001)
        assert teacher.schedule != load_teacher(base, device="meta").schedule


# ---- variants and places

def test_a_variant_is_read_where_it_is_asked_for_or_the_only_one(tmp_path, base):
    both = shutil.copytree(base, tmp_path / "both")
    half = tiny_pipeline(seed=3)
    half.save_pretrained(both, variant="fp16")
    only = tmp_path / "only"
    half.save_pretrained(only, variant="fp16")
    known = load_teacher(base).network
    assert same(load_teacher(both).network, known) and same(load_teacher(Source(str(both), variant="fp16")).network,
                                                            half.unet)
    teacher = load_teacher(only)
    assert (same(teacher.network, half.unet) and same(teacher.parts["text_encoder"], half.text_encoder)
            and teacher.source.variant == "fp16")
    assert same(teacher.pipeline().unet, half.unet)
    with pytest.raises(RequestError, match="has no weights of the variant fp8; it has fp16"):
        load_teacher(Source(str(only), variant="fp8"))
    half.save_pretrained(only, variant="ema")
    with pytest.raises(RequestError, match="ema and fp16: choose one by variant"):
        load_teacher(only)


def test_a_pipeline_in_a_part_of_a_folder(tmp_path, base):
    shutil.copytree(base, tmp_path / "outer" / "inner")
    teacher = load_teacher(Source(str(tmp_path / "outer"), subfolder="inner"))
    assert (same(teacher.network, load_teacher(base).network)
            and teacher.source.place == str(tmp_path / "outer" / "inner"))
    with pytest.raises(RequestError, match="subfolder is inner, but owner/name is no folder here"):
        load_teacher(Source("owner/name", subfolder="inner"))


# ---- one file

@pytest.fixture
def file(tmp_path):
    save_file({"model.diffusion_model.out.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("device", [None, "meta"])
def test_a_single_file_without_configs_says_whose_are_missing(file, offline, device):
    with pytest.raises(RequestError, match="its pipeline's are those of stable-diffusion-v1-5/stable-diffusion-v1-5, "
                                           "which is not in the cache.*config name a local folder"):
        load_teacher(file, device=device)


@pytest.mark.parametrize(("keys", "said"), [
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA, .* name the file by loras"),
    (["transformer.blocks.0.attn.to_q.lora_A.weight"], "is a LoRA"),
    (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "another network, whose first tensor is "
     "model.diffusion_model.double_blocks.0.img_attn.qkv.weight. Stable Diffusion 1 and 2 and SDXL are read from one"),
    (["double_blocks.0.img_attn.qkv.weight"], "holds no whole Stable Diffusion checkpoint"),
    (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
     "is SDXL's refiner")])
def test_a_single_file_of_something_else_says_what_it_is(tmp_path, keys, said):
    path = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, path)
    with pytest.raises(RequestError, match=said):
        load_teacher(path)


def test_config_names_the_configs_of_a_single_file(file, base, monkeypatch, offline):
    asked = []

    def from_single_file(place, config, **parts):
        asked.append((place, config))
        return StableDiffusionPipeline.from_pretrained(base, **parts)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    source = Source(str(file), config=str(base))
    real, meta = load_teacher(source), load_teacher(source, device="meta")
    assert asked == [(str(file), str(base))] and real.sizes == meta.sizes and real.latent_shape == meta.latent_shape
    plain = {"method": "lcm", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
             "data": {"images": "shapes", "batch": 2},
             "train": {"updates": 2}}
    of_file, of_folder = (plan(Recipe.load(plain | {"teacher": teacher}))
                          for teacher in ({"base": str(file), "config": str(base)}, str(base)))
    assert of_file == of_folder


def test_config_must_be_of_the_file_s_kind(file, base, tmp_path):
    with pytest.raises(RequestError, match="holds the configs of a StableDiffusion3Pipeline, but the file .* is "
                       "a StableDiffusionPipeline"):
        load_teacher(Source(str(file), config=str(save_tiny_sd3(tmp_path / "sd3"))))
    with pytest.raises(RequestError, match="the configs of a single .safetensors file, but .* is none"):
        load_teacher(Source(str(base), config=str(base)))


def test_a_source_is_a_value(base):
    assert (Source.of(base) == Source(str(base)) and hash(Source("a", loras=(FusedLora("b"),)))
            == hash(Source("a", loras=(FusedLora("b"),))))
    assert json.dumps(vars(FusedLora("b", 0.5))) == '{"path": "b", "weight": 0.5}'


def unresolved(host, *rest):
    raise socket.gaierror(-2, "Name or service not known")


def test_a_dead_network_and_a_typo_read_differently(monkeypatch):
    """And neither takes longer than a name's look-up: the Hub's library would try again for half a minute."""
    monkeypatch.setattr("stepdistill.models.sources.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(RequestError, match=r"no folder owner/name here, and the Hub cannot be asked .*huggingface.co: "
                       r"Name or service not known.: check the network"):
        index_at(Source("owner/name"))

    def absent(source, **options):
        raise OSError(f"{source} is not a valid model identifier")

    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: [host])
    monkeypatch.setattr(DiffusionPipeline, "load_config", absent)
    with pytest.raises(RequestError, match="the Hub did not supply such a pipeline: owner/name is not a valid model "
                       "identifier"):
        index_at(Source("owner/name"))
