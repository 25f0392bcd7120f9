"""Times an LCM-LoRA update of the Trainer against a hand-written loop of the same passes.

    python scripts/bench_trainer.py trainer --teacher assets/shapes-sd --updates 20
    python scripts/bench_trainer.py hand    --teacher assets/shapes-sd --updates 20
    python scripts/bench_trainer.py check   --teacher assets/shapes-sd --updates 5      # both give the same losses

Both have cached latents and embeddings, guidance in one doubled call, the same adapters, AdamW, clipping, average and
draws. Where LOCKFD names two file descriptors, an update is made for every token read from the first, and its
nanoseconds are written to the second: a harness can let several such processes take turns on one core.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from stepdistill.data.cache import Cache  # noqa: E402
from stepdistill.data.datasets import Encoders, cached_images  # noqa: E402
from stepdistill.data.images import ShapesImages  # noqa: E402
from stepdistill.data.stream import Stream  # noqa: E402
from stepdistill.data.walk import permuted  # noqa: E402
from stepdistill.diffusion.draws import Step, key  # noqa: E402
from stepdistill.methods.base import Follows  # noqa: E402
from stepdistill.methods.consistency.lcm import LCM, Settings  # noqa: E402
from stepdistill.models.roles import Lora, build_roles  # noqa: E402
from stepdistill.models.teacher import load_teacher  # noqa: E402
from stepdistill.training import TrainConfig, Trainer  # noqa: E402

SEED, GUIDANCE, LR, CLIP, DECAY, C = 0, 3.0, 1e-3, 1.0, 0.98, 0.001


class Turns:
    """Called after every update: reports its time, and waits for the next turn."""

    def __init__(self) -> None:
        self.pipes = [int(fd) for fd in os.environ["LOCKFD"].split()] if "LOCKFD" in os.environ else None
        self.times: list[float] = []
        self.start = time.perf_counter_ns()

    def __call__(self, step: int) -> None:
        spent = time.perf_counter_ns() - self.start
        self.times.append(spent / 1e9)
        if self.pipes:
            os.write(self.pipes[1], str(spent).encode())
            if os.read(self.pipes[0], 1) != b"g":
                raise SystemExit
        self.start = time.perf_counter_ns()


class World:
    """What both loops are given: roles on one base, and the cached data."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.batch, self.updates = args.batch, args.updates
        family = load_teacher(args.teacher)
        needs = LCM.needs(Settings(), full=False) | {"ema": Follows("student", DECAY)}
        self.roles = build_roles(family, needs, {"student": Lora(rank=args.rank)})
        encoders = Encoders(family.encode, family.encode_images, identity=str(args.teacher))
        size = family.decode(torch.zeros(1, *family.latent_shape)).shape[-1]
        self.data = cached_images(ShapesImages(size, count=args.images), encoders, Cache(folder / "cache"))
        self.stream = Stream(self.data, args.batch, SEED)


def trainer(world: World, run_dir: Path, turns: Turns) -> list[float]:
    """The losses of all updates."""
    method = LCM(Settings(), world.roles, GUIDANCE, None)
    config = TrainConfig(updates=world.updates, lr=LR, clip=CLIP, seed=SEED)
    run = Trainer(method, world.roles, world.stream, config, run_dir, [turns])
    turns.start = time.perf_counter_ns()
    run.train()
    return [json.loads(line)["student/consistency"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def hand(world: World, run_dir: Path, turns: Turns) -> list[float]:
    """As one would write it for this one case: v or eps, DDIM, the boundary scalings from a table, nothing else."""
    roles, (x_all, cond_all) = world.roles, world.data[torch.arange(world.data.count)]
    network, bank, kind = roles.teacher.network, roles.bank, roles["student"].teacher.kind
    text_all, null = cond_all.text, cond_all.null.text[:1].expand(world.batch, -1, -1)
    student, ema = roles.parameters("student"), roles.parameters("ema")
    adamw = torch.optim.AdamW(student, lr=LR, weight_decay=0.01, fused=True)

    nodes = torch.arange(51, dtype=torch.float64) / 50
    alpha, sigma = (f(nodes).float()[:, None, None, None]
                    for f in (roles["teacher"].schedule.alpha, roles["teacher"].schedule.sigma))
    timesteps = 1000 * nodes - 1
    scaled = 10 * timesteps
    c_skip = (0.25 / (scaled**2 + 0.25)).float()[:, None, None, None]
    c_out = (scaled / (scaled**2 + 0.25).sqrt()).float()[:, None, None, None]
    timesteps = timesteps.round().float()

    def x0_of(raw, x, i):
        return alpha[i] * x - sigma[i] * raw if kind == "v" else (x - sigma[i] * raw) / alpha[i]

    def consistent(x, i, text):
        with bank.use("student"):
            raw = network(x, timesteps[i], text, return_dict=False)[0]
        return c_skip[i] * x + c_out[i] * x0_of(raw, x, i)

    walk, losses = key(SEED, "data", "student", 0), []
    turns.start = time.perf_counter_ns()
    for index in range(world.updates):
        ids = index * world.batch + torch.arange(world.batch)
        rows = permuted(ids, len(x_all), walk)
        x0, text = x_all[rows], text_all[rows]
        step = Step(SEED, index, 0.0, "student", 0, ids)
        i = step.integers("node", 50) + 1
        x_t = alpha[i] * x0 + sigma[i] * step.normal("noise", tuple(x0.shape[1:]))
        with torch.no_grad():
            both = network(torch.cat([x_t, x_t]), timesteps[i].repeat(2), torch.cat([null, text]), return_dict=False)[0]
            without, given = both.chunk(2)
            raw = without + GUIDANCE * (given - without)
            clean = x0_of(raw, x_t, i)
            noise = sigma[i] * x_t + alpha[i] * raw if kind == "v" else raw
            s = i - 1
            x_s = alpha[s] * clean + sigma[s] * noise
            safe = torch.where(s > 0, s, i)
            target = torch.where(s[:, None, None, None] > 0, consistent(x_s, safe, text), x_s)
        loss = (((consistent(x_t, i, text) - target) ** 2 + C * C).sqrt() - C).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student, CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        torch._foreach_lerp_(ema, student, 1 - DECAY)
        losses.append(loss.detach())
        turns(index + 1)
    return [loss.item() for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=["trainer", "hand", "check"])
    parser.add_argument("--teacher", default="assets/shapes-sd")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--images", type=int, default=256, help="how many are cached")
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    loops = {"trainer": trainer, "hand": hand}
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in loops if args.loop == "check" else [args.loop]:
            turns = Turns()
            found[name] = loops[name](World(args, Path(folder)), Path(folder) / name, turns)
            if not turns.pipes:
                middle = sorted(turns.times)[len(turns.times) // 2]
                print(f"{name}: median {1000 * middle:.1f} ms an update, losses {found[name][:3]} ... "
                      f"{found[name][-1]:.6g}")
        if args.loop == "check":
            apart = max(abs(a / b - 1) for a, b in zip(*found.values(), strict=True))
            print(f"losses differ by at most {apart:.1e} of their value")
            sys.exit(apart > 1e-3)


if __name__ == "__main__":
    main()
