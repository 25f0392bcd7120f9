#!/usr/bin/env bash
# The first six minutes on a card: smoke, memory, throughput. One that fails, or takes its time, takes no other's.
# Arguments go to all three. Logs and records are copied to $OUT where it is set.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
logs="${OUT:-runs/gpu}"
mkdir -p "$logs"
failed=0
for part in smoke:110 memory:120 throughput:125; do
    name="${part%%:*}"
    status=0
    timeout -k 5 "${part##*:}" "scripts/gpu/$name.sh" "$@" > "$logs/$name.log" 2>&1 || status=$?
    echo "== $name: status $status"
    tail -n 25 "$logs/$name.log"
    [ "$status" = 2 ] && exit 2
    [ "$status" = 0 ] || failed=1
done
exit "$failed"
