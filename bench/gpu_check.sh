#!/usr/bin/env bash
# Everything that only a GPU can show, in steps: build tests large sanitizers profile settings bench bars. Each has a time
# limit of its own; one that fails does not stop the next.
#
#   bench/gpu_check.sh [--dry-run] [folder, relative to the checkout; default: gpu-check]
#
# All at once takes up to half an hour. At 10 minutes a command, and of 15 minutes the first and one other:
#   STEPS="build tests large" bench/gpu_check.sh
#   STEPS="sanitizers profile settings" bench/gpu_check.sh
#   STEPS="bench bars" bench/gpu_check.sh           again: the benchmark goes on; BENCH_ARGS="--minutes 3": for so long
# Steps taken by STEPS add to the folder; without it, it is emptied first. It is packed into FOLDER.tgz at the end:
# summary.txt, run.json (device, versions, commit, each step's result, seconds and counts), logs, *.failures (written at
# once: a step that is cut off has them), CSVs, figures. The exit status is 1 if a step failed, 2 if nothing could be
# checked; speeds that are missed are reported apart and fail nothing.
#
# PYTHON: the interpreter (default: the checkout's .venv, else python3), which has torch with CUDA, triton, pytest-xdist
# and those of the extra "bench". WORKERS=15: processes that test. TEST_ARGS="-k name": more for pytest in "tests".
# SKIP_NATIVE=1: go on without the CUDA kernels. COMMIT: of a copy without git. --dry-run: the same steps on a CPU, as far
# as they go there: is all in place?
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

ALL="build tests large sanitizers profile settings bench bars"
refuse() { printf '%s\n' "$@" >&2; exit 2; }

dry=0
out=gpu-check
for argument in "$@"; do
    case $argument in
    --dry-run) dry=1 ;;
    -*) refuse "usage: bench/gpu_check.sh [--dry-run] [folder]" ;;
    *) out=$argument ;;
    esac
done
for name in ${STEPS:-}; do
    case " $ALL " in *" $name "*) ;; *) refuse "no such step: $name; there are: $ALL" ;; esac
done
if [ -z "${COMMIT:-}" ] && [ "$(git rev-parse --show-toplevel 2>/dev/null)" != "$(pwd -P)" ]; then
    refuse "this is no checkout that git knows: COMMIT must say which commit it is a copy of"
