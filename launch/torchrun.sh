#!/usr/bin/env bash
# One or several nodes with torchrun. On one node:
#
#   launch/torchrun.sh train --config configs/care.yaml deepspeed=zero2
#
# On several, the same line on each of them, started within a few minutes of each other:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launch/torchrun.sh train --config configs/care.yaml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-0 launch/torchrun.sh train --config configs/care.yaml
#
# SIGTERM or Ctrl-C ends the run after its step, with a checkpoint, within STOP_SECONDS. torchrun
# restarts nothing: a rank that dies ends the run. Either way the same line with `--resume` at its end
# goes on, on as many ranks as before; `--resume` may be there from the start. torchrun's exit status
# is 1 wherever a rank's is not 0, also where a run saved and left with 75.
#
# Environment:
#   GPUS_PER_NODE  processes on this node (all GPUs, or 1 without any)
#   NNODES         nodes (1)
#   NODE_RANK      this node's place, from 0; wanted with NNODES above 1
#   MASTER_ADDR    first node's address; wanted with NNODES above 1
#   MASTER_PORT    a free port on it (29500)
#   STOP_SECONDS   longest a step and a checkpoint may take after a signal (600)
#   PYTHON         the environment's interpreter (python)
#   DRY_RUN        1: print the command and leave
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

python="${PYTHON:-python}"
gpus="${GPUS_PER_NODE:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}"
launcher=(--nproc_per_node "$gpus" --shutdown_timeout "${STOP_SECONDS:-600}")
if [ "${NNODES:-1}" -gt 1 ]; then
  : "${NODE_RANK:?wanted with NNODES above 1}" "${MASTER_ADDR:?wanted with NNODES above 1}"
  launcher+=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
  launcher+=(--master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
else
  # A free port of its own choice: several runs may share a node.
  launcher+=(--standalone)
fi

command=("$python" -m torch.distributed.run "${launcher[@]}" -m care_train "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
