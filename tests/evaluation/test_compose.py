"""A bench under other LoRAs: its pictures are the stock pipeline's own, and what is planted is what is said."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import style, tiny_pipeline, tiny_sd3

from stepdistill.diffusion.draws import key
from stepdistill.errors import RequestError
from stepdistill.evaluation.compose import _scales, bench_composed
from stepdistill.evaluation.own import STEPS
from stepdistill.evaluation.plans import Target, solver_scheduler
from stepdistill.evaluation.report import read_results
from stepdistill.models.families import stock_prompts
from stepdistill.models.sources import FusedLora
from stepdistill.models.stock import USUAL, pictures

PROMPTS, SAMPLES = ["a red ring", "a blue cross"], 8


def itself() -> tuple[Target, Target]:
    """(a student that is its base in 25 steps, the base)."""
    base = Target("teacher", tiny_pipeline(), companion=True)
    own = tiny_pipeline()
    own.scheduler = solver_scheduler(base, "dpmpp_2m")
    return Target("student", own, "lcm", {"guidance_scale": 1.0, "num_inference_steps": STEPS}, trained=1.0,
                  made={"lora": "fused"}), base


def bench(pair, styles, out, **more):
    asked = {"trained": 1.0, "solvers": ["dpmpp_2m"], "scales": [1.0, 0.5], "prompts": PROMPTS, "samples": SAMPLES,
             "say": lambda text: None}
    return bench_composed(*pair, styles, out, **asked | more)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    pair, folder = itself(), tmp_path_factory.mktemp("composed")
    lora = style(tiny_pipeline(), folder / "ink", size=3.0)
    return pair, lora, bench(pair, [lora], folder / "out", made={"date": "today"}), folder / "out"


def test_a_student_that_is_its_base_keeps_all(measured):
    _, _, results, out = measured
    assert read_results(out / "results.json") == results == json.loads((out / "results.json").read_text())
    one, = results["compose"]
    assert (one["lora"], one["guidance"], [scale["scale"] for scale in one["scales"]]) == ("ink", 1.0, [0.5, 1.0])
    for scale in one["scales"]:
        assert ((scale["kept"], scale["kept_low"], scale["diversity_ratio"]) == pytest.approx((1.0, 1.0, 1.0))
                and scale["fd"] is None)
    assert one["verdict"] == ("keeps the style: 100 % (100 to 100) at scale 0.5, 100 % (100 to 100) at scale 1; "
                              "pictures of one prompt differ as much as the base's")
    assert [row["target"] for row in results["rows"]] == ["teacher:dpmpp_2m", "student",
                                                          "teacher:dpmpp_2m + ink at 0.5", "student + ink at 0.5",
                                                          "teacher:dpmpp_2m + ink at 1", "student + ink at 1"]
    assert all(row["nfe"] == STEPS and row["made"]["date"] == "today" for row in results["rows"])
    assert results["rows"][0]["metrics"]["to_teacher"] is None and results["rows"][0]["metrics"]["clip_score"] is None


def test_the_pictures_are_a_stock_pipelines_own_with_the_lora_at_its_scale(measured):
    (student, base), lora, results, out = measured
    fresh = tiny_pipeline()
    fresh.scheduler = solver_scheduler(base, "dpmpp_2m")
    draw = lambda i: pictures(fresh, stock_prompts(fresh), [PROMPTS[i % 2]], num_inference_steps=STEPS,
                              guidance_scale=1.0,
                              generator=[torch.Generator().manual_seed(key(0, "sample", i))])
    plain = torch.cat([draw(i) for i in range(SAMPLES)])
    fresh.load_lora_weights(lora.path, adapter_name="ink")
    fresh.set_adapters(["ink"], adapter_weights=[0.5])
    half = torch.cat([draw(i) for i in range(SAMPLES)])
    assert (plain - half).square().mean().sqrt() > 0.02                                # the LoRA does something
    coarse = torch.nn.functional.adaptive_avg_pool2d(half, 32).flatten(1) / (3 * 32**2) ** 0.5
    apart = torch.stack([torch.pdist(coarse[i::2]).mean() for i in (0, 1)]).mean().item()
    assert results["rows"][3]["metrics"]["diversity"] == pytest.approx(apart, rel=1e-3)
    # taken off again
    assert all("lora" not in name for pipe in (student.pipeline, base.pipeline) for name in pipe.unet.state_dict())
    sheet = Image.open(out / "samples" / "ink.png")
    cell = sheet.crop((sheet.width - 2 * (96 + 4), 4, sheet.width - 96 - 8, 4 + 96)).resize((16, 16),
                                                                                            Image.Resampling.NEAREST)
    levels = torch.tensor(list(cell.getdata()), dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(levels, half[0], rtol=0, atol=1.5 / 255)                # the first row's second column


def test_a_student_that_loses_the_style_is_told_so(measured, tmp_path, monkeypatch):
    _, lora, _, _ = measured
    pair = itself()
    own = pair[0].pipeline.set_adapters
    monkeypatch.setattr(pair[0].pipeline, "set_adapters",
                        lambda names, adapter_weights: own(names, adapter_weights=[0.0]))
    results = bench(pair, [lora], tmp_path, scales=[1.0])
    one, = results["compose"]
    assert (one["scales"][0]["kept"] == pytest.approx(0.0, abs=1e-6) and "the style is lost at every scale (kept "
            "are 0 % (" in one["verdict"])
    assert results["rows"][-1]["metrics"]["to_teacher"] > 0.01
    page = (tmp_path / "report.html").read_text()
    assert ("<li>ink at guidance 1: the style is lost at every scale" in page and "kept 0.00 [" in page
            and 'alt="ink: a column without it' in page)


def test_each_guidance_and_each_lora_has_its_rows(tmp_path, clip_folder):
    pair = itself()
    loras = [style(tiny_pipeline(), tmp_path / name, 3.0, seed) for seed, name in enumerate(("ink", "oil"))]
    results = bench(pair, loras, tmp_path / "out", scales=[1.0], guidance=[1, 2], samples=4, features=[clip_folder])
    assert [(one["lora"], one["guidance"]) for one in results["compose"]] == [("ink", 1.0), ("ink", 2.0), ("oil", 1.0),
                                                                              ("oil", 2.0)]
    assert [(row["target"], row["nfe"]) for row in results["rows"]][:3] == [("teacher:dpmpp_2m", STEPS),
                                                                            ("student", STEPS), ("student", 2 * STEPS)]
    assert len(results["rows"]) == 9 and all(isinstance(row["metrics"]["clip_score"], float) for row in results["rows"])
    assert results["compose"][0]["scales"][0]["clip_score_change"] == pytest.approx(0.0, abs=1e-4)
    assert results["rows"][3]["metrics"]["diversity"] != pytest.approx(results["rows"][6]["metrics"]["diversity"],
                                                                       rel=1e-3)


def test_what_cannot_be_composed_is_refused(measured, tmp_path):
    pair, lora, _, _ = measured
    wide = style(tiny_sd3(), tmp_path / "of-sd3")
    with pytest.raises(RequestError, match="the LoRA .*of-sd3 does not fit this StableDiffusionPipeline"):
        bench(pair, [wide], tmp_path / "out")
    torch.save({}, tmp_path / "pickle.bin")
    with pytest.raises(RequestError, match="is no .safetensors file"):
        bench(pair, [FusedLora(str(tmp_path / "pickle.bin"))], tmp_path / "out")
    with pytest.raises(RequestError, match="there is no LoRA here/there/and/nowhere"):
        bench(pair, [FusedLora("here/there/and/nowhere")], tmp_path / "out")
    with pytest.raises(RequestError, match="LoRAs are told apart by their names; found ink, ink"):
        bench(pair, [lora, lora], tmp_path / "out")
    with pytest.raises(RequestError, match="different numbers above 0, such as 0.5, 0.75, 1; found 0, 1"):
        bench(pair, [lora], tmp_path / "out", scales=[0, 1])
    with pytest.raises(RequestError, match="2 of each prompt; found 3 of 2 prompts"):
        bench(pair, [lora], tmp_path / "out", samples=3)
    with pytest.raises(RequestError, match="a guidance scale of 0.5 was asked for"):
        bench(pair, [lora], tmp_path / "out", guidance=[0.5])
    assert not (tmp_path / "out").exists()


def test_a_lora_of_other_widths_is_refused_before_anything_is_drawn(measured, tmp_path):
    pair, lora, _, _ = measured
    state = load_file(Path(lora.path) / "pytorch_lora_weights.safetensors")
    (tmp_path / "odd").mkdir()
    save_file({name: torch.cat([value, value], 1) if "lora_A" in name or "lora.down" in name else value
               for name, value in state.items()},
              tmp_path / "odd" / "pytorch_lora_weights.safetensors")
    with pytest.raises(RequestError, match="the LoRA .*odd does not fit this StableDiffusionPipeline: .*size mismatch"):
        bench(pair, [FusedLora(str(tmp_path / "odd"))], tmp_path / "out")
    assert all("lora" not in name for pipe in (pair[0].pipeline, pair[1].pipeline) for name in pipe.unet.state_dict())


def test_a_network_that_reads_its_scale_is_asked_at_its_own_alone():
    class Reads(Target):
        guidance = replace(USUAL, embedded="guidance_scale", within=True)
    assert _scales(Reads("student", tiny_pipeline(), "lcm", {"guidance_scale": 3.5}), None) == [3.5]
    assert _scales(Target("student", tiny_pipeline(), "lcm", {"guidance_scale": 3.5}), None) == [3.5, 1.0]
    assert _scales(Target("student", tiny_pipeline(), "lcm", {"guidance_scale": 1.0}), None) == [1.0]
