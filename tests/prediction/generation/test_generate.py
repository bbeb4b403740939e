"""Generation: token by token it is the average of plain passes, whatever transformers does around it."""

import math

import pytest
import torch
from support.tiny import gaussian, make_base, make_model, same_state, state_of
from transformers import TextIteratorStreamer

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.params import read, swapped
from bayeslora.posteriors import Linearised, Mixture, Point, Scaled
from bayeslora.prediction.generation import semantic as groups

CAUSAL = ("llama", "qwen2", "gpt2")
PROMPTS = ["Question: bag holds 3 red, 5 blue", "Answer"]
DRAWS = 4
ONE = {f"{of}.{part}": torch.ones(1) for of in ("draws", "mean") for part in ("weight", "bias")}


@pytest.fixture(params=CAUSAL)
def model(request):
    found = make_model(request.param)
    found.get_base_model().generation_config.eos_token_id = None  # texts of full length
    return found


def plain(model, posterior, tokenizer, prompt, tokens):
    """Each draw's log-probabilities [S T V] of each next token, in passes without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    found = []
    for k in range(DRAWS):
        with swapped(model, posterior.draw(k)), torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        found.append(logits.float().log_softmax(-1))
    return torch.stack(found)


def test_each_token_is_the_most_probable_on_average(model, tokenizer):
    posterior, before = bl.tempered(gaussian(model), 9), state_of(model)  # whose draws differ by more than rounding
    answers = bl.generate(model, posterior, PROMPTS, DRAWS, tokenizer=tokenizer, max_new_tokens=7)
    assert same_state(model, before)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        log_p = plain(model, posterior, tokenizer, prompt, list(answer.token_ids))
        average = log_p.logsumexp(0) - math.log(DRAWS)
        assert len(answer.token_ids) == 7
        assert average.argmax(-1).tolist() == list(answer.token_ids)
        chosen = torch.tensor(answer.token_ids)[:, None]
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(answer.log_probs, average.gather(1, chosen)[:, 0], **close)
        own = log_p.gather(2, chosen.expand(DRAWS, -1, -1))[..., 0]
        torch.testing.assert_close(answer.draw_log_probs, own, **close)
        entropy = -(average.exp() * average).sum(-1)
        expected = -(log_p.exp() * log_p).sum(-1).mean(0)
        torch.testing.assert_close(answer.entropy, entropy, **close)
        torch.testing.assert_close(answer.mutual_information, entropy - expected, **close)
        assert float(answer.mutual_information.max()) > 1e-3
        assert answer.log_mean_likelihood == pytest.approx(float(own.sum(1).logsumexp(0)) - math.log(DRAWS), abs=1e-3)
        best, p = answer.alternatives[0][0]
        assert (best, p) == (answer.tokens[0], pytest.approx(math.exp(answer.log_probs[0]), abs=1e-5))
        assert answer.finished == "length"


def test_a_point_is_generated_from_as_transformers_does(model, tokenizer):
    base = model.get_base_model()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    whole = base.eval().generate(**ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
    answer = bl.generate(model, Point(read(model)), PROMPTS[:1], tokenizer=tokenizer, max_new_tokens=9)[0]
    assert list(answer.token_ids) == whole[ids.input_ids.shape[1] :].tolist()
    assert len(answer.draw_log_probs) == 1
    assert float(answer.mutual_information.abs().max()) == 0


@pytest.mark.parametrize("size", [1, 2, None])
def test_batches_do_not_matter(size, model, tokenizer):
    prompts = [*PROMPTS, "Question: bag holds 9 green"]
    how = {"tokenizer": tokenizer, "max_new_tokens": 5}
    alone = [bl.generate(model, gaussian(model), [p], DRAWS, **how)[0] for p in prompts]
    for one, other in zip(
        alone, bl.generate(model, gaussian(model), prompts, DRAWS, batch_size=size, **how), strict=True
    ):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ask", [bl.generate, bl.generate_each])
def test_a_batch_too_large_for_memory_is_halved(ask, tokenizer):
    model, sizes = make_model("llama"), []
    prompts = [*PROMPTS, "Question: bag holds 9 green"]
    how = {"tokenizer": tokenizer, "max_new_tokens": 3, "eos_token_id": None}
    wanted = ask(model, gaussian(model), prompts, DRAWS, **how)

    def crowded(_, args, inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    largest = 2 if ask is bl.generate else 2 * DRAWS  # rows come once for each draw after this hook, or before
    handle = model.get_base_model().register_forward_pre_hook(crowded, with_kwargs=True)
    found = ask(model, gaussian(model), prompts, DRAWS, **how)
    assert sizes[0] > largest
    for one, other in zip(wanted, found, strict=True):
        if ask is bl.generate:
            one, other = (bl.Answers((a,), (0,), (0,)) for a in (one, other))
        assert [a.token_ids for a in one.answers] == [a.token_ids for a in other.answers]
    largest = 0
    with pytest.raises(InputError, match=r"prompt 0 has \d+ tokens and does not fit into memory"):
        ask(model, gaussian(model), prompts, DRAWS, **how)
    handle.remove()


def test_what_was_told_is_not_generated_again(tokenizer):
    model, seen = make_model("llama"), []

    def crowded(*_):
        if seen:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.get_base_model().register_forward_pre_hook(crowded)
    how = {"tokenizer": tokenizer, "max_new_tokens": 3, "eos_token_id": None, "on_step": seen.append}
    with pytest.raises(torch.OutOfMemoryError):
        bl.generate(model, gaussian(model), PROMPTS, DRAWS, **how)
    handle.remove()
    assert len(seen) == 1


def test_sampled_texts_depend_on_the_seed_alone_and_leave_the_global_stream(model, tokenizer):
    def sampled(seed):
        found = bl.generate(
            model, gaussian(model), PROMPTS, bl.Draws(DRAWS, seed), tokenizer=tokenizer, max_new_tokens=8,
            do_sample=True, temperature=1.5, num_return_sequences=2,
        )  # fmt: skip
        return [a.token_ids for a in found]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sampled(0) == first
    assert sampled(1) != first
    assert len(first) == 4


@pytest.mark.slow
def test_sampling_follows_the_average(tokenizer):
    model = make_model("llama")
    posterior = gaussian(model)
    answers = bl.generate(
        model, posterior, ["Answer"], DRAWS, tokenizer=tokenizer, max_new_tokens=1, do_sample=True,
        num_return_sequences=4000, top_k=0,
    )  # fmt: skip
    drawn = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=80) / len(answers)
    log_p = plain(model, posterior, tokenizer, "Answer", [0])[:, 0]
    wanted = (log_p.logsumexp(0) - math.log(DRAWS)).exp()
    assert float((drawn - wanted).abs().sum()) < 0.16  # the expected distance of 4000 draws from 80 classes is 0.11


def test_beams_are_scored_by_the_average(model, tokenizer):
    how = {"tokenizer": tokenizer, "max_new_tokens": 6}
    greedy = bl.generate(model, gaussian(model), PROMPTS, DRAWS, **how)
    beams = bl.generate(model, gaussian(model), PROMPTS, DRAWS, num_beams=3, **how)
    for prompt, one, other in zip(PROMPTS, beams, greedy, strict=True):
        assert one.log_likelihood >= other.log_likelihood - 1e-3
        log_p = plain(model, gaussian(model), tokenizer, prompt, list(one.token_ids)).logsumexp(0) - math.log(DRAWS)
        wanted = log_p.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(one.log_probs, wanted, rtol=1e-4, atol=1e-4)


def test_the_end_of_a_text(tokenizer):
    model = make_model("llama")
    how = {"tokenizer": tokenizer, "max_new_tokens": 8, "eos_token_id": None}
    whole = bl.generate(model, gaussian(model), PROMPTS, DRAWS, **how)
    last = whole[0].token_ids[3]
    place = whole[0].token_ids.index(last)
    ended = bl.generate(model, gaussian(model), PROMPTS[:1], DRAWS, **{**how, "eos_token_id": last})[0]
    assert ended.token_ids == whole[0].token_ids[: place + 1]
    assert ended.finished == "stop"
    stop = whole[0].tokens[3].strip() or whole[0].tokens[3]
    cut, other = bl.generate(model, gaussian(model), PROMPTS, DRAWS, stop_strings=[stop], **how)
    assert cut.finished == "stop"
    assert cut.text == whole[0].text[: whole[0].text.index(stop)]
    assert cut.token_ids == whole[0].token_ids[: len(cut.token_ids)]
    assert stop in tokenizer.decode(cut.token_ids)
    assert other.text == whole[1].text.split(stop)[0]


def test_steps_are_told_as_they_happen_and_can_end_it(tokenizer):
    model, seen = make_model("llama"), []

    def note(step):
        seen.append(step)
        return len(seen) == 3

    answer = bl.generate(
        model,
        gaussian(model),
        PROMPTS[:1],
        DRAWS,
        tokenizer=tokenizer,
        max_new_tokens=9,
        on_step=note,
        eos_token_id=None,
    )[0]
    assert [int(s.token_ids[0]) for s in seen] == list(answer.token_ids)
    assert len(seen) == 3


def test_text_streams_as_it_does_in_transformers(tokenizer):
    model, streamer = make_model("llama"), TextIteratorStreamer(tokenizer, skip_prompt=True)
    how = {"tokenizer": tokenizer, "max_new_tokens": 6, "eos_token_id": None}
    answer = bl.generate(model, gaussian(model), PROMPTS[:1], DRAWS, streamer=streamer, **how)[0]
    assert "".join(streamer) == answer.text


def test_a_chat_goes_through_its_template(tokenizer):
    model = make_model("llama")
    chat = [{"role": "user", "content": "bag holds 3 red"}]
    with pytest.raises(InputError, match="prompt 0 is a chat"):
        bl.generate(model, gaussian(model), [chat], DRAWS, tokenizer=tokenizer)
    tokenizer.chat_template = "{% for m in messages %}Question: {{ m.content }}{% endfor %} Answer:"
    try:
        one = bl.generate(model, gaussian(model), [chat], DRAWS, tokenizer=tokenizer, max_new_tokens=4)[0]
    finally:
        tokenizer.chat_template = None
    prompt = "Question: bag holds 3 red Answer:"
    assert (
        one.token_ids
        == bl.generate(model, gaussian(model), [prompt], DRAWS, tokenizer=tokenizer, max_new_tokens=4)[0].token_ids
    )


def test_one_answer_a_draw(model, tokenizer):
    posterior = gaussian(model)
    how = {"tokenizer": tokenizer, "max_new_tokens": 6}
    found = bl.generate_each(model, posterior, PROMPTS, DRAWS, **how)
    for number, prompt in enumerate(PROMPTS):
        assert found[number].draws == tuple(range(DRAWS))
        for k, answer in enumerate(found[number].answers):
            alone = bl.generate(model, Point(posterior.draw(k)), [prompt], **how)[0]
            assert answer.token_ids == alone.token_ids
            torch.testing.assert_close(answer.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)
    twice = bl.generate_each(model, posterior, PROMPTS[:1], 2, do_sample=True, num_return_sequences=3, **how)[0]
    assert twice.draws == (0, 0, 0, 1, 1, 1)


def answers(*texts):
    empty = torch.zeros(0)
    made = tuple(bl.Answer(t, (), (), empty, torch.zeros(1, 0), empty, empty, (), "stop") for t in texts)
    return bl.Answers.of(made, tuple(range(len(texts))))


def test_answers_that_say_the_same():
    found = answers("The red one.", "red one", "Blue", "a blue!")
    assert found.groups == (0, 0, 1, 1)
    assert found.semantic_entropy == pytest.approx(math.log(2))
    assert answers("a b", "b", "c d e").best().text == "a b"
    assert groups.overlap("red blue", "blue") == pytest.approx(2 / 3)
    assert groups.overlap("", "") == 1.0
    assert answers("x", "x").semantic_entropy == 0.0


def test_judges_of_meaning(tokenizer):
    encoder = make_base("bert").eval().bert
    near = bl.by_embedding(encoder, tokenizer, threshold=0.999)
    assert near("bag holds red", "bag holds red")
    assert not near("bag", "5 7 9 green")
    with pytest.raises(InputError, match="cosine"):
        bl.by_embedding(encoder, tokenizer, threshold=2)
    classifier = make_base("bert").eval()
    with pytest.raises(InputError, match="entailment"):
        bl.by_entailment(classifier, tokenizer)
    classifier.config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    with torch.no_grad():
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert bl.by_entailment(classifier, tokenizer)("red", "blue")


def test_what_cannot_be_generated_is_refused_in_words(tokenizer):
    model = make_model("llama")
    posterior, before = gaussian(model), state_of(model)
    for change, said in (
        ({"max_new_tokens": 500}, "more than the model's 128"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 5, "temprature": 1.0}, "temprature"),
    ):
        with pytest.raises(InputError, match=said):
            bl.generate(model, posterior, PROMPTS, DRAWS, tokenizer=tokenizer, **change)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        bl.generate(model, posterior, ["Answer", ""], DRAWS, tokenizer=tokenizer, max_new_tokens=5)
    with pytest.raises(InputError, match="temperature was fitted"):
        bl.generate(model, Scaled(posterior, ONE), PROMPTS, DRAWS, tokenizer=tokenizer)
    with pytest.raises(InputError, match="not weights"):
        bl.generate(model, Linearised(posterior), PROMPTS, DRAWS, tokenizer=tokenizer)
    with pytest.raises(InputError, match="num_beams"):
        bl.generate_each(model, posterior, PROMPTS, DRAWS, tokenizer=tokenizer, num_beams=2)
    encoder = make_model("bert")
    with pytest.raises(InputError, match="cannot generate"):
        bl.generate(encoder, gaussian(encoder), PROMPTS, DRAWS, tokenizer=tokenizer)
    wide = make_model("llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match="outside of linear layers"):
        bl.generate(wide, gaussian(wide), PROMPTS, DRAWS, tokenizer=tokenizer, max_new_tokens=5)
    assert same_state(model, before)


def test_a_mixture_of_points(model, tokenizer):
    posterior = gaussian(model)
    members = Mixture(tuple(Point(posterior.draw(k)) for k in range(DRAWS)))
    how = {"tokenizer": tokenizer, "max_new_tokens": 5}
    one = bl.generate(model, members, PROMPTS, 50, **how)
    other = bl.generate(model, posterior, PROMPTS, DRAWS, **how)
    assert [a.token_ids for a in one] == [a.token_ids for a in other]


def test_antithetic_draws_come_in_pairs(tokenizer):
    model = make_model("llama")
    how = {"tokenizer": tokenizer, "max_new_tokens": 2}
    each = bl.generate_each(model, gaussian(model), PROMPTS[:1], bl.Draws(3, sampling="antithetic"), **how)[0]
    assert each.draws == (0, 1, 2, 3)
