"""SiD by hand, on each path of its settings."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..methods.base import Frozen, Trained
from ..methods.distribution.sid import SiD
from .affine import Net
from .paths import NOISE, Algorithm, Known, Order, Path, Turn, denoised, laws, noise_level, output_scale, rolled, rows
from .problem import Check, Problem

MANY = (0, 1, 2, 3)                     # moments, so that exits differ
TOY = {"alpha": 0.5, "critic_steps": 3, "t_range": (0.02, 0.9)}
PATHS = (
    Path("the defaults", moments=(0, 1), elsewhere=True),
    Path("the defaults at 4 steps", steps=4, moments=MANY),
    Path("shapes/sid, a critic that is not guided", {"critic_training_guidance": 1.0}, elsewhere=True),
    Path("toy/sid, exit embedding, four exits, not guided", TOY | {"exit_embedding": True}, steps=4,
         guidance=1.0, moments=MANY,
         elsewhere=True),
    Path("toy/sid-1step, not guided", TOY, guidance=1.0, elsewhere=True),
    Path("a range of guidance, its middle for the critic", guidance=(1.5, 4.0), moments=(0, 1)),
    Path("alpha 1.2", {"alpha": 1.2}),
    Path("alpha 0", {"alpha": 0.0}),
    Path("a critic trained and used at 1.7", {"critic_training_guidance": 1.7}),
    Path("a critic used at 2.3, trained at the teacher's", {"critic_guidance": 2.3}),
    Path("a critic trained at 1, used at 2.3, of an unguided teacher",
         {"critic_training_guidance": 1.0, "critic_guidance": 2.3, "drop": 0.5}, guidance=1.0),
    Path("a critic trained at 2.3, used at 1",
         {"critic_training_guidance": 2.3, "critic_guidance": 1.0, "drop": 0.5}),
    Path("critic_steps 3", {"critic_steps": 3}),
    Path("exit embedding, guided, half of the prompts dropped", {"exit_embedding": True, "drop": 0.5},
         steps=2, moments=MANY),
    Path("drop 0", {"drop": 0.0}),
    Path("t_range from 0.3 to 0.6", {"t_range": (0.3, 0.6)}),
    Path("t_range to 1", {"t_range": (0.0, 1.0)}),
    *laws(),
)


def scales(turn: Turn) -> tuple[float, float]:
    """Of guidance, at which the critic is trained and asked."""
    s, w = turn.settings, turn.problem.w if turn.path.guidance is None else turn.path.guidance
    trained = s.critic_training_guidance or (w if isinstance(w, float) else (w[0] + w[1]) / 2)
    return trained, s.critic_guidance or trained


def known(turn: Turn) -> Known:
    s, t = turn.settings, noise_level(turn, turn.step.uniform("t"))
    trained, matched = scales(turn)
    if turn.trains == ("critic",):                                # of its own sample; both see the prompt, or neither
        dropped = turn.step.uniform("drop") < (0 if trained == matched == 1 else s.drop)
        text = torch.where(dropped[:, None], turn.null, turn.text)
        sample = rolled(turn, text)
        w = sample.exit if s.exit_embedding else None
        value, slope = denoised(turn, sample.x, t, turn.guided(trained, text), output_scale(turn, t) ** 2, w)
        return Known({"denoising": value}, {"critic": slope})
    sample, (teacher, student, critic) = rolled(turn), (turn.roles[name] for name in ("teacher", "student", "critic"))
    x_t, alpha = turn.noised(sample.x, t), turn.problem.schedule.alpha(t)[:, None]
    real = teacher.x0(x_t, t, turn.guided(turn.scale))
    fake = critic.x0(x_t, t, turn.guided(matched), sample.exit if s.exit_embedding else None)
    weight, d = 1 / (sample.x - real).abs().mean(1, keepdim=True), real - fake
    # L = (1 - a) |d|^2 + <d, fake - x>: its slopes in real, in fake, and in x itself; both networks lead on to x_t
    of_real = 2 * (1 - s.alpha) * d + fake - sample.x
    pull = alpha * (teacher.back(weight * of_real, t) + critic.back(weight * (d - of_real), t)) - weight * d
    value = (weight * ((1 - s.alpha) * d**2 + d * (fake - sample.x))).mean()
    return Known({"identity": value}, {"student": student.slopes(pull / d.numel(), sample.given, sample.t, turn.text)},
                 unchecked=("teacher", "critic"))


ALGORITHM = Algorithm(
    SiD,
    roles=lambda problem, settings: {name: Net.of(problem) for name in ("teacher", "student", "critic")},
    orders=lambda settings: [Order(("critic",), repeat=settings.critic_steps), Order(("student",))],
    needs=lambda settings: {"teacher": Frozen(), "student": Trained("teacher"),
                            "critic": Trained("teacher", reads=("w",) if settings.exit_embedding else ())},
    known=known,
    defaults={"alpha": 1.0, "critic_training_guidance": None, "critic_guidance": None, "critic_steps": 1, "drop": 0.1,
              **NOISE},
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
