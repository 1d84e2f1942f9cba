#!/usr/bin/env bash
# Installs what is missing, builds the crate, runs every test. Arguments go to pytest: bash tests/run.sh -k chat
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/install.sh dev
if [ $# -eq 0 ] && command -v cargo >/dev/null; then
    cargo test --quiet --manifest-path rustbpe/Cargo.toml
fi
exec .venv/bin/python -m pytest "$@"
