"""A new family of posteriors is one class, and everything that takes a posterior takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from support.families import FAMILIES, scaling
from support.tiny import make_model, make_split, same_params

from bayeslora.errors import InputError
from bayeslora.params import Params, read
from bayeslora.posteriors import Linearised, Mixture, Point, Posterior, Scaled
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import Origin, origin_of
from bayeslora.posteriors.transforms import restricted, tempered
from bayeslora.prediction import predict


@dataclass(frozen=True)
class Shifted(Posterior):
    """A family of this test alone: the mean, and as far above it as the draw's number says, up to a limit."""

    description: ClassVar[str] = "a family of one class"

    mean: Params
    step: Params
    limit: int
    origin: Origin | None = None

    @property
    def distinct(self):
        return self.limit

    def draw(self, index, seed=0, sampling="independent"):
        return {name: value + index * self.step[name] for name, value in self.mean.items()}


def test_a_new_family_is_one_class(tmp_path, tokenizer):
    model, split = make_model("llama"), make_split("test", 5, 2, classes=False, readout="letters")
    mean = read(model)
    step = {name: torch.full_like(value, 0.1) for name, value in mean.items()}
    posterior = Shifted(mean, step, 3, origin_of(model, "shift"))
    found = predict(model, posterior, split, 10, tokenizer=tokenizer)
    assert found.draws == 3
    for k in range(3):
        alone = predict(model, Point(posterior.draw(k)), split, tokenizer=tokenizer)
        torch.testing.assert_close(found.log_probs[k], alone.log_probs[0], rtol=0, atol=2e-5)
    Mixture((posterior, Scaled(posterior, scaling(), posterior.origin)), posterior.origin).save_pretrained(
        tmp_path / "p"
    )
    loaded = load_posterior(tmp_path / "p", model)
    assert isinstance(loaded, Mixture)
    assert isinstance(loaded.members[0], Shifted)
    assert loaded.members[0].limit == 3
    assert same_params(loaded.draw(4), posterior.draw(2))
    posterior.save_pretrained(tmp_path / "q")
    assert "a family of one class" in (tmp_path / "q" / "README.md").read_text()
    with pytest.raises(InputError, match="a Shifted cannot be linearised"):
        Linearised(posterior)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [lambda p: p, lambda p: tempered(p, 0.5), lambda p: restricted(p, 1)])
def test_every_family_and_what_is_made_of_it_is_saved_and_loaded(family, change, tmp_path):
    origin = Origin({"peft_type": "LORA"}, "base", {})
    made = FAMILIES[family]()
    parts = {
        part: tuple(replace(one, origin=origin) for one in getattr(made, part))
        if part == "members"
        else replace(made.posterior, origin=origin)
        for part in ("members", "posterior")
        if hasattr(made, part)
    }
    posterior = change(replace(made, origin=origin, **parts))
    posterior.save_pretrained(tmp_path / "p")
    loaded = load_posterior(tmp_path / "p")
    assert type(loaded) is type(posterior)
    for index in range(posterior.count(2)):
        assert same_params(loaded.draw(index, 3), posterior.draw(index, 3))
