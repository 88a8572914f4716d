#!/bin/bash
# One Slurm job on any number of machines: a torchrun a machine, DDP over all GPUs. From the root of a clone:
#   sbatch --nodes 8 training/launch/slurm.sh training.pretrain --config vit_imagenet21k --dataset ... --output_dir /shared/run
# What the cluster wants beyond that (--partition, --account, --time) goes before the file's name.
#SBATCH --job-name=hf_vit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch [--nodes N] training/launch/slurm.sh training.pretrain|training.finetune ARGUMENTS" >&2
    exit 2
fi
module=$1
shift

# The first machine of the job is where the processes meet; a port of the job's own lets two jobs share a machine.
nodes=${SLURM_JOB_NUM_NODES:-1}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-8}

# --kill-on-bad-exit: a machine that fails ends the job, where the others would wait for it until the time limit.
exec srun --kill-on-bad-exit=1 --ntasks="$nodes" --ntasks-per-node=1 \
    torchrun --nnodes "$nodes" --nproc_per_node "$gpus" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head:$port" \
    -m "$module" --resume_from_checkpoint true "$@"
