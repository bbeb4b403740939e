"""A posterior that is replaced by another: whatever happens on the way, the old one or the new one loads."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.crashes import broken_off, inodes, power_cut
from support.families import mean
from support.tiny import same_params

from bayeslora.files import atomic
from bayeslora.posteriors import Mixture, Point, base, loading
from bayeslora.posteriors.loading import load_posterior
from bayeslora.posteriors.provenance import Origin

ORIGIN = Origin({"peft_type": "LORA"}, "base", {"names": "x", "sketch": []})


def point(value):
    return Point({name: torch.full_like(p, value) for name, p in mean().items()}, ORIGIN)


def mixture(value):
    return Mixture((point(value), point(value + 0.5)), ORIGIN)


def without_exchange(monkeypatch):
    """A system that has two renames only."""
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_: object())


def which(folder, build):
    """The value of the posterior that loads from a folder; all of it is the same one's."""
    loaded = load_posterior(folder)
    value = float(next(iter(loaded.mean.values())).flatten()[0])
    expected = build(value)
    for k in range(2):
        assert same_params(loaded.draw(k), expected.draw(k))
    return value


CASES = [
    (point, "renames", "dies"),
    pytest.param(point, "exchange", "dies", marks=pytest.mark.slow),
    pytest.param(point, "exchange", "fails", marks=pytest.mark.slow),
    pytest.param(point, "renames", "fails", marks=pytest.mark.slow),
    pytest.param(mixture, "exchange", "dies", marks=pytest.mark.slow),
    pytest.param(mixture, "renames", "fails", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("build", "way", "end"), CASES)
def test_at_every_operation_of_a_replacement_the_old_or_the_new_posterior_loads(tmp_path, monkeypatch, build, way, end):
    monkeypatch.setattr(base, "card", lambda *_: "a card")  # whose template takes longer than all the rest
    if way == "renames":
        without_exchange(monkeypatch)
    fails = end == "fails"
    root = tmp_path / "root"
    build(1.0).save_pretrained(tmp_path / "old")

    def replaced(at):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "old", root / "p")
        before = inodes(root)
        outcome = broken_off(lambda: build(2.0).save_pretrained(root / "p", overwrite=True), root, at, fails=fails)
        if outcome.died:
            power_cut(root, before, outcome.synced)
        return outcome

    total = replaced(0).operations
    assert which(root / "p", build) == 2.0
    assert os.listdir(root) == ["p"]
    seen = set()
    for at in range(1, total + 1):
        outcome = replaced(at)
        assert outcome.died != fails, at
        assert outcome.error is None or outcome.error.startswith("InputError"), (at, outcome.error)
        seen.add(found := which(root / "p", build))
        if not outcome.died:
            assert found == (1.0 if outcome.error else 2.0), (at, outcome.error)
        build(3.0).save_pretrained(root / "p", overwrite=True)
        assert which(root / "p", build) == 3.0
        assert os.listdir(root) == ["p"], at
    assert seen == {1.0, 2.0}


def test_nothing_of_the_old_posterior_goes_before_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    point(1.0).save_pretrained(tmp_path / "p")
    steps, real = [], (os.fsync, atomic.shutil.rmtree)

    def sync(handle):
        steps.append(("sync", os.fstat(handle).st_ino, os.stat(tmp_path / "p").st_ino))
        real[0](handle)

    def remove(path, **options):
        steps.append(("remove", Path(path).stat().st_ino if Path(path).exists() else 0, 0))
        real[1](path, **options)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(atomic.shutil, "rmtree", remove)
    old, parent = (tmp_path / "p").stat().st_ino, tmp_path.stat().st_ino
    point(2.0).save_pretrained(tmp_path / "p", overwrite=True)
    new = {path.stat().st_ino for path in ((tmp_path / "p"), *(tmp_path / "p").iterdir())}
    assert new <= {inode for kind, inode, target in steps if kind == "sync" and target == old}  # before the exchange
    placed = steps.index(("sync", parent, (tmp_path / "p").stat().st_ino))
    assert placed < steps.index(("remove", old, 0))


def test_a_posterior_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    mixture(1.0).save_pretrained(tmp_path / "p")
    real = loading.read_folder

    def read(folder):
        content = real(folder)
        if folder.name == "member-0":
            monkeypatch.setattr(loading, "read_folder", real)
            mixture(2.0).save_pretrained(tmp_path / "p", overwrite=True)
        return content

    monkeypatch.setattr(loading, "read_folder", read)
    assert which(tmp_path / "p", mixture) == 2.0


@pytest.mark.slow
def test_processes_that_replace_the_same_posterior_leave_one_of_theirs_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "card", lambda *_: "a card")
    mixture(9.0).save_pretrained(tmp_path / "p")
    running = set()
    for k in range(3):
        process = os.fork()
        if process == 0:
            try:
                for _ in range(20):
                    mixture(float(k)).save_pretrained(tmp_path / "p", overwrite=True)
                os._exit(0)
            finally:
                os._exit(1)
        running.add(process)
    while running:
        assert which(tmp_path / "p", mixture) in (0.0, 1.0, 2.0, 9.0)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            assert status == 0
            running.discard(ended)
    assert os.listdir(tmp_path) == ["p"]
