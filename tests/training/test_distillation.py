"""One adapter in the place of many draws."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from support.tiny import KINDS, arguments, make_base, same_params

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.metrics.uncertainty import divergences
from bayeslora.params import generator, lora_parameters, read
from bayeslora.posteriors import DiagonalGaussian, Point
from bayeslora.training.distillation import distill, soft_loss


def test_the_loss_is_the_divergence_of_the_answers():
    log_p = torch.randn(5, 3).log_softmax(-1)
    log_p[4] = torch.tensor([0.3, 0.7, 0.0]).log()
    logits = torch.randn(3, 3, requires_grad=True)
    labels = torch.tensor([4, 0, 2])
    with torch.no_grad():
        logits[0, 2] = -torch.inf  # a choice that the example does not have
    loss = soft_loss(log_p)({"logits": logits}, labels)
    q = torch.distributions.Categorical(logits=logits.detach())
    p = torch.distributions.Categorical(probs=log_p[labels].exp())
    each = torch.stack([
        (p.probs[i][:n] * (p.probs[i][:n].log() - q.probs[i][:n].log())).sum() for i, n in enumerate((2, 3, 3))
    ])  # fmt: skip
    torch.testing.assert_close(loss, each.mean())
    loss.backward()
    torch.testing.assert_close(logits.grad, (q.probs - p.probs) / 3)
    torch.testing.assert_close(soft_loss(log_p)({"logits": logits}, labels, 6), each.sum() / 6)


@pytest.mark.parametrize("name", ["llama-likelihood", "gpt2", "bert"])
def test_a_distilled_adapter_answers_as_the_draws_do(name, tokenizer, tmp_path):
    kind = KINDS[name]
    model, rows = kind.build(), kind.task().train
    unlabelled = replace(rows, examples=tuple(replace(e, label=None) for e in rows))
    mean = read(model)
    posterior = DiagonalGaussian(mean, {n: torch.full_like(m, 0.3) for n, m in mean.items()})
    wanted = bl.predict(model, posterior, rows, 20, tokenizer=tokenizer)
    args = arguments(tmp_path, max_steps=60, learning_rate=2e-2)
    found = distill(model, posterior, unlabelled, args, 20, held_out=0, tokenizer=tokenizer)
    assert same_params(read(model), found.mean)
    assert isinstance(found, Point)
    assert found.origin is not None
    assert found.origin.method == "distilled"

    def divergence(log_q):
        gap = (wanted.log_p - log_q).masked_fill(torch.isneginf(wanted.log_p), 0)
        return float((wanted.probs * gap).sum(-1).mean())

    after = bl.predict(model, found, rows, 1, tokenizer=tokenizer)
    assert divergence(after.log_p) < 0.25 * divergence(wanted.mean_log_probs)
    found.save_pretrained(tmp_path / "one")
    loaded = PeftModel.from_pretrained(make_base(kind.model), tmp_path / "one")
    assert same_params({n: p.detach() for n, p in lora_parameters(loaded).items()}, found.mean)


def test_there_must_be_rows(tokenizer, tmp_path):
    model = KINDS["gpt2"].build()
    nothing = replace(KINDS["gpt2"].task().train, examples=())
    with pytest.raises(InputError, match="no examples to distil from"):
        distill(model, Point(read(model)), nothing, arguments(tmp_path), tokenizer=tokenizer)
    rows = KINDS["gpt2"].task().train
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="share of the rows"):
            distill(model, Point(read(model)), rows, arguments(tmp_path), held_out=share, tokenizer=tokenizer)
    with pytest.raises(InputError, match="too few to hold out"):
        distill(model, Point(read(model)), rows, arguments(tmp_path), held_out=0.001, tokenizer=tokenizer)


@pytest.mark.parametrize("rate", [2e-2, 1e2])
def test_the_epoch_that_comes_closest_on_held_out_rows_is_kept(rate, tokenizer, tmp_path, caplog):
    kind = KINDS["bert"]
    model, rows = kind.build(), kind.task().train
    mean = read(model)
    posterior = DiagonalGaussian(mean, {n: torch.full_like(m, 0.3) for n, m in mean.items()})
    said = bl.predict(model, posterior, rows, 20, tokenizer=tokenizer)
    args = arguments(tmp_path, num_train_epochs=8, max_steps=-1, learning_rate=rate)
    found = distill(model, posterior, rows, args, 20, held_out=0.5, tokenizer=tokenizer)
    assert found.origin is not None
    told = found.origin.settings
    judges = torch.randperm(len(rows), generator=generator("held-out rows", args.seed))[: len(rows) // 2]
    assert told["held_out"] == len(judges)
    assert found.origin.num_data == len(rows) - len(judges)

    def divergence(log_q):
        assert log_q is not None
        return float(divergences(said.log_p[judges], log_q[judges]).mean())

    after = bl.predict(model, found, rows, 1, tokenizer=tokenizer)
    assert told["divergence"] == pytest.approx(divergence(after.log_p), rel=1e-4)
    assert told["divergence_of_mean"] == pytest.approx(divergence(said.mean_log_probs), rel=1e-4)
    if rate > 1:  # every epoch is worse than no training
        assert same_params(found.mean, mean)
        assert "no epoch came closer" in caplog.text
    else:
        assert told["divergence"] < told["divergence_of_mean"]
        assert "no epoch" not in caplog.text
    assert args.eval_strategy == "no"
