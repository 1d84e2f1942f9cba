#!/usr/bin/env bash
# Makes .venv ready and quick to make ready again: the packages at the versions of constraints.txt, and rustbpe/.
#
#   bash dev/install.sh         what a run needs
#   bash dev/install.sh dev     that, and what the tests need
#
# NANOCHAT_TORCH_INDEX names another package index for torch alone, NANOCHAT_PYTHON the Python to build .venv from.
# Uses uv where it is installed, else venv and pip; builds rustbpe/ where cargo is, else takes rustbpe from PyPI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-run}
python=.venv/bin/python

die() {
    printf 'error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 2
}

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))'

if [ ! -x $python ]; then
    if command -v uv >/dev/null; then
        uv venv --quiet --python "${NANOCHAT_PYTHON:->=3.10,<3.15}" .venv
    else
        for base in ${NANOCHAT_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
            command -v "$base" >/dev/null && "$base" -c "$supported" 2>/dev/null && break
            base=
        done
        [ -n "$base" ] || die "no Python from 3.10 to 3.14 was found" "install one, or name it in NANOCHAT_PYTHON"
        "$base" -m venv .venv || die "$base cannot make a virtual environment" "install its venv package, or install uv"
    fi
fi
$python -c "$supported" || die ".venv holds a Python that is not from 3.10 to 3.14" "delete .venv and run this again"

if command -v flock >/dev/null; then
    exec 9>.venv/install.lock && flock 9 # two at once would spoil each other's build
fi
if command -v uv >/dev/null; then
    install() { uv pip install --quiet --python $python "$@"; }
else
    install() { $python -m pip install --quiet --disable-pip-version-check "$@"; }
fi

# A stamp holds the checksum of all that decides what is installed: nothing is done twice.
stamp() { # stamp NAME FILE...
    local file=.venv/$1.stamp sum
    shift
    sum=$( (printf '%s ' "$PWD" "${NANOCHAT_TORCH_INDEX:-}" && cat "$@") | cksum)
    [ "$(cat "$file" 2>/dev/null)" = "$sum" ] && return 1
    stamp_file=$file stamp_sum=$sum
}
stamped() { printf '%s\n' "$stamp_sum" >"$stamp_file"; }

if command -v cargo >/dev/null && [ -f rustbpe/Cargo.toml ]; then
    grep -v '^rustbpe==' constraints.txt >.venv/constraints.txt
    if stamp rustbpe rustbpe/Cargo.toml rustbpe/pyproject.toml $(find rustbpe/src -type f | LC_ALL=C sort); then
        echo "installing: building rustbpe/ with $(cargo --version)"
        install -c .venv/constraints.txt maturin
        PATH="$PWD/.venv/bin:$PATH" install --no-build-isolation --no-deps --force-reinstall ./rustbpe
        stamped
    fi
else
    cp constraints.txt .venv/constraints.txt
    rm -f .venv/rustbpe.stamp
    echo "installing: no cargo here, so rustbpe comes from PyPI instead of rustbpe/"
fi

if [ "$extra" = run ] && [ -f .venv/dev.stamp ]; then
    extra=dev # never less than before
fi
if stamp "$extra" pyproject.toml .venv/constraints.txt; then
    echo "installing: Python packages into .venv (torch is large: minutes on a slow connection)"
    install -c .venv/constraints.txt setuptools
    if [ -n "${NANOCHAT_TORCH_INDEX:-}" ]; then
        install --no-deps --index-url "$NANOCHAT_TORCH_INDEX" -c .venv/constraints.txt torch
    fi
    target=.
    [ "$extra" = run ] || target=".[$extra]"
    install --no-build-isolation -c .venv/constraints.txt -e "$target"
    stamped
fi
