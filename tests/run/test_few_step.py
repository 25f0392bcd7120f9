"""The race of calls, on figures that are known."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from stepdistill.diffusion.times import LEVELS
from stepdistill.evaluation.estimate import Estimate, Z
from stepdistill.evaluation.fd import Moments, Reference, frechet, frechet_infinity, slopes
from stepdistill.evaluation.kernels import kid, kid_slopes
from stepdistill.methods.base import Inference
from stepdistill.models.teacher import load_teacher
from stepdistill.run import few_step
from stepdistill.run.few_step import Judge, Judged, Way, find_call, first_ways, gains, near_ways, way_of
from tests.tiny import save_tiny, save_tiny_sd3


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return load_teacher(save_tiny(tmp_path_factory.mktemp("few") / "sd"))


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    return load_teacher(save_tiny_sd3(tmp_path_factory.mktemp("few") / "sd3"))


def way(steps: int, scale: float = 1.0, guidance: float = 1.0, noise: float = 1.0) -> Way:
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    return Way(LCMScheduler() if noise else DDIMScheduler(), call, steps * (2 if guidance > 1 else 1), steps,
               guidance, scale,
               Inference(steps, noise))


class Known:
    """Figures of a law: far from (scale 1/4, 4 steps, fresh noise) is worse. They come nearer to it with more samples,
    with what the seed of a way adds."""

    def __init__(self, spread: float = 0.0) -> None:
        self.asked: list[tuple[Way, int]] = []
        self.spread = spread

    def truth(self, way: Way) -> float:
        log = torch.tensor([way.scale * 4, way.steps / 4]).log2().abs().sum().item()
        return 2 + 3 * log + 4 * (1 - way.inference.noise) + 2 * (way.guidance > 1)

    def __call__(self, way: Way, samples: int) -> Judged:
        self.asked.append((way, samples))
        chance = torch.Generator().manual_seed(int(1000 * self.truth(way)) + samples)
        value = self.truth(way) + self.spread * torch.randn((), generator=chance).item() / samples ** 0.5
        slopes = self.spread * torch.randn(samples, generator=chance), torch.zeros(10)
        return Judged(way, samples, "kid", Estimate(value, None, None), slopes)


ALL = [way(steps, scale, noise=noise) for scale in few_step.SCALES for steps in few_step.STEPS for noise in (0.0, 1.0)]


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_right_call_is_found(spread):
    known = Known(spread)
    found = find_call(ALL, known, lambda one: [way(one.steps, one.scale, 3.0, one.inference.noise)], 1000)
    best = found.best.way
    assert (best.scale, best.steps, best.inference.noise, best.guidance) == (1 / 4, 4, 1.0, 1.0)
    rounds = few_step.FIRST, few_step.SECOND, few_step.THIRD, 1000
    drawn = [sum(n == samples for _, n in known.asked) for samples in rounds]
    assert drawn[0] == len(ALL) and drawn[1] <= (few_step.KEPT + 1) * len(few_step.STEPS)
    assert drawn[2] <= few_step.WIDE and drawn[3] <= few_step.LAST
    again = find_call(ALL, Known(spread), lambda one: [way(one.steps, one.scale, 3.0, one.inference.noise)], 1000)
    assert [one.figure for one in again.last] == [one.figure for one in found.last]


def test_a_neighbour_may_be_the_best():
    class Guided(Known):
        def truth(self, way: Way) -> float:
            return super().truth(way) - 3.5 * (way.guidance > 1)

    found = find_call(ALL, Guided(), lambda one: [way(one.steps, one.scale, 3.0, one.inference.noise)], 1000)
    assert found.best.way.guidance == 3.0 and found.best.way.nfe == 8 and found.best.figure.value == pytest.approx(0.5)


def test_a_call_at_which_the_base_is_as_good_is_none_of_the_lora():
    class Hardly(Known):
        """The best of all is a LoRA that is hardly worn in eight steps, where the base is as good."""

        def truth(self, way: Way) -> float:
            return 1.0 if way.steps == 8 and way.scale <= 1 / 8 else 9.0 if not way.scale else super().truth(way)

    twin = lambda one: replace(one, scale=0.0)
    assert find_call(ALL, Hardly(), samples=400).best.way.steps == 8
    best = find_call(ALL, Hardly(), samples=400, twin=twin).best.way
    assert (best.scale, best.steps) == (1 / 4, 4)


def test_of_two_calls_that_draw_the_same_one_goes_on():
    known, asked = Known(3.0), []

    def measure(way: Way, samples: int) -> Judged:
        asked.append((way, samples))
        return known(way, samples)

    find_call(ALL, measure, lambda one: [replace(one)], 1000)           # a neighbour by another name
    last = [repr(way) for way, samples in asked if samples == 1000]
    assert len(last) == 1


def test_the_likely_weight_is_looked_at_twice():
    """Whatever chance makes of few pictures."""
    unlucky = way(4, 1.0)

    class Noisy(Known):
        def __call__(self, asked: Way, samples: int) -> Judged:
            found = super().__call__(asked, samples)
            value = 99.0 if asked is unlucky and samples == few_step.FIRST else 0.0 if asked is unlucky else 5.0
            return replace(found, figure=Estimate(value + found.figure.value / 100, None, None))

    ways = [unlucky if (one.scale, one.steps, one.inference.noise) == (1.0, 4, 1.0) else one for one in ALL]
    assert find_call(ways, Noisy(), samples=1000).best.way is not unlucky
    assert find_call(ways, Noisy(), samples=1000, told=1.0).best.way is unlucky


def judged(value: float, steps: int = 4, half: float = 0.0, fits: float | None = None, sign: int = 1, **more) -> Judged:
    """Differences to one of the other sign are known to 2 half."""
    slopes = torch.tensor([1.0, -1.0]).repeat(200) * sign * half * 400 ** 0.5 / Z, torch.zeros(10)
    return Judged(way(steps, **more), 400, "fd", Estimate(value, None, None), slopes, fits)


def test_of_equals_the_cheapest_and_then_the_one_that_fits_its_prompts():
    eight, four, two = judged(2.0, 8), judged(2.09, 4), judged(2.2, 2)
    assert few_step._cheapest([eight, four, two]) is four                          # within 5 % of the best; two is not
    plain, better = judged(2.0, fits=70.0), judged(2.05, fits=71.0)
    assert few_step._cheapest([plain, better]) is better


def test_a_claim_is_believed_unless_its_call_is_worse_beyond_the_intervals():
    for claimed, believed in ((Known().truth(way(4, 1 / 4)) + 0.5, "claim"), (9.0, "measurement")):
        one = way(2, 3.0)
        measure = lambda asked, n: judged(claimed if asked is one else 2.0, half=0.4, sign=-1 if asked is one else 1)
        found = find_call(ALL, measure, samples=400, claimed=one)
        assert (found.believed is found.claimed) == (believed == "claim") and found.claimed.way is not found.best.way


def test_what_is_common_to_two_calls_cancels():
    one, same, other = judged(2.0, half=0.5), judged(2.1, half=0.5), judged(2.1, half=0.5, sign=-1)
    assert one.apart(same).high == pytest.approx(-0.1) and one.beats(same) and not same.beats(one)
    assert one.apart(other).high == pytest.approx(-0.1 + 1.0, rel=3e-3) and not one.beats(other)
    with pytest.raises(ValueError, match="fd of 400 samples is not held against kid of 120"):
        one.apart(replace(same, distance="kid", samples=120))


def test_what_gains_nothing_over_its_base_is_no_few_step_generator():
    base = [judged(10, 2, 1, sign=-1), judged(8, 2, 1, sign=-1), judged(3, 8, 1, sign=-1, scale=0.0)]
    assert gains([judged(4.3, 2, 1), judged(2.0, 8, 1)], base) == [2]             # at 8 chance may have done it
    assert gains([judged(4.5, 2, 1), judged(2.0, 8, 1)], base) == []              # less than a fifth is sure
    assert gains([judged(1.0, 4, 0.1)], base) == []                               # nothing is known of the base at 4


def spelled(ways) -> set[tuple]:
    return {(type(one.scheduler).__name__, one.steps, one.nfe, one.scale, tuple(one.call.get("timesteps", ())))
            for one in ways}


def test_first_ways_are_what_the_family_spells(diffusion, flow):
    found = first_ways(diffusion, (0.5, 1.0), (1, 4))
    assert spelled(found) == {(name, steps, steps, scale, times) for scale in (0.5, 1.0) for name, steps, times in (
        ("LCMScheduler", 1, ()), ("LCMScheduler", 1, (399,)), ("LCMScheduler", 1, (624,)), ("LCMScheduler", 4, ()),
        ("DDIMScheduler", 4, ()))}
    assert len(found) == 10
    assert spelled(first_ways(flow)) == {("FlowMatchLCMScheduler", 1, 1, 1.0, ())} | {
        (name, steps, steps, 1.0, ()) for steps in (2, 4, 8)
        for name in ("FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler")}


def test_near_ways_change_guidance_grid_and_noise(diffusion, flow):
    near = near_ways(diffusion, way_of(diffusion, Inference(4, 1.0), scale=0.5), 3.0)
    assert [(type(one.scheduler).__name__, one.call["guidance_scale"], one.nfe, one.scale) for one in near] == [
        ("LCMScheduler", 3.0, 8, 0.5), ("TCDScheduler", 1.0, 4, 0.5), ("LCMScheduler", 1.0, 4, 0.5)]
    assert (near[1].call["eta"] == few_step.TCD_NOISE and near[2].scheduler.config.original_inference_steps
            == few_step.COARSE_NODES)
    assert near[1].inference.end == 1 / LEVELS
    assert (str(near[2]) == "LCMScheduler(original_inference_steps=50), num_inference_steps=4, guidance_scale=1, "
            "LoRA weight 0.5")
    near = near_ways(flow, way_of(flow, Inference(4)), 1.0)
    assert ([one.scheduler.config.shift for one in near] == [3.0]
            and near_ways(flow, near[0], 1.0)[0].scheduler.config.shift == 3.0)
    assert near_ways(flow, Way(LCMScheduler(), {}, 4, 4), 3.0) == []


def test_a_guided_step_is_two_evaluations(diffusion):
    assert [way_of(diffusion, Inference(4), w).nfe for w in (1.0, 3.0)] == [4, 8]
    assert way_of(diffusion, Inference(3)) is None                  # 3 does not divide a thousand


class Flat:
    """Features: the mean of each colour."""

    dim, clip = 3, False

    def images(self, pixels):
        return pixels.mean((2, 3))

    def texts(self, prompts):
        return None


def test_pictures_are_drawn_once_and_measured_as_a_bench_does(monkeypatch):
    drawn: list[tuple[float, list[int]]] = []
    worn = [1.0]

    def images(plan, prompts, ids, seed):
        assert prompts == [f"prompt {i % 3}" for i in ids.tolist()]
        drawn.append((worn[0], ids.tolist()))
        pixels = torch.randn(len(ids), 3, 2, 2, generator=torch.Generator().manual_seed(int(ids[0])))
        return torch.where(ids[:, None, None, None] == 7, torch.nan, pixels + worn[0])

    monkeypatch.setattr(few_step.Plan, "images", images)
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(9))
    reference = Reference((Moments.of(real[0::2]), Moments.of(real[1::2])), real)
    target = SimpleNamespace(name="base", given={}, prompted=True, pipeline=None)
    judge = Judge(target, Flat(), reference, [f"prompt {i}" for i in range(3)], 0, 40, 8,
                  lambda scale: worn.__setitem__(0, scale))
    one, other = way(4, 0.5), way(4, 2.0)
    first, _, last = judge(one, 16), judge(other, 16), judge(one, 40)
    assert drawn == [(0.5, [*range(8)]), (0.5, [*range(8, 16)]), (2.0, [*range(8)]), (2.0, [*range(8, 16)]),
                     (0.5, [*range(16, 24)]), (0.5, [*range(24, 32)]), (0.5, [*range(32, 40)])]
    seen = judge.kept[one.drawn_by]
    assert seen[7].tolist() == [0, 0, 0]                            # a picture of NaN is a grey one
    assert (first.distance, first.figure) == ("kid", kid(seen[:16], real))
    assert (last.distance, last.figure) == ("fd", frechet_infinity(seen, reference, 0))


def test_slopes_are_the_derivatives_of_the_figures():
    """One sample more counts as its slope says: the von Mises expansion, by differences."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) + c for n, c in ((300, 0.3), (300, 0.0)))
    plain = lambda x, y: frechet(Moments.of(x).mean, Moments.of(x).covariance, Moments.of(y)).item()
    for figure, kernel, (of_x, of_y) in (
            (plain, None, (slopes(x, Moments.of(x), Moments.of(y)), slopes(y, Moments.of(y), Moments.of(x)))),
            (lambda x, y: kid(x, y).value, lambda a: (a.square().sum() / 3 + 1) ** 3, kid_slopes(x, y))):
        for i, j in ((3, 8), (5, 17)):
            for points, found, of in ((x, of_x, lambda x: figure(x, y)), (y, of_y, lambda y: figure(x, y))):
                twin = 0.0 if kernel is None else (kernel(points[i]) - kernel(points[j])).item() / (len(points) - 1)
                assert by_differences(of, points, i, j) - twin == pytest.approx((found[i] - found[j]).item(), abs=2e-3)


def by_differences(figure, points, i: int, j: int) -> float:
    """Of the slopes at two points: the figure with either of them twice and the other not at all. A mean over pairs has
    then one of a point with its twin."""
    twice, other = points.clone(), points.clone()
    twice[j], other[i] = points[i], points[j]
    return len(points) * (figure(twice) - figure(other)) / 2
