"""A LoRA from two checkpoints, against one that is known."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import save_tiny, save_tiny_sd3, tiny_pipeline
from torch import nn

from stepdistill import api, cli
from stepdistill.errors import RequestError
from stepdistill.export.extract import factors
from stepdistill.models.stock import Prompts, pictures

FILE, RANK = "pytorch_lora_weights.safetensors", 4
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}


def merged(rank: int = RANK) -> StableDiffusionPipeline:
    """The tiny pipeline with a LoRA of this rank on linear layers and convolutions, added to its weights."""
    pipe = tiny_pipeline()
    torch.manual_seed(5)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "ff.net.2", "conv1",
                                                                              "time_emb_proj", "downsamplers.0.conv"],
                                     init_lora_weights=False), "made")
    pipe.fuse_lora(components=["unet"], adapter_names=["made"])
    pipe.unload_lora_weights()
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base; one that differs by a LoRA of rank 4; one that differs by norms, biases and a layer that is no target,
    too; and a rank-4 LoRA of that."""
    root = tmp_path_factory.mktemp("extract")
    save_tiny(root / "base")
    pipe = merged()
    pipe.save_pretrained(root / "turbo", variant="fp16")
    with torch.no_grad():
        pipe.unet.conv_norm_out.weight.add_(0.1)
        pipe.unet.conv_norm_out.bias.add_(0.2)
        pipe.unet.conv_out.bias.sub_(0.5)
        pipe.unet.conv_in.weight.add_(0.25)
    pipe.save_pretrained(root / "more")
    return root


def with_lora(base, folder) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(folder)
    return drawn(pipe)


def drawn(pipe: StableDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pictures(pipe, Prompts(), ["a red ring", "a blue square"], generator=torch.Generator().manual_seed(0),
                    **CALL)


def test_a_lora_that_was_merged_is_found_again(folders, tmp_path):
    found = api.extract(folders / "turbo", folders / "base", RANK, tmp_path / "lora", dtype="float32")
    theirs = drawn(StableDiffusionPipeline.from_pretrained(folders / "turbo", variant="fp16", safety_checker=None))
    assert (with_lora(folders / "base", tmp_path / "lora") - theirs).abs().max() <= 1e-4
    assert (drawn(tiny_pipeline()) - theirs).abs().max() > 1e-2
    assert found.kept == pytest.approx(1, abs=1e-6) and found.reached == 1 and not found.beyond
    assert {layer.name for layer in found.layers} == {name for name, module in tiny_pipeline().unet.named_modules()
                                                      if isinstance(module, nn.Linear | nn.Conv2d)
                                                      and name.endswith(("to_q", "ff.net.2", "conv1", "time_emb_proj",
                                                                         "downsamplers.0.conv"))}
    student = {"method": "lcm", "teacher": str(folders / "base"), "student": {"from": str(tmp_path / "lora")},
               "guidance": 2.0, "steps": 2,
               "data": {"images": "shapes", "count": 4, "batch": 2}, "train": {"updates": 1, "lr": 1e-4}}
    assert api.train(student, out=tmp_path / "run").is_dir()


def test_of_a_lower_rank_it_holds_the_largest_singular_values(folders, tmp_path):
    found = api.extract(folders / "turbo", folders / "base", 2, tmp_path / "lora", dtype="float32")
    old, new = (load_file(folders / name) for name in ("base/unet/diffusion_pytorch_model.safetensors",
                                                       "turbo/unet/diffusion_pytorch_model.fp16.safetensors"))
    held = whole = 0.0
    for layer in found.layers:
        values = torch.linalg.svdvals((new[f"{layer.name}.weight"]
                                       - old[f"{layer.name}.weight"]).double().flatten(1)).square()
        assert (layer.kept == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-5)
                and layer.norm == pytest.approx(values.sum().item(), rel=1e-5))
        held, whole = held + values[:2].sum().item(), whole + values.sum().item()
    assert found.kept == pytest.approx(held / whole, rel=1e-5) and 0.2 < found.kept < 0.9
    assert [layer.kept for layer in found.worst(3)] == sorted(layer.kept for layer in found.layers)[:3]
    state = load_file(tmp_path / "lora" / FILE)
    rest = sum((new[f"{layer.name}.weight"] - old[f"{layer.name}.weight"]
                - (state[f"unet.{layer.name}.lora_B.weight"].flatten(1)
                @ state[f"unet.{layer.name}.lora_A.weight"].flatten(1)).view_as(
                    new[f"{layer.name}.weight"])).square().sum().item() for layer in found.layers)
    assert rest == pytest.approx(whole - held, rel=1e-4), "what is left is what is not kept"


