"""Steps that are not finite: the run stops there or leaves them out, and nothing of them is written."""

import math

import pytest
import torch
from support.forked import in_ranks
from support.methods_table import LEARNERS
from support.spoil import Spoil, numbers
from support.tiny import arguments, gaussian, make_model, make_task, same_params
from transformers import Trainer, TrainerCallback

from bayeslora.errors import InputError
from bayeslora.methods import Blob, Ensemble, Ivon, Laplace, Map, Swag
from bayeslora.methods.steps import FiniteSteps
from bayeslora.params import lora_parameters, read
from bayeslora.posteriors import ColumnDropout, DiagonalGaussian, Draws, Point
from bayeslora.posteriors.loading import export_draws
from bayeslora.training.run import fit

TASK = make_task(readout="likelihood")
METHODS = {
    "map": Map(),
    "map-decay": Map(weight_decay=0.1, weight_decay_b=5.0),
    "ensemble": Ensemble(2),
    "together": Ensemble(2, together=True),
    "swag": Swag(start=1, interval=1),
    "blob": Blob(),
    "blob-elbo": Blob("elbo"),
    "ivon": Ivon(),
    "laplace": Laplace(),
}
PARAMETER = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
MATRIX = PARAMETER.replace("lora_B", "lora_A")
ROWS = [{"input_ids": [3, 7, 11, 5 + k, 9], "labels": [3, 7, 11, 5 + k, 9]} for k in range(16)]


def all_finite(tensors):
    return bool(tensors) and all(bool(value.isfinite().all()) for value in tensors.values())


QUICK = ("map", "blob", "ivon")


