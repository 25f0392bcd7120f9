"""Bases of few bits a weight: what their numbers stand for, what trains on them, and what is refused."""
from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from diffusers import BitsAndBytesConfig, TorchAoConfig, UNet2DConditionModel
from test_sources import save_lora
from tiny import save_tiny, tiny_pipeline
from torch import nn
from transformers import CLIPTextModel

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.export import load, read_settings
from stepdistill.methods.base import Frozen, Trained
from stepdistill.models import quantized, sources
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.quantized import BYTES, dequantized, layers, packed_bytes, quantization_of, quantize_
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.sources import Source, index_at
from stepdistill.models.stock import pictures
from stepdistill.models.teacher import load_teacher
from stepdistill.models.weights import settled
from stepdistill.recipe import Recipe
from stepdistill.run.checks import check
from stepdistill.run.first_call import check_first_call
from stepdistill.run.plan import plan
from stepdistill.run.setup import open_run, setup
from stepdistill.run.sources import source_of

needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="wants bitsandbytes: pip install "
                                   "stepdistill[bitsandbytes]")
FIRST = "time_embedding.linear_1"
TIMES = torch.tensor([0.5, 0.7], dtype=torch.float64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture
def installed(monkeypatch):
    """As if the library were there, for what uses nothing of it."""
    monkeypatch.setattr(quantized, "find_spec", lambda name: True)


def recipe(base, quantization: str | None = "nf4", **entries) -> dict:
    return {"method": "lcm", "teacher": {"base": str(base)} | ({} if quantization is None
                                                               else {"quantization": quantization}),
            "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
            "data": {"images": "shapes", "count": 4, "batch": 2},
            "train": {"updates": 2, "lr": 1e-2}, **entries}


def refused(written: dict) -> str:
    with pytest.raises(RequestError) as caught:
        check(Recipe.load(written))
    return str(caught.value)


# -- refusals and plans, which use nothing of the library --------------------------------------------------------------

def test_a_missing_library_is_named_before_anything_is_loaded(base, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    assert ("teacher.quantization is nf4: a quantised base wants bitsandbytes, and that is not installed: pip install "
            "stepdistill[bitsandbytes]" in refused(recipe(base)))


@pytest.mark.parametrize("entries, said", [
    ({"student": "full"}, "student trains all its weights, but the base is quantised (nf4), whose weights take "
     "no updates: let it be a LoRA"),
    ({"method": "dmd2", "critic": "full", "data": {"prompts": "shapes", "batch": 2}, "settings": {"gan_weight": 0.0}},
     "critic trains all its weights, but the base is quantised"),
    ({"train": {"updates": 1, "fsdp": True}}, "train.fsdp is on, but the base is quantised (nf4), whose layers "
     "it does not serve"),
    ({"train": {"updates": 1, "compile": True}}, "train.compile is on, but the base is quantised"),
    ({"method": "scm", "settings": {"derivative": "exact"}}, "settings.derivative is exact, but the base is quantised "
     "(nf4), whose layers have no derivative forward"),
])
def test_what_a_quantised_base_cannot_carry_is_refused(base, installed, entries, said):
    assert said in refused(recipe(base, **entries))


def test_loras_cannot_be_fused_into_few_bits(base, installed):
    written = recipe(base)
    written["teacher"]["loras"] = ["style.safetensors"]
    assert "teacher.loras are given, but the base is quantised (nf4)" in refused(written)


def test_toy_has_nothing_to_quantise():
    written = Recipe.load("toy/lcm").resolved()
    written["teacher"] = {"base": "assets/toy", "quantization": "nf4"}
    assert "teacher.quantization is nf4, but the teacher is Toy" in refused(written)


def test_the_table_of_bytes():
    assert (BYTES["nf4"](64, 48) == 64 * 48 // 2 + 4 * 48 and BYTES["nf4"](3, 5) == 7 + 4
            and BYTES["int8"](64, 48) == 64 * 48 + 4 * 64)


@pytest.mark.parametrize("kind", BYTES)
def test_a_plan_counts_packed_weights(base, installed, kind):
    plain, packed = (plan(Recipe.load(recipe(base, quantization)))["roles"]["teacher"] for quantization in (None, kind))
    linear = {path: module.weight.shape for path, module in load_teacher(base).network.named_modules()
              if type(module) is nn.Linear and path != FIRST}
    saved = sum(4 * rows * columns - BYTES[kind](rows, columns) for rows, columns in linear.values())
    assert (len(linear) == 49 and packed["parameters"] == plain["parameters"]
            and packed["bytes"] == plain["bytes"] - saved)


@pytest.mark.parametrize("names, quantization, said", [
    (["unet", "vae"], "nf4", "it quantises unet and text_encoder alone"),
    (["unet", "text_encoder_2"], "nf4", "it quantises unet and text_encoder alone"),
    (["text_encoder"], "nf4", "a LoRA lies on its unet: name that too"),
    (["unet", "text_encoder"], None, "quantization says no kind: nf4 or int8")])
def test_components_that_cannot_be_quantised_are_refused(base, installed, names, quantization, said):
    source = Source(str(base), quantization=quantization, components_to_quantize=tuple(names))
    with pytest.raises(RequestError, match=f"components_to_quantize names .* of a StableDiffusionPipeline, but {said}"):
        load_teacher(source, device="meta")


def test_a_plan_counts_packed_encoders(base, installed):
    written = recipe(base)
    written["teacher"]["components_to_quantize"] = ["unet", "text_encoder"]
    plain, packed = (plan(Recipe.load(w))["roles"]["text_encoder"] for w in (recipe(base), written))
    shapes = [module.weight.shape for module in load_teacher(base).parts["text_encoder"].modules()
              if type(module) is nn.Linear]
    saved = sum(4 * rows * columns - BYTES["nf4"](rows, columns) for rows, columns in shapes)
    assert len(shapes) == 6 and packed["bytes"] == plain["bytes"] - saved


# -- what is computed --------------------------------------------------------------------------------------------------

def opened(base, kind: str, dtype: torch.dtype = torch.float32):
    return load_teacher(Source(str(base), quantization=kind), dtype)


@needs_library
@pytest.mark.parametrize("kind, error, near", [("nf4", 0.304 / 2, 1e-5), ("int8", 0.5 / 127, 0.02)])
def test_a_base_computes_what_its_numbers_stand_for(base, kind, error, near):
    """The levels of NF4 are at most 0.304 of a block's largest apart, those of int8 1/127 of a row's; int8 rounds
    inputs too. (On a CPU bitsandbytes 0.50 reads rows of half a block by another block's scale, in every use alike:
    those are left out.)"""
    teacher, plain = opened(base, kind), load_teacher(base)
    weights = dequantized(teacher.network)
    assert weights.keys() == layers(plain.network, FIRST).keys() and quantization_of(teacher.network) == kind
    assert type(teacher.network.get_submodule(FIRST)) is nn.Linear and teacher.dtype == torch.float32
    for path, weight in ((path, weight) for path, weight in weights.items() if weight.shape[1] % 64 == 0):
        given = plain.network.get_submodule(path).weight.detach().bfloat16().float()
        rows = zip(given.view(-1, 64), weight.view(-1, 64)) if kind == "nf4" else zip(given, weight)
        assert all((a - b).abs().max() <= 1.01 * error * a.abs().max() for a, b in rows), path
    known = plain.network
    known.load_state_dict(known.state_dict() | {f"{path}.weight": weight for path, weight in weights.items()})
    x, cond = (torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)),
               plain.encode(["a red ring", "a blue square"]))
    with torch.no_grad():
        ours, theirs = (Denoiser(teacher, teacher.network)(x, TIMES, cond).raw,
                        Denoiser(plain, known)(x, TIMES, cond).raw)
    assert (ours - theirs).abs().max() <= near * theirs.abs().max()


