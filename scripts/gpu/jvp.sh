#!/usr/bin/env bash
# Attention with its derivative forward, one Triton kernel, against the flash kernel's forward. At most 1 minute.
# --tiny: by Triton's interpreter on the CPU, in seconds. --again: also what is recorded. The record is
# assets/gpu/jvp.json.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
for argument in "$@"; do [ "$argument" = --tiny ] && export TRITON_INTERPRET=1; done
exec "$PYTHON" scripts/gpu/jvp.py "$@"
