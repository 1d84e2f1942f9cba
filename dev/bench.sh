#!/usr/bin/env bash
# Runs benchmarks/bench_*.py one after the other; each writes its csv under benchmarks/record/<machine>/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/install.sh dev
for file in benchmarks/bench_*.py; do
    .venv/bin/python "$file" "$@"
done