@needs_library
@pytest.mark.parametrize("kind", BYTES)
def test_a_base_is_the_same_in_every_precision(base, kind):
    whole, half = (dequantized(opened(base, kind, dtype).network) for dtype in (torch.float32, torch.bfloat16))
    # in which the layer says what its numbers stand for
    rounded = torch.bfloat16 if kind == "nf4" else torch.float32
    assert all(torch.equal(whole[path].to(rounded), half[path].to(rounded)) for path in whole)


@needs_library
def test_adapters_on_it_have_the_gradients_of_the_network_that_it_stands_for(base):
    teacher, plain = opened(base, "nf4"), load_teacher(base)
    plain.network.load_state_dict(plain.network.state_dict()
                                  | {f"{path}.weight": w for path, w in dequantized(teacher.network).items()})
    x, found = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)), []
    for one in (teacher, plain):
        roles = build_roles(one, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(4)},
                            gradient_checkpointing=True)
        cond, generator = one.encode(["a red ring", "a blue square"]), torch.Generator().manual_seed(1)
        with torch.no_grad():
            # a pass without gradients comes first, as in training
            before = roles["teacher"](x, TIMES, cond).raw
            for parameter in roles.parameters("student"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        roles["student"](x, TIMES, cond).raw.square().mean().backward()
        with torch.no_grad():
            assert torch.equal(roles["teacher"](x, TIMES, cond).raw, before)
            merged = one.predict(roles.network("student"), x, TIMES, cond)
            torch.testing.assert_close(merged, roles["student"](x, TIMES, cond).raw, rtol=1e-4, atol=1e-5)
        assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
        found.append([p.grad for p in roles.parameters("student")])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


@needs_library
@pytest.mark.parametrize("kind, precision", [("nf4", "fp32"), ("nf4", "fp16"), ("int8", "bf16")])
def test_a_student_of_it_leaves_as_a_lora_that_is_proved(base, tmp_path, kind, precision):
    run = api.train(recipe(base, kind, train={"updates": 2, "lr": 1e-2, "precision": precision}), out=tmp_path / "run")
    folder = api.export(run)
    said, card = read_settings(folder), (folder / "README.md").read_text()
    assert said["quantization"] == said["teacher_parts"]["quantization"] == kind
    assert said["proof"]["difference"] <= said["proof"]["tolerance"] == (1e-4 if kind == "nf4" else 2**-5)
    assert ("quantization_config=bits" in card and "fuse_lora" not in card
            and f'llm_int8_skip_modules=["{FIRST}"]' in card)
    with pytest.raises(RequestError, match=rf"base is quantised \({kind}\).* use --to lora"):
        api.export(run, to="pipeline")
    known = open_run(run)
    pipe = known.teacher.pipeline()
    assert quantization_of(pipe.unet) == kind and pipe.unet is not known.teacher.network
    call, prompts = load(pipe, folder), ["a red ring"]
    drawn = pictures(pipe, known.teacher.family.prompts, prompts, generator=torch.Generator().manual_seed(0), **call)
    student = known.roles[known.sampling_role]
    noise = torch.randn(1, *known.teacher.latent_shape, generator=(generator := torch.Generator().manual_seed(0)))
    latents = known.method.sampler(student, noise, known.teacher.encode(prompts),
                                   lambda i: torch.randn(noise.shape, generator=generator))
    # the LoRA is float16
    assert (known.teacher.decode(latents) / 2 + 0.5 - drawn).abs().max() <= (5e-3 if kind == "int8" else 1e-3)


@needs_library
def test_a_student_of_it_begins_with_a_lora(base, tmp_path):
    save_lora(tmp_path / "lora")
    run = setup(Recipe.load(recipe(base, student={"from": str(tmp_path / "lora")})), torch.device("cpu"))
    pipe = run.teacher.pipeline()
    pipe.load_lora_weights(tmp_path / "lora")
    x, cond = torch.randn(2, *run.teacher.latent_shape), run.teacher.encode(["a red ring", "a blue square"])
    with torch.no_grad():
        ours, theirs = run.roles["student"](x, TIMES, cond).raw, Denoiser(run.teacher, pipe.unet)(x, TIMES, cond).raw
        assert (run.roles.base(x, TIMES, cond).raw - theirs).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_library
def test_the_first_call_is_that_of_the_quantised_pipeline(base):
    for kind, limit in (("nf4", 1e-4), ("int8", 2**-5)):
        assert check_first_call(setup(Recipe.load(recipe(base, kind)), torch.device("cpu"))) <= limit


@needs_library
@pytest.mark.parametrize("kind", BYTES)
def test_a_folder_that_was_saved_quantised(base, tmp_path, kind):
    pipe = tiny_pipeline()
    quantize_(pipe.unet, kind, first="")                       # as stock pipelines do, the time embedding too
    pipe.save_pretrained(tmp_path / "saved")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    path = tmp_path / "saved" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())
                               | {"quantization_config": BitsAndBytesConfig(**options).to_dict()}))
    teacher, known = load_teacher(tmp_path / "saved"), opened(base, kind)
    assert teacher.source.quantization == kind and type(teacher.network.get_submodule(FIRST)) is nn.Linear
    x, cond = torch.randn(2, *teacher.latent_shape), teacher.encode(["a red ring", "a blue square"])
    saved, made = dequantized(teacher.network), dequantized(known.network)
    assert saved.keys() == made.keys() and all(torch.equal(saved[name], made[name]) for name in made)
    with torch.no_grad():
        assert Denoiser(teacher, teacher.network)(x, TIMES, cond).raw.isfinite().all()
    assert "has a base that was saved as" not in json.dumps(plan(Recipe.load(recipe(tmp_path / "saved", None))))
    assert (plan(Recipe.load(recipe(tmp_path / "saved", None)))["roles"]["teacher"]["bytes"]
            == plan(Recipe.load(recipe(base, kind)))["roles"]["teacher"]["bytes"])
    run = api.train(recipe(tmp_path / "saved", None), out=tmp_path / "run")
    folder = api.export(run)
    assert (read_settings(folder)["quantization"] == kind
            and "quantization_config" not in (folder / "README.md").read_text())
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    assert (f"quantization is {other}, but the unet of {tmp_path / 'saved'} was saved quantised as {kind}: "
            "leave it out" in refused(recipe(tmp_path / "saved", other)))


