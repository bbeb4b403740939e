"""Noise on the answer's tokens only: what it does to the answers of fitted posteriors, and what it saves.

For each task and seed SmolLM2 is trained by each method; the ensemble is of three seeds' MAP. The same draws answer
with noise on all tokens and on the answer's only, at several widths (factors on the covariance), of which the
validation rows' NLL chooses one. "Trained so" are posteriors whose noise in training was on the answer's tokens too.
What a run gives is kept in ``--out`` and not made again.

    python benchmarks/answer_noise.py --data DATA --out runs --json answer_noise.json
    python benchmarks/answer_noise.py --data DATA --sections speed            # on prompts of 80 tokens and more
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from adapters import adapter, add_adapters
from peft.tuners.lora import LoraLayer
from report import finish, row
from timing import in_turn, ratio
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import bayeslora as bl
from bayeslora.cli.build import build_arguments
from bayeslora.cli.data import build_task, other_splits
from bayeslora.cli.demo.model import demo_model
from bayeslora.cli.options import TaskOptions, TrainingOptions
from bayeslora.comparison.cached_runs import CachedRuns, learned
from bayeslora.methods import Blob, Inference, Ivon, Laplace, Map, Swag
from bayeslora.metrics.classification import accuracy, ece, nll
from bayeslora.metrics.detection import auroc
from bayeslora.metrics.uncertainty import average, entropy, mutual_information
from bayeslora.params import generator, read, require_lora, write
from bayeslora.posteriors import DiagonalGaussian, Mixture, Posterior
from bayeslora.prediction.readouts import readout_for
from bayeslora.tasks.types import Split

METHODS: dict[str, Inference] = {
    "ivon": Ivon(),
    "blob": Blob(update="elbo"),
    "swag": Swag(),
    "laplace": Laplace(predictive="draws", prior=1000.0),
}
TRAINED = {"ivon, trained so": "ivon", "blob, trained so": "blob"}
"""What is trained with noise on the answer's tokens only."""
WIDTHS = (1.0, 4.0, 16.0)
OTHER = {"sst2": "trec", "trec": "sst2", "arc_easy": "openbookqa", "openbookqa": "arc_easy", "boolq": "winogrande"}
Tensors = dict[str, torch.Tensor]


def prepared(args: argparse.Namespace, task: str) -> tuple[CachedRuns, Split]:
    """Return what is the same for all methods on a task, and the other data."""
    options = TaskOptions(
        task=task, data=args.data, readout="likelihood", validation=args.validation_rows,
        train_rows=args.train_rows, test_rows=args.rows,
    )  # fmt: skip
    found = build_task(options)
    assert found.test is not None
    other = other_splits([OTHER[task]], options, found.test, args.other_rows)[OTHER[task]]
    model, tokenizer = bl.load_model(
        args.model or demo_model(), found.test.classes, target_modules=["q_proj", "v_proj"]
    )
    training = TrainingOptions(epochs=args.epochs, batch_size=args.batch, learning_rate=1e-3)
    out = Path(args.out) / task
    return CachedRuns(model, tokenizer, found, build_arguments(training, out, 0), out, {OTHER[task]: other}), other


