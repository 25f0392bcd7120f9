#!/usr/bin/env bash
# The table of methods on this card, at full length, several seeds. As long as --seconds says.
# --tiny: on the CPU, in seconds. --again: also what is recorded. The record is assets/gpu/world.json.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu/world.py "$@"
