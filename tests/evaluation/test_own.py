"""A bench of one's own model: distances to the teacher's own pictures, from the same noise, and what its page shows."""
from __future__ import annotations

import io
import json
from html.parser import HTMLParser

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.errors import RequestError
from stepdistill.evaluation.own import STEPS, bench_own
from stepdistill.evaluation.page import SORT
from stepdistill.evaluation.plans import Target, plans
from stepdistill.evaluation.report import read_results
from stepdistill.export.card import _table

PROMPTS = ["a red ring", "a blue cross", "a green square"]


@pytest.fixture(scope="module")
def targets():
    pipeline = tiny_pipeline(seed=1)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    student = Target("student", pipeline, "lcm", {"guidance_scale": 1.0, "num_inference_steps": 4},
                     made={"weights": "mine"})
    return student, Target("teacher", tiny_pipeline(), companion=True)


def bench(targets, out, **more):
    return bench_own(targets, targets[1], [1, 4], out, guidance=[1.0, 2.0], solvers=["ddim", "dpmpp_2m"],
                     prompts=PROMPTS, samples=6,
                     say=lambda text: None, **more)


def test_figures_are_those_of_the_pictures(targets, tmp_path):
    student, teacher = targets
    results = bench(targets, tmp_path, made={"date": "today"})
    rows = results["rows"]
    assert json.loads((tmp_path / "results.json").read_text()) == read_results(tmp_path / "results.json") == results
    assert "Features none, reference the teacher's own pictures" in _table(results) and "to teacher" in _table(results)
    assert (rows[0]["target"], rows[0]["steps"], rows[0]["nfe"], rows[0]["guidance"]) == ("teacher:dpmpp_2m", STEPS,
                                                                                          2 * STEPS, 2.0)
    assert rows[0]["metrics"]["to_teacher"] is None and all(row["metrics"]["clip_score"] is None for row in rows)
    assert ([row["nfe"] for row in rows if row["target"] == "student"] == [1, 4]
            and rows[1]["made"] == {"date": "today", "weights": "mine"})

    ids, asked = torch.arange(6), PROMPTS * 2
    best = next(p for p in plans(teacher, [2 * STEPS], [2.0], ["dpmpp_2m"], print))
    one = plans(student, [4], [], [], print)[0]
    theirs, ours = (torch.cat([p.images(asked[i:i + 4], ids[i:i + 4], 0) for i in (0, 4)]) for p in (best, one))
    row = next(r for r in rows if r["target"] == "student" and r["nfe"] == 4)
    assert row["metrics"]["to_teacher"] == pytest.approx(((ours - theirs) / 2).square().mean().sqrt().item(), rel=1e-4)
    coarse = torch.nn.functional.adaptive_avg_pool2d(ours / 2, 32)
    # samples 0 and 3 are of one prompt
    apart = (coarse[:3] - coarse[3:]).square().flatten(1).mean(1).sqrt().mean()
    assert row["metrics"]["diversity"] == pytest.approx(apart.item(), rel=1e-4)
    assert row["latency_ms"] > 0

    together = Image.open(tmp_path / "samples" / "together.png")
    assert together.height > len(rows) * 96 and (tmp_path / "samples" / "student-nfe4-w1.png").is_file()


def test_a_clip_model_gives_a_score(targets, clip_folder, tmp_path):
    rows = bench(targets[:1] * 1 + targets[1:], tmp_path, features=[clip_folder])["rows"]
    assert all(isinstance(row["metrics"]["clip_score"], float) for row in rows)


def test_what_cannot_be_drawn_is_refused(targets, tmp_path):
    with pytest.raises(RequestError, match="takes a prompt and at least 2 samples; found 0 and 6"):
        bench_own(targets, targets[1], [1], tmp_path, guidance=[1.0], solvers=["ddim"], prompts=[], samples=6)
    with pytest.raises(RequestError, match="teacher cannot be drawn of in 25 steps of heun"):
        bench_own([targets[0]], targets[1], [1], tmp_path, guidance=[1.0], solvers=["heun"], prompts=PROMPTS)


class Checker(HTMLParser):
    """What a page must have for those who hear it, and for narrow screens."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_serves_every_reader(targets, tmp_path):
    bench(targets, tmp_path, made={"date": "today", "versions": {"torch": "2"}})
    text = (tmp_path / "report.html").read_text()
    page = Checker()
    page.feed(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    assert page.of("html") == [{"lang": "en"}] and len(page.of("main")) == 1 and "prefers-color-scheme: dark" in text
    assert all(image["alt"] for image in page.of("img")) and all(div["tabindex"] == "0" and div["aria-label"]
                                                                 for div in page.of("div"))
    assert len(page.of("button")) == 8 and SORT in text and "date: today; versions: torch 2" in text
    assert "http" not in text
    assert Image.open(io.BytesIO((tmp_path / "samples" / "together.png").read_bytes())).format == "PNG"
