"""The concepts' pictures, from computation: `python docs/figures.py` writes them into docs/assets (ten seconds).

Each is a small model that can be computed exactly enough with numpy: no figure is drawn by hand. The SVGs have their
own paper and ink, and change both where the reader's system is dark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK, PAPER = "#1f2328", "#fefefe"
BLUE, ORANGE, GREEN = "#3b82d0", "#e07b39", "#2f9e6e"  # apart from each other, also on dark paper and in grey
STYLE = """<style>:root{--ink:#1f2328;--paper:#fefefe}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6ea;--paper:#1e2129}}</style>"""
LOOK = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.facecolor": PAPER,
    "legend.edgecolor": PAPER, "legend.framealpha": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 11, "font.family": "sans-serif", "axes.titlesize": 11, "axes.titlelocation": "left",
    "svg.fonttype": "path", "svg.hashsalt": "bayeslora",
}  # fmt: skip


def sigmoid(z: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of a binary distribution in nats."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return -q * np.log(q) - (1 - q) * np.log(1 - q)


def newton(features: np.ndarray, labels: np.ndarray, precision: float) -> tuple[np.ndarray, np.ndarray]:
    """Mode and covariance (Laplace) of a logistic regression with a normal prior: features [N D], labels [N]."""
    w = np.zeros(features.shape[1])
    for _ in range(100):
        p = sigmoid(features @ w)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + precision * np.eye(len(w))
        w -= np.linalg.solve(hessian, features.T @ (p - labels) + precision * w)
    return w, np.linalg.inv(hessian)


def posterior() -> Figure:
    """A rank-one adapter of one number each, A = a and B = b: the logit is (w₀ + b·a)·x; 24 rows, a grid."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, 24)
    y = (rng.random(24) < sigmoid(2.5 * x)).astype(float)
    a, b = np.meshgrid(np.linspace(-1, 5, 361), np.linspace(-1, 5, 361), indexing="ij")
    logits = (0.3 + b * a)[..., None] * x
    likelihood = (y * logits - np.logaddexp(0, logits)).sum(-1)
    log_density = likelihood - ((a - 1.5) ** 2 + b**2) / (2 * 1.5**2)  # A has a start, B starts at zero
    p = np.exp(log_density - log_density.max())
    best = np.unravel_index(p.argmax(), p.shape)
    chosen = rng.choice(p.size, 60, p=(p / p.sum()).ravel())
    draws = np.stack([a.ravel()[chosen], b.ravel()[chosen]], 1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5), layout="constrained")
    left.contour(a, b, p, levels=[0.05, 0.2, 0.4, 0.6, 0.8, 0.95], colors=BLUE, linewidths=1)
    left.plot(*draws.T, ".", color=ORANGE, ms=4, label="60 draws")
    left.plot(a[best], b[best], "x", color=INK, ms=9, mew=2.5, label="trained adapter (MAP)")
    left.set(xlabel="a, the number in A", ylabel="b, the number in B", title="Adapters that fit 24 rows")
    left.legend(loc="upper right")
    where = np.linspace(-4, 4, 200)
    curves = sigmoid((0.3 + draws.prod(1))[:, None] * where)
    right.plot(where, curves.T, color=ORANGE, lw=0.5, alpha=0.4)
    right.plot(where, sigmoid((0.3 + a[best] * b[best]) * where), color=INK, lw=2, ls="--", label="trained adapter")
    every = sigmoid((0.3 + b * a)[..., None] * where)
    average = (p[..., None] * every).sum((0, 1)) / p.sum()
    right.plot(where, average, color=BLUE, lw=2.5, label="average over the posterior")
    right.plot(x, y, "o", color=GREEN, ms=6, label="rows")
    right.set(xlabel="input x", ylabel="probability of yes", title="What each of them says")
    right.legend(loc="upper left", bbox_to_anchor=(-0.02, 0.94), fontsize=9)
    return figure


def reliability() -> Figure:
    """Sixty rows of forty features: what the mode says and what the average over the posterior says, on 20,000 rows."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 0.35, 40)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        features = rng.normal(size=(count, 40))
        return features, (rng.random(count) < sigmoid(features @ truth)).astype(float)

    (train, labels), (test, answers) = rows(60), rows(20_000)
    sharp, _ = newton(train, labels, 0.02)  # hardly regularised, as a fine-tune of many epochs
    mode, covariance = newton(train, labels, 1 / 0.35**2)
    weights = rng.multivariate_normal(mode, covariance, 200)
    said = {"point estimate": sigmoid(test @ sharp), "average of 200 draws": sigmoid(test @ weights.T).mean(1)}

    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.7), layout="constrained", sharey=True)
    edges = np.linspace(0.5, 1, 11)
    for panel, (name, p), colour in zip(panels, said.items(), (ORANGE, BLUE), strict=True):
        confidence, right = np.maximum(p, 1 - p), (p > 0.5) == (answers == 1)
        place = np.clip(np.digitize(confidence, edges) - 1, 0, 9)
        share = np.bincount(place, minlength=10) / len(p)
        sure = np.bincount(place, confidence, 10) / np.maximum(np.bincount(place, minlength=10), 1)
        accurate = np.bincount(place, right, 10) / np.maximum(np.bincount(place, minlength=10), 1)
        gap = (share * np.abs(sure - accurate)).sum()
        there = share > 0.002
        panel.bar(edges[:-1][there], accurate[there], 0.05, align="edge", color=colour, alpha=0.75, edgecolor=PAPER)
        panel.plot([0.5, 1], [0.5, 1], color=INK, lw=1.5, ls="--")
        panel.plot(edges[:-1] + 0.025, 0.5 * share, color=INK, marker=".", lw=1)
        panel.set(title=f"{name}: ECE {gap:.3f}")
        panel.text(0.515, 0.94, f"says {confidence.mean():.0%}, is right {right.mean():.0%}")
        panel.set(xlabel="confidence", xlim=(0.5, 1), ylim=(0, 1.02))
    panels[0].set_ylabel("accuracy")
    panels[0].annotate("as sure as right", (0.62, 0.62), (0.53, 0.8), arrowprops={"arrowstyle": "-", "color": INK})
    panels[0].text(0.6, 0.06, "share of rows (half scale)", color=INK)
    return figure


