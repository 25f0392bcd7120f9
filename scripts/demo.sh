#!/usr/bin/env bash
# The main job, from nothing: installs, distils the shipped teacher into a 4-step LoRA, measures it. Arguments go to the
# demo.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" -m stepdistill.demo "$@"
