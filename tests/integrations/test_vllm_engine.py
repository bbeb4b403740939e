"""vLLM's engine in this process, with a stand-in for its classes; `tests/live` has the engine itself."""

import sys
from dataclasses import dataclass, replace
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

        def get_tokenizer(self):
            return stand.tokenizer

        def generate(self, prompts, params, *, lora_request, use_tqdm):
            stand.asked.append({"prompts": len(prompts)})
            return [self.answer(*each) for each in zip(prompts, params, lora_request, strict=True)]

        def answer(self, prompt, params, adapter):
            log_p = stand.log_probs(adapter.lora_name[:8], prompt["prompt_token_ids"])[-1]
            shown = {i: SimpleNamespace(logprob=float(log_p[i])) for i in params.logprob_token_ids}
            return SimpleNamespace(outputs=[SimpleNamespace(logprobs=[shown])])

    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, request.LoRARequest = Llm, SimpleNamespace, Request
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
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
    found = load_engine(folder).predict(split)
    wanted = bl.predict(stand.model, stand.posterior, split, 3, tokenizer=stand.tokenizer)
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-4, atol=1e-4)
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
