#!/usr/bin/env bash
# Everything that only a GPU can show, in the half hour for which one is rented: builds the native backend, runs the
# tests and the sanitizers, then the benchmark. Each has its own time limit; one that fails does not stop the next.
#
#   bench/gpu_check.sh [--dry-run] [folder]
#
# Logs, CSVs, figures and a summary go to the folder (default: gpu-check). PYTHON names the interpreter (default: the
# checkout's .venv, else python3); its packages must be there: torch with CUDA, triton, pytest, and those of the extras
# "bench" and "dev". STEPS="build bench" takes only these. --dry-run does the same on the CPU, kernels interpreted, with a handful of tests: is all in place?
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
out=${1:-gpu-check}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
summary=$out/summary.txt
: >"$summary"
failed=0

step() { # name, limit in seconds, command...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    echo "== $name (at most $limit s): $*" >&2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
    0) result=passed ;;
    124 | 137) result="OUT OF TIME after $limit s" ;;
    *) result="FAILED with status $status" ;;
    esac
    [ $status -eq 0 ] || failed=1
    printf '%-14s %5d s  %s%s\n' "$name" $((SECONDS - start)) "$result" "$(tail_of "$name")" | tee -a "$summary" >&2
}

tail_of() { # the last line of a test run says how many passed
    local line
    line=$(grep -E '[0-9]+ (passed|failed|skipped|error)' "$out/$1.log" | tail -1)
    [ -z "$line" ] || echo "  ($line)"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
{
    git rev-parse HEAD 2>/dev/null
    git status --porcelain -uno 2>/dev/null
    date -u
    nvidia-smi 2>&1
    "$python" -m brn_kernels info
} >"$out/machine.txt" 2>&1

if [ $dry = 1 ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    step build 600 "$python" -m brn_kernels build --in-place
    step tests-gpu 120 "$python" -m pytest -q -p no:cacheprovider tests/gpu
    step tests 300 "$python" -m pytest -q -p no:cacheprovider tests/test_invariants.py -k "triton or native"
    step bench 300 "$python" -m bench --tiny --device cpu --fresh --out "$out/bench.csv"
else
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$python sees no GPU: nothing to check (--dry-run tries the script without one)" >&2
        exit 2
    fi
    step build 240 "$python" -m brn_kernels build --in-place --cuda
    step tests-gpu 240 "$python" -m pytest -q -p no:cacheprovider --device cuda tests/gpu -k "not sanitizer"
    step tests 360 "$python" -m pytest -q -p no:cacheprovider --device cuda tests --ignore tests/gpu -x --maxfail 20
    step sanitizers 300 "$python" -m pytest -q -p no:cacheprovider --device cuda tests/gpu/test_sanitizer.py
    step bench 500 "$python" -m bench --device cuda --fresh --minutes 7.5 --out "$out/bench.csv"
    step bars 30 "$python" -m bench bars "$out/bench.csv"
fi

echo "logs in $out" >&2
exit $failed
