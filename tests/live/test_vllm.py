"""vLLM itself: draws that it serves, and that its engine holds in this process, answer as they do here.

The model is tiny, its adapters change the head too, and it is loaded in float32, where rounding hides nothing.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import VOCABULARY, make_split, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.integrations.openai.serving import vllm_command
from bayeslora.params import read
from bayeslora.posteriors import DiagonalGaussian, Draws
from bayeslora.posteriors.loading import export_draws
from bayeslora.posteriors.provenance import origin_of
from bayeslora.tasks.types import Format

pytest.importorskip("vllm")
from bayeslora.integrations.openai.client import Adapters, Reference
from bayeslora.integrations.vllm_engine import load_engine

# what vLLM calls is its own affair
pytestmark = [
    pytest.mark.live, pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # fmt: skip
CLOSE = {"rtol": 0.0, "atol": 2e-3}
SMALL = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
DRAWS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model whose heads have a size that vLLM's kernels know."""
    folder = tmp_path_factory.mktemp("vllm") / "base"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=2,
            tie_word_embeddings=False, initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "lm_head"])
    config.rank_pattern = {"v_proj": 2}  # which vLLM takes as PEFT does
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    model.get_base_model().generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def posterior(model):
    mean = read(model)
    return DiagonalGaussian(mean, {n: torch.full_like(m, 0.01) for n, m in mean.items()}, origin_of(model, "test"))


@pytest.fixture(scope="module")
def folders(posterior, tmp_path_factory):
    return export_draws(posterior, tmp_path_factory.mktemp("vllm") / "adapters", DRAWS)


@pytest.fixture(scope="module")
def address(posterior, folders):
    """vLLM, started by the line that `export` prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = vllm_command(posterior.origin, {path.name: path for path in folders}).split()
    words[0] = os.path.join(os.path.dirname(sys.executable), "vllm")
    more = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    more.append("--enforce-eager")
    process = subprocess.Popen([*words[:3], *more, *words[3:]], env=os.environ | SMALL, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, "vLLM has ended"
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield url
        assert httpx.get(f"{url}/health").status_code == 200, "vLLM's engine has ended"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture
def server(address):
    return Adapters(address, check=False)


def split_of(readout, rows=6, **form):
    return make_split("test", rows, 2, classes=False, readout=readout, **form)


def here(model, posterior, split):
    return bl.predict(model, posterior, split, DRAWS, tokenizer=make_tokenizer())


@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_predictions_are_those_here(server, model, posterior, readout):
    found, wanted = server.predict(split_of(readout)), here(model, posterior, split_of(readout))
    torch.testing.assert_close(found.log_probs, wanted.log_probs, **CLOSE)
    assert float(wanted.log_probs.nan_to_num(neginf=0.0).std(0).max()) > 0.05  # the draws do differ


def test_normalised_scores_are_those_here(server, model, posterior):
    for normalisation in ("tokens", "unconditional"):
        split = replace(split_of("likelihood", 3), format=Format("", "likelihood", normalisation=normalisation))
        torch.testing.assert_close(server.predict(split).log_probs, here(model, posterior, split).log_probs, **CLOSE)


def test_echo_one_text_after_another_gives_the_same(server):
    split = split_of("likelihood", 2)
    echoed = replace(server, echo=True).predict(split)
    torch.testing.assert_close(echoed.log_probs, server.predict(split).log_probs, **CLOSE)


def test_the_server_is_verified_and_one_of_other_draws_is_not(server, model, posterior):
    for found in server.verify(model, posterior, rows=3):
        assert not found.differing
        assert len(found.names) == DRAWS + 1
    wrong = Reference(model, posterior, Draws(seed=5))
    with pytest.raises(InputError, match="differ from their draws by more than rounding"):
        replace(server, reference=wrong, check=True).predict(split_of("letters", 8))


def test_one_answer_a_draw_is_what_the_draws_generate_here(server, model, posterior):
    prompts = ["Question: bag holds 3 red, 5 blue", "Answer"]
    wanted = bl.generate_each(model, posterior, prompts, DRAWS, tokenizer=make_tokenizer(), max_new_tokens=6)
    found = server.generate_each(prompts, max_tokens=6, temperature=0, ignore_eos=True, return_token_ids=True)
    for mine, theirs in zip(found, wanted, strict=True):
        assert [a.token_ids for a in mine.answers] == [a.token_ids for a in theirs.answers]
        assert mine.predictive_entropy == pytest.approx(theirs.predictive_entropy, abs=1e-2)


@pytest.fixture(scope="module")
def engine(folders):
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_batched_tokens": 256}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setenv(name, value)
        yield load_engine(folders[0].parent, average=True, settings=settings)


@pytest.mark.parametrize("readout", ["letters", "likelihood"])
def test_the_engine_in_this_process_gives_the_same(engine, model, posterior, readout):
    found = engine.predict(split_of(readout))
    torch.testing.assert_close(found.log_probs, here(model, posterior, split_of(readout)).log_probs, **CLOSE)


PROMPTS = [example.text for example in split_of("letters", 12)]


def test_the_engine_averages_the_draws_at_each_token(engine, model, posterior):
    wanted = bl.generate(model, posterior, PROMPTS, DRAWS, tokenizer=make_tokenizer(), max_new_tokens=8)
    found = engine.generate(PROMPTS, max_tokens=8, temperature=0, settings={"ignore_eos": True})
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.draw_log_probs, theirs.draw_log_probs, **CLOSE)
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, **CLOSE)


def test_sampled_texts_are_those_of_the_average_and_of_their_seed(engine):
    one, other = (
        engine.generate(PROMPTS * 3, max_tokens=8, seed=seed, settings={"ignore_eos": True}) for seed in (0, 1)
    )
    again = engine.generate(PROMPTS * 3, max_tokens=8, settings={"ignore_eos": True})
    assert [a.token_ids for a in one] == [a.token_ids for a in again]
    assert sum(a.token_ids != b.token_ids for a, b in zip(one, other, strict=True)) > 20
    assert len({a.token_ids for a in one[:: len(PROMPTS)]}) > 1  # the same prompt with other seeds


def test_a_prompt_that_does_not_begin_in_one_step_is_refused(engine):
    with pytest.raises(InputError, match=r"prompt 0 has 1.. tokens, which 3 draws do not begin together"):
        engine.generate(["3" * 100], max_tokens=1)
