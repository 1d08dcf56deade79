#!/usr/bin/env bash
# Several nodes with DeepSpeed's launcher, from one of them:
#
#   HOSTFILE=hostfile launch/deepspeed.sh train --config configs/care.yaml deepspeed=zero3
#
# The launcher logs in to every node of the hostfile (pdsh over ssh, so both must be installed), goes
# to this same folder there and starts one process a slot. So the folder, the Python environment, the
# model and the data must be under the same paths on all nodes: a shared disk.
#
# Without ssh between the nodes, start the same line on each of them with its own NODE_RANK:
#
#   HOSTFILE=hostfile NODE_RANK=1 MASTER_ADDR=node-0 launch/deepspeed.sh train --config ...
#
# A run that was stopped or killed goes on with the same line and `--resume` at its end, on as many
# ranks as before; `--resume` may be there from the start. To stop it after its step, with a
# checkpoint, signal a rank on any node, not the launcher, which kills its ranks after 30 seconds:
#
#   pkill -TERM -o -f "m care_train --local_rank"
#
#
# Environment:
#   HOSTFILE     nodes and their GPUs (see launch/hostfile.example); without one: this node alone
#   NODE_RANK    this node's place in the hostfile, from 0; set it to do without ssh
#   MASTER_ADDR  first node's address; wanted with NODE_RANK, otherwise found by ssh
#   MASTER_PORT  a free port on it (29500)
#   PYTHON       the environment's interpreter (python)
#   DRY_RUN      1: print the command and leave
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

launcher=(--master_port "${MASTER_PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
  launcher+=(--hostfile "$HOSTFILE")
fi
if [ -n "${MASTER_ADDR:-}" ]; then
  launcher+=(--master_addr "$MASTER_ADDR")
fi
if [ -n "${NODE_RANK:-}" ]; then
  : "${HOSTFILE:?wanted with NODE_RANK}" "${MASTER_ADDR:?wanted with NODE_RANK}"
  launcher+=(--no_ssh --node_rank "$NODE_RANK")
fi

# Variables of these kinds reach the other nodes through the file .deepspeed_env in this folder or
# your home, one NAME=value a line; for example NCCL_SOCKET_IFNAME=eth0.
command=("${PYTHON:-python}" -m deepspeed.launcher.runner "${launcher[@]}" --module care_train "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
