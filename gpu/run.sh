#!/usr/bin/env bash
# Everything that some minutes on a bare GPU machine should answer, without a network:
#
#     bash gpu/run.sh                  all steps of the first command, in 490 s at most
#     bash gpu/run.sh text             single steps, such as the second command
#     bash gpu/run.sh --dry [STEP ...] the same on a machine without a GPU, with tiny sizes
#
# Results are left under $OUT. all.log there grows after each step, so that whatever is cut off, the
# rest is there. A step that fails does not stop the next one; a library that refuses Triton does.
#
#   step      limit   what it answers
#   check     110 s   which assemblers make right code: one process each, side by side
#   models     80 s   whether models stream, pack, generate, compile, checkpoint, repeat
#   tests      80 s   the quickest part of tests/kernels/test_gpu.py, at the same time as models
#   rates      15 s   bytes and operations a second that the device reaches
#   sweep      90 s   the fastest tiles, compiled by 16 processes
#   table      90 s   the operations and layers beside SDPA, FlexAttention, mamba-ssm and fla
#   train      60 s   tokens a second and memory of 150m models
#   profile    40 s   counters of the hottest kernels, by ncu
# and only when named:
#   text      120 s   150m models trained on real text, 40 s each; BLOCKS="dpassm vanilla" or others
#   lengths   240 s   the table at 2,048 and 32,768, and N 128
#   alltests  300 s   all of tests/kernels/test_gpu.py
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-/tmp/longctx-gpu/out}
WORK=${WORK:-/tmp/longctx-gpu/work} # what a later call of this script uses again
LIMIT=${LIMIT:-490}
PYTHON=${PYTHON:-python3}
BLOCKS=${BLOCKS:-dpassm vanilla}
FIRST_COMMAND="check models tests rates sweep table train profile"
NAMED="text lengths alltests"

# Extra flags of each program; in a dry run, sizes that a CPU can do in seconds.
ENVIRONMENT=() CHECK=() MODELS=() TESTS=() RATES=() SWEEP=() TRAIN=() TEXT=() HOT=()
TABLE=(--groups ssd window full layers --rounds 12)
INTERPRETER=()
DRY=
if [ "${1:-}" = --dry ]; then
    shift
    DRY=yes
    LIMIT=3600 # a busy machine must not make it fail
    ENVIRONMENT=(--dry)
    CHECK=(--device cpu --turns 1 --seconds 600)
    MODELS=(--device cpu --length 90 --blocks dpassm --seconds 300)
    MODELS+=(--checks streams packs generates checkpoints casts repeats keeps_rows_apart)
    TESTS=(--collect-only)
    RATES=(--device cpu)
    HOT=(--device cpu --batch 1 --length 70 --heads 1)
    SWEEP=("${HOT[@]}" --window 20 --limit 3)
    TABLE=(--device cpu --groups ssd --rounds 1 --lengths 64 --tokens 64 --n-heads 2)
    TRAIN=(--device cpu --size tiny --vocab 256 --tokens 64 --lengths 64 --seconds 0.1)
    TRAIN+=(--blocks dpassm --backends auto)
    TEXT=(--device cpu --size tiny --length 64 --batch 2 --seconds 0.2 --every 0.1)
    INTERPRETER=(env TRITON_INTERPRET=1)
fi
STEPS=${*:-$FIRST_COMMAND}
for step in $STEPS; do
    case " $FIRST_COMMAND $NAMED " in
        *" $step "*) ;;
        *)
            echo "expected steps out of: $FIRST_COMMAND $NAMED; got $step" >&2
            exit 2
            ;;
    esac
done

mkdir -p "$OUT" "$WORK" || exit 1
say() { echo "[$SECONDS s] $*" | tee -a "$OUT/all.log"; }
keep() { # NAME: add its log to the one that travels back
    { echo "===== $1"; cat "$WORK/$1.log"; } >> "$OUT/all.log"
}
limited() { # SECONDS COMMAND...: within this limit and that of the whole script
    local left=$((LIMIT - SECONDS)) limit=$1
    shift
    [ -n "$DRY" ] && limit=$left
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "not run: no time left"
        return 124
    fi
    timeout -k 3 "$limit" "$@"
}
log() { # NAME SECONDS COMMAND...: its output goes to a log
    local name=$1
    shift
    limited "$@" > "$WORK/$name.log" 2>&1
    echo "exit status $?" >> "$WORK/$name.log"
}
step() { # NAME SECONDS COMMAND...: run it, keep its log, show its end
    say "$1"
    log "$@"
    keep "$1"
    tail -n "${TAIL:-8}" "$WORK/$1.log"
}
wanted() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }

