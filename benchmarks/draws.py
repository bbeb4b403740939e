"""What draws of a posterior cost to make: beside one `torch.randn` of their size, and where they are made.

The adapter is that of all linear layers of a model of Llama-2-7B's shape at rank 16, 40 million numbers, or of fewer
of its layers. What is compared is made in turn, and a figure is the median over the rounds of the ratio of times.

    python benchmarks/draws.py --json draws.json
    python benchmarks/draws.py --layers 2 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from report import finish, row
from timing import in_turn, ratio

from bayeslora.posteriors import DiagonalGaussian, KroneckerGaussian, LowRankGaussian, Posterior
from bayeslora.posteriors.noise import MERSENNE_TWISTER, Noise
from bayeslora.posteriors.sampling import Sampling

RANK, HIDDEN, INNER, SNAPSHOTS, KEPT = 16, 4096, 11008, 10, 16
GROUP = 5
Params = dict[str, torch.Tensor]


def normal(layers: int, rng: torch.Generator) -> Params:
    """Return random adapter parameters of so many layers by name."""
    sides = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    return {
        f"layers.{layer}.{site}.lora_{part}.weight": torch.randn(shape, generator=rng)
        for layer in range(layers)
        for site, (inputs, outputs) in enumerate(sides)
        for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK)))
    }


def kronecker(mean: Params, rng: torch.Generator) -> KroneckerGaussian:
    """Return a Gaussian of which each factor keeps at most so many eigenvectors."""
    values: tuple[Params, Params] = ({}, {})
    vectors: tuple[Params, Params] = ({}, {})
    for name, value in mean.items():
        for side, size in enumerate(value.shape):
            count = min(size, KEPT)
            values[side][name] = torch.rand(count + 1, generator=rng)
            vectors[side][name] = torch.linalg.qr(torch.randn(size, count, generator=rng))[0]
    strength = {name: torch.ones(()) for name in mean}
    return KroneckerGaussian(mean, values[0], vectors[0], values[1], vectors[1], strength, 1.0)


def drawn(posterior: Posterior, sampling: Sampling, numbers: range = range(GROUP)) -> Callable[[], None]:
    """Return what makes draws one after another, and lets each go."""

    def make() -> None:
        for k in numbers:
            posterior.draw(k, 0, sampling)

    return make


def independent(layers: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows on a diagonal Gaussian: five draws of each sampling, and one alone."""
    rng = torch.Generator().manual_seed(0)
    mean, variance = normal(layers, rng), {name: value.square() for name, value in normal(layers, rng).items()}
    size = sum(value.numel() for value in mean.values())
    posterior = DiagonalGaussian(mean, variance).placed(dict.fromkeys(mean, device))
    on_cpu = DiagonalGaussian(mean, variance)
    print(f"{size / 1e6:.1f} million numbers on {device}")
    ways: dict[str, Callable[[], Any]] = {
        "randn": lambda: [torch.randn(size, device=device).numel() for _ in range(GROUP)],
        "independent": drawn(posterior, "independent"),
        "antithetic": drawn(posterior, "antithetic"),
        "simplex": drawn(posterior, "simplex"),
        "sobol": drawn(posterior, "sobol"),
        "third simplex": drawn(posterior, "simplex", range(2, 3)),
        "noise": lambda: [all(z.numel() for _, z in Noise().normal(posterior.mean, k, 0)) for k in range(GROUP)],
        "former noise": lambda: [
            all(z.numel() for _, z in Noise(MERSENNE_TWISTER).normal(posterior.mean, k, 0)) for k in range(GROUP)
        ],
    }
    if device.type != "cpu":
        ways["copied"] = lambda: [
            {name: value.to(device) for name, value in on_cpu.draw(k).items()} for k in range(GROUP)
        ]
    took = in_turn(ways, rounds)
    bound = 1.3 if device.type == "cpu" else None
    rows = [
        row("draw / one torch.randn of its size", ratio(took, "independent", "randn"), bound),
        row("its noise / one torch.randn of its size", ratio(took, "noise", "randn"), None),
        row("noise of earlier folders / one torch.randn", ratio(took, "former noise", "randn"), None),
        row("five antithetic draws / independent", ratio(took, "antithetic", "independent"), None),
        row("five simplex draws / independent", ratio(took, "simplex", "independent"), 1.2),
        row("five Sobol draws / independent", ratio(took, "sobol", "independent"), None),
        row("third simplex draw alone / a draw", GROUP * ratio(took, "third simplex", "independent"), None),
    ]
    if device.type != "cpu":
        rows.append(row("draw on the device / on the CPU and copied", ratio(took, "independent", "copied"), 1.0))
    return rows


def others(layers: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows on the Gaussians with more than a variance a parameter."""
    rng = torch.Generator().manual_seed(1)
    mean = normal(layers, rng)
    low_rank = LowRankGaussian(
        mean,
        {name: torch.ones_like(value) for name, value in mean.items()},
        {name: value + torch.randn(SNAPSHOTS, *value.shape, generator=rng) for name, value in mean.items()},
    )
    devices, size = dict.fromkeys(mean, device), sum(value.numel() for value in mean.values())
    snapshots, factors = low_rank.placed(devices), kronecker(mean, rng).placed(devices)
    took = in_turn(
        {
            "randn": lambda: torch.randn(size, device=device),
            "low rank": lambda: snapshots.draw(0),
            "kronecker": lambda: factors.draw(0),
        },
        rounds,
    )
    return [
        row(f"draw of low rank, {SNAPSHOTS} snapshots / one torch.randn", ratio(took, "low rank", "randn"), None),
        row(f"draw of Kronecker factors, rank {KEPT} / one torch.randn", ratio(took, "kronecker", "randn"), None),
    ]


def kept(layers: int) -> list[dict[str, Any]]:
    """Return the row on what simplex draws keep between them."""
    mean = normal(layers, torch.Generator().manual_seed(2))
    posterior = DiagonalGaussian(mean, {name: value.square() for name, value in mean.items()})
    size, most = sum(value.numel() for value in mean.values()), 0
    for k in range(2 * GROUP):
        posterior.draw(k, 0, "simplex")
        most = max(most, sum(value.numel() for sums in posterior.noise.sums.values() for value in sums.values()))
    return [row("numbers kept between simplex draws / a draw's", most / size, 1.0)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the model; 32 are 40 million numbers")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = independent(args.layers, args.rounds, args.device)
    rows += others(max(1, args.layers // 8), args.rounds, args.device)
    rows += kept(1)
    finish(rows, args.json)


if __name__ == "__main__":
    main()
