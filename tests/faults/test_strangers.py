"""Posterior folders from strangers: one sentence, or a valid posterior; what the earlier format held still loads."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families import FAMILIES, mean
from support.folders import ADAPTER_CONFIG, CONFIG, change, first_format, seal
from support.tiny import make_model, same_params

from bayeslora.errors import InputError
from bayeslora.models import adapter_of
from bayeslora.params import read
from bayeslora.posteriors import Mixture, Point
from bayeslora.posteriors.folder import read_tensors
from bayeslora.posteriors.loading import load_adapter, load_posterior
from bayeslora.posteriors.provenance import Origin, origin_of

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


def test_folders_of_the_first_format_give_the_same_draws(saved):
    posterior = load_posterior(saved)
    first_format(saved)
    loaded = load_posterior(saved)
    assert all(same_params(loaded.draw(k), posterior.draw(k)) for k in range(4))


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
