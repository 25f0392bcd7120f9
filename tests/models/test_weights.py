"""What the files of a teacher must hold, told before anything trains on random numbers."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families.flux import tiny_flux
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline, tiny_sd3

from stepdistill.errors import RequestError
from stepdistill.models.teacher import load_teacher

DEVICES = [None, "meta"]


@pytest.fixture
def sd3(tmp_path):
    return save_tiny_sd3(tmp_path / "sd3", t5=True)


@pytest.fixture
def unet(tmp_path):
    return save_tiny(tmp_path / "unet")


def rewritten(file: Path, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def refused(folder: Path, device: str | None, *words: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_teacher(folder, device=device)
    assert all(word in str(caught.value) for word in words), str(caught.value)


CASES = {
    "encoder": ("text_encoder/model", "text_model.encoder.layers.0.mlp.fc1.weight"),
    "t5": ("text_encoder_3/model", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    "denoiser": ("transformer/diffusion_pytorch_model", "transformer_blocks.1.attn2.to_q.weight"),
    "codec": ("vae/diffusion_pytorch_model", "decoder.conv_in.weight"),
}


@pytest.mark.parametrize("device", [pytest.param(device, marks=pytest.mark.long if device == "meta" else ())
                                    for device in DEVICES])
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_missing_or_one_too_many_is_refused_by_name(sd3, case, device):
    file, key = CASES[case]
    path, component = sd3 / f"{file}.safetensors", file.split("/")[0]
    whole = path.read_bytes()
    rewritten(path, lambda state: state.pop(key))
    refused(sd3, device, f"the {component} of {sd3}", f"1 missing, first {key}")
    path.write_bytes(whole)
    rewritten(path, lambda state: state.update({"one.too.many": torch.zeros(2)}))
    refused(sd3, device, f"the {component} of {sd3}", "1 unexpected, first one.too.many")
    path.write_bytes(whole)
    rewritten(path, lambda state: state.update({key: torch.zeros(3)}))
    refused(sd3, device, component, "not fit", "should have the shape", "found (3,)")
    path.write_bytes(whole)
    assert load_teacher(sd3, device=device).name == "sd3"


@pytest.mark.parametrize("device", DEVICES)
def test_a_shard_is_read_as_a_part(tmp_path, device):
    pipe = tiny_sd3(t5=True)
    pipe.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and load_teacher(tmp_path, device=device).name == "sd3"
    lost = sorted(load_file(shards[1]))
    rewritten(shards[1], lambda state: state.pop(lost[0]))
    refused(tmp_path, device, "the transformer of", f"1 missing, first {lost[0]}")


def test_names_of_earlier_versions_are_no_fault(unet):
    """Autoencoders before diffusers 0.14 name their attention otherwise, and CLIP's files held its positions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state):
        for key in [key for key in state if ".mid_block.attentions.0.to_" in key
                    or key.startswith("mid_block.attentions.0.to_")]:
            new = next(key.replace(name, before) for name, before in old.items() if f".{name}." in key)
            state[new] = state.pop(key)

    known = load_teacher(unet).parts["vae"].state_dict()
    rewritten(unet / "vae/diffusion_pytorch_model.safetensors", rename)
    rewritten(unet / "text_encoder/model.safetensors",
              lambda state: state.update({"text_model.embeddings.position_ids": torch.arange(20)[None]}))
    assert any("query" in key for key in load_file(unet / "vae/diffusion_pytorch_model.safetensors"))
    found = load_teacher(unet).parts["vae"].state_dict()
    assert found.keys() == known.keys() and all(torch.equal(found[key], known[key]) for key in known)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tokenizer_without_its_vocabulary_is_refused(sd3, device):
    for name in ("tokenizer", "tokenizer_3"):
        whole = {path: path.read_bytes() for path in (sd3 / name).iterdir()}
        for path in whole:
            if path.name != "tokenizer_config.json":
                path.unlink()
        refused(sd3, device, f"the {name} of {sd3} has no vocabulary", "tokenizer.json")
        for path, data in whole.items():
            path.write_bytes(data)


