"""Compiled layers answer and learn as plain ones do."""

import shutil

import jaxtyping
import pytest
import torch
from support.tiny import KINDS, arguments, gaussian, make_model, make_split, make_task, same_state, state_of
from transformers import TrainerCallback

import bayeslora as bl
from bayeslora.errors import InputError
from bayeslora.methods.blob.layer import attach, begin
from bayeslora.prediction import PassOptions, predict
from bayeslora.prediction import compilation as module
from bayeslora.prediction.fused import fused


@pytest.fixture(autouse=True)
def _without_shape_checks():
    """The checks of shapes cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TRACED = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
"""What torch says about its own tracing of autograd functions."""


BROKEN = pytest.mark.skipif(
    torch.__version__ < "2.8", reason="with torch 2.7 a layer that IVON trains is not one graph"
)


@pytest.fixture
def quick(monkeypatch):
    """Trace layers without making machine code of them; the list grows with each graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(module.torch, "compile", lambda call, **_: compile_(call, backend=backend))
    return graphs


@pytest.mark.parametrize(
    "kind", [k if k == "llama-likelihood" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS], indirect=True
)
def test_draws_are_the_same(quick, kind, tokenizer):
    model = kind.build()
    split = kind.task().test
    before = state_of(model)
    plain, layers = (
        predict(model, gaussian(model), split, 3, tokenizer=tokenizer, options=PassOptions(compile=c))
        for c in (False, True)
    )
    assert quick
    assert same_state(model, before)
    close = 1e-5 if kind.dtype == torch.float32 else 0.05
    torch.testing.assert_close(layers.log_probs.exp(), plain.log_probs.exp(), rtol=0, atol=close)


@pytest.mark.slow
def test_training_is_the_same(quick, tokenizer, tmp_path):
    found = []
    for compile_ in (False, True):
        args = arguments(tmp_path / str(compile_), max_steps=6, torch_compile=compile_)
        model = make_model()
        before = [m.__dict__.get("forward") for m in model.modules()]
        found.append(bl.fit(model, make_task(), bl.Map(), args, tokenizer=tokenizer).mean)
        assert [m.__dict__.get("forward") for m in model.modules()] == before
    assert quick
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_what_cannot_be_compiled_is_refused_in_words(monkeypatch, tokenizer):
    def fails(graph, inputs):
        raise RuntimeError("no compiler was found")

    compile_ = torch.compile
    monkeypatch.setattr(module.torch, "compile", lambda call, **_: compile_(call, backend=fails))
    model = make_model()
    before = state_of(model)
    with pytest.raises(InputError, match=r"cannot be compiled here: .*no compiler was found.*leave compilation off"):
        predict(
            model,
            gaussian(model),
            make_split("test", 3, 2, classes=False),
            2,
            tokenizer=tokenizer,
            options=PassOptions(compile=True),
        )
    assert same_state(model, before)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_machine_code_gives_the_same_draws(tokenizer):
    model, split = make_model(), make_split("test", 7, 2, classes=False)
    plain, layers = (
        predict(model, gaussian(model), split, 3, tokenizer=tokenizer, options=PassOptions(compile=c))
        for c in (False, True)
    )
    torch.testing.assert_close(layers.log_probs, plain.log_probs, rtol=1e-4, atol=1e-4)


def layers_input(model):
    """What the first layer of a model is given."""
    body = model.base_model.model.model
    states = body.embed_tokens(torch.arange(3, 27).view(2, 12)).detach().requires_grad_()
    return {"hidden_states": states, "position_embeddings": body.rotary_emb(states, torch.arange(12)[None])}


@pytest.mark.slow
@TRACED
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["q, v", "all linear"])
@pytest.mark.parametrize("method", [bl.Map(), pytest.param(bl.Ivon(), marks=BROKEN), bl.Blob()], ids=lambda m: m.name)
def test_a_layer_is_one_graph_where_a_method_puts_noise(method, targets, tokenizer, tmp_path):
    model, breaks = make_model(target_modules=targets), []

    class Count(TrainerCallback):
        def on_step_end(self, *_, **__):
            torch._dynamo.reset()
            report = torch._dynamo.explain(model.base_model.model.model.layers[0])(**layers_input(model))
            breaks.append((report.graph_count, report.graph_break_count))

    bl.fit(model, make_task(), method, arguments(tmp_path, max_steps=1), tokenizer=tokenizer, callbacks=[Count()])
    assert breaks == [(1, 0)]


@pytest.mark.slow
@TRACED
def test_blobs_noise_has_the_same_gradients_in_one_graph():
    model = make_model(target_modules="all-linear")
    noisy = attach(model)
    begin(noisy, 0.3, 1.0, 0)
    for layer in noisy.values():
        layer.noisy = True
    model.train()
    layer, found = model.base_model.model.model.layers[0], []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with torch.random.fork_rng(), fused(model):
            torch.manual_seed(5)
            call(**layers_input(model)).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) == 3 * 7  # M, G and B of every matrix
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)
