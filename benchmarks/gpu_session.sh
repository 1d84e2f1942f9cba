#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests, attention, training, decoding. Each part has a
# time limit of its own, so that one that hangs costs only itself; the exit code is that of the worst part.
#
#   bash benchmarks/gpu_session.sh [FOLDER]     csv files and logs go there (default: benchmarks/record/<gpu>)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x $python ] || python=python3
name=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
    printf 'error: torch sees no GPU\n  hint: run this where nvidia-smi lists one\n' >&2
    exit 2
}
out=${1:-benchmarks/record/$name}
day=$(date +%F)
mkdir -p "$out"
worst=0

part() { # part SECONDS NAME COMMAND...
    local limit=$1 label=$2 start=$SECONDS code=0
    shift 2
    printf '== %s\n' "$label"
    timeout "$limit" "$@" > "$out/$day-$label.log" 2>&1 || code=$?
    tail -n 15 "$out/$day-$label.log"
    printf -- '-- %s: exit %s after %s s\n' "$label" "$code" "$((SECONDS - start))"
    if [ "$code" -gt "$worst" ]; then worst=$code; fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
part 110 tests "$python" -m pytest -q -m gpu tests/gpu tests/engine/test_cuda_graphs.py
part 50 attention "$python" -m benchmarks.bench_attention --dtypes=bfloat16 --repeats=10 --csv="$out/$day-attention.csv"
part 80 train-d12 "$python" -m benchmarks.bench_gpu --depth=12 --csv="$out/$day-train-d12.csv"
[ -s "$out/$day-train-d12.csv" ] || part 50 train-d12-eager "$python" -m benchmarks.bench_gpu --depth=12 --speed= --csv="$out/$day-train-d12-eager.csv"
part 50 train-d12-fp8 "$python" -m benchmarks.bench_gpu --depth=12 --speed=compile,fp8 --csv="$out/$day-train-d12-fp8.csv"
part 90 train-d20 "$python" -m benchmarks.bench_gpu --depth=20 --device-batch=16 --steps=4 --csv="$out/$day-train-d20.csv"
part 90 train-d20-fp8 "$python" -m benchmarks.bench_gpu --depth=20 --device-batch=16 --steps=4 --speed=compile,fp8 --csv="$out/$day-train-d20-fp8.csv"
part 30 decode "$python" -m benchmarks.bench_attention --dtypes=bfloat16 --only=decoding --no-memory --csv="$out/$day-decode.csv"
engine=("$python" -m benchmarks.bench_engine --device=cuda --csv="$out/$day-engine.csv")
part 45 engine-d12 "${engine[@]}" --only=decode,load --context=2048 --tokens=200
part 45 engine-d20 "${engine[@]}" --only=decode,bandwidth --depth=20 --context=2048 --tokens=100
exit "$worst"