def methods(*names):
    each = [pytest.param(METHODS[n], id=n, marks=[] if n in QUICK else pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("method", each)


@methods(*METHODS)
def test_a_loss_that_is_nan_stops_before_its_step_and_no_checkpoint_has_it(method, tokenizer, tmp_path):
    model = make_model()
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2, logging_steps=1)
    with pytest.raises(InputError, match=r"^step 5 of 8: the loss is nan, and the gradient"):
        fit(model, TASK, method, args, tokenizer=tokenizer, callbacks=[Spoil([5])])
    written = numbers(tmp_path)
    assert "checkpoint-4" in " ".join(written)
    assert all_finite(written)


@methods("map", "blob", "ivon")
def test_a_gradient_that_is_infinite_is_named_with_its_step(method, tokenizer, tmp_path):
    model = make_model()
    spoil = Spoil([3], "gradient", PARAMETER)
    with pytest.raises(InputError, match=r"^step 3 of 8: the gradient of .*layers.1.self_attn.v_proj.lora_B.* is not"):
        fit(model, TASK, method, arguments(tmp_path), tokenizer=tokenizer, callbacks=[spoil])
    assert all_finite(read(model))


class Look(TrainerCallback):
    """What a step that is left out must not change."""

    def __init__(self, step):
        self.step, self.seen, self.history = step, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.history = state.log_history

    def on_step_end(self, args, state, control, *, model, optimizer, **_):
        if state.global_step in (self.step - 1, self.step):
            moments = {f"{k}/{n}": v for k, s in enumerate(optimizer.state.values()) for n, v in s.items()}
            values = {k: torch.as_tensor(v).clone() for k, v in moments.items()}
            trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            self.seen.append((trained, values))


@methods("map", "map-decay", "together", "swag", "blob", "blob-elbo", "ivon")
def test_a_step_that_is_left_out_changes_nothing_and_the_run_goes_on(method, tokenizer, tmp_path):
    model, look = make_model(), Look(4)
    what = "gradient" if isinstance(method, Blob | Ivon) else "loss"
    callbacks = [Spoil([4], what, PARAMETER), look, FiniteSteps("skip")]
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    posterior = fit(model, TASK, method, args, tokenizer=tokenizer, callbacks=callbacks)
    (before, moments), (after, later) = look.seen
    assert same_params(before, after)
    assert same_params(moments, later)
    assert all_finite(read(model))
    assert all_finite(posterior.draw(0))
    assert not same_params(read(model), {n: p for n, p in before.items() if n in read(model)})
    assert {"step": 4, "skipped_steps": 1} in look.history
    losses = {entry["step"]: entry["loss"] for entry in look.history if "loss" in entry}
    assert math.isnan(losses.pop(4))
    assert all(math.isfinite(loss) for loss in losses.values())


def test_swag_collects_nothing_at_a_step_that_is_left_out(tokenizer, tmp_path):
    def fitted(*callbacks):
        args = arguments(tmp_path)
        return fit(
            make_model(), TASK, Swag(rank=9, start=1, interval=1), args, tokenizer=tokenizer, callbacks=callbacks
        )

    assert fitted(Spoil([4]), FiniteSteps("skip")).rank == fitted().rank - 1


def test_a_step_that_is_left_out_does_not_use_up_blobs_weight_of_the_divergence(tokenizer, tmp_path):
    def weights(folder, *callbacks):
        model, seen = make_model(), []

        class Weigh(TrainerCallback):
            def on_log(self, *_, logs, **__):
                seen.append(logs.get("blob_kl_weight"))

        args = arguments(tmp_path / folder, logging_strategy="steps", logging_steps=1)
        fit(model, TASK, Blob(kl_cycle=4), args, tokenizer=tokenizer, callbacks=[*callbacks, Weigh()])
        return [weight for weight in seen if weight is not None]

    plain, skipping = weights("plain"), weights("skipping", Spoil([3]), FiniteSteps("skip"))
    assert skipping == [*plain[:2], *plain[1:-1]]


@pytest.mark.parametrize(
    ("spoiled", "settings", "said"),
    [
        (range(3, 9), {"max_in_a_row": 2, "max_share": 1.0}, "step 5 of 8: .* 3 such steps in a row and 3 in all"),
        ((1, 3, 5), {"max_in_a_row": 1, "max_share": 0.25}, "step 5 of 8: .* 1 such steps in a row and 3 in all"),
    ],
)
def test_leaving_out_has_a_bound(spoiled, settings, said, tokenizer, tmp_path):
    callbacks = [Spoil(spoiled), FiniteSteps("skip", **settings)]
    with pytest.raises(InputError, match=said):
        fit(make_model(), TASK, Map(), arguments(tmp_path), tokenizer=tokenizer, callbacks=callbacks)


def test_a_resumed_run_goes_on_counting(tokenizer, tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1)
    steps = {"max_in_a_row": 2, "max_share": 0.0}
    with pytest.raises(InputError, match="step 5"):
        fit(
            make_model(), TASK, Map(), args, tokenizer=tokenizer,
            callbacks=[Spoil([2, 4]), Spoil([5], "gradient", PARAMETER), FiniteSteps("skip", **steps)],
        )  # fmt: skip
    guard = FiniteSteps("skip", **steps)
    fit(make_model(), TASK, Map(), args, tokenizer=tokenizer, resume=True, callbacks=[guard])
    assert guard.skipped == 2


@pytest.mark.parametrize("settings", [("never",), ("skip", 0), ("skip", 5, 1.5)])
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(InputError, match="must be"):
        FiniteSteps(*settings)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"])
def test_the_stock_trainer_stops_at_the_loss_that_the_model_computes(compiled, tmp_path):
    model, method = make_model(), Map()
    kwargs = method.trainer_kwargs(model, len(ROWS))
    args = arguments(tmp_path, torch_compile=compiled, torch_compile_backend="eager" if compiled else None)
    trainer = Trainer(model, args, train_dataset=ROWS, **kwargs)
    trainer.add_callback(Spoil([5]))
    with pytest.raises(InputError, match=r"^step 5 of 8: the loss is nan"):
        trainer.train()
    assert all_finite(read(model))


def test_a_loss_that_is_nan_beside_a_finite_gradient_is_not_logged_as_zero(tmp_path):
    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * math.nan

    model = make_model()
    args = arguments(tmp_path, logging_strategy="steps", logging_steps=2)
    trainer = Own(model, args, train_dataset=ROWS, **Map().trainer_kwargs(model, len(ROWS)))
    with pytest.raises(InputError, match="the loss logged at step 2 is nan"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_no_checkpoint_has_a_parameter_that_is_not_finite(strategy, tmp_path):
    model = make_model()
    args = arguments(
        tmp_path, save_strategy=strategy, save_steps=2, eval_strategy=strategy if strategy != "best" else "steps",
        eval_steps=2, metric_for_best_model="eval_runtime",
    )  # fmt: skip
    kwargs = Map().trainer_kwargs(model, len(ROWS))
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], **kwargs)
    trainer.add_callback(Spoil([4], "parameter", PARAMETER))
    with pytest.raises(InputError, match=r"^no checkpoint of step 4 is written: .*v_proj.lora_B"):
        trainer.train()
    written = numbers(tmp_path)
    assert all_finite(written) or not written


