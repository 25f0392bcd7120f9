"""How often the interval of FD holds the truth, against references of few pictures: Gaussians whose distance is known.

    python scripts/check_interval.py [--trials 200] [--samples 500 2000] [--pictures 130 200 400 1000 2000]

Each line: the true distance, the mean error, the spread of the estimates, the mean half width over 1.96, the share that
held it.
"""
from __future__ import annotations

import argparse

import torch
from torch import Tensor

from stepdistill.evaluation.fd import Moments, Reference, frechet_infinity

DIM = 64


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(size: float) -> tuple[Moments, Moments, float]:
    """Generated, reference, and their distance: the first is the second moved by a symmetric map A > 0, which is
    optimal."""
    basis, _ = torch.linalg.qr(gaussian(DIM, DIM, seed=0))
    turned, _ = torch.linalg.qr(gaussian(DIM, DIM, seed=1))
    covariance = (basis * torch.linspace(0.05, 2, DIM, dtype=torch.float64)) @ basis.T
    step = (turned * torch.linspace(-size, size, DIM, dtype=torch.float64)) @ turned.T
    shift, stretch = size * 0.3 * gaussian(DIM, seed=2), torch.eye(DIM, dtype=torch.float64) + step
    truth = shift.square().sum() + (step @ covariance @ step).trace()
    return (Moments(10**9, shift, stretch @ covariance @ stretch),
            Moments(10**9, torch.zeros(DIM, dtype=torch.float64), covariance),
            truth.item())


def drawn(law: Moments, count: int, seed: int) -> Tensor:
    return law.mean + gaussian(count, DIM, seed=seed) @ law.root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--samples", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--pictures", type=int, nargs="+", default=[130, 200, 400, 1000, 2000])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.0, 0.1, 0.4])
    args = parser.parse_args()
    for size in args.sizes:
        generated, law, truth = problem(size)
        for samples, pictures in ((n, m) for n in args.samples for m in args.pictures):
            found = []
            for trial in range(args.trials):
                x, y = drawn(generated, samples, 10_000 + trial), drawn(law, pictures, 20_000 + trial)
                found.append(frechet_infinity(x, Reference((Moments.of(y[0::2]), Moments.of(y[1::2])), y), seed=trial))
            values, halves = torch.tensor([e.value for e in found]), torch.tensor([(e.high - e.low) / 2 for e in found])
            held = sum(e.low <= truth <= e.high for e in found) / len(found)
            print(f"distance {truth:.3f}, {samples} samples, {pictures} pictures: error {values.mean() - truth:+.3f}, "
                  f"spread {values.std():.3f}, half width / 1.96 {halves.mean() / 1.96:.3f}, held {held:.1%}",
                  flush=True)


if __name__ == "__main__":
    main()
