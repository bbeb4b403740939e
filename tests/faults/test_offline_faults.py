"""The guards of the test suite itself: nothing gets out, and no deprecated call goes unseen."""

import logging
import socket
import subprocess
import sys
import warnings

import pytest

CONNECT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
RESOLVE = "import urllib.request; urllib.request.urlopen('http://example.invalid', timeout=5)"


@pytest.mark.parametrize("code", [CONNECT, RESOLVE])
def test_neither_a_test_nor_a_process_of_its_own_reaches_another_machine(code, reached):
    with pytest.raises(OSError, match="tests have no network"):
        exec(code, {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "tests have no network" in done.stderr
    assert len(reached.read().splitlines()) == 2  # what would have failed a test that does not look


def test_loopback_is_in_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_a_deprecated_call_is_an_error(request, deprecations):
    if request.config.getoption("pythonwarnings"):
        pytest.skip("warnings are set on the command line")
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        with pytest.raises(category):
            warnings.warn("goes", category, stacklevel=1)
    logging.getLogger("transformers.generation").warning("`this` is deprecated")
    assert deprecations.messages.pop() == "transformers.generation: `this` is deprecated"