def test_a_teacher_that_is_blind_to_prompts_is_refused(unet):
    """Here an encoder of zeros, on real devices; a plan runs no encoder."""
    rewritten(unet / "text_encoder/model.safetensors", lambda state: [value.zero_() for value in state.values()])
    refused(unet, None, f"the text_encoder of {unet} encodes two different prompts alike")
    assert load_teacher(unet, device="meta").name == "unet2d_condition"


def test_one_blind_encoder_among_several_is_enough(sd3):
    for name in ("text_encoder_3", "text_encoder_2"):
        path = sd3 / name / "model.safetensors"
        whole = path.read_bytes()
        rewritten(path, lambda state: [value.zero_() for value in state.values()])
        refused(sd3, None, f"the {name} of {sd3} encodes two different prompts alike")
        path.write_bytes(whole)


def test_a_pooled_embedding_that_is_blind_to_prompts_is_refused(tmp_path):
    """The end of a text, of which it is read, stands nowhere in texts where config and tokenizer differ about it."""
    folder = tmp_path / "flux"
    tiny_flux(guidance_embeds=True).save_pretrained(folder)
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 3}))
    refused(folder, None, f"the pooled embedding of {folder} encodes two different prompts alike")


def test_an_encoder_of_nan_is_refused(unet):
    rewritten(unet / "text_encoder/model.safetensors",
              lambda state: [value.fill_(float("nan")) for value in state.values()])
    refused(unet, None, f"the text_encoder of {unet} encodes prompts as numbers that are not finite")


def without(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def sharded(folder: Path) -> None:
    without(folder, "unet/*")
    tiny_pipeline().unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    without(folder, "unet/*.index.json")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spoil", "component", "lacks"), [
    (lambda folder: without(folder, "text_encoder/*.safetensors"), "text_encoder", "weights"),
    (lambda folder: without(folder, "text_encoder/config.json"), "text_encoder", "config.json"),
    (sharded, "unet", "*.safetensors.index*.json, which says what its"),
])
def test_an_incomplete_folder_says_what_it_lacks(unet, device, spoil, component, lacks):
    spoil(unet)
    refused(unet, device, f"{unet} is not complete: the folder of its {component} has no {lacks}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alone", [True, False])
def test_an_encoder_that_was_saved_under_a_lora_is_refused(unet, device, alone):
    """transformers saves the adapter alone, and loads it with the base that it names, wherever that lies."""
    encoder = tiny_pipeline().text_encoder
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    if alone:
        without(unet, "text_encoder/*")
    encoder.save_pretrained(unet / "text_encoder")
    refused(unet, device, f"the text_encoder of {unet} was saved while a LoRA lay on it",
            "adapter_config.json lies beside its weights")


def test_a_size_that_no_picture_has_is_refused(unet):
    path = unet / "unet/config.json"
    for size in (9, 0, -8, "8", 8.0, [8], [8, 16, 8]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
        refused(unet, "meta", "its pictures have sides of a multiple of 8 pixels; found 18 of 18 x 18" if size == 9
                else f"its network's config says sample_size: {size!r}, which is no size")


@pytest.mark.parametrize("device", DEVICES)
def test_a_pipeline_that_was_saved_under_a_lora_says_what_to_call_first(tmp_path, device):
    pipe = tiny_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.save_pretrained(tmp_path / "laid")
    refused(tmp_path / "laid", device, "the unet of", "was saved while a LoRA lay on it", "attn1.to_q",
            "call pipe.fuse_lora() and "
            "pipe.unload_lora_weights() before pipe.save_pretrained")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    refused(tmp_path / "fused", device, "the unet of", "was saved while a LoRA lay on it")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "plain")
    assert load_teacher(tmp_path / "plain", device=device).name == "unet2d_condition"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("made_by", "said"), [
    (["pipeline_mine", "MyUNet"], "component unet is a MyUNet of pipeline_mine, which is code beside the pipeline "
     "and is never run"),
    (["diffusers", "UNetOfTomorrow"], "component unet is a UNetOfTomorrow, which diffusers .* does not have"),
])
def test_code_of_its_own_is_refused_by_its_component(unet, device, made_by, said):
    path = unet / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": made_by}))
    with pytest.raises(RequestError, match=said):
        load_teacher(unet, device=device)
