"""The value object `Prediction`: what it derives, what it refuses, and its file."""

import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bayeslora.errors import InputError
from bayeslora.metrics import uncertainty
from bayeslora.metrics.prediction import Prediction


def random_prediction(draws=4, rows=6, choices=3, **fields):
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(draws, rows, choices, generator=generator).log_softmax(-1)
    log_probs[:, 2, :-1] = log_probs[:, 2, :-1].log_softmax(-1)
    log_probs[:, 2, -1] = -math.inf  # row 2 lacks the last choice
    return Prediction(log_probs, **fields)


def complete_prediction():
    plain = random_prediction()
    return Prediction(
        plain.log_probs,
        mean_log_probs=plain.log_probs[0],
        components=(0, 0, 1, 1),
        truncated=2,
        readout="letters",
        seconds=1.25,
        base_log_probs=plain.log_probs[1],
    )


def assert_same(first, second):
    for field in dataclasses.fields(Prediction):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_the_probabilities_are_the_average_of_the_draws_and_sum_to_one():
    prediction = random_prediction()
    torch.testing.assert_close(prediction.probs, prediction.log_probs.exp().mean(0))
    torch.testing.assert_close(prediction.log_p.exp(), prediction.probs)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(6))


def test_the_answer_has_the_confidence():
    prediction = random_prediction()
    at_the_answer = prediction.probs.gather(-1, prediction.answer[:, None]).squeeze(-1)
    assert torch.equal(prediction.confidence, at_the_answer)
    assert torch.equal(prediction.confidence, prediction.probs.max(-1).values)


def test_the_uncertainties_are_those_of_the_pure_functions():
    prediction = random_prediction()
    draws = prediction.log_probs
    torch.testing.assert_close(prediction.entropy, uncertainty.entropy(uncertainty.average(draws)))
    assert torch.equal(prediction.expected_entropy, uncertainty.expected_entropy(draws))
    assert torch.equal(prediction.mutual_information, uncertainty.mutual_information(draws))
    assert torch.equal(prediction.disagreement, uncertainty.disagreement(draws))


def test_entropy_is_expected_entropy_plus_mutual_information():
    prediction = random_prediction()
    torch.testing.assert_close(prediction.entropy, prediction.expected_entropy + prediction.mutual_information)


def test_without_members_all_information_is_within():
    prediction = random_prediction()
    assert torch.equal(prediction.between, torch.zeros(6))
    assert torch.equal(prediction.within, prediction.mutual_information)


def test_with_members_information_is_split_into_between_and_within():
    prediction = random_prediction(components=(0, 1, 0, 1))
    between, within = uncertainty.between_within(prediction.log_probs, (0, 1, 0, 1))
    assert torch.equal(prediction.between, between)
    assert torch.equal(prediction.within, within)


def test_draws_is_the_length_of_the_leading_axis():
    assert random_prediction(draws=4).draws == 4


def test_a_prediction_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_prediction().truncated = 3


@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_a_shape_other_than_draws_examples_choices_is_refused(shape):
    with pytest.raises(InputError, match="draws, examples, choices"):
        Prediction(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_type_other_than_float32_is_refused(dtype):
    log_probs = random_prediction().log_probs
    with pytest.raises(InputError, match=r"log_probs has type .* give float32"):
        Prediction(log_probs.to(dtype))
    with pytest.raises(InputError, match=r"mean_log_probs has type .* give float32"):
        Prediction(log_probs, mean_log_probs=log_probs[0].to(dtype))


def test_the_first_row_that_is_nan_is_named():
    log_probs = random_prediction().log_probs.clone()
    log_probs[0, 5, 1] = math.nan
    log_probs[3, 1, 0] = math.nan
    with pytest.raises(InputError, match="log_probs: row 1 of draw 3 is NaN"):
        Prediction(log_probs)


def test_a_nan_at_the_posterior_mean_is_named():
    log_probs = random_prediction().log_probs
    mean = log_probs[0].clone()
    mean[4] = math.nan
    with pytest.raises(InputError, match="mean_log_probs: row 4 is NaN"):
        Prediction(log_probs, mean_log_probs=mean)


@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0], [-math.inf] * 3, [math.inf, 0.0, 0.0]])
def test_a_row_that_is_no_distribution_is_refused(row):
    log_probs = random_prediction().log_probs.clone()
    log_probs[0, 3] = torch.tensor(row)
    with pytest.raises(InputError, match="row 3 of draw 0 does not sum to 1"):
        Prediction(log_probs)


def test_draws_that_were_not_taken_count_nowhere_and_survive_the_file(tmp_path):
    full = random_prediction().log_probs
    cut = full.clone()
    cut[2:, 3] = -math.inf
    error = torch.rand(full.shape[1])
    prediction, alone = Prediction(cut, monte_carlo_error=error), Prediction(full[:2])
    assert prediction.draws_taken.tolist() == [2 if n == 3 else len(full) for n in range(full.shape[1])]
    for name in ("probs", "entropy", "expected_entropy", "mutual_information", "disagreement"):
        torch.testing.assert_close(getattr(prediction, name)[3], getattr(alone, name)[3])
    prediction.save(tmp_path / "p.safetensors")
    loaded = Prediction.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.log_probs, cut)
    assert torch.equal(loaded.monte_carlo_error, error)


def test_an_error_that_is_none_is_refused():
    log_probs = random_prediction().log_probs
    for error in (torch.zeros(2), torch.full((log_probs.shape[1],), math.nan), -torch.ones(log_probs.shape[1])):
        with pytest.raises(InputError, match="monte_carlo_error is not one number"):
            Prediction(log_probs, monte_carlo_error=error)


