"""No draws are the mean: one point, with the scaling that a posterior has for its mean."""

import pytest
import torch
from peft import PeftModel
from support.families import scaling
from support.preferences import TEXTS, reward_model
from support.tiny import gaussian, make_base, make_model, make_split
from transformers import TrainingArguments

from bayeslora.errors import InputError
from bayeslora.params import lora_parameters, read, swapped
from bayeslora.posteriors import Draws, Linearised, Mixture, Point, Scaled, TokenDropout
from bayeslora.posteriors.loading import export_draws
from bayeslora.posteriors.transforms import requested
from bayeslora.prediction import predict
from bayeslora.prediction.generation import generate, generate_each
from bayeslora.prediction.rewards import predict_rewards
from bayeslora.training.distillation import distill

ROWS = make_split("test", 5, 2, classes=False, readout="letters")
FAMILIES = {
    "gaussian": gaussian,
    "point": lambda model: Point(read(model)),
    "tokens": lambda model: TokenDropout(read(model), 0.2),
    "linearised": lambda model: Linearised(gaussian(model)),
    "mixture": lambda model: Mixture((gaussian(model), gaussian(model))),
    "scaled": lambda model: Scaled(gaussian(model), scaling()),
    "scaled linearised": lambda model: Scaled(Linearised(gaussian(model)), scaling()),
    "mixture of scaled": lambda model: Mixture((Scaled(gaussian(model), scaling()), Point(read(model)))),
}


@pytest.mark.parametrize("draws", [0, Draws(0, seed=3, sampling="simplex", tolerance=0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_draws_are_what_is_predicted_at_the_mean(family, draws, tokenizer):
    model = make_model()
    posterior = FAMILIES[family](model)
    wanted = predict(model, posterior, ROWS, 2, tokenizer=tokenizer).mean_log_probs
    found = predict(model, posterior, ROWS, draws, tokenizer=tokenizer)
    assert found.draws == 1
    assert found.components is None
    torch.testing.assert_close(found.log_probs[0], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean_log_probs, wanted, rtol=1e-4, atol=1e-5)
    assert not bool(found.monte_carlo_error.any())
    assert predict(model, posterior, ROWS, draws, mean=False, tokenizer=tokenizer).mean_log_probs is None


def test_a_request_for_draws_is_left_as_it_is():
    posterior, draws = gaussian(make_model()), Draws(3, seed=4)
    assert requested(posterior, draws) == (posterior, draws)
    assert requested(posterior, 7) == (posterior, Draws(7))


def test_no_draws_generate_and_reward_by_the_mean(tokenizer):
    model = make_model()
    posterior, how = gaussian(model), {"tokenizer": tokenizer, "max_new_tokens": 4}
    wanted = generate(model, Point(posterior.mean), ["bag holds 3 red"], 1, **how)[0]
    assert generate(model, posterior, ["bag holds 3 red"], 0, **how)[0].token_ids == wanted.token_ids
    assert generate(model, Linearised(posterior), ["bag holds 3 red"], 0, **how)[0].token_ids == wanted.token_ids
    (each,) = generate_each(model, posterior, ["bag holds 3 red"], 0, **how)
    assert [answer.token_ids for answer in each.answers] == [wanted.token_ids]
    scaled = Scaled(posterior, scaling())  # to a task's choices, and nothing to a text
    assert generate(model, scaled, ["bag holds 3 red"], 0, **how)[0].token_ids == wanted.token_ids
    with pytest.raises(InputError, match="temperature was fitted"):
        generate(model, scaled, ["bag"], 1, **how)
    judge = reward_model()
    posterior = gaussian(judge)
    rewards = predict_rewards(judge, posterior, TEXTS, 0, tokenizer=tokenizer)
    assert torch.equal(rewards, predict_rewards(judge, Point(posterior.mean), TEXTS, 1, tokenizer=tokenizer))
    assert rewards.shape == (1, len(TEXTS))


def test_no_draws_export_the_mean(tmp_path):
    model = make_model()
    posterior = gaussian(model)
    (folder,) = export_draws(posterior, tmp_path / "out", 0)
    assert folder.name == "mean"
    loaded = PeftModel.from_pretrained(make_base("llama"), folder)
    for name, value in lora_parameters(loaded).items():
        assert torch.equal(value, posterior.mean[name])
    assert [path.name for path in export_draws(posterior, tmp_path / "birds", 0, name="birds")] == ["birds-mean"]


def test_only_a_scaled_mean_can_be_distilled(tokenizer, tmp_path):
    model = make_model()
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    posterior = gaussian(model)
    with pytest.raises(InputError, match="one plain adapter already"):
        distill(model, posterior, ROWS, args, 0, tokenizer=tokenizer)
    with swapped(model, posterior.mean):
        found = distill(model, Scaled(posterior, scaling(), posterior.origin), ROWS, args, 0, tokenizer=tokenizer)
    assert found.origin.settings["draws"] == 1
