#!/usr/bin/env bash
# torchrun on two nodes beside a Ray cluster, whose dashboard shows the writer of each run. On each node:
#
#   HEAD=10.0.0.1 NODE_RANK=0 ./beside_ray.sh train.py
#   HEAD=10.0.0.1 NODE_RANK=1 ./beside_ray.sh train.py
#
# Ray stays: later runs need two_nodes.sh and RAY_ADDRESS=10.0.0.1:6379 only, and `ray stop` on each node ends it.
set -euo pipefail

: "${HEAD:?set HEAD to the address of the first node}"
: "${NODE_RANK:?set NODE_RANK to 0 on the first node and to 1 on the second}"

# Ray carries the observer only: the GPUs are torchrun's.
ray_options=(--num-cpus=1 --num-gpus=0 --disable-usage-stats)
export RAY_ADDRESS="$HEAD:6379"
if ((NODE_RANK == 0)); then
  ray start --head --node-ip-address="$HEAD" --port=6379 "${ray_options[@]}"
else
  until ray start --address="$RAY_ADDRESS" "${ray_options[@]}"; do sleep 1; done
fi

exec "$(dirname "$0")/two_nodes.sh" "$@"
