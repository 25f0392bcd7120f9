#!/usr/bin/env bash
# The table of methods: trains, measures and exports the shapes recipes one after the other, and goes on where it was
# stopped. Arguments: recipes such as dmd2 or dmd2-1step (all unless named); --commit commits each row as it comes.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" scripts/table.py "$@"