# The checkout as an installed package: kernels/ belongs inside of it, as pyproject.toml maps it. A
# copy, because there may be no pip that can install offline; with metadata, for the version.
SITE=$WORK/site
rm -rf "$SITE"
mkdir -p "$SITE" || exit 1
cp -r "$ROOT/longctx_layers" "$SITE/"
cp -r "$ROOT/kernels" "$SITE/longctx_layers/kernels"
cp -r "$ROOT/benchmarks" "$SITE/"
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$ROOT/pyproject.toml")
mkdir "$SITE/longctx_layers-$VERSION.dist-info"
printf 'Metadata-Version: 2.1\nName: longctx-layers\nVersion: %s\n' "$VERSION" \
    > "$SITE/longctx_layers-$VERSION.dist-info/METADATA"
for peer in fla mamba_ssm; do
    [ -d "$ROOT/.gpu/$peer" ] && cp -r "$ROOT/.gpu/$peer" "$SITE/"
done
# fla refuses its own backward pass on Hopper under an older Triton; its time is wanted all the same.
[ -f "$SITE/fla/utils/env.py" ] &&
    sed -i 's/^TRITON_ABOVE_3_7_1 = .*/TRITON_ABOVE_3_7_1 = True/' "$SITE/fla/utils/env.py"

# Without the current folder on the path, which has longctx_layers/ without its kernels.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$SITE:$ROOT/gpu
# The gate of Triton's versions is what this run is to judge.
export LONGCTX_TRITON_ANY=1
cd "$ROOT" || exit 1

log environment 60 "$PYTHON" gpu/environment.py "${ENVIRONMENT[@]}"
keep environment
tail -n 12 "$WORK/environment.log"
if ! grep -q '^exit status 0$' "$WORK/environment.log"; then
    say "stopped: the Triton kernels do not run here; see environment in $OUT/all.log"
    exit 1
fi

# Assemblers by name: the wheel's own, a newer one in it, the machine's, and the one brought along.
BIN=$("$PYTHON" -c "import pathlib, triton
print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin')")
[ -f "$ROOT/.gpu/ptxas.gz" ] && gzip -dc "$ROOT/.gpu/ptxas.gz" > "$WORK/ptxas" &&
    chmod +x "$WORK/ptxas"
assembler() {
    case $1 in
        bundled) echo "$BIN/ptxas" ;;
        blackwell) echo "$BIN/ptxas-blackwell" ;;
        machine) command -v ptxas || echo /usr/local/cuda/bin/ptxas ;;
        carried) echo "$WORK/ptxas" ;;
    esac
}
ASSEMBLERS=
for name in bundled blackwell machine carried; do
    [ -n "$DRY" ] && [ "$(wc -w <<< "$ASSEMBLERS")" = 2 ] && break # no CPU uses them
    if [ -x "$(assembler $name)" ]; then
        ASSEMBLERS="$ASSEMBLERS $name"
        say "assembler $name: $("$(assembler $name)" --version | grep -o 'V[0-9][0-9.]*')"
    fi
done

if wanted check; then
    say check
    for name in $ASSEMBLERS; do
        TRITON_PTXAS_PATH=$(assembler "$name") TRITON_CACHE_DIR=$WORK/cache-$name \
            log "check-$name" 110 "$PYTHON" gpu/check.py --name "$name" "${CHECK[@]}" &
    done
    wait
    rm -f "$WORK/best"
    for name in $ASSEMBLERS; do
        keep "check-$name"
        say "== $name"
        tail -n 6 "$WORK/check-$name.log"
        # The last one that is right goes on: later ones in the list are newer.
        grep -q '^ALL RIGHT' "$WORK/check-$name.log" && echo "$name" > "$WORK/best"
    done
    [ -f "$WORK/best" ] || say "no assembler was right: times that follow are of wrong kernels"
