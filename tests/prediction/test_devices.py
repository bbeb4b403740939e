"""A model whose layers lie on two devices answers and learns as on one: no tensor meets one from elsewhere.

The devices are pretended: the tensors are ordinary ones that carry the name of a place, and every torch function that
is given tensors of two places raises, as torch does for two GPUs. As with ``device_map="auto"``, each layer moves its
inputs to where it is. What this proves is that our code between the layers moves what it combines; what is on no named
place (the CPU) is not looked at.
"""

from contextlib import contextmanager

import pytest
import torch
from accelerate.utils import send_to_device
from support.tiny import gaussian, make_model, make_split
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from bayeslora.methods.laplace.ggn import DiagonalCurvature, KroneckerCurvature, accumulated
from bayeslora.methods.regularisers import answer_loss
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import Linearised
from bayeslora.prediction import PassOptions, predict, readout_for
from bayeslora.prediction.jacobians import linear_sites
from bayeslora.prediction.likelihoods import Likelihoods
from bayeslora.prediction.passes import batched
from bayeslora.training.distillation import soft_loss

FIRST, SECOND = "cuda:0", "cuda:1"


def place(value):
    return getattr(value, "_place", "cpu")


def put(value, where):
    value._place = where
    return value


class Elsewhere(TorchFunctionMode):
    """Tensors are where their name says, and do not meet others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is Tensor.device:
            return torch.device(place(args[0]))
        if func is torch.autograd.grad:
            found = func(*args, **kwargs)
            return tuple(put(value, place(asked)) for value, asked in zip(found, args[1], strict=True))
        if func in (Tensor.to, Tensor.cpu):
            return self.moved(func, args, kwargs)
        asked = str(kwargs.pop("device")) if kwargs.get("device") is not None else None
        tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        places = {place(t) for t in tensors} - {"cpu"}
        if len(places) > 1 and func is not Tensor.copy_:
            raise RuntimeError(f"{func} is given tensors on {sorted(places)}")
        where = asked or (place(args[0]) if func is Tensor.copy_ else next(iter(places), "cpu"))
        found = func(*args, **kwargs)
        for value in tree_flatten(found)[0]:
            if isinstance(value, Tensor):
                put(value, where)
        return found

    def moved(self, func, args, kwargs):
        where = "cpu" if func is Tensor.cpu else place(args[0])
        rest = []
        for value in args[1:]:
            if isinstance(value, (str, torch.device)):
                where = str(value)
            elif isinstance(value, Tensor):
                where = place(value)
                rest.append(value.dtype)
            else:
                rest.append(value)
        if kwargs.get("device") is not None:
            where = str(kwargs["device"])
        kept = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        found = args[0].to(*rest, **kept) if rest or kept else args[0]
        return put(found.view_as(found) if found is args[0] else found, where)


def move_inputs(module, where):
    """Do as accelerate's hooks do: what a module is given goes to its place."""
    plain = module.forward

    def forward(*args, **kwargs):
        return plain(*send_to_device(args, where), **send_to_device(kwargs, where))

    module.forward = forward


@contextmanager
def spread(model):
    """Put the second layer, the last norm and the head on the second device, all else on the first."""
    base = model.get_base_model()
    later = (base.model.layers[1], base.model.norm, base.lm_head)
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor, FIRST)
    for module in later:
        move_inputs(module, SECOND)
        for tensor in (*module.parameters(), *module.buffers()):
            put(tensor, SECOND)
    with Elsewhere():
        yield


def both(work):
    """What is found on one device, and on two."""
    plain, apart = make_model().eval(), make_model().eval()
    wanted = work(plain)
    with spread(apart):
        return wanted, work(apart)


@pytest.mark.parametrize("normalisation", ["sum", "tokens", "unconditional"])
@pytest.mark.parametrize(
    "how", [{"token_budget": 300}, {"token_budget": 300, "options": PassOptions(stack=False)}, {"token_budget": 60}]
)
def test_prediction_by_draws_is_that_of_one_device(normalisation, how, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood", normalisation=normalisation)
    wanted, found = both(lambda model: predict(model, gaussian(model), split, 3, tokenizer=tokenizer, **how).log_probs)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_common_beginning_is_kept_where_its_layers_are(tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="letters", before="Question: red holds 1 blue. " * 4)
    wanted, found = both(
        lambda model: predict(model, gaussian(model), split, 3, tokenizer=tokenizer, token_budget=300).log_probs
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_labels_and_counts_meet_the_scores_where_these_are(tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood")

    def losses(model):
        readout = readout_for(model, split, tokenizer)
        apart = place(next(model.parameters())) == FIRST
        batch = {k: v.to(FIRST) if apart else v for k, v in readout.collate(readout.encode(split)[0]).items()}
        labels, count = batch.pop("labels"), torch.tensor(6.0)
        count = put(count, FIRST) if apart else count
        with readout.attached(model):
            logits = model(**batch).logits
        assert place(logits) == (SECOND if apart else "cpu")
        soft = soft_loss(torch.full((6, 4), 0.25).log())
        values = [answer_loss({"logits": logits}, labels, count), soft({"logits": logits}, torch.arange(6), count)]
        sum(values).backward()
        return [*(v.detach().cpu() for v in values), *(p.grad.cpu() for p in lora_parameters(model).values())]

    for one, other in zip(*both(losses), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [DiagonalCurvature, KroneckerCurvature])
def test_curvature_is_summed_where_each_layer_is(kind, tokenizer):
    split = make_split("test", 6, 5, classes=False, readout="likelihood")

    def predicted(model):
        readout = readout_for(model, split, tokenizer)
        sites = linear_sites(model)
        curvature = kind(sites) if kind is DiagonalCurvature else kind(sites, 8)
        with readout.attached(model):
            batches = batched(model, readout, readout.encode(split)[0], 200)
            accumulated(model, curvature, batches, split.labels)
        posterior = Linearised(curvature.posterior(read(model), 10.0, None), None)
        return predict(model, posterior, split, tokenizer=tokenizer, token_budget=200).log_p

    wanted, found = both(predicted)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_texts_are_scored_where_the_head_is(tokenizer):
    split = make_split("test", 1, 5, classes=False, readout="likelihood")
    pairs = [((3, 4, 5), (6, 7)), ((3, 4, 5), (8,)), ((9, 10), (11, 12, 13))]

    def scored(model):
        draws = [gaussian(model).draw(k, 0) for k in range(2)]
        readout = readout_for(model, split, tokenizer)
        return Likelihoods(model, draws, readout, 100).of(pairs, lambda _: None)[0]

    wanted, found = both(scored)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_pretence_refuses_two_places():
    a, b = put(torch.ones(2), FIRST), put(torch.ones(2), SECOND)
    with Elsewhere(), pytest.raises(RuntimeError, match=r"cuda:0.*cuda:1"):
        functional.mse_loss(a, b)
    with Elsewhere():
        assert place(a + b.to(a.device)) == FIRST
        assert str(a.device) == FIRST
