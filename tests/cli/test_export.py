"""``export``: names of the adapters, and the line that serves them."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import gaussian, make_model

from bayeslora.integrations.openai.serving import changes_head, served_name, vllm_command
from bayeslora.posteriors import Draws
from bayeslora.posteriors.loading import export_draws, load_posterior

FOLDERS = {"draw-000": Path("/x/draw-000"), "draw-001": Path("/x y/draw-001")}


def origin_with(**config):
    origin = gaussian(make_model()).origin
    assert origin is not None
    return replace(origin, base_model="org/base", adapter_config={**origin.adapter_config, **config})


def test_after_the_folders_comes_the_line_that_serves_them(bay, swag_run, home, tmp_path):
    said = bay("export", swag_run, "--draws", "2", "--name", "birds", "--out", tmp_path / "a b")
    assert said.status == 0, said.err
    folders = said.out.splitlines()
    assert [Path(folder).name for folder in folders] == ["birds-000", "birds-001"]
    words = shlex.split(said.err)
    assert words[:4] == ["vllm", "serve", str(home.path / "llama"), "--enable-lora"]
    assert words[4:8] == ["--max-loras", "3", "--max-lora-rank", "8"]
    assert words[8:12] == ["--lora-target-modules", "q_proj", "v_proj", "--lora-modules"]
    names, paths = zip(*(word.split("=") for word in words[12:]), strict=True)
    assert paths == tuple(f"{tmp_path}/a b/birds-00{k}" for k in range(2))
    assert all(re.fullmatch(rf"birds-00{k}-[0-9a-f]{{8}}", name) for k, name in enumerate(names))
    assert json.loads((tmp_path / "a b" / "birds-000" / "adapter_config.json").read_text())["r"] == 8


def test_paths_are_whole_wherever_it_is_run(bay, swag_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = bay("export", swag_run, "--draws", "1", "--out", "here")
    assert said.out.split() == ["here/draw-000"]
    assert re.fullmatch(rf"draw-000-[0-9a-f]{{8}}={tmp_path}/here/draw-000", shlex.split(said.err)[-1])


def test_the_name_of_an_adapter_says_what_is_in_it(tmp_path):
    posterior = gaussian(make_model())
    names = [
        served_name("draw-000", export_draws(posterior, tmp_path / str(k), Draws(1, seed))[0])
        for k, seed in enumerate((0, 0, 1))
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(("words", "name"), [([], "mean"), (["--name", "birds"], "birds")])
def test_the_mean_is_served_under_a_name_too(bay, swag_run, tmp_path, words, name):
    said = bay("export", swag_run, "--mean", "--out", tmp_path / "mean", *words)
    assert said.status == 0, said.err
    assert said.out.split() == [str(tmp_path / "mean")]
    assert re.fullmatch(rf"{name}-[0-9a-f]{{8}}={tmp_path}/mean", shlex.split(said.err)[-1])


@pytest.mark.parametrize(("words", "names"), [([], ["mean", "draw"]), (["--name", "birds"], ["birds-mean", "birds"])])
def test_draws_and_the_mean_are_both_written_if_both_are_asked_for(bay, swag_run, tmp_path, words, names):
    out = tmp_path / "both"
    said = bay("export", swag_run, "--draws", "3", "--mean", "--out", out, *words)
    assert said.status == 0, said.err
    wanted = [names[0], *(f"{names[1]}-00{k}" for k in range(3))]
    assert said.out.split() == [str(out / name) for name in wanted]
    assert sorted(path.name for path in out.iterdir()) == sorted(wanted)
    served = shlex.split(said.err)
    assert served[served.index("--max-loras") + 1] == "5"
    assert [word.partition("=")[2] for word in served[-4:]] == [str(out / name) for name in wanted]
    own = load_posterior(swag_run / "posterior")
    for name, params in zip(wanted, [own.mean, *(own.draw(k, 0) for k in range(3))], strict=True):
        written = load_file(out / name / "adapter_model.safetensors")
        assert written.keys() == params.keys()
        assert all(torch.equal(written[key], params[key]) for key in params)


def test_of_a_failed_export_of_draws_and_mean_nothing_is_left(refused, swag_run, tmp_path):
    words = ["--mean", "--draws", "2", "--name", "a/b", "--out", tmp_path / "out"]
    assert "must be of letters, digits" in refused("export", swag_run, *words)
    assert not any(tmp_path.iterdir())


def test_as_many_draws_as_the_run_predicts_with_are_written_if_nothing_is_said(bay, swag_run, tmp_path):
    said = bay("export", swag_run, "--out", tmp_path / "run")  # which was trained with --draws 3
    assert [Path(path).name for path in said.out.split()] == [f"draw-00{k}" for k in range(3)]
    shutil.copytree(swag_run / "posterior", tmp_path / "alone")
    said = bay("export", tmp_path / "alone", "--out", tmp_path / "ten")
    assert [Path(path).name for path in said.out.split()] == [f"draw-00{k}" for k in range(10)]


@pytest.mark.parametrize("name", ["", "a/b", "a=b", "a b", "..", "-x"])
def test_a_name_that_is_no_name_of_an_adapter_is_refused(refused, swag_run, tmp_path, name):
    assert "must be of letters, digits" in refused("export", swag_run, f"--name={name}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_several_exports_do_not_meet(tmp_path):
    posterior = gaussian(make_model())
    found = [export_draws(posterior, tmp_path / name, 2, name=name) for name in ("birds", "fish")]
    assert len({path.name for paths in found for path in paths}) == 4


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (33, 64), (257, 320), (321, 512), (512, 512)])
def test_the_rank_is_the_next_that_vllm_takes(rank, allowed):
    words = shlex.split(vllm_command(origin_with(r=rank), FOLDERS))
    assert words[words.index("--max-lora-rank") + 1] == str(allowed)
    assert words[2] == "org/base"
    assert words[-1] == "draw-001=/x y/draw-001"


def test_ranks_that_differ_are_served_with_room_for_the_highest():
    words = shlex.split(
        vllm_command(origin_with(r=4, rank_pattern={"q_proj": 24}, alpha_pattern={"v_proj": 9}), FOLDERS)
    )
    assert words[words.index("--max-lora-rank") + 1] == "32"


@pytest.mark.parametrize("modules", [r".*\.q_proj", ["layers.0.q_proj"], None])
def test_layers_that_are_not_plain_names_leave_room_in_all(modules):
    assert "--lora-target-modules" not in vllm_command(origin_with(target_modules=modules), FOLDERS)


def test_adapters_of_the_head_are_told_of():
    assert changes_head(gaussian(make_model(target_modules=["q_proj", "lm_head"])).mean)
    assert not changes_head(gaussian(make_model()).mean)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"modules_to_save": ["score", "classifier"]}, "whole modules are saved with them (score, classifier)"),
        ({"use_dora": True}, "they are DoRA"),
        ({"bias": "all"}, "they have biases (bias='all')"),
        ({"r": 513}, "their rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 513}}, "their rank 513 is above 512"),
        ({"init_lora_weights": "pissa"}, "begun in a changed base model (init_lora_weights='pissa')"),
        ({"layer_replication": [[0, 1]]}, "they replicate layers"),
    ],
)
def test_what_vllm_does_not_serve_is_said(config, told):
    said = vllm_command(origin_with(**config), FOLDERS)
    assert told in said
    assert said.startswith("vLLM does not serve these adapters: ")
    assert "vllm serve" not in said


def test_two_reasons_are_one_sentence():
    assert "they are DoRA and they have biases" in vllm_command(origin_with(use_dora=True, bias="all"), FOLDERS)


def test_a_classification_head_is_exported_and_not_served(bay, bert_run, tmp_path):
    said = bay("export", bert_run, "--draws", "2", "--out", tmp_path / "draws")
    assert said.status == 0, said.err
    assert len(said.out.split()) == 2
    assert said.err.startswith("vLLM does not serve these adapters: whole modules are saved with them")
