#!/usr/bin/env bash
# Everything that only a GPU can show, in the half hour for which one is rented: builds the native backend, runs the tests
# that use a GPU, the benchmark, the sanitizers. Each has its own time limit; one that fails does not stop the next.
#
#   bench/gpu_check.sh [--dry-run] [folder, relative to the checkout]
#
# Logs, CSVs, figures and a summary go to the folder (default: gpu-check). PYTHON names the interpreter (default: the
# checkout's .venv, else python3); its packages must be there: torch with CUDA, triton, pytest, and those of the extras
# "bench" and "dev". STEPS="build bench" takes only these; WORKERS=4 tests by fewer processes at once; COMMIT names the
# commit of a copy without git; BENCH_ARGS="--quick" measures less. --dry-run does the same on the CPU, kernels interpreted, with a handful of tests: is all in place?
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry=0
out=gpu-check
for argument in "$@"; do
    case $argument in
    --dry-run) dry=1 ;;
    -*) echo "usage: bench/gpu_check.sh [--dry-run] [folder]" >&2; exit 2 ;;
    *) out=$argument ;;
    esac
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
summary=$out/summary.txt
fresh=
if [ -z "${STEPS:-}" ]; then # steps taken one by one belong together, and an interrupted benchmark goes on
    : >"$summary" || exit 2
    fresh=--fresh
fi
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
    124) result="OUT OF TIME after $limit s" ;;
    137) result="KILLED: out of time, or of memory" ;;
    *) result="FAILED with status $status" ;;
    esac
    if [ $dry = 0 ] && [ -n "$(tail_of "$name")" ] && ! tail_of "$name" | grep -q passed; then
        result="NOTHING RAN"
        status=1
    fi
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
    step bench 300 "$python" -m bench --tiny --device cpu $fresh --out "$out/bench.csv"
else
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "$python sees no GPU: nothing to check (--dry-run tries the script without one)" >&2
        exit 2
    fi
    unset TRITON_INTERPRET
    workers=(-p no:cacheprovider -p no:benchmark --device cuda -m device -n "${WORKERS:-12}" --dist loadgroup)
    step build 240 "$python" -m brn_kernels build --in-place --cuda
    step tests 300 "$python" -m pytest -q "${workers[@]}" --maxfail 100 tests --ignore tests/gpu/test_sanitizer.py
    step bench 500 "$python" -m bench --device cuda $fresh ${BENCH_ARGS:---minutes 7} --out "$out/bench.csv"
    step bars 30 "$python" -m bench bars "$out/bench.csv"
    step sanitizers 300 "$python" -m pytest -q "${workers[@]}" tests/gpu/test_sanitizer.py
fi

[ -s "$summary" ] || { echo "no such step: ${STEPS:-}" >&2; exit 2; }
echo "logs in $out" >&2
exit $failed