fi
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
device=cuda
[ $dry = 0 ] || device=cpu
if [ $dry = 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    refuse "$python sees no GPU: nothing to check (--dry-run tries the script without one)"
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
summary=$out/summary.txt
if [ -z "${STEPS:-}" ]; then
    [ -z "$(ls -A "$out")" ] || [ -e "$summary" ] || refuse "$out is in use, and not by this script"
    rm -rf "$out"/*.log "$out"/*.failures "$out"/*.csv "$out"/*.csv.part "$out"/bench "$out"/bench-so-far \
        "$summary" "$out/run.json"
fi
: >>"$summary"

failed=0 ran=0 child='' current='' started=0

wanted() { case " ${STEPS:-$ALL} " in *" $1 "*) ;; *) return 1 ;; esac; }

tail_of() { # the last line of a test run: how many passed
    grep -E '(^|[ =])[0-9]+ (passed|failed|skipped|errors?)\b' "$out/$1.log" | tail -1
}

note() { # name, result
    local seconds=$((SECONDS - started)) counts
    counts=$(tail_of "$1")
    printf '%-12s %4d s  %s%s\n' "$1" "$seconds" "$2" "${counts:+  ($counts)}" | tee -a "$summary" >&2
    "$python" -m bench.gpu_record step "$out" "$1" "$2" "$seconds"
}

finish() { # exit status
    "$python" -m bench.gpu_record pack "$out"
    echo "ran $ran of $(set -- ${STEPS:-$ALL}; echo $#) steps: $out and $out.tgz" >&2
    exit "$1"
}

stop() { # what `timeout` runs is in a process group of its own, which nobody else would end
    trap '' INT TERM
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null
        wait "$child"
        note "$current" INTERRUPTED
    fi
    finish 130
}
trap stop INT TERM

limited() { # seconds, command...: its exit status
    timeout --kill-after=10 "$@" >"$out/$current.log" 2>&1 &
    child=$!
    wait $child
    local status=$?
    child=''
    return $status
}

step() { # name, limit in seconds, command...
    wanted "$1" || return 0
    current=$1 started=$SECONDS ran=$((ran + 1))
    shift
    local limit=$1 status result counts
    echo "== $current (at most $limit s): ${*:2}" >&2
    rm -f "$out/$current.failures"
    limited "$@"
    status=$?
    counts=$(tail_of "$current")
    case $current:$status in
    bench:3) result="cut off by its time limit: STEPS=bench goes on" ;;
    bars:[013]) result=$(tail -1 "$out/bars.log") ;;
    *:0) result=passed ;;
    *:124) result="OUT OF TIME after $limit s" ;;
    *:137) result="KILLED: out of time, or of memory" ;;
    *) result="FAILED with status $status" ;;
    esac
    case $current:$counts in # on a GPU a test that skips shows nothing
    large:*skipped*) [ $dry = 1 ] || result="SKIPPED" ;;
    *skipped*) [[ $counts =~ (passed|failed|error) ]] || result="NOTHING RAN" ;;
    esac
    case $result in [a-z0-9]*) ;; *) failed=1 ;; esac
    note "$current" "$result"
}

need_backends() { # a test that skips for want of a backend would pass for one that was run
    local backend
    for backend in triton $([ "${SKIP_NATIVE:-}" = 1 ] || echo native); do
        "$python" -c 'import sys, brn_kernels.backends as b; b.resolve(*sys.argv[1:])' $backend $device >&2 && continue
        echo "the $backend backend does not run on $device (SKIP_NATIVE=1 goes on without native)" | tee -a "$summary" >&2
        finish 2
    done
}

{ date -u; nvidia-smi; git status --porcelain -uno; "$python" -m brn_kernels info; } >"$out/machine.txt" 2>&1
"$python" -m bench.gpu_record machine "$out" >&2

pytest=("$python" -m pytest -q --durations 15 -p no:cacheprovider -p no:benchmark)
if [ $dry = 1 ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    side_by_side=(-n "${WORKERS:-2}" --dist loadgroup)
    what=(tests/gpu tests/test_unaligned.py)
    step build 600 "$python" -m brn_kernels build --in-place
else
    unset TRITON_INTERPRET
    pytest+=(--device cuda -m device)
    side_by_side=(-n "${WORKERS:-15}" --dist loadgroup --maxfail 100)
    what=(tests)
    step build 200 "$python" -m brn_kernels build --in-place --cuda
fi
if wanted tests || wanted large || wanted sanitizers; then need_backends; fi
step tests 420 "${pytest[@]}" "${side_by_side[@]}" --failures "$out/tests.failures" "${what[@]}" \
    --ignore tests/gpu/test_large.py --ignore tests/gpu/test_sanitizer.py ${TEST_ARGS:-}
step large 120 "${pytest[@]}" -n 0 --failures "$out/large.failures" tests/gpu/test_large.py # the memory is its own
step sanitizers 300 "${pytest[@]}" "${side_by_side[@]}" --failures "$out/sanitizers.failures" tests/gpu/test_sanitizer.py

fresh=
[ -n "${STEPS:-}" ] || fresh=--fresh
if [ $dry = 1 ]; then
    step profile 60 "${pytest[@]}" tests/benchmark/test_profile.py
    step settings 200 "$python" -m scripts.compile_check --first 4
    step bench 300 "$python" -m bench --tiny --device cpu $fresh --out "$out/bench.csv"
else
    step profile 120 "$python" -m bench profile "$out/profile.csv"
    step settings 170 "$python" -m bench settings "$out/settings.csv" --main --seconds 0.01 --minutes 2
    step bench 500 "$python" -m bench --device cuda $fresh ${BENCH_ARGS:---minutes 7} --out "$out/bench.csv"
fi
if wanted bars; then
    measured=$out/bench.csv
    if [ -e "$measured.part" ]; then # a cut-off run goes on from its own file: what there is, is finished elsewhere
        rm -f "$out"/bench-so-far.csv*
        cp "$measured.part" "$out/bench-so-far.csv.part"
        measured=$out/bench-so-far.csv
        tiny=
        [ $dry = 0 ] || tiny=--tiny
        "$python" -m bench --device $device $tiny --minutes 0 --out "$measured" >"$out/bench-so-far.log" 2>&1
    fi
    if grep -qs "WRONG RESULTS" "$out/bench.log"; then
        echo "bars: not judged, results are wrong" | tee -a "$summary" >&2
    else
        step bars 30 "$python" -m bench bars "$measured"
    fi
fi
finish $failed
