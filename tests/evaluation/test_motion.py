"""Motion of videos: a pattern that moves by d pixels a frame gives d, and slow motion is called so."""
from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.evaluation.means import clip_score, diversity
from stepdistill.evaluation.metrics import METRICS, Means, register_metric
from stepdistill.evaluation.motion import displacement, in_words, of_videos
from stepdistill.evaluation.own import bench_own
from stepdistill.evaluation.plans import Target, plans
from stepdistill.models.stock import some_frames

from ..families.wan import CALL, tiny

PROMPTS = ["a red ring", "a blue square"]


def waves(by: float, frames: int = 6, side: int = 96, along: str = "x", period: float = 24.0) -> torch.Tensor:
    """(1, F, 3, H, W): waves along both axes, moved by so many pixels a frame."""
    k, at = 2 * math.pi / period, torch.arange(side, dtype=torch.float64)
    videos = []
    for f in range(frames):
        x, y = (at + (by * f if along in (axis, "both") else 0) for axis in ("x", "y"))
        videos.append((torch.cos(k * x)[None] + torch.cos(k * y)[:, None]) / 2)
    return torch.stack(videos)[None, :, None].expand(-1, -1, 3, -1, -1).float()


@pytest.mark.parametrize("by", [0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, -2.0])
@pytest.mark.parametrize("along", ["x", "y"])
def test_a_pattern_that_moves_by_d_pixels_a_frame_gives_d(by, along):
    assert displacement(waves(by, along=along)).item() == pytest.approx(abs(by), rel=0.04, abs=1e-4)


def texture(side: int) -> torch.Tensor:
    """(3, side, side), alike in all directions."""
    noise, kernel = (torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)),
                     torch.exp(-torch.arange(-9, 10) ** 2 / 18))
    blurred = torch.nn.functional.conv2d(noise[:, None], kernel[None, None, None], padding=(0, 9))
    return torch.nn.functional.conv2d(blurred, kernel[None, None, :, None], padding=(9, 0))[:, 0]


@pytest.mark.parametrize("by", [1, 2, 4])
def test_a_texture_that_a_camera_pans_over_gives_the_pan(by):
    whole = texture(320)
    pan = torch.stack([whole[:, 20:276, 20 + by * f:276 + by * f] for f in range(6)])[None]
    assert displacement(pan).item() == pytest.approx(by, rel=0.06)
    slanted = torch.stack([whole[:, 20 + by * f:276 + by * f, 20 + by * f:276 + by * f] for f in range(6)])[None]
    assert displacement(slanted).item() == pytest.approx(by * 2 ** 0.5, rel=0.06)


def test_contrast_and_light_are_no_motion():
    moving = waves(2.0)
    assert displacement(0.2 * moving + 0.1).item() == pytest.approx(displacement(moving).item(), rel=1e-4)
    light = torch.linspace(-0.5, 0.5, 6)[None, :, None, None, None]
    assert displacement(moving / 2 + light).item() == pytest.approx(displacement(moving).item(), rel=1e-4)
    assert displacement(torch.zeros(2, 5, 3, 16, 16) + light[:, :5]).tolist() == [0.0, 0.0]
    assert displacement(waves(0.0)[:, :1].expand(-1, 6, -1, -1, -1)).item() == 0.0


def test_videos_are_measured_one_by_one_and_at_most_half_a_side():
    together = torch.cat([waves(1.0), waves(3.0),
                          torch.randn(1, 6, 3, 96, 96, generator=torch.Generator().manual_seed(1))])
    found = displacement(together)
    assert found[:2].tolist() == pytest.approx([displacement(waves(1.0)).item(), displacement(waves(3.0)).item()])
    assert 0 < found[2] <= 48                                        # independent noise: no shift brings it back


def kept(moved: list[float]) -> dict[str, torch.Tensor]:
    return {"moved": torch.tensor(moved), "seen": torch.randn(len(moved), 3, 8)}


def test_the_ratio_is_paired_with_the_teachers_videos():
    teacher = kept([1.0, 2.0, 4.0, 3.0])
    found = of_videos(kept([0.5, 1.0, 2.0, 1.5]), teacher, 2, 0)
    assert ((found["motion_ratio"], found["motion_ratio_low"], found["motion_ratio_high"])
            == pytest.approx((0.5, 0.5, 0.5)))
    assert found["motion"] == 1.25 and found["motion_low"] < 1.25 < found["motion_high"] and found["fd_frames"] is None
    assert of_videos(teacher, teacher, 2, 0)["motion_ratio"] is None
    assert of_videos(teacher, kept([0.0] * 4), 2, 0)["motion_ratio"] is None