@needs_library
@pytest.mark.parametrize("kind", BYTES)
def test_text_encoders_are_quantised_where_they_are_named(base, tmp_path, kind):
    written = recipe(base, kind)
    written["teacher"]["components_to_quantize"] = ["unet", "text_encoder"]
    teacher = load_teacher(source_of(Recipe.load(written)))
    encoder, plain = teacher.parts["text_encoder"], load_teacher(base)
    assert quantization_of(encoder) == quantization_of(teacher.network) == kind
    known = plain.parts["text_encoder"]
    known.load_state_dict(known.state_dict() | {f"{path}.weight": w for path, w in dequantized(encoder).items()})
    ours, theirs = (one.encode(["a red ring", "a blue square"]).text for one in (teacher, plain))
    assert (ours - theirs).abs().max() <= (1e-5 if kind == "nf4" else 0.02) * theirs.abs().max()
    run = api.train(written, out=tmp_path / "run")
    folder = api.export(run)
    card = (folder / "README.md").read_text()
    assert 'quant_mapping={"unet": bits, "text_encoder": encoder_bits}' in card and "import transformers" in card
    assert read_settings(folder)["teacher_parts"]["components_to_quantize"] == ["unet", "text_encoder"]


@needs_library
def test_a_text_encoder_that_was_saved_quantised_is_read_as_it_is(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "saved")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", quantization_config=bits)
    shutil.rmtree(folder / "text_encoder")
    encoder.save_pretrained(folder / "text_encoder")
    teacher, prompts = load_teacher(folder), ["a red ring", "a blue square"]
    assert quantization_of(teacher.parts["text_encoder"]) == "nf4" and quantization_of(teacher.network) is None
    read, made, plain = dequantized(teacher.parts["text_encoder"]), dequantized(encoder), load_teacher(base)
    assert read.keys() == made.keys() and all(torch.equal(read[name], made[name]) for name in made)
    known = plain.parts["text_encoder"]
    known.load_state_dict(known.state_dict() | {f"{path}.weight": weight for path, weight in read.items()})
    torch.testing.assert_close(teacher.encode(prompts).text, plain.encode(prompts).text, rtol=1e-4, atol=1e-4)
    assert (plan(Recipe.load(recipe(folder, None)))["roles"]["text_encoder"]["bytes"]
            < plan(Recipe.load(recipe(base, None)))["roles"]["text_encoder"]["bytes"])


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("library, config", [
    ("torchao", {"quant_method": "torchao"}),
    ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True})])
