"""Measuring memory and disk."""

import sys

import pytest
import torch

from bayeslora.comparison.costs import folder_bytes, max_known, peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's highest memory")
def test_memory_that_was_held_and_let_go_is_seen():
    with peak_memory(torch.device("cpu")) as small:
        pass
    with peak_memory(torch.device("cpu")) as large:
        block = torch.ones(64, 1024, 1024)  # 256 MiB
        del block
    assert small.bytes is not None
    assert large.bytes is not None
    assert large.bytes > 200 * 2**20
    assert small.bytes < 50 * 2**20


def test_unknown_amounts_are_left_out_and_folders_are_summed(tmp_path):
    assert max_known(None, 3, None, 5) == 5
    assert max_known(None) is None
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"45")
    assert folder_bytes(tmp_path) == 5
