"""Damaged folders, full disks and folders in the way: it is said in words and nothing is lost."""

import errno
import os
import shutil
from dataclasses import replace

import pytest
from support.folders import change, seal
from support.tiny import gaussian, make_model, same_params

from bayeslora.errors import InputError
from bayeslora.files import atomic
from bayeslora.params import read
from bayeslora.posteriors import Mixture, Point
from bayeslora.posteriors import folder as storage
from bayeslora.posteriors.loading import export_draws, load_posterior
from bayeslora.posteriors.provenance import origin_of


@pytest.fixture
def saved(tmp_path):
    """A posterior on disk."""
    gaussian(make_model()).save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


def changed(folder, **values):
    """Change the configuration, with checksums that are right."""
    change(folder / "posterior_config.json", **values)
    seal(folder)


def flip(path):
    """Change one bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "not a posterior": (lambda f: (f / "posterior_config.json").unlink(), "is not a posterior of bayeslora"),
    "config cut": (lambda f: (f / "posterior_config.json").write_text('{"family": "Po'), "cannot be read"),
    "config no object": (lambda f: (f / "posterior_config.json").write_text("[1]"), "does not hold a JSON object"),
    "config not text": (lambda f: (f / "posterior_config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "adapter missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "spread missing": (lambda f: (f / "posterior.safetensors").unlink(), "posterior.safetensors is missing"),
    "adapter config missing": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "adapter changed": (lambda f: flip(f / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "spread changed": (lambda f: flip(f / "posterior.safetensors"), "posterior.safetensors is damaged"),
    "spread cut": (lambda f: os.truncate(f / "posterior.safetensors", 100), "posterior.safetensors cannot be read"),
    "later format": (lambda f: changed(f, format_version=9), "format version 9"),
    "unknown family": (lambda f: changed(f, family="Cauchy"), "names the family 'Cauchy'"),
    "part lacking": (lambda f: changed(f, family="LowRankGaussian"), "lacks a part"),
    "no scalars": (lambda f: changed(f, scalars=None), "lacks a part"),
    "no fingerprint": (lambda f: changed(f, fingerprint=None), "fingerprint"),
    "checksums of no kind": (lambda f: changed(f, sha256=["x"]), "sha256"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_posterior_is_refused_and_the_file_named(saved, damage):
    harm, said = DAMAGE[damage]
    harm(saved)
    with pytest.raises(InputError, match=said) as caught:
        load_posterior(saved)
    assert str(saved) in str(caught.value)


def test_values_that_cannot_be_are_refused_even_with_the_right_checksum(tmp_path):
    posterior = gaussian(make_model())
    next(iter(posterior.variance.values())).fill_(-1.0)  # behind the back of the frozen dataclass
    posterior.save_pretrained(tmp_path / "p")
    with pytest.raises(InputError, match="negative"):
        load_posterior(tmp_path / "p")


def test_cut_safetensors_are_refused_even_with_the_right_checksum(saved):
    os.truncate(saved / "posterior.safetensors", 100)
    seal(saved)
    with pytest.raises(InputError, match="cannot be read"):
        load_posterior(saved)


def test_a_mixture_with_a_member_missing_is_refused(tmp_path):
    model = make_model()
    Mixture((gaussian(model), gaussian(model)), origin_of(model)).save_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "member-1")
    with pytest.raises(InputError, match="member-1"):
        load_posterior(tmp_path / "m")


def test_a_name_that_is_neither_folder_nor_repository_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a folder nor a repository"):
        load_posterior("no/such/folder/at all")


def test_a_posterior_without_an_origin_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="without an origin"):
        Point(read(make_model())).save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept_unless_it_may_be_replaced(saved):
    model = make_model()
    other = Point({n: 2 * p for n, p in read(model).items()}, origin_of(model))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        other.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    other.save_pretrained(saved, overwrite=True)
    assert same_params(load_posterior(saved).mean, other.mean)
    assert os.listdir(saved.parent) == [saved.name]


def test_an_empty_folder_may_be_written_to(tmp_path):
    (tmp_path / "p").mkdir()
    gaussian(make_model()).save_pretrained(tmp_path / "p")
    assert os.listdir(tmp_path) == ["p"]
    load_posterior(tmp_path / "p")


def test_a_file_in_the_way_is_refused_and_replaced_when_allowed(tmp_path):
    (tmp_path / "p").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        gaussian(make_model()).save_pretrained(tmp_path / "p")
    assert (tmp_path / "p").read_text() == "mine"
    gaussian(make_model()).save_pretrained(tmp_path / "p", overwrite=True)
    assert os.listdir(tmp_path) == ["p"]
    load_posterior(tmp_path / "p")


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        gaussian(make_model()).save_pretrained(tmp_path / "file" / "p")


def fails_at(monkeypatch, owner, name, call):
    """Make one call of a function fail as it does on a full disk."""
    real, count = getattr(owner, name), 0

    def full(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)


FULL = [(storage, "save_file", 1), (storage, "save_file", 2), (storage, "write_json", 2)]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [*FULL, (atomic.os, "replace", 1)],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, owner, name, call):
    posterior = gaussian(make_model())
    fails_at(monkeypatch, owner, name, call)
    with pytest.raises(InputError, match="No space left"):
        posterior.save_pretrained(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("owner", "name", "call"), FULL, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_full_disk_leaves_the_old_folder_as_it_was(saved, monkeypatch, owner, name, call):
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = make_model()
    fails_at(monkeypatch, owner, name, call)
    changed = replace(gaussian(model), mean={n: 2 * p for n, p in read(model).items()})
    with pytest.raises(InputError, match="No space left"):
        changed.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old


def test_a_full_disk_leaves_no_exported_draw(tmp_path, monkeypatch):
    fails_at(monkeypatch, storage, "save_file", 3)
    with pytest.raises(InputError, match="No space left"):
        export_draws(gaussian(make_model()), tmp_path / "draws", 5)
    assert list(tmp_path.iterdir()) == []
