#!/usr/bin/env bash
# Tries dist/mosaic-queue.pyz (or the file that is named) under python3 (or $PYTHON), as a host that
# never saw it would: an empty HOME, a PATH with python3 alone, spaces in its path, no terminal.  A
# task goes through its life on the private Valkey, MCP clients of both eras list the tools; then a
# HOME that cannot be written, another user (where this one is root), and Pythons that it is not for.
set -euo pipefail
pyz=$(realpath "${1:-$(dirname "$0")/../dist/mosaic-queue.pyz}")
python=$("${PYTHON:-python3}" -c 'import os, sys; print(os.path.realpath(sys.executable))')
home=$(mktemp -d)
# /proc takes no folders from anybody.
[ -d /proc/self ] && nowhere=/proc/nowhere || nowhere=/dev/null/nowhere
trap 'queue server stop >/dev/null || true; rm -rf "$home"' EXIT
mkdir "$home/bin" "$home/with space"
ln -s "$python" "$home/bin/python3"
cp "$pyz" "$home/with space/mosaic queue.pyz"
pyz="$home/with space/mosaic queue.pyz"
queue() { env -i PATH="$home/bin" HOME="$home" "$home/bin/python3" "$pyz" "$@"; }
fail() { echo "smoke: $*" >&2; exit 1; }

queue version
queue create demo smoke T1 --title "Try the zipapp"
queue claim T1 --agent alice --json | grep -q '"claimedBy": "alice"'
if queue claim T1 --agent bob 2>"$home/refusal"; then fail "claimed twice"; fi
grep -q 'held by alice' "$home/refusal"
queue complete T1 --summary "it runs" --json | grep -q '"status": "completed"'
queue show T1 --json <&- | grep -q '"it runs"'

mkfifo "$home/in" "$home/out"
session() { # sends the lines to a new MCP server, and prints its answer to each that has an id
  queue mcp <"$home/in" >"$home/out" &
  exec 8>"$home/in" 9<"$home/out"
  for line; do
    printf '%s\n' "$line" >&8
    case $line in *'"id"'*) IFS= read -r -t 30 answer <&9 && printf '%s\n' "$answer" ;; esac
  done
  exec 8>&- 9<&-
  wait $!
}
client='"clientInfo":{"name":"smoke","version":"1"}'
session '{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},'"$client"'}}' \
  '{"jsonrpc":"2.0","method":"notifications/initialized"}' \
  '{"jsonrpc":"2.0","id":2,"method":"tools/list"}' >"$home/legacy"
tail -n 1 "$home/legacy" | grep -q '"queue_claim"' || fail "no tools after initialize"
meta='{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},'"${client/\"/\"io.modelcontextprotocol/}"'}}'
session '{"jsonrpc":"2.0","id":1,"method":"server/discover","params":'"$meta"'}' \
  '{"jsonrpc":"2.0","id":2,"method":"tools/list","params":'"$meta"'}' >"$home/modern"
head -n 1 "$home/modern" | grep -q '"2026-07-28"' || fail "server/discover does not name its version"
tail -n 1 "$home/modern" | grep -q '"queue_claim"' || fail "no tools without initialize"

env -i PATH="$home/bin" HOME=$nowhere XDG_CACHE_HOME="$home/cache" "$python" "$pyz" version >"$home/version"
[ -d "$home/cache/mosaic-queue" ] || fail "XDG_CACHE_HOME is not used where HOME cannot be"
if [ "$(id -u)" = 0 ] && command -v setpriv >/dev/null; then
  chmod 755 "$home" "$home/with space"
  mkdir -m 777 "$home/other"
  other() { setpriv --reuid=65534 --regid=65534 --clear-groups env -i HOME=$nowhere TMPDIR="$home/other" "$@"; }
  # Its own Python may lie where only root may look.
  if other "$python" -c '' 2>"$home/no"; then own=$python; else own=/usr/bin/python3; fi
  other "$own" "$pyz" version
  [ "$(stat -c %a "$home/other/mosaic-queue-65534")" = 700 ] || fail "what another user unpacked is open"
fi

for old in python2.7 python3.8 python3.9 python3.10 pypy3; do
  old=$(command -v "$old") && "$old" -c '' 2>"$home/no" || continue
  if env -i HOME="$home/old" "$old" "$pyz" version 2>"$home/refusal"; then fail "$old is no Python for it"; fi
  [ "$(wc -l <"$home/refusal")" = 1 ] && [ ! -e "$home/old" ] || fail "$old is not refused in one sentence"
  cat "$home/refusal"
done
echo "smoke: ok"
