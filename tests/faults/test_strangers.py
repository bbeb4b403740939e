"""Posterior folders from strangers: one sentence, or a valid posterior; what the earlier format held still loads."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families import FAMILIES, mean, vector
from support.folders import ADAPTER_CONFIG, CONFIG, change, first_format, seal, second_format
from support.tiny import make_model, same_params

from bayeslora.errors import InputError
from bayeslora.models import adapter_of
from bayeslora.params import read
from bayeslora.posteriors import Mixture, Point
from bayeslora.posteriors.folder import read_tensors
from bayeslora.posteriors.loading import load_adapter, load_posterior
from bayeslora.posteriors.provenance import Origin, origin_of
from bayeslora.posteriors.transforms import tempered

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "soak"))
import folders

ORIGIN = Origin({"peft_type": "LORA", "r": 2}, "base", {"names": "x", "sketch": []})


@pytest.fixture
def saved(tmp_path):
    """A mixture on disk."""
    Mixture(
        tuple(replace(FAMILIES[name](), origin=ORIGIN) for name in ("diagonal", "low-rank")), ORIGIN
    ).save_pretrained(tmp_path / "p")
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("inputs", "seed"), [(250, 3), pytest.param(2000, 4, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_every_mutated_folder_is_one_sentence_or_a_valid_posterior(inputs, seed):
    results = folders.survey(inputs, seed)
    assert len(results) == inputs
    assert [each for each in results if folders.bad(each[3])] == []


# draw 7 of stream 5, as the last version that wrote format version 2 made it: three numbers of its first parameter
FORMER = {
    ("diagonal", "independent"): [1.811436, 0.067840, -1.245104],
    ("diagonal", "antithetic"): [2.776358, 0.538456, -2.727177],
    ("diagonal", "simplex"): [0.301355, -0.012636, -1.749941],
    ("diagonal", "sobol"): [0.931579, 2.481659, -2.743520],
    ("low-rank", "independent"): [2.155154, -1.554968, -0.412826],
    ("low-rank", "antithetic"): [2.334252, -1.646600, -1.817927],
    ("low-rank", "simplex"): [0.946831, -0.131177, -1.327288],
    ("low-rank", "sobol"): [1.327380, 1.816705, -2.311972],
    ("kronecker", "independent"): [1.830089, 0.121385, 0.076806],
    ("kronecker", "antithetic"): [3.624837, 0.616813, -3.699114],
    ("kronecker", "simplex"): [-0.562300, 0.020234, -0.996626],
    ("kronecker", "sobol"): [0.662523, 2.749604, -3.473385],
    ("dropout", "independent"): [2.054662, -0.391239, -2.905053],
    ("dropout", "simplex"): [2.054662, -0.391239, -2.905053],
    ("dropout", "sobol"): [0.000000, -0.391239, -0.000000],
}


@pytest.mark.parametrize("earlier", [first_format, second_format])
@pytest.mark.parametrize(("family", "sampling"), FORMER)
def test_folders_of_earlier_formats_keep_their_draws(family, sampling, earlier, tmp_path):
    replace(FAMILIES[family](), origin=ORIGIN).save_pretrained(tmp_path / "p")
    earlier(tmp_path / "p")
    former = load_posterior(tmp_path / "p")
    former.save_pretrained(tmp_path / "again")  # as a folder of today's format
    for posterior in (former, load_posterior(tmp_path / "again"), tempered(former, 1.0)):
        found = vector(posterior.draw(7, 5, sampling))[:3]
        torch.testing.assert_close(found, torch.tensor(FORMER[family, sampling]).double(), rtol=0, atol=2e-6)


def test_a_mixture_of_folders_of_two_formats_has_the_draws_of_both(saved):
    today = load_posterior(saved)
    second_format(saved / "member-1")
    seal(saved)
    loaded = load_posterior(saved)
    for k in range(4):
        assert same_params(loaded.draw(k), today.draw(k)) == (k % 2 == 0)


@pytest.mark.parametrize("file", [CONFIG, ADAPTER_CONFIG, f"member-1/{CONFIG}", f"member-0/{ADAPTER_CONFIG}"])
def test_a_configuration_that_was_changed_is_refused(saved, file):
    change(saved / file, settings={"scale": 2}, lora_alpha=64)
    with pytest.raises(InputError, match="damaged or was changed"):
        load_posterior(saved)


def test_a_name_among_the_checksums_that_is_no_part_is_not_opened(saved):
    first_format(saved)
    for name in ("/dev/zero", "../p/adapter_model.safetensors"):
        change(saved / CONFIG, sha256={name: "0" * 64})
        with pytest.raises(InputError, match="no part of a posterior"):
            load_posterior(saved)


def test_a_pipe_in_a_files_place_is_refused(saved):
    (saved / ADAPTER_CONFIG).unlink()
    os.mkfifo(saved / ADAPTER_CONFIG)
    with pytest.raises(InputError, match="adapter_config"):
        load_posterior(saved)


def test_links_lead_into_the_cache_of_the_hub_and_nowhere_else(saved, tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in saved.rglob("*") if p.is_file())):
        link = cache / "snapshots" / "abc" / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert same_params(load_posterior(cache / "snapshots" / "abc").draw(3), load_posterior(saved).draw(3))
    (saved / ADAPTER_CONFIG).rename(tmp_path / "outside.json")
    (saved / ADAPTER_CONFIG).symlink_to(tmp_path / "outside.json")
    with pytest.raises(InputError, match="outside the folder"):
        load_posterior(saved)


def test_the_plain_adapter_of_a_mixture_is_its_first_members_mean(saved):
    other = saved / "member-0" / "adapter_model.safetensors"
    Point({name: value + 1 for name, value in mean().items()}, ORIGIN).save_pretrained(saved.parent / "q")
    other.write_bytes((saved.parent / "q" / other.name).read_bytes())
    seal(saved)
    with pytest.raises(InputError, match="plain adapter is not the mean"):
        load_posterior(saved)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 1_000_000},
        {"r": -1},
        {"modules_to_save": ["(a+)+$"]},
        {"rank_pattern": {"(.*)*x": 2}},
        {"alpha_pattern": {"(a|a)*b": 2}},
        {"layers_pattern": "(a+)+"},
        {"megatron_config": {"a": 1}},
        {"lora_alpha": float("nan")},
        {"init_lora_weights": "pissa_niter_1000000000"},
    ],
    ids=str,
)
def test_an_adapter_that_would_take_for_ever_to_build_is_refused(tmp_path, values):
    Point(mean(), ORIGIN).save_pretrained(tmp_path / "p")
    (tmp_path / "p" / CONFIG).unlink()
    change(tmp_path / "p" / ADAPTER_CONFIG, **values)
    with pytest.raises(InputError, match=ADAPTER_CONFIG):
        load_adapter(tmp_path / "p")


def test_layers_are_named_by_the_tensors_and_not_by_a_regular_expression():
    model = make_model(target_modules=r".*\.(q|v)_proj")
    config = adapter_of(origin_of(model).adapter_config, read(model))
    assert config.target_modules == {f"model.layers.{k}.self_attn.{n}_proj" for k in (0, 1) for n in "qv"}
    assert read(make_model(**{"target_modules": sorted(config.target_modules)})).keys() == read(model).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_plain_adapter_of_any_floats_becomes_float32(tmp_path, dtype):
    Point({name: value.to(dtype) for name, value in mean().items()}, ORIGIN).save_pretrained(tmp_path / "p")
    (tmp_path / "p" / CONFIG).unlink()
    loaded = load_adapter(tmp_path / "p")
    assert same_params(loaded.mean, {name: value.to(dtype).float() for name, value in mean().items()})


def test_a_tensor_of_more_dimensions_than_torch_has_is_refused(tmp_path):
    save_file({"base_model.model.x.lora_A.weight": torch.ones([1] * 70)}, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="no tensor of floats"):
        read_tensors(tmp_path / "t.safetensors")