@contextmanager
def noise_on_answers(model: nn.Module) -> Iterator[None]:
    """Keep the noise of training to the answer's tokens for the length of a ``with`` block, by hooks on A and B."""
    inner: set[nn.Module] = set()
    answer = torch.zeros(0, 0, 1, dtype=torch.bool)

    def before(_: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        """Note which tokens predict those of an answer, and the layers, which a method may have replaced."""
        nonlocal answer
        ids = kwargs["input_ids"]
        keep = kwargs.get("readout_keep", torch.arange(ids.numel()))
        answer = torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, keep, True).view(*ids.shape, 1)
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        inner.update(part for layer in layers for parts in (layer.lora_A, layer.lora_B) for part in parts.values())

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Return the output without noise for the tokens before the answer."""
        if module not in inner or not module.training:
            return None
        return torch.where(answer, output, nn.functional.linear(args[0], module._parameters["weight"]))

    handles = [
        require_lora(model).register_forward_pre_hook(before, with_kwargs=True),
        register_module_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trained(args: argparse.Namespace, runs: CachedRuns, name: str, seed: int) -> Posterior:
    """Return what a method gives under a seed, or the ensemble that begins with the seed."""
    if name == "ensemble":
        order = args.seeds[args.seeds.index(seed) :] + args.seeds[: args.seeds.index(seed)]
        return Mixture(tuple(learned(runs, Map(), s).posterior for s in order))
    if name in TRAINED:
        with noise_on_answers(runs.model):
            return learned(replace(runs, out=runs.out / "answer"), METHODS[TRAINED[name]], seed).posterior
    return learned(runs, METHODS[name], seed).posterior


def answers(runs: CachedRuns, other: Split, posterior: Posterior, draws: bl.Draws, *, scaled: bool) -> Tensors:
    """Return the log-probabilities of every way, on test and other rows, and on validation rows of the widths."""
    found: Tensors = {}
    validation = runs.task.validation
    assert validation is not None

    def ask(asked: Posterior, split: Split, count: int | bl.Draws) -> torch.Tensor:
        """Return the draws' log-probabilities [S N C]."""
        return bl.predict(runs.model, asked, split, count, tokenizer=runs.tokenizer, mean=False).log_probs

    widths = WIDTHS if scaled else WIDTHS[:1]
    narrow = {w: bl.restricted(bl.tempered(posterior, w) if w != 1 else posterior, tokens="answer") for w in widths}
    judged = {w: float(nll(average(ask(p, validation, draws)), validation.labels)) for w, p in narrow.items()}
    best = min(judged, key=lambda w: judged[w])
    print("  NLL of validation rows by width:", judged, flush=True)
    ways = {
        "mean": (posterior, 0),
        "all": (posterior, draws),
        "answer": (narrow[1.0], draws),
        "wider": (narrow[best], draws),
    }
    for name, (asked, count) in ways.items():
        for part, split in (("test", runs.test), ("other", other)):
            same = name == "wider" and best == 1
            found[f"{name} {part}"] = found[f"answer {part}"] if same else ask(asked, split, count)
    return found | {"width": torch.tensor(best)}


def run(args: argparse.Namespace, task: str, seed: int) -> None:
    """Make what is missing of a task and a seed."""
    place = Path(args.out)
    place.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in args.methods if not (place / f"{task}-{seed}-{name}.pt").exists()]
    if not wanted:
        return
    runs, other = prepared(args, task)
    draws = bl.Draws(args.draws, seed=seed, sampling="simplex" if args.draws % 5 == 0 else "independent")
    for name in wanted:
        print(f"{task}, seed {seed}, {name}", flush=True)
        found = answers(runs, other, trained(args, runs, name, seed), draws, scaled=name != "ensemble")
        torch.save(found | {"labels": runs.test.labels}, place / f"{task}-{seed}-{name}.pt")


def measured(found: Tensors, name: str) -> dict[str, float]:
    """Return the measures of one way of asking."""
    log_probs, labels = found[f"{name} test"], found["labels"]
    other, log_p = found[f"{name} other"], average(log_probs)
    full = average(found["all test"])
    wrong = log_p.argmax(-1) != labels
    doubts = {"entropy": entropy(log_p), "mutual information": mutual_information(log_probs)}
    far = {"entropy": entropy(average(other)), "mutual information": mutual_information(other)}
    kl = (full.exp() * (full - log_p)).masked_fill(full == -torch.inf, 0.0).sum(-1)
    pair = torch.stack([mutual_information(found["all test"]), doubts["mutual information"]])
    return {
        "divergence from all": float(kl.mean()),
        "accuracy": float(accuracy(log_p, labels)),
        "NLL": float(nll(log_p, labels)),
        "ECE": float(ece(log_p, labels)),
        "mutual information": float(doubts["mutual information"].mean()),
        "its correlation with all": float(pair.corrcoef()[0, 1]) if len(log_probs) > 1 else 0.0,
        **({f"AUROC errors, {k}": float(auroc(v[~wrong], v[wrong])) for k, v in doubts.items()} if any(wrong) else {}),
        **{f"AUROC other data, {k}": float(auroc(v, far[k])) for k, v in doubts.items()},
    }  # fmt: skip


