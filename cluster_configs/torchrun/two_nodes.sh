#!/usr/bin/env bash
# torchrun on two nodes, and nothing else: on each, with the first node's address.
#
#   HEAD=10.0.0.1 NODE_RANK=0 ./two_nodes.sh train.py
#   HEAD=10.0.0.1 NODE_RANK=1 ./two_nodes.sh train.py
set -euo pipefail

: "${HEAD:?set HEAD to the address of the first node}"
: "${NODE_RANK:?set NODE_RANK to 0 on the first node and to 1 on the second}"

# The second node's ranks report to the first one over one port: name those that a firewall lets through.
# export OBSERVER_PORTS=20000-20100

# The first node has rank 0, with which the run lies, and the API key has to.
exec torchrun --nnodes=2 --nproc-per-node="${GPUS:-8}" --node-rank="$NODE_RANK" \
  --master-addr="$HEAD" --master-port=29500 --rdzv-id="${RUN_NAME:-train}" "$@"
