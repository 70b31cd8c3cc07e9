#!/bin/sh
# Train with one process for each GPU of this machine, or on CPUs with as many as PROCESSES says:
#
#     examples/launch/torchrun.sh var-d30-combined --run.output_dir runs/mine
#     ACCELERATE_USE_CPU=true PROCESSES=2 examples/launch/torchrun.sh toy-painting
#
# `--run.fsdp true` spreads the model over them.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m nextscale train "$@"
