"""The two kinds of MC dropout against the moments of inverted dropout; column masks are in test_posteriors."""

import math

import pytest
import torch
from support.tiny import make_model, make_task, same_state, state_of

from bayeslora.errors import InputError
from bayeslora.methods import McDropout
from bayeslora.params import read
from bayeslora.posteriors import ColumnDropout, Draws, TokenDropout
from bayeslora.posteriors.loading import export_draws
from bayeslora.prediction import predict

RATE, DRAWS = 0.3, 3000


def test_each_token_has_its_own_mask_with_the_moments_of_dropout():
    model = make_model().eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).expand(DRAWS, 2, 32)
    posterior = TokenDropout(read(model), RATE)
    before = state_of(model)
    with posterior.dropping(model, 0), torch.no_grad():
        found = layer(x)  # the rows of a batch are as independent as draws
    assert same_state(model, before)
    with torch.no_grad():
        centre = layer(x[0])
        variance = (x[0].square() @ layer.weight.T.square()) * RATE / (1 - RATE)
    # 12 comparisons at five standard errors: false alarm 1e-5
    assert ((found.mean(0) - centre).abs() <= 5 * (variance / DRAWS).sqrt()).all()
    assert ((found.var(0) / variance - 1).abs() <= 5 * math.sqrt(2 / DRAWS) * 1.2).all()
    one, other = (found - centre).unbind(1)
    correlation = (one * other).mean(0) / variance.prod(0).sqrt()
    assert (correlation.abs() <= 5 / math.sqrt(DRAWS)).all()  # tokens are independent


def test_masks_are_a_function_of_seed_and_draw_and_leave_the_global_generator_alone(tokenizer):
    model, task = make_model(lora_dropout=RATE), make_task(readout="likelihood")
    posterior = McDropout("tokens").fit(model, task)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, two = (predict(model, posterior, task.test, draws=Draws(3, seed=1), tokenizer=tokenizer) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.log_probs, two.log_probs)
    assert not torch.equal(one.log_probs[0], one.log_probs[1])
    other = predict(model, posterior, task.test, draws=Draws(3, seed=2), tokenizer=tokenizer)
    assert not torch.equal(other.log_probs, one.log_probs)


def test_the_rate_is_the_adapters_or_the_one_given():
    task = make_task(readout="likelihood")
    found = McDropout().fit(make_model(lora_dropout=RATE), task)
    assert isinstance(found, ColumnDropout)
    assert found.rate == pytest.approx(RATE)
    assert McDropout("tokens", rate=0.2).fit(make_model(), task).rate == 0.2


@pytest.mark.parametrize(
    ("targets", "said"),
    [({"target_modules": ["q_proj", "embed_tokens"]}, "an adapted embedding"),
     ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "an adapted bare parameter"),
     ({"use_dora": True}, "DoRA")],
)  # fmt: skip
def test_token_masks_are_refused_where_no_layer_has_an_input_for_them(targets, said):
    model, task = make_model(**targets), make_task(readout="likelihood")
    with pytest.raises(InputError, match=f"MC dropout by tokens serves plain LoRA on modules, and .* is {said}"):
        McDropout("tokens", rate=RATE).check(model, task)


def test_no_dropout_and_no_weights_are_refused_in_words(tmp_path):
    task = make_task(readout="likelihood")
    for kind in ("tokens", "columns"):
        with pytest.raises(InputError, match="trained without dropout"):
            McDropout(kind).fit(make_model(), task)
    posterior = McDropout("tokens").fit(make_model(lora_dropout=RATE), task)
    with pytest.raises(InputError, match="no draws of weights"):
        export_draws(posterior, tmp_path / "draws", 2)
    assert not (tmp_path / "draws").exists()
    with pytest.raises(InputError, match="'columns' and 'tokens'"):
        McDropout("rows")
    with pytest.raises(InputError, match=r"rate in \(0, 1\)"):
        McDropout(rate=1.0)
    with pytest.raises(InputError, match="DoRA"):
        McDropout().fit(make_model(lora_dropout=RATE, use_dora=True), task)
