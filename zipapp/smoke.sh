#!/usr/bin/env bash
# Tries dist/mosaic-queue.pyz (or the file that is named) as a user would, with an empty HOME: a
# task is created, claimed and completed on the private Valkey, and an MCP client lists the tools.
set -euo pipefail
pyz=$(realpath "${1:-$(dirname "$0")/../dist/mosaic-queue.pyz}")
python=${PYTHON:-python3}
home=$(mktemp -d)
queue() { env -i PATH="$PATH" HOME="$home" "$python" "$pyz" "$@"; }
trap 'queue server stop >/dev/null || true; rm -rf "$home"' EXIT

queue version
queue create demo smoke T1 --title "Try the zipapp"
queue claim T1 --agent alice --json | grep -q '"claimedBy": "alice"'
if queue claim T1 --agent bob 2>"$home/refusal"; then echo "claimed twice" >&2; exit 1; fi
grep -q 'held by alice' "$home/refusal"
queue complete T1 --summary "it runs" --json | grep -q '"status": "completed"'

initialize='{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"smoke","version":"1"}}}'
initialized='{"jsonrpc":"2.0","method":"notifications/initialized"}'
list='{"jsonrpc":"2.0","id":2,"method":"tools/list"}'
{ printf '%s\n' "$initialize" "$initialized" "$list"; sleep 3; } | queue mcp | grep -q '"queue_claim"'
echo "smoke: ok"
