#!/bin/bash
# Train on 8 machines with 8 GPUs each, under SLURM:
#
#     sbatch examples/launch/slurm.sh var-d36-combined --run.fsdp true --run.output_dir runs/mine
#
# SLURM starts one torchrun on each machine; these meet on the first one, and start a process for each GPU. The
# folder of the run, and the models' cache (HF_HOME), must be on a file system that all machines see. Five
# minutes before the time is up SLURM sends SIGTERM to this script: the step in hand ends, a checkpoint is
# written, and the job is queued again, to go on from there. A run that fails is not. A cluster that preempts jobs
# does the same where it sends the signal of --signal (PreemptParameters=send_user_signal); where it requeues by
# itself (PreemptMode=REQUEUE), the job goes on from its last checkpoint.
#SBATCH --job-name=nextscale
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# torchrun would kill its processes 30 seconds after SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m nextscale train "$@" --run.resume auto &
step=$!

asked=no
trap 'asked=yes; kill -TERM "$step"' TERM  # srun passes it on
wait "$step"
status=$?
if [ "$asked" = yes ]; then
    trap "" TERM
    wait "$step"  # the first wait ended with the signal; the checkpoint is still being written
    status=$?
    [ "$status" = 0 ] || exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