def test_the_factors_are_as_good_as_an_exact_decomposition():
    """Of a spectrum that falls slowly the randomised decomposition keeps as much, to a thousandth."""
    matrix = (torch.linalg.qr(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)))[0]
              * (1 / torch.arange(1, 201).sqrt()))
    matrix = matrix @ torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(1)))[0]
    known = torch.linalg.svdvals(matrix.double()).square()[:8].sum().item()
    down, up, kept = factors(matrix, 8)
    assert (known * 0.999 <= kept <= known * 1.0001 and (up @ down).square().sum().item()
            == pytest.approx(kept, rel=1e-4))
    assert torch.equal(factors(matrix, 8)[0], down), "it is the same at every time"


def test_what_no_lora_reaches_is_counted(folders, tmp_path):
    found = api.extract(folders / "more", folders / "base", RANK, tmp_path / "lora")
    assert {kind: count for kind, (count, _) in found.beyond.items()} == {"norms": 2, "biases": 1, "other layers": 1}
    old, new = (load_file(folders / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("base", "more"))
    for kind, names in (("norms", ("conv_norm_out.weight", "conv_norm_out.bias")), ("biases", ("conv_out.bias",)),
                        ("other layers", ("conv_in.weight",))):
        assert found.beyond[kind][1] == pytest.approx(sum((new[name] - old[name]).square().sum().item()
                                                          for name in names), rel=1e-4)
    whole = sum((new[name] - old[name]).double().square().sum().item() for name in old)
    assert (found.reached == pytest.approx(sum(layer.norm for layer in found.layers) / whole, rel=1e-5)
            and found.kept == pytest.approx(1, abs=1e-6))
    assert {value.dtype for value in load_file(tmp_path / "lora" / FILE).values()} == {torch.float16}


def test_layers_narrower_than_the_rank_have_their_own(folders, tmp_path):
    api.extract(folders / "turbo", folders / "base", 24, tmp_path / "lora", dtype="float32")
    state = load_file(tmp_path / "lora" / FILE)
    ranks = {len(value) for name, value in state.items() if name.endswith("lora_A.weight")}
    assert ranks == {16, 24}
    theirs = drawn(StableDiffusionPipeline.from_pretrained(folders / "turbo", variant="fp16", safety_checker=None))
    assert (with_lora(folders / "base", tmp_path / "lora") - theirs).abs().max() <= 1e-4


def test_the_command_says_what_is_kept(folders, tmp_path, capsys):
    cli.extract(str(folders / "more"), str(folders / "base"), 2, tmp_path / "a")
    said = " ".join(capsys.readouterr().out.split())
    assert "the 10 layers of" in said and "kept in all: " in said
    assert "out of its reach: 2 norms, 1 biases, 1 other layers" in said and "student: {from:" in said
    cli.extract(str(folders / "more"), str(folders / "base"), 2, tmp_path / "b", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"] == 2 and 0 < found["kept"] < 1 and found["beyond"]["norms"]["tensors"] == 2
            and {"name", "norm", "kept"} == {*found["layers"][0]})


def test_what_cannot_be_extracted_is_refused(folders, tmp_path):
    for turbo, base, said in ((folders / "base", folders / "base", "no layer of .* that a LoRA adapts differs from"),
                              (save_tiny_sd3(tmp_path / "sd3"), folders / "base", "is a StableDiffusion3Pipeline "
                               "and .*base a StableDiffusionPipeline: a LoRA is made of two pipelines of one class"),
                              ("assets/toy", "assets/toy", "is Toy, whose network is none of diffusers"),
                              (folders / "more" / "unet" / "diffusion_pytorch_model.safetensors", folders / "base",
                               "holds no whole Stable Diffusion checkpoint")):
        with pytest.raises(RequestError, match=said):
            api.extract(turbo, base, 2, tmp_path / "out")
    wide = tiny_pipeline()
    wide.unet.conv_in = nn.Conv2d(4, 16, 1)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(RequestError, match=r"are not alike: conv_in.weight has the shape \(16, 4, 1, 1\) in one "
                       r"and \(16, 4, 3, 3\) in the other"):
        api.extract(tmp_path / "wide", folders / "base", 2, tmp_path / "out")
    with pytest.raises(RequestError, match="is not empty: choose another --out"):
        api.extract(folders / "more", folders / "base", 2, folders / "base")
    with pytest.raises(RequestError, match="at least 1, found 0"):
        api.extract(folders / "more", folders / "base", 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
