#!/bin/bash
# The jobs of a comparison as a Slurm array, a GPU for each, and its table when all of them are done.
#
#   bayeslora compare --model org/model --task openbookqa --methods map swag ivon --seeds 0 1 2 --plan grid
#   sbatch --array=0-8 examples/clusters/slurm_array.sh grid   # as many as --plan has said
#   bayeslora compare --gather grid                           # any time later; says what is not done yet
#
# A job that was stopped, by --time or by hand, goes on from its last checkpoint when it is submitted again:
# Slurm sends SIGTERM first, at which training saves.
#SBATCH --job-name=bayeslora
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail
exec bayeslora compare --config "$1/jobs/$SLURM_ARRAY_TASK_ID.yaml"
