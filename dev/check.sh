#!/usr/bin/env bash
# Format, lint and types, of Python and (where cargo is) of Rust. Changes nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/install.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
if command -v cargo >/dev/null; then
    cargo fmt --check --manifest-path rustbpe/Cargo.toml
    cargo clippy --quiet --all-targets --manifest-path rustbpe/Cargo.toml -- -D warnings
    cargo clippy --quiet --features python --manifest-path rustbpe/Cargo.toml -- -D warnings
fi