def test_the_distance_of_frames_is_of_one_frame_a_video():
    """A frame that is not looked at may be anything; the shift by 1 in 4 dimensions is a distance of 4."""
    generator = torch.Generator().manual_seed(2)
    i = torch.arange(200)
    looked = torch.nn.functional.one_hot((i + i // 5).remainder(3), 3).bool()[..., None]
    make = lambda shift: {"moved": torch.ones(200),
                          "seen": torch.where(looked, torch.randn(200, 3, 4, generator=generator) + shift, 1e3)}
    found = of_videos(make(1.0), make(0.0), 5, 0)
    assert found["fd_frames_low"] < 4 < found["fd_frames_high"]


@pytest.mark.parametrize("ratio, says", [((0.7, 0.6, 0.89), "slow motion: student, 2 NFE, w = 1 has 70 % (60 to "
                                          "89) of its teacher's motion"),
                                         ((0.8, 0.6, 0.91), None), ((1.0, 0.95, 1.05), None),
                                         ((1.3, 1.2, 1.4), "more motion: student, 2 NFE, w = 1 has 130 % (120 to "
                                          "140) of its teacher's motion")])
def test_slow_motion_is_called_so_where_the_upper_end_is_below_nine_tenths(ratio, says):
    metrics = dict(zip(("motion_ratio", "motion_ratio_low", "motion_ratio_high"), ratio, strict=True))
    row = {"target": "student", "nfe": 2, "guidance": 1.0, "metrics": metrics}
    assert list(in_words([{"metrics": {"motion_ratio": None}}, row, {"metrics": {}}])) == ([] if says is None
                                                                                           else [says])


def test_figures_of_pictures_are_means_over_the_frames_of_each_video():
    generator = torch.Generator().manual_seed(3)
    seen, told = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 8, generator=generator)
    by_frame = 100 * torch.nn.functional.cosine_similarity(seen, told[:, None], dim=-1).clamp(min=0).mean(1)
    assert clip_score(seen, told).value == pytest.approx(by_frame.mean().item(), rel=1e-5)
    assert diversity([seen[:2]]).value == pytest.approx((seen[0] - seen[1]).square().sum(1).mean().sqrt().item(),
                                                        rel=1e-5)
    register_metric("level", lambda pixels: pixels.flatten(1).mean(1))
    means, videos = Means({"level": "here"}), torch.randn(2, 5, 3, 4, 4, generator=generator)
    means.add(videos, None)
    del METRICS["level"]
    assert (means.count == 2 and torch.cat(means.values["level"]).tolist()
            == pytest.approx(videos.flatten(1).mean(1).tolist(), abs=1e-6))


def test_a_bench_of_wan_has_motion_beside_the_teachers(tmp_path):
    given = CALL | {"height": 32, "width": 32}
    student = Target("student", tiny(), "dmd2", {"num_inference_steps": 2, "guidance_scale": 1.0}, given=given)
    student.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    teacher = Target("teacher", tiny(), given=given, companion=True)
    results = bench_own([student, teacher], teacher, [2], tmp_path, guidance=[1.0], solvers=["euler"], prompts=PROMPTS,
                        samples=4, say=lambda text: None)
    best, row, same = results["rows"]
    assert (best["target"], best["steps"], row["target"], same["target"]) == ("teacher:euler", 25, "student",
                                                                              "teacher:euler")
    plan = plans(student, [2], [], [], print)[0]
    videos = plan.images(PROMPTS * 2, torch.arange(4), 0)
    assert videos.shape == (4, 5, 3, 32, 32)
    torch.testing.assert_close(row["metrics"]["motion"], displacement(videos).mean().item(), rtol=1e-3, atol=1e-5)
    coarse = torch.nn.functional.adaptive_avg_pool2d(some_frames(videos).flatten(0, 1) / 2,
                                                     32).flatten(1).unflatten(0, (4, 5))
    apart = [(coarse[i] - coarse[i + 2]).square().mean().sqrt().item() for i in (0, 1)]
    assert row["metrics"]["diversity"] == pytest.approx(sum(apart) / 2, rel=1e-3)
    assert best["metrics"]["motion_ratio"] is None and row["metrics"]["motion_ratio"] == pytest.approx(
        row["metrics"]["motion"] / best["metrics"]["motion"], rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    assert ("motion, px a frame</button>" in page and "FD of frames</button>" in page
            and (tmp_path / "samples/together.png").is_file())
