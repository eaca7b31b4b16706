#!/usr/bin/env bash
# Writes the two locks anew: requirements.lock, what goes into the zipapp, for every platform and
# Python at once, and tools.lock, what builds it.  Look at the diff before it is committed.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/uv"
"$work/uv/bin/pip" install -q --disable-pip-version-check uv
lock() {
  "$work/uv/bin/uv" pip compile -q --universal --python-version 3.11 --generate-hashes --upgrade \
    --no-header --no-annotate "$@"
}

# cryptography has no wheels for Intel Macs since 49.
lock pyproject.toml - -o zipapp/requirements.lock <<'END'
cryptography<49; sys_platform == 'darwin' and platform_machine == 'x86_64'
cryptography>=49; sys_platform != 'darwin' or platform_machine != 'x86_64'
END
# Of shiv only the builder is used, which needs none of its dependencies.
lock - -o zipapp/tools.lock --no-emit-package click --no-emit-package pip --no-emit-package setuptools <<'END'
shiv
hatchling
END
