"""What importing the library does besides: nothing."""

import subprocess
import sys

import pytest

AUDITED = """
import sys

def note(event, args):
    if event.startswith("socket.") and event not in HARMLESS:
        found.append((event, *map(str, args[:1])))
    elif event == "open" and (set(args[1] or "") & set("wax+") or (args[2] or 0) & WRITES):
        found.append((event, str(args[0])))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "subprocess.Popen", "os.system"):
        found.append((event, *map(str, args[:1])))

import os, threading
HARMLESS, WRITES = ("socket.__new__", "socket.bind", "socket.gethostname"), os.O_WRONLY | os.O_RDWR | os.O_CREAT
found, others = [], 1
sys.addaudithook(note)
"""
EVERYTHING = """
import importlib, peft, pkgutil, bayeslora
others = threading.active_count()  # bitsandbytes compiles when peft imports it, and torch 2.7 keeps a thread for that
names = [found.name for found in pkgutil.walk_packages(bayeslora.__path__, "bayeslora.")]
for name in names:
    if name not in ("bayeslora.__main__", "bayeslora.integrations.vllm_averaging"):  # which vLLM imports, where it is
        importlib.import_module(name)
assert len(names) > 100
found = [one for one in found if one[0].startswith("socket.")]  # torch makes folders of its own
"""
NOTHING_LEFT = """
assert found == [], found
assert threading.active_count() == others, threading.enumerate()
"""


def imported(code):
    done = subprocess.run(
        [sys.executable, "-B", "-c", AUDITED + code + NOTHING_LEFT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_package_touches_no_file_network_or_thread():
    imported("import bayeslora")


@pytest.mark.slow
def test_importing_every_module_touches_no_network_or_thread():
    imported(EVERYTHING)
