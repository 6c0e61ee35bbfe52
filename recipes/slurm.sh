#!/bin/bash
# Trains on two nodes of eight GPUs under Slurm. After a preemption, and at the time limit, the job
# saves what is done and queues itself again. From the root of this repository, on a disk that both
# nodes share:
#
#     sbatch recipes/slurm.sh train_grpo.py @recipes/soft_7b.args
#
# Partition and account are your cluster's: sbatch --partition=... --account=... recipes/slurm.sh ...
# It has not run on a cluster. tests/test_faults.py runs it with stand-ins for srun and scontrol.

#SBATCH --job-name=medreasoner
#SBATCH --nodes=2
# One process per GPU. srun starts the ranks, so that Slurm's signals reach them and no launcher
# kills them while they save.
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# After a preemption or a broken node Slurm may queue the job again, under the same number.
#SBATCH --requeue
# The ranks get SIGTERM ten minutes before the time limit: enough to end an update and to write the
# weights of a 7B. On a preemption Slurm sends it by itself, and waits for the partition's GraceTime.
#SBATCH --signal=TERM@600
# One file for all lives of the job; the next one writes on at its end.
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append

# A pipeline fails where srun does, not where tee does.
set -o pipefail

# Where the ranks meet: the first node, at a port of this job's own.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# As torchrun does: eight processes on a node must not each take all its cores.
export OMP_NUM_THREADS=1

# What is said in this life of the job.
LOG=$(mktemp)

# srun numbers its tasks; PyTorch wants these numbers under its own names. exec: python takes the
# place of the shell, so that it is python that gets the signal. If one rank fails, srun ends all.
# --resume auto continues from the newest checkpoint, or starts where there is none.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID
    export LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec .venv/bin/python "$@"' rank "$@" --resume auto 2>&1 | tee "$LOG"
STATUS=$?

# A run that was stopped ends with status 0 and says so. A signal in the first seconds, before there
# is anything to save, ends it with 128 + 15. Both go on later; anything else is done, or an error.
if grep -q "the same command with --resume" "$LOG" || [ "$STATUS" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    STATUS=0
fi
rm "$LOG"
exit "$STATUS"
