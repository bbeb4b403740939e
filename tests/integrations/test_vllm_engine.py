"""vLLM's engine in this process, with a stand-in for its classes; `tests/live` has the engine itself."""

import os
import sys
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.fake_vllm import Stand
from support.tiny import gaussian, make_model, make_split, make_tokenizer

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.integrations.vllm_engine import QUERIES_AT_ONCE, load_engine
from bayeslora.posteriors.loading import export_draws
from bayeslora.tasks.types import Format

TEXT = (15, 17)
Moves = Enum("Moves", ["UNIDIRECTIONAL", "SWAP"])


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def stand(monkeypatch):
    """A posterior, and modules in the place of vLLM's that answer from it; ``stand.asked`` has the calls."""
    model = make_model("llama")
    stand = Stand(model, gaussian(model), make_tokenizer())

    class Llm:
        def __init__(self, base, **settings):
            stand.asked.append({"base": base, **settings})

            config = SimpleNamespace(max_num_batched_tokens=50, max_num_seqs=7)
            self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=config))

        def get_tokenizer(self):
            return stand.tokenizer

        def generate(self, prompts, params, *, lora_request, use_tqdm):
            stand.asked.append({"prompts": len(prompts)})
            answer = self.text if hasattr(params[0], "extra_args") else self.answer
            return [answer(*each) for each in zip(prompts, params, lora_request, strict=True)]

        def text(self, prompt, params, adapter):
            ids = prompt["prompt_token_ids"]
            log_p = stand.log_probs(adapter.lora_name[:8], [*ids, *TEXT])
            shown = [{i: SimpleNamespace(logprob=float(log_p[len(ids) + t - 1, i]))} for t, i in enumerate(TEXT)]
            text = SimpleNamespace(text=" red blue", token_ids=TEXT, logprobs=shown, finish_reason="length")
            return SimpleNamespace(outputs=[text])

        def answer(self, prompt, params, adapter):
            name = "base" if adapter is None else adapter.lora_name[:8]
            log_p = stand.log_probs(name, prompt["prompt_token_ids"])[-1]
            shown = {i: SimpleNamespace(logprob=float(log_p[i])) for i in params.logprob_token_ids}
            return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[shown])])

    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor")
    vllm, _, request, _, _, processor = modules = [ModuleType(name) for name in names]
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = Llm, SimpleNamespace, Request
    processor.LogitsProcessor, processor.BatchUpdate, processor.MoveDirectionality = object, object, Moves
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "bayeslora.integrations.vllm_averaging", raising=False)
    return stand


@pytest.fixture
def folder(stand, tmp_path):
    origin = stand.posterior.origin
    config = {**origin.adapter_config, "base_model_name_or_path": "org/base"}
    posterior = replace(stand.posterior, origin=replace(origin, adapter_config=config))
    export_draws(posterior, tmp_path / "out", 3)
    export_draws(posterior, tmp_path / "mean", 0)[0].rename(tmp_path / "out" / "mean")  # which is no draw
    return tmp_path / "out"


@pytest.mark.parametrize("form", [Format("", "letters"), Format("", "likelihood", normalisation="unconditional")])
def test_predictions_are_those_of_the_library(stand, folder, form):
    split = replace(make_split("test", 5, 2, classes=False), format=form)
    found = load_engine(folder).predict(split, base=True)
    wanted = bl.predict(stand.model, stand.posterior, split, 3, base=True, tokenizer=stand.tokenizer)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.base_log_probs, wanted.base_log_probs, rtol=1e-4, atol=1e-4)
    assert found.readout == wanted.readout


def test_the_engine_is_made_for_the_adapters_and_names_them_by_their_content(stand, folder):
    engine = load_engine(folder, settings={"max_loras": 2})
    assert stand.asked == [{
        "base": "org/base", "enable_lora": True, "max_loras": 2, "max_lora_rank": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
    }]  # fmt: skip
    assert [adapter.lora_name[:9] for adapter in engine.adapters] == ["draw-000-", "draw-001-", "draw-002-"]
    assert [adapter.lora_int_id for adapter in engine.adapters] == [1, 2, 3]


