#!/usr/bin/env bash
# Updates a second against a hand-written loop of the same passes. At most 2 minutes.
# --tiny: on the CPU, in seconds. --again: also what is recorded. The record is assets/gpu/throughput.json.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu/throughput.py "$@"