def uncertainty() -> Figure:
    """Two classes that overlap around −1.5 and rows from −3 to 1.5: a logistic regression on bumps, Laplace draws."""
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.uniform(-3, -0.2, 90), rng.uniform(-0.2, 1.5, 40)])
    chance = np.where(x < -0.2, sigmoid(1.2 * (x + 1.6)), 0.96)
    y = (rng.random(len(x)) < chance).astype(float)
    centres = np.linspace(-5, 5, 26)

    def bumps(at: np.ndarray) -> np.ndarray:
        return np.exp(-((at[:, None] - centres) ** 2) / (2 * 0.7**2))

    mode, covariance = newton(bumps(x), y, 0.25)
    weights = rng.multivariate_normal(mode, covariance, 400)
    where = np.linspace(-4, 4, 300)
    p = sigmoid(bumps(where) @ weights.T)  # [points, draws]
    mean = p.mean(1)
    total, expected = entropy(mean), entropy(p).mean(1)

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.6, 5.2), layout="constrained", sharex=True)
    top.plot(where, p[:, :40], color=ORANGE, lw=0.5, alpha=0.4)
    top.plot(where, mean, color=BLUE, lw=2.5, label="average of 400 draws")
    top.plot(x, y + rng.uniform(-0.02, 0.02, len(x)), ".", color=GREEN, ms=5, label="rows")
    top.set(ylabel="probability of yes", title="Forty of the draws, and their average")
    top.legend(loc="center", bbox_to_anchor=(0.62, 0.3))
    bottom.fill_between(where, 0, expected, color=GREEN, alpha=0.55, lw=0, label="aleatoric: expected entropy")
    bottom.fill_between(where, expected, total, color=ORANGE, alpha=0.75, lw=0, label="epistemic: mutual information")
    bottom.plot(where, total, color=INK, lw=1.5, label="total: entropy of the average")
    bottom.set(xlabel="input x", ylabel="nats", ylim=(0, 1.0), title="What they do not know, by its kind")
    bottom.legend(loc="upper left", ncols=3, fontsize=9)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "posterior": posterior,
    "reliability": reliability,
    "uncertainty": uncertainty,
}


def main(folder: Path) -> None:
    """Write all pictures into a folder."""
    plt.rcParams.update(LOOK)
    for name, make in PICTURES.items():
        path = folder / f"{name}.svg"
        make().savefig(path, metadata={"Date": None, "Creator": None})
        text = path.read_text(encoding="utf-8").replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
        text = re.sub(r"(<svg [^>]*>)", lambda m: m[1] + STYLE, text, count=1)
        path.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "assets")