def summed_up(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return means over tasks and seeds, with the standard deviation of the differences from noise on all tokens."""
    rows = []
    for method in args.methods:
        ways: dict[str, list[dict[str, float]]] = {}
        chosen = []
        for task in args.tasks:
            for seed in args.seeds:
                path = Path(args.out) / f"{task}-{seed}-{method}.pt"
                if not path.exists():
                    continue
                found = torch.load(path)
                chosen.append(float(found["width"]))
                for way in ("mean", "all", "answer", "wider"):
                    ways.setdefault(way, []).append(measured(found, way))
        for way, measures in ways.items():
            for key in measures[0]:
                pairs = [(m[key], a[key]) for m, a in zip(measures, ways["all"], strict=True) if key in m and key in a]
                if not pairs:
                    continue
                rows.append(row(f"{method}, {way}: {key}", fmean(m for m, _ in pairs), None, "mean"))
                if way != "all" and len(pairs) > 1:
                    rows.append(
                        row(f"{method}, {way} less all: {key}, deviation", stdev(m - a for m, a in pairs), None, "sd")
                    )
        if chosen:
            rows.append(row(f"{method}: width that validation rows choose, mean", fmean(chosen), None, "factor"))
            rows.append(row(f"{method}: runs", len(chosen), None, "runs"))
    return rows


def speed(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Return the time of ten draws on the answer's tokens beside one pass, and beside ten on all tokens."""
    options = TaskOptions(task=args.speed_task, data=args.data, readout=args.readout, test_rows=200)
    split = build_task(options).test
    assert split is not None
    model, tokenizer = bl.load_model(args.model or demo_model(), split.classes, adapter=adapter(name))
    rows, _ = readout_for(model, split, tokenizer).encode(split)
    long = [i for i, each in enumerate(rows) if len(each.prompt) >= 80][: args.speed_rows]
    print(f"  {len(long)} prompts, of {min(len(rows[i].prompt) for i in long)} tokens and more")
    split = split.take(long)
    noise = {n: torch.randn(v.shape, generator=generator("answers", n)) for n, v in read(model).items()}
    mean = {n: 0.01 * noise[n] if "lora_B" in n else v for n, v in read(model).items()}
    write(model, mean)
    posterior = DiagonalGaussian(mean, {n: torch.full_like(v, 1e-4) for n, v in mean.items()})
    answer = bl.restricted(posterior, tokens="answer")

    def ask(asked: Posterior, draws: int) -> Callable[[], object]:
        """Return the prediction as something to time."""
        return lambda: bl.predict(model, asked, split, draws, tokenizer=tokenizer, mean=False)

    took = in_turn({"one": ask(posterior, 0), "answer": ask(answer, 10), "all": ask(posterior, 10)}, args.rounds)
    return [
        row(f"{name}: ten draws on the answer / one pass", ratio(took, "answer", "one"), 1.5),
        row(f"{name}: ten draws on all tokens / one pass", ratio(took, "all", "one"), None),
    ]


def main() -> None:
    """Make what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the tasks' data")
    parser.add_argument("--model", help="folder or name of a causal language model; none: the demo's")
    parser.add_argument("--out", default="answer-noise", help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec", "openbookqa"], choices=list(OTHER))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "ensemble", *TRAINED])
    parser.add_argument("--train-rows", type=int, default=120)
    parser.add_argument("--validation-rows", type=int, default=32)
    parser.add_argument("--rows", type=int, default=48, help="test rows")
    parser.add_argument("--other-rows", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--sections", nargs="+", default=["answers", "speed"], choices=["answers", "report", "speed"])
    parser.add_argument("--speed-task", default="arc_easy")
    parser.add_argument("--speed-rows", type=int, default=16)
    parser.add_argument("--readout", default="letters", choices=["likelihood", "letters"])
    add_adapters(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the report")
    args = parser.parse_args()
    if "answers" in args.sections:
        for task in args.tasks:
            for seed in args.seeds:
                run(args, task, seed)
    rows = summed_up(args) if {"answers", "report"} & set(args.sections) else []
    if "speed" in args.sections:
        rows += [row for name in args.adapters for row in speed(args, name)]
    finish(rows, args.json)


if __name__ == "__main__":
    main()