fi
# What was right here, in this call or an earlier one; or else the newest there is.
BEST=$(cat "$WORK/best" 2> /dev/null || echo "${ASSEMBLERS##* }")
TRITON_PTXAS_PATH=$(assembler "$BEST")
export TRITON_PTXAS_PATH TRITON_CACHE_DIR=$WORK/cache-$BEST
say "going on with the assembler $BEST: TRITON_PTXAS_PATH=$TRITON_PTXAS_PATH"

PARALLEL=$("$PYTHON" -c "import xdist; print('-n 8')" 2> /dev/null)
# Verbose: of what is cut off, the log still says what passed.
PYTEST=("$PYTHON" -m pytest tests/kernels/test_gpu.py -v -rs -p no:cacheprovider $PARALLEL)
wanted models && log models 80 "$PYTHON" gpu/check_models.py "${MODELS[@]}" &
wanted tests && TAIL=4 step tests 80 "${PYTEST[@]}" -k "head_dim or stream" "${TESTS[@]}"
wait
if wanted models; then
    keep models
    tail -n 8 "$WORK/models.log"
fi

TILES=$OUT/sweep.json
[ -f "$WORK/sweep.json" ] && cp "$WORK/sweep.json" "$TILES" # from an earlier call
wanted rates && step rates 15 "$PYTHON" gpu/rates.py --out "$OUT/rates.json" "${RATES[@]}"
if wanted sweep; then
    TAIL=60 step sweep 90 "${INTERPRETER[@]}" "$PYTHON" gpu/sweep.py --out "$TILES" "${SWEEP[@]}"
    cp "$TILES" "$WORK/sweep.json"
fi
table() { # NAME SECONDS FLAG...
    local name=$1 limit=$2
    shift 2
    TAIL=60 step "$name" "$limit" "$PYTHON" gpu/table.py --tiles "$TILES" --output "$OUT/$name" \
        "$@" "${TABLE[@]}"
}
wanted table && table table 90 --lengths 8192
wanted train && TAIL=12 step train 60 "$PYTHON" gpu/train.py --tiles "$TILES" \
    --rates "$OUT/rates.json" --out "$OUT/train.json" "${TRAIN[@]}"
if wanted profile; then
    COUNTERS=gpu__time_duration.sum,sm__inst_executed.avg.per_cycle_elapsed
    COUNTERS+=,sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed
    COUNTERS+=,sm__warps_active.avg.pct_of_peak_sustained_active,dram__bytes.sum
    COUNTERS+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
    COUNTERS+=,launch__registers_per_thread,smsp__inst_executed.sum
    COUNTERS+=,l1tex__data_bank_conflicts_pipe_lsu.sum
    KERNELS='regex:_back_to|_scan|_states|_forward|_keys|_queries'
    NCU=$(command -v ncu || ls /opt/nvidia/nsight-compute/*/ncu 2> /dev/null | tail -n 1)
    HOT=("$PYTHON" gpu/hot.py --tiles "$TILES" "${HOT[@]}")
    if [ -n "$DRY" ]; then
        step profile 40 "${INTERPRETER[@]}" "${HOT[@]}"
    elif [ -x "$NCU" ]; then
        TAIL=80 step profile 40 "$NCU" --clock-control none --metrics "$COUNTERS" \
            --kernel-name "$KERNELS" --launch-count 24 "${HOT[@]}"
    else
        say "profile: not measured, there is no ncu"
    fi
fi

wanted text && TAIL=40 step text $((60 * $(wc -w <<< "$BLOCKS"))) "$PYTHON" gpu/text.py \
    --tiles "$TILES" --blocks $BLOCKS --out "$OUT/text.json" "${TEXT[@]}"
if wanted lengths; then
    table table-2048 80 --lengths 2048
    table table-32768 80 --lengths 32768
    table table-N128 80 --lengths 8192 --states 128
fi
wanted alltests && TAIL=12 step alltests 300 "${PYTEST[@]}" "${TESTS[@]}"
say "end"
