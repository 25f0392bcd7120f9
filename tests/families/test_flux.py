"""FLUX pipelines beside the matrix: what their networks are told in bfloat16, numbers beside a guidance scale, and
refusals."""
from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from stepdistill import api
from stepdistill.diffusion.sampler import Sampler
from stepdistill.errors import RequestError
from stepdistill.methods.base import Trained
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher

from . import flux, flux2

CASES = flux.CASES | flux2.CASES
PROMPTS = ["a red ring", "a blue square"]


def told(pipe: DiffusionPipeline, **call) -> list[dict]:
    """The keyword arguments of every call of its network."""
    seen: list[dict] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt=PROMPTS, output_type="latent", num_inference_steps=3, generator=torch.Generator().manual_seed(0),
         **call)
    return seen


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def folder(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    (tmp_path / "stepdistill.json").write_text(json.dumps({"call": dict(case.call)}))
    return tmp_path


def test_in_bfloat16_the_network_is_told_what_the_stock_call_tells_it(case, folder):
    """Times that bfloat16 cannot hold, positions, and a guidance scale: each with its dtype."""
    teacher = load_teacher(folder, dtype=torch.bfloat16, scale=3.3, resolution=(16, 24))
    stock = teacher.pipeline()
    seen = told(stock, **teacher.call, guidance_scale=teacher.scale or 1.0)
    cond = teacher.scaled(teacher.encode(PROMPTS))
    for given, time in zip(seen, stock.scheduler.sigmas.double(), strict=False):
        x_t = case.unpacked(given["hidden_states"], (2, *teacher.latent_shape))
        timestep = teacher.timestep(time.expand(2)).to(torch.bfloat16)
        ours = teacher.family.inputs(teacher.network, x_t, timestep, cond)
        for name in ours.keys() - {"return_dict"}:
            many = name.endswith("_ids") and given[name].ndim == 3          # of which the network reads the first
            same(ours[name], given[name][0] if many else given[name])
    assert len(seen) == 3


def same(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("reads", [("w",), ("r",), ("w", "r")], ids="+".join)
def test_numbers_beside_the_time_are_folded_into_a_stock_network(case, folder, reads):
    """The module of sinusoids also embeds a guidance scale, which must not read them."""
    teacher = load_teacher(folder, scale=3.3, resolution=16)
    if teacher.scale is not None and "w" in reads:
        pytest.skip("its network reads w by itself")
    roles = build_roles(teacher, {"student": Trained("teacher", reads)}, {"student": Lora(4)})
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    scheduler = teacher.scheduler.from_config(teacher.scheduler.config, use_dynamic_shifting=False)
    sampler, cond, x = (Sampler.of(scheduler, 3, teacher.schedule), teacher.encode(PROMPTS),
                        torch.randn(2, *teacher.latent_shape))
    network = roles.stock_network("student", sampler, 3.3)
    for time, landing in zip(sampler.times, sampler.landings, strict=True):
        numbers = {"w": torch.full((2,), 3.3, dtype=torch.float64), "r": landing.expand(2)}
        reading = cond.replace(**{name: numbers[name] for name in reads})
        ours = roles["student"](x, time.expand(2), reading).raw
        torch.testing.assert_close(teacher.predict(network, x, time.expand(2), teacher.scaled(cond)), ours,
                                   rtol=1e-3, atol=1e-4)
        assert (teacher.predict(teacher.network, x, time.expand(2), teacher.scaled(cond)) - ours).abs().max() > 1e-2


def test_pictures_of_a_stock_call_are_1024_pixels(case, folder):
    """As the pipeline's own default says: 128 latents a side of the codec."""
    call = {name: value for name, value in case.call.items() if name not in ("height", "width")}
    (folder / "stepdistill.json").write_text(json.dumps({"call": call}))
    teacher, stock = load_teacher(folder, device="meta"), case.build()
    packed, _ = stock.prepare_latents(1, stock.transformer.config.in_channels // 4,
                                      *[stock.default_sample_size * stock.vae_scale_factor] * 2,
                                      torch.float32, "cpu", torch.Generator())
    assert case.unpacked(packed, (1, *teacher.latent_shape)).shape[1:] == teacher.latent_shape


def test_teachers_that_it_does_not_translate(case, folder):
    pipeline = case.build()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, in_channels=20)
    pipeline.scheduler = DDIMScheduler()
    pipeline.save_pretrained(folder)
    with pytest.raises(RequestError, match="reads tokens of 20 numbers.*DDIMScheduler is none of flow matching"):
        load_teacher(folder, device="meta")


def test_a_klein_that_is_distilled_or_reads_a_scale(tmp_path):
    pipeline = flux2.tiny_klein()
    pipeline.register_to_config(is_distilled=True)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config, guidance_embeds=True)
    pipeline.save_pretrained(tmp_path)
    for device in (None, "meta"):
        with pytest.raises(RequestError, match="distilled to a few steps already.*reads a guidance scale"):
            load_teacher(tmp_path, device=device)


@pytest.mark.parametrize("method, settings",
                         [("lcm", {"guidance_embedding": True}), ("dmd2", {"exit_embedding": True, "gan_weight": 0})])
def test_no_embedding_of_ours_where_the_network_reads_its_scale(tmp_path, method, settings):
    flux.tiny_flux(True).save_pretrained(tmp_path / "teacher")
    lora = {"lora": {"rank": 2}}
    recipe = {"method": method, "teacher": str(tmp_path / "teacher"), "resolution": [16, 16], "student": lora,
              "guidance": 2.0, "steps": 2,
              "settings": settings, "data": {"images": "shapes", "count": 2, "batch": 2}, "train": {"updates": 1}}
    with pytest.raises(RequestError, match="an embedding, but the teacher's network reads its guidance scale "
                       "by itself"):
        api.train(recipe | ({"critic": lora} if method == "dmd2" else {}), out=tmp_path / "run")


@pytest.mark.parametrize("device", [None, "meta"])
def test_of_a_processor_the_tokenizer_is_enough(tmp_path, device):
    """The released FLUX.2 dev names a PixtralProcessor, which wants torchvision; prompts read its tokenizer alone."""
    pipe = flux2.tiny_dev()
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["transformers", "PixtralProcessor"]}))
    (tmp_path / "tokenizer/processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    call = flux2.CASES["flux2-dev"].call
    (tmp_path / "stepdistill.json").write_text(json.dumps({"call": dict(call)}))
    teacher = load_teacher(tmp_path, device=device)
    shape = (len(PROMPTS), call["max_sequence_length"], 48)
    assert teacher.encode(PROMPTS).text.shape == shape
    if device is None:
        known, _ = pipe.encode_prompt(PROMPTS, max_sequence_length=shape[1], text_encoder_out_layers=(1, 2, 4))
        torch.testing.assert_close(teacher.encode(PROMPTS).text, known, rtol=1e-5, atol=1e-5)
        assert type(teacher.pipeline().tokenizer) is type(pipe.tokenizer)
        (tmp_path / "tokenizer/tokenizer.json").unlink()
        with pytest.raises(RequestError, match="the tokenizer of .* has no vocabulary"):
            load_teacher(tmp_path)
