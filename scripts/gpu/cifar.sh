#!/usr/bin/env bash
# CIFAR-10 on this card: a classifier, a class-conditional teacher, students of one and of few steps, and their
# distances. A call ends within --seconds and the next one goes on; README.md beside this says how. The record is
# assets/gpu/cifar.json. --tiny: on the CPU, in seconds. --again: also what is recorded.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$PYTHON" scripts/gpu/cifar.py "$@"
