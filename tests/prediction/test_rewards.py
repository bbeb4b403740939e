"""Rewards under draws: they are those of plain passes, whatever is stacked."""

import pytest
import torch
from support.preferences import TEXTS, reward_model
from support.tiny import gaussian, make_model, same_state, state_of

from bayeslora.errors import InputError
from bayeslora.params import read, swapped
from bayeslora.posteriors import Linearised, Mixture, Point
from bayeslora.prediction import PassOptions
from bayeslora.prediction.rewards import penalised_rewards, predict_rewards, preference_probability


def plain_rewards(model, posterior, tokenizer, draws):
    """Each draw by itself, each text by itself."""
    found = []
    for k in range(draws):
        with swapped(model, posterior.draw(k)), torch.no_grad():
            rows = [tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"] for text in TEXTS]
            found.append([model.eval()(input_ids=ids).logits.item() for ids in rows])
    return torch.tensor(found)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("budget", [None, 60])
def test_rewards_are_those_of_plain_passes(stack, budget, tokenizer):
    model = reward_model()
    mean = gaussian(model)
    other = Point({name: p + 0.1 for name, p in mean.mean.items()})
    options = PassOptions(stack=stack)
    for posterior in (mean, Mixture((Point(mean.mean), other))):
        draws = posterior.distinct or 4
        model.train()
        before = state_of(model)
        found = predict_rewards(
            model, posterior, TEXTS, draws, tokenizer=tokenizer, token_budget=budget, options=options
        )
        assert same_state(model, before)
        assert found.shape == (draws, len(TEXTS))
        assert not found.is_inference()  # it may meet what is trained
        torch.testing.assert_close(found, plain_rewards(model, posterior, tokenizer, draws), rtol=1e-4, atol=1e-5)
        assert float(found.std(0).min()) > 1e-3


def test_what_is_made_of_rewards():
    chosen, rejected = torch.tensor([[1.0, 0.0], [3.0, 5.0]]), torch.tensor([[0.0, 0.0], [1.0, 5.0]])
    wanted = torch.tensor([(torch.sigmoid(torch.tensor(1.0)) + torch.sigmoid(torch.tensor(2.0))) / 2, 0.5])
    torch.testing.assert_close(preference_probability(chosen, rejected), wanted)
    torch.testing.assert_close(penalised_rewards(chosen, 0.5), chosen.mean(0) - 0.5 * chosen.std(0))
    shifted = chosen + torch.tensor([[10.0], [-3.0]])  # another zero in each draw
    ours, theirs = (penalised_rewards(r, 1.0, r) for r in (chosen, shifted))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(penalised_rewards(chosen[:1], 1.0), chosen[0])


def test_what_cannot_be_rewarded_is_refused(tokenizer):
    model = reward_model()
    point = Point(read(model))
    for other in (make_model("llama"), make_model("bert")):
        with pytest.raises(InputError, match="one output"):
            predict_rewards(other, Point(read(other)), TEXTS, tokenizer=tokenizer)
    with pytest.raises(InputError, match="not weights"):
        predict_rewards(model, Linearised(gaussian(model)), TEXTS, tokenizer=tokenizer)
    with pytest.raises(InputError, match="no texts"):
        predict_rewards(model, point, [], tokenizer=tokenizer)
    with pytest.raises(InputError, match="reads at most 128"):
        predict_rewards(model, point, ["bag " * 200], tokenizer=tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        predict_rewards(model, point, [[{"role": "user", "content": "red"}]], tokenizer=tokenizer)
    with pytest.raises(InputError, match="equally many"):
        preference_probability(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="negative"):
        penalised_rewards(torch.zeros(2, 3), -1.0)
    with pytest.raises(InputError, match="2 draws"):
        penalised_rewards(torch.zeros(2, 3), 1.0, torch.zeros(4, 3))


def test_draws_share_a_pass_and_one_too_large_for_memory_is_halved(tokenizer):
    model = reward_model()
    posterior, sizes = gaussian(model), []

    def crowded(_, args, inputs):
        sizes.append(len(args[0] if args else inputs["hidden_states"]))
        if sizes[-1] > 12:
            raise RuntimeError("CUDA out of memory.")

    wanted = predict_rewards(model, posterior, TEXTS, 3, tokenizer=tokenizer)
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    handle = layer.register_forward_pre_hook(crowded, with_kwargs=True)
    found = predict_rewards(model, posterior, TEXTS, 3, tokenizer=tokenizer)
    handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert sizes[0] == 3 * len(TEXTS)
    assert set(sizes[1:]) <= {15, 6, 9}
