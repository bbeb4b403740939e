"""The jobs of a comparison on a Ray cluster, as many at once as there are accelerators, and then its table.

    bayeslora compare --model org/model --task openbookqa --methods map swag ivon --seeds 0 1 2 --plan grid
    python examples/clusters/ray_grid.py grid --gpus 1

pip install ray. The folder must be one that all machines see, under the same path. A job that dies with its machine
is started again and goes on from its last checkpoint; one that is refused is reported, and the others go on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ray


def run(job: str) -> str:
    """Run one job, and return what it said if it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "bayeslora", "compare", "--config", job], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stderr


def main() -> int:
    """Run the jobs of the plan that is named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--gpus", type=float, default=0, help="accelerators of a job; .5 lets two share one")
    parser.add_argument("--cpus", type=float, default=1)
    given = parser.parse_args()
    ray.init()
    remote = ray.remote(num_cpus=given.cpus, num_gpus=given.gpus, max_retries=3)(run)
    jobs = {remote.remote(str(path.resolve())): path.name for path in sorted((given.plan / "jobs").iterdir())}
    waiting = list(jobs)
    while waiting:
        (done,), waiting = ray.wait(waiting)
        fault = ray.get(done)
        print(f"{jobs[done]}: {fault or 'done'} ({len(waiting)} left)", flush=True)
    return subprocess.run([sys.executable, "-m", "bayeslora", "compare", "--gather", str(given.plan)]).returncode


if __name__ == "__main__":
    sys.exit(main())
