#!/usr/bin/env bash
# torchrun on two nodes. On each node, with the first node's address:
#
#   HEAD=10.0.0.1 NODE_RANK=0 ./two_nodes.sh train.py
#   HEAD=10.0.0.1 NODE_RANK=1 ./two_nodes.sh train.py
set -euo pipefail

: "${HEAD:?set HEAD to the address of the first node}"
: "${NODE_RANK:?set NODE_RANK to 0 on the first node and to 1 on the second}"
GPUS=${GPUS:-8}
RAY_PORT=${RAY_PORT:-6379}

# Ray only carries the observer here, so it is given no GPU and one CPU.
ray_options=(--num-cpus=1 --num-gpus=0 --disable-usage-stats --block)
if [[ $NODE_RANK == 0 ]]; then
  ray start --head --node-ip-address="$HEAD" --port="$RAY_PORT" "${ray_options[@]}" &
else
  until ray start --address="$HEAD:$RAY_PORT" "${ray_options[@]}"; do sleep 1; done &
fi
ray_pid=$!
trap 'kill "$ray_pid"' EXIT

export RAY_ADDRESS="$HEAD:$RAY_PORT"
torchrun --nnodes=2 --nproc-per-node="$GPUS" --node-rank="$NODE_RANK" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" --rdzv-id="${RUN_NAME:-train}" "$@"