def test_fields_that_do_not_fit_the_draws_are_refused():
    log_probs = random_prediction().log_probs
    with pytest.raises(InputError, match="mean_log_probs has shape"):
        Prediction(log_probs, mean_log_probs=log_probs[0, :-1])
    with pytest.raises(InputError, match="3 entries for 4 draws"):
        Prediction(log_probs, components=(0, 0, 1))
    with pytest.raises(InputError, match="truncated is -1"):
        Prediction(log_probs, truncated=-1)


@pytest.mark.parametrize("prediction", [random_prediction(), complete_prediction()], ids=["plain", "complete"])
def test_what_is_saved_is_loaded_bit_by_bit(prediction, tmp_path):
    prediction.save(tmp_path / "p.safetensors")
    assert_same(Prediction.load(tmp_path / "p.safetensors"), prediction)


def test_a_view_of_other_memory_is_saved_as_it_looks(tmp_path):
    whole = random_prediction(draws=4)
    prediction = Prediction(whole.log_probs[::2], mean_log_probs=whole.log_probs[1])
    prediction.save(tmp_path / "p.safetensors")
    assert_same(Prediction.load(str(tmp_path / "p.safetensors")), prediction)


def test_saving_makes_the_folder_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "p.safetensors"
    random_prediction().save(path)
    complete_prediction().save(path)
    assert_same(Prediction.load(path), complete_prediction())
    assert [file.name for file in path.parent.iterdir()] == ["p.safetensors"]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    random_prediction().save(path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        complete_prediction().save(path)
    assert_same(Prediction.load(path), random_prediction())
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


def test_saving_to_a_folder_is_refused_in_words(tmp_path):
    with pytest.raises(InputError, match="cannot write the prediction"):
        random_prediction().save(tmp_path)


def test_a_missing_file_is_refused_in_words(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        Prediction.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 20, 0.5, -1])
def test_a_truncated_file_is_refused_in_words(kept, tmp_path):
    path = tmp_path / "p.safetensors"
    complete_prediction().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"truncated or no \.safetensors file"):
        Prediction.load(path)


def test_a_safetensors_file_of_something_else_is_refused_in_words(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file({"log_probs": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(InputError, match="no prediction"):
        Prediction.load(path)


def metadata(**changes):
    return json.dumps({"version": 1, "components": None, "truncated": 0, "readout": "", "seconds": None} | changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "damaged metadata"),
        ("[]", "damaged metadata"),
        (json.dumps({"version": 1}), "damaged metadata"),
        (metadata(components=3), "damaged metadata"),
        (metadata(truncated="many"), "damaged metadata"),
        (metadata(version=2), "version 2"),
        (metadata(components=[0]), "1 entries for 4"),
    ],
)
def test_damaged_metadata_are_refused_in_words_that_name_the_file(fields, message, tmp_path):
    path = tmp_path / "p.safetensors"
    save_file({"log_probs": random_prediction().log_probs}, path, metadata={"bayeslora.prediction": fields})
    with pytest.raises(InputError, match=message) as raised:
        Prediction.load(path)
    assert str(path) in str(raised.value)


def test_tensors_that_are_not_those_of_a_prediction_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    save_file({"logits": torch.zeros(1, 2, 3)}, path, metadata={"bayeslora.prediction": metadata()})
    with pytest.raises(InputError, match=r"holds the tensors \['logits'\]"):
        Prediction.load(path)


def test_drift_is_the_divergence_from_the_base_and_the_ratio_is_that_of_the_answer():
    log_p = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.4, 0.0]]).log()
    base = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]).log()
    prediction = Prediction(log_p[None], base_log_probs=base)
    by_hand = [0.5 * math.log(2) - 0.25 * math.log(2), 0.6 * math.log(1.2) + 0.4 * math.log(0.8)]
    torch.testing.assert_close(prediction.drift, torch.tensor(by_hand))
    torch.testing.assert_close(prediction.likelihood_ratio, torch.tensor([math.log(2), math.log(1.2)]))


def test_drift_is_that_of_the_average_and_not_of_the_draws():
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log()
    base = torch.tensor([[0.5, 0.5]]).log()
    torch.testing.assert_close(Prediction(log_probs, base_log_probs=base).drift, torch.zeros(1), rtol=0, atol=1e-6)


def test_without_the_bases_answers_there_is_neither():
    for name in ("drift", "likelihood_ratio"):
        with pytest.raises(InputError, match="predict with base=True"):
            getattr(random_prediction(), name)


def test_a_base_of_other_rows_or_choices_is_refused():
    log_probs = random_prediction().log_probs
    base = log_probs[1].clone()
    with pytest.raises(InputError, match=r"base_log_probs has shape \[5, 3\]"):
        Prediction(log_probs, base_log_probs=base[:5])
    with pytest.raises(InputError, match=r"base_log_probs has type .* give float32"):
        Prediction(log_probs, base_log_probs=base.double())
    with pytest.raises(InputError, match="base_log_probs: row 3 does not sum to 1"):
        Prediction(log_probs, base_log_probs=base - torch.tensor([0, 0, 0, 1.0, 0, 0])[:, None])
    base[4] = torch.tensor([0.5, 0.5, 0.0]).log()
    with pytest.raises(InputError, match="base_log_probs: row 4 lacks a choice that the draws have"):
        Prediction(log_probs, base_log_probs=base)


def test_a_file_without_the_base_is_as_before_and_one_with_it_has_it(tmp_path):
    plain = random_prediction()
    plain.save(tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"log_probs"}
    assert Prediction.load(tmp_path / "plain.safetensors").base_log_probs is None
    dataclasses.replace(plain, base_log_probs=plain.log_probs[2]).save(tmp_path / "base.safetensors")
    assert torch.equal(Prediction.load(tmp_path / "base.safetensors").base_log_probs, plain.log_probs[2])
