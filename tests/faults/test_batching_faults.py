"""What one request does, or lacks, is no other request's affair: sampling, deadlines, memory and a dead thread."""

import itertools
import math
import threading
import time

import pytest
import torch
from support.asking import Asked, make, working
from support.tiny import make_model

from bayeslora.errors import InputError
from bayeslora.integrations.server.batching import ContinuousGroup
from bayeslora.integrations.server.errors import ApiError
from bayeslora.integrations.server.worker import Call, Worker
from bayeslora.prediction.generation.rows import joins

KINDS = ["llama", "mamba"]  # continuous and static batches


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_temperature_is_greedy_and_hurts_nobody(kind, tokenizer):
    with working(tokenizer, make(kind)) as worker:
        hold = threading.Event()
        worker.submit(Call([lambda: hold.wait(20)]))
        how = [0.0, 1e-40, 1e-6, 1.0]
        together = [Asked(worker, [5, 6, 7], 9, temperature=temperature, top_p=0.9) for temperature in how]
        hold.set()
        found = [one.wait().ids for one in together]
    assert [one.job.error for one in together] == [None] * 4
    assert found[0] == found[1] == found[2]
    assert len(found[3][0]) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_numbers_fails_alone(kind, tokenizer):
    model = make(kind)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[77] = math.nan
        model.get_base_model().get_output_embeddings().weight = torch.nn.Parameter(torch.randn(80, 32))
    assert joins(model) == (kind == "llama")
    with working(tokenizer, model) as worker:
        alone = Asked(worker, [5, 6], 9).wait()
        hold = threading.Event()
        worker.submit(Call([lambda: hold.wait(20)]))
        good, bad = Asked(worker, [5, 6], 9), Asked(worker, [5, 77], 9, n=2, temperature=1.0)
        hold.set()
        assert good.wait().ids == alone.ids
        assert good.job.error is None
        assert isinstance(bad.wait().job.error, FloatingPointError)


def test_an_error_in_a_row_or_a_group_ends_no_other(tokenizer, monkeypatch):
    with working(tokenizer) as worker:
        long = Asked(worker, [5, 6], 100)
        assert long.seen.wait(20)
        draws_of = worker.served.draws_of

        def draws(self, name, count):
            if name == "tiny/mean":
                raise OSError("the draws cannot be read")
            return draws_of(name, count)

        monkeypatch.setattr(type(worker.served), "draws_of", draws)
        assert isinstance(Asked(worker, [5], model="tiny/mean").wait().job.error, OSError)
        decode = tokenizer.decode
        broken = Asked(worker, [5, 9], 20, stops=("never",))
        broken.job.rows[0].on_token = lambda note: 1 / 0 if note else broken.done.set()
        broken.wait()
        assert isinstance(broken.job.error, ZeroDivisionError)
        assert len(long.wait().ids[0]) == 100
        assert tokenizer.decode == decode
        assert worker.alive


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_late_or_alone_leave_before_the_next_pass(kind, tokenizer):
    model = make(kind)
    with working(tokenizer, model) as worker:
        passes, widths = [0], []

        def count(_, args, kwargs):
            passes[0] += 1
            widths.append(len(kwargs["input_ids"]))
            time.sleep(0.01)

        hook = model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)
        long = Asked(worker, [5, 6], 100)
        assert long.seen.wait(20)
        long.job.rows[0].cancelled.set()
        before = passes[0]
        long.wait()
        assert passes[0] <= before + 1
        assert long.job.rows[0].finish == "cancelled"
        late = Asked(worker, [5, 6], 100, deadline=time.monotonic() + 0.1).wait()
        assert isinstance(late.job.error, ApiError)
        assert late.job.error.status_code == 504
        assert 0 < len(late.ids[0]) < 100
        before = passes[0]
        dead = Asked(worker, [5, 6], 100, deadline=time.monotonic() - 1).wait()
        assert dead.job.error is not None
        assert passes[0] == before
        hook.remove()


class Short:
    """A model's memory holds so many tokens of a batch."""

    def __init__(self, model, tokens):
        self.tokens, self.failed, base = tokens, 0, model.get_base_model()
        base.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _, args, kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.numel() > self.tokens:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_short_memory_halves_the_rows_and_changes_no_token(tokenizer):
    prompts = [[5, 6, 7 + k] for k in range(8)]
    with working(tokenizer) as worker:
        wanted = [Asked(worker, ids, 40).wait().ids for ids in prompts]
    model = make_model("llama")
    memory = Short(model, 300)
    with working(tokenizer, model) as worker:
        asked = [Asked(worker, ids, 40) for ids in prompts]
        assert [one.wait().ids for one in asked] == wanted
        assert [one.job.error for one in asked] == [None] * 8
        assert memory.failed > 0
        assert max(worker.batches) > 1


def test_a_newcomer_that_does_not_fit_ends_nobody(tokenizer):
    model = make_model("llama")
    Short(model, 90)
    with working(tokenizer, model) as worker:
        alone = Asked(worker, [5, 6], 40).wait()
        runs = Asked(worker, [5, 6], 40)
        assert runs.seen.wait(20)
        large = Asked(worker, [7] * 100, 4)
        small = Asked(worker, [8], 4)
        assert runs.wait().ids == alone.ids
        assert isinstance(large.wait().job.error, InputError)
        assert "does not fit into memory" in str(large.job.error)
        assert small.wait().job.error is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_says_so_and_leaves_nobody_waiting(tokenizer, monkeypatch):
    def dies(self, *_):
        raise SystemExit

    monkeypatch.setattr(ContinuousGroup, "turn", dies)
    with working(tokenizer) as worker:
        waits = Asked(worker, [5, 6], 9)
        assert isinstance(waits.wait().job.error, ApiError)
        assert not worker.alive
        with pytest.raises(ApiError):
            worker.submit(waits.job)


def test_prompts_are_run_in_parts_between_which_others_go_on(tokenizer, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr("bayeslora.integrations.server.batching.default_token_budget", lambda model: 4 * 3 * 20)
    with working(tokenizer, model) as worker:
        shapes = []
        model.get_base_model().register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        prompts = [[5 + k] * 110 for k in range(3)]
        alone = [Asked(worker, ids, 4).wait().ids for ids in prompts]
        del shapes[:]
        runs = Asked(worker, [5, 6], 100)
        assert runs.seen.wait(20)
        together = [Asked(worker, ids, 4, n=4) for ids in prompts]
        assert [one.wait().ids for one in together] == [ids * 4 for ids in alone]
        runs.wait()
    prompted = [at for at, (rows, width) in enumerate(shapes) if width > 2]
    assert max(rows * width for rows, width in shapes) <= 20
    assert len(prompted) == 3 * 6
    assert all(later > earlier + 1 for earlier, later in itertools.pairwise(prompted))


def test_a_stopped_worker_refuses_what_runs(tokenizer):
    with working(tokenizer) as worker:
        long = Asked(worker, [5, 6], 110)
        assert long.seen.wait(20)
        assert isinstance(worker, Worker)
    assert isinstance(long.wait().job.error, ApiError)
