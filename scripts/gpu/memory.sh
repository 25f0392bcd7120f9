#!/usr/bin/env bash
# Peak memory by phase and seconds an update of real networks with random weights. At most 2 minutes.
# --tiny: on the CPU, in seconds. --again: also what is recorded. The record is assets/gpu/memory.json.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu/memory.py "$@"
