#!/usr/bin/env bash
# Does everything run on this card, and is it right there? At most 2 minutes.
# --tiny: on the CPU, in seconds. --again: also what is recorded. The record is assets/gpu/smoke.json.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu/smoke.py "$@"
