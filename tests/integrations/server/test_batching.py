"""Continuous batching: rows join and leave between two tokens, and none is changed by its company."""

import random
import time

import pytest
from support.asking import Asked, make, working

import bayeslora as bl
from bayeslora.integrations.server.errors import ApiError
from bayeslora.integrations.server.worker import Call
from bayeslora.posteriors import Point
from bayeslora.prediction.generation.rows import joins


def requests(count, seed=0):
    """Arguments of requests of many kinds."""
    rng = random.Random(seed)
    return [
        {
            "ids": [rng.randrange(3, 80) for _ in range(rng.choice([1, 2, 3, 5, 8, 21]))],
            "tokens": rng.randrange(1, 24),
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "top_p": rng.choice([1.0, 0.8]),
            "n": rng.choice([1, 1, 2, 4]),
            "seed": 10 * number,
            "model": rng.choice(["tiny", "tiny", "tiny/mean", "tiny/draw-001"]),
        }
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen2", "qwen3", "gpt2", "mistral"))],
)
def test_whoever_comes_when_rows_have_the_tokens_they_have_alone(kind, tokenizer):
    model, rng = make(kind), random.Random(kind)
    assert joins(model)
    with working(tokenizer, model, rows=6) as worker:
        asked = requests(12, seed=len(kind))
        alone = [Asked(worker, **how).wait() for how in asked]
        together = []
        for how in asked:
            together.append(Asked(worker, **how))
            time.sleep(rng.choice([0.0, 0.002, 0.02]))
        for one, other in zip(alone, together, strict=True):
            assert other.wait().ids == one.ids
            assert other.log_probs == pytest.approx(one.log_probs, abs=2e-4)
            assert [row.text for row in other.job.rows] == [row.text for row in one.job.rows]
        assert 1 < max(worker.batches) <= 6


def test_rows_are_those_of_generate(tokenizer):
    model = make("gemma3")
    with working(tokenizer, model) as worker:
        prompt = "Question: bag holds 3 red, 5 blue"
        found = Asked(worker, tokenizer(prompt)["input_ids"], 12, model="tiny/draw-002").wait()
        draw = Point(worker.served.draws_of("tiny/draw-002", 1)[0])
    wanted = bl.generate(model, draw, [prompt], tokenizer=tokenizer, max_new_tokens=12, eos_token_id=None)[0]
    assert found.ids[0] == list(wanted.token_ids)
    assert found.log_probs == pytest.approx(wanted.log_probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_that_keep_something_else_have_static_batches(kind, tokenizer):
    model = make(kind)
    assert not joins(model)
    with working(tokenizer, model) as worker:
        alone = [Asked(worker, ids, 9).wait() for ids in ([5, 6, 7], [8, 9, 4])]
        together = [Asked(worker, ids, 9) for ids in ([5, 6, 7], [8, 9, 4])]
        assert [one.wait().ids for one in together] == [one.ids for one in alone]
        late = Asked(worker, [5], 100, deadline=time.monotonic() + 0.05).wait()
        assert isinstance(late.job.error, ApiError)


def test_a_newcomer_does_not_wait_for_those_who_run(tokenizer):
    with working(tokenizer) as worker:
        long = Asked(worker, [5, 6], 110)
        assert long.seen.wait(20)
        short = Asked(worker, [7], 2).wait()
        other = Asked(worker, [7], 2, model="tiny/mean").wait()
        called = Call([lambda: 1, lambda: 2])
        worker.submit(called)
        assert called.result.result(20) == [1, 2]
        assert not long.done.is_set()
        assert [len(one.wait().ids[0]) for one in (short, other, long)] == [2, 2, 110]


def test_an_answer_is_there_as_soon_as_it_ends_and_its_seat_is_free(tokenizer):
    with working(tokenizer, rows=2) as worker:
        long = Asked(worker, [5, 6], 110)
        many = [Asked(worker, [7, k], 2) for k in range(10)]
        for one in many:
            one.wait()
        assert not long.done.is_set()
        assert max(worker.batches) <= 2