def test_rows_are_handed_over_in_parts(stand, folder):
    split = make_split("test", 1, 2, classes=False, readout="letters")
    many = replace(split, examples=split.examples * (QUERIES_AT_ONCE + 1))
    engine = load_engine(folder)
    stand.log_probs = lambda name, ids: torch.zeros(1, 80)
    assert engine.predict(many).log_probs.shape[1] == len(many)
    assert [call["prompts"] for call in stand.asked[1:]] == [3 * QUERIES_AT_ONCE, 3]


def test_texts_of_the_average_are_asked_for_in_parts_that_begin_in_one_step(stand, folder, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = load_engine(folder, average=True)
    assert [one.__name__ for one in stand.asked[0]["logits_processors"]] == ["AverageDraws"]
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    found = engine.generate(["red blue"] * 3 + ["bag holds 3 red, 5 blue"], max_tokens=2)
    assert [call["prompts"] for call in stand.asked[1:]] == [6, 6]  # 7 rows at most, three for each prompt
    ids = stand.tokenizer("red blue")["input_ids"]
    draws = torch.stack([stand.log_probs(f"draw-00{k}", [*ids, *TEXT])[len(ids) - 1 : -1] for k in range(3)])
    wanted = draws.gather(2, torch.tensor([TEXT]).expand(3, -1)[..., None])[..., 0]
    torch.testing.assert_close(found[0].draw_log_probs, wanted)
    torch.testing.assert_close(found[0].log_probs, wanted.exp().mean(0).log())
    assert found[0].tokens == tuple(stand.tokenizer.decode([i]) for i in TEXT)
    with pytest.raises(InputError, match="prompt 0 has 17 tokens, which 3 draws do not begin together"):
        engine.generate(["3" * 17])


def test_rows_of_a_prompt_get_the_log_of_their_mean_probabilities(stand):
    processor = import_module("bayeslora.integrations.vllm_averaging").AverageDraws(None, None, False)
    logits, tokens = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), [[] for _ in range(6)]

    def row(place, group):
        extra = None if group is None else {"bayeslora_average": [group, 2]}
        return place, SimpleNamespace(extra_args=extra), None, tokens[place]

    def update(removed=(), added=(), moved=()):
        processor.update_state(SimpleNamespace(removed=removed, added=added, moved=moved))

    def averaged(*places):
        return (logits[list(places)].softmax(-1).mean(0)).log()

    assert not processor.is_argmax_invariant()
    update(added=[row(0, 7), row(1, None), row(2, 8), row(3, 7), row(4, 8)])
    found = processor.apply(logits.clone())
    torch.testing.assert_close(found[0], averaged(0, 3))
    torch.testing.assert_close(found[4], averaged(2, 4))
    assert torch.equal(found[1], logits[1])
    processor.update_state(None)
    update(removed=[0, 3], moved=[(4, 0, Moves.UNIDIRECTIONAL), (2, 1, Moves.SWAP)])
    found = processor.apply(logits.clone())
    torch.testing.assert_close(found[0], averaged(0, 1))
    torch.testing.assert_close(found[1], averaged(0, 1))
    assert torch.equal(found[2:], logits[2:])
    tokens[4].append(5)  # one of the two is a token ahead
    with pytest.raises(RuntimeError, match="prompt 8 are not in step"):
        processor.apply(logits.clone())
    update(removed=[0])
    with pytest.raises(RuntimeError, match="1 of 2 rows are here"):
        processor.apply(logits.clone())


def test_an_engine_that_was_not_loaded_to_average_says_so(folder):
    with pytest.raises(InputError, match="does not average; load it with load_engine"):
        load_engine(folder).generate(["Answer"])


def test_what_cannot_be_loaded_is_said(stand, folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no adapters of draws; write some with bayeslora export"):
        load_engine(tmp_path / "nowhere")
    dora = make_model("llama", use_dora=True)
    export_draws(bl.Point(gaussian(dora).mean, gaussian(dora).origin), tmp_path / "dora", 1)
    with pytest.raises(InputError, match=r"they are DoRA; use bayeslora\.predict"):
        load_engine(tmp_path / "dora")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vLLM's engine needs vllm"):
        load_engine(folder)