def test_a_checkpoint_that_another_callback_asks_for_is_looked_at_too(tokenizer, tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = True

    callbacks = [Spoil([3], "parameter", PARAMETER), Save()]
    with pytest.raises(InputError, match=r"^no checkpoint of step 3 is written: .*v_proj.lora_B"):
        fit(make_model(), TASK, Map(), arguments(tmp_path), tokenizer=tokenizer, callbacks=callbacks)
    assert all_finite(numbers(tmp_path))


@methods("map", "swag", "blob", "ivon")
def test_no_posterior_is_made_of_an_adapter_that_is_not_finite(method, tokenizer, tmp_path):
    spoil = Spoil([8], "parameter", PARAMETER)
    with pytest.raises(InputError, match=r"^the trained adapter makes no posterior: .*v_proj.lora_B"):
        fit(make_model(), TASK, method, arguments(tmp_path), tokenizer=tokenizer, callbacks=[spoil])


def test_no_posterior_and_no_draw_is_written_that_is_not_finite(tmp_path):
    origin, mean = gaussian(make_model()).origin, read(make_model())
    bad = mean | {PARAMETER: mean[PARAMETER] * math.nan}
    with pytest.raises(InputError, match=r"^the adapter cannot be written: .*v_proj.lora_B.weight has numbers"):
        Point(bad, origin).save_pretrained(tmp_path / "point")
    wide = {PARAMETER: torch.full_like(mean[PARAMETER], 3e38)}  # σ = 1.7e19: a draw's square is not finite, a draw is
    huge = ColumnDropout(mean | {MATRIX: torch.full_like(mean[MATRIX], 3e38)}, 0.5, {MATRIX: 1.0}, origin)
    DiagonalGaussian(mean, wide, origin).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"^the adapter cannot be written"):
        export_draws(huge, tmp_path / "draws", Draws(40))
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


def test_an_evaluation_that_is_nan_is_never_the_best(tokenizer, tmp_path):
    class Blind(TrainerCallback):
        """Evaluations see NaN from the second on."""

        def on_train_begin(self, args, state, control, *, model, **_):
            def spoil(module, inputs, outputs):
                if not module.training and state.global_step > 2:
                    outputs["logits"] = outputs["logits"] * math.nan
                return outputs

            model.register_forward_hook(spoil)

    class Kept(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **_):
            if state.global_step == 2:
                self.params = read(model)

        def on_train_end(self, args, state, control, **_):
            self.best, self.steps = state.best_global_step, state.global_step

    model, kept = make_model(), Kept()
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    posterior = fit(
        model, TASK, Map(early_stopping=2), args, tokenizer=tokenizer, callbacks=[Blind(), kept]
    )  # fmt: skip
    assert (kept.best, kept.steps) == (2, 6)
    assert same_params(posterior.mean, kept.params)


def test_every_method_that_learns_looks_at_its_steps():
    for row in LEARNERS:
        if not getattr(row.method, "together", False):
            first = row.method.trainer_kwargs(make_model(), 24)["callbacks"][0]
            assert isinstance(first, FiniteSteps), row.name


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_all_processes_stop_or_leave_out_where_one_has_a_loss_that_is_nan(what, tmp_path):
    guard = FiniteSteps(what)

    class OneOfTwo(Trainer):
        def compute_loss(self, model, inputs, **named):
            loss = super().compute_loss(model, inputs, **named)
            spoiled = self.state.global_step == 2 and self.args.process_index == 1
            return loss + (math.nan if spoiled else 0.0)  # the gradient stays finite

        def training_step(self, *args, **named):
            loss = super().training_step(*args, **named)
            guard.note(loss)
            return loss

    def train():
        model = make_model()
        args = arguments(tmp_path / "run", max_steps=4, ddp_find_unused_parameters=False)
        callbacks = [*Map().trainer_kwargs(model, len(ROWS))["callbacks"][1:], guard]
        try:
            OneOfTwo(model, args, train_dataset=ROWS, callbacks=callbacks).train()
        except InputError as error:
            print(error)
        print("skipped", guard.skipped)

    for status, said in in_ranks(train):
        assert status == 0, said
        assert "step 3 of 4: the loss is nan" in said, said
        assert f"skipped {int(what == 'skip')}" in said, said


def test_lora_parameters_have_the_name_that_is_spoiled():
    assert PARAMETER in lora_parameters(make_model())