def test_a_saved_kind_whose_library_is_missing_is_named(tmp_path, monkeypatch, part, library, config):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    path = save_tiny(tmp_path / "saved") / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(RequestError, match=f"a quantised base wants {library}, and that is not installed"):
        load_teacher(tmp_path / "saved")


@pytest.mark.skipif(find_spec("torchao") is None, reason="wants torchao")
def test_a_folder_that_was_saved_by_torchao(base, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    folder = shutil.copytree(base, tmp_path / "saved")
    network = UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.float32,
                                                   quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet")
    teacher, plain = load_teacher(folder), load_teacher(base)
    assert teacher.source.quantization == quantization_of(teacher.network) == "torchao"
    weights = dequantized(network)
    plain.network.load_state_dict(plain.network.state_dict() | {f"{path}.weight": w for path, w in weights.items()})
    x, cond = torch.randn(2, *teacher.latent_shape), plain.encode(["a red ring", "a blue square"])
    with torch.no_grad():
        ours, theirs = (Denoiser(one, one.network)(x, TIMES, cond).raw for one in (teacher, plain))
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    folder = api.export(api.train(recipe(folder, None), out=tmp_path / "run"))
    assert read_settings(folder)["quantization"] == "torchao"


def test_a_base_on_the_hub_that_was_saved_quantised_is_known_by_its_config(tmp_path, monkeypatch):
    """Here as the cache holds it: no weights are read."""
    folder = save_tiny(tmp_path / "models--a--b/snapshots/0123")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}))
    asked = []
    monkeypatch.setattr(sources, "hub_file", lambda place, name, **more: asked.append((place, name)) or str(
        folder / name))
    source = Source("a/b")
    assert settled(source, index_at(Source(str(folder)))).quantization == "nf4"
    assert asked == [("a/b", "unet/config.json")]


@pytest.mark.parametrize("config, said", [({"quant_method": "gptq"}, "are quantised by gptq; a base is served "
                                           "in nf4 or int8 of bitsandbytes, or by torchao"),
                                          ({"quant_method": "bitsandbytes", "load_in_4bit": True,
                                            "bnb_4bit_quant_type": "fp4"}, "by bitsandbytes as fp4;")])
def test_other_kinds_of_quantisation_are_refused(tmp_path, config, said):
    path = save_tiny(tmp_path / "saved") / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(RequestError, match=said):
        load_teacher(tmp_path / "saved")


def test_a_packed_count_leaves_adapters_out(base):
    teacher = load_teacher(base)
    before = packed_bytes(teacher.network, "nf4", FIRST)
    build_roles(teacher, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(4)})
    assert packed_bytes(teacher.network, "nf4", FIRST) == before
