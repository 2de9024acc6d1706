#!/usr/bin/env bash
# `ray job submit`: a program that trains on a Ray cluster (Ray Train), from any machine that reaches its dashboard.
# Run it where the program lies; the directory travels with it.
#
#   RAY_API_SERVER_ADDRESS=http://10.0.0.1:8265 ./submit.sh train.py
set -euo pipefail

: "${RAY_API_SERVER_ADDRESS:?set RAY_API_SERVER_ADDRESS to the dashboard of the cluster: http://HEAD:8265}"

exec ray job submit --runtime-env="$(dirname "$0")/runtime_env.yaml" --working-dir=. -- python "$@"
