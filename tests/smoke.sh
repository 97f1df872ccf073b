#!/usr/bin/env bash
# The whole pipeline on the smoke preset, in a clone of this checkout as it is committed, with the second run a no-op.
set -euo pipefail
here=$PWD
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git clone --quiet "$here" "$clone"
cd "$clone"
git config user.name smoke && git config user.email smoke@localhost
export DVC_NO_ANALYTICS=1 DVC_SITE_CACHE_DIR="$clone/.dvc/tmp/site"
python -m tinyllm.cli preset smoke
started=$SECONDS
dvc repro
echo "smoke: all stages in $((SECONDS - started)) s"
dvc repro | tee again.log
if grep -q '^Running stage' again.log; then
    echo "smoke: a second dvc repro ran a stage again" >&2
    exit 1
fi
