"""The table of all methods, and posteriors that are learned once for the whole suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import PeftModel
from support.methods_table import DROPOUT, TABLE
from support.tiny import KINDS, Kind, arguments

from bayeslora.methods import Inference
from bayeslora.params import read, write
from bayeslora.posteriors import Posterior
from bayeslora.training.run import fit


@dataclass(frozen=True)
class Learned:
    """One method's posterior over one tiny model, and where it was saved."""

    method: Inference
    kind: Kind
    model: PeftModel
    posterior: Posterior
    folder: Path


@pytest.fixture(scope="session")
def learn(tokenizer, tmp_path_factory):
    """Train a method on a kind of model by their names, or return what was trained before."""
    done = {}

    def once(method, kind):
        if (method, kind) not in done:
            folder = tmp_path_factory.mktemp(f"{method}-{kind}")
            row = KINDS[kind]
            model = row.build(lora_dropout=DROPOUT)
            posterior = fit(model, row.task(), TABLE[method].method, arguments(folder / "run"), tokenizer=tokenizer)
            posterior.save_pretrained(folder / "posterior")
            write(model, {name: p + 0.25 for name, p in read(model).items()})  # so that restoring is not applying
            done[method, kind] = Learned(TABLE[method].method, row, model, posterior, folder / "posterior")
        return done[method, kind]

    return once
