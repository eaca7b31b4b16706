#!/usr/bin/env bash
# Builds the zipapp: the program and all it needs in one file, for CPython 3.11 to 3.14 on one
# platform.  The same sources give the same bytes, on whatever host.
#   zipapp/build.sh [--platform linux-x86_64|linux-aarch64|macos-x86_64|macos-arm64] [--output FILE]
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
host=$(uname -sm | tr ' ' - | sed 's/^Linux/linux/; s/^Darwin/macos/')
platform=$host output=
while [ $# -gt 0 ]; do
  case $1 in
    --platform) platform=${2:?} ;;
    --output) output=${2:?} ;;
    *) sed -n 's/^#   /usage: /p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done
case $platform in # no newer ones than what main.py asks of a host
  linux-x86_64 | linux-aarch64)
    tags=$(for minor in 28 27 26 25 24 23 22 21 20 19 18 17 12 5; do echo "manylinux_2_${minor}"; done; echo manylinux2014) ;;
  macos-x86_64 | macos-arm64) tags=macosx_11_0 ;;
  *) echo "build.sh: no platform $platform; one of linux-x86_64 linux-aarch64 macos-x86_64 macos-arm64" >&2; exit 2 ;;
esac
[ -n "$output" ] || { output=$(dirname "$here")/dist/mosaic-queue.pyz; [ "$platform" = "$host" ] || output=${output%.pyz}-$platform.pyz; }
mkdir -p "$(dirname "$output")"

export SOURCE_DATE_EPOCH=1767225600 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip=$work/venv/bin/pip
"$pip" install -q --no-deps --require-hashes -r "$here/tools.lock"
pack() { "$work/venv/bin/python" "$here/pack.py" "$@"; }

fetch() { # the wheels of the lines in file $2 for Python $1
  # shellcheck disable=SC2046  # options, one per tag
  "$pip" download -q --no-deps --require-hashes --only-binary :all: --implementation cp --python-version "$1" \
    $(printf -- '--platform %s ' $(printf "%s_${platform#*-}\n" $tags)) --dest "$work/wheels" -r "$2"
}
pack wanted "$here/requirements.lock" "$platform" >"$work/all"
fetch 3.11 "$work/all"
# Of the wheels with native modules for one Python alone, those for the others too.
ls "$work/wheels" | sed -n 's/-cp311-cp311-.*//p' | sed 's/-[^-]*$//; s/_/-/g' >"$work/native"
grep -if <(sed 's/.*/^&==/' "$work/native") "$work/all" >"$work/each"
for python in 3.12 3.13 3.14; do fetch "$python" "$work/each" & fetching+=($!); done
"$pip" wheel -q --no-deps --no-index --no-build-isolation --wheel-dir "$work/wheels" "$here/.."
for one in "${fetching[@]}"; do wait "$one"; done

pack site "$work/wheels" "$work/site" "$platform"
pack zip "$work/site" "$output" "$platform"
