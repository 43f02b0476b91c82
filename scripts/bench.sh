#!/usr/bin/env bash
# Speed, in one run on one machine, and one table of it at the end: the micro benches (cargo bench), events to weights beside Vowpal
# Wabbit (scripts/bench.py), answers beside its daemon (scripts/bench_serve.py), the drain from Kafka beside a bare consumer
# (scripts/bench_kafka.py), a full retrain (scripts/bench_retrain.py), answers while versions are swapped in beside answers without
# (scripts/bench_reload.py). The rows stay in target/bench/rows.jsonl.
#
#   scripts/bench.sh                          all six
#   scripts/bench.sh micro serving            some: micro, events, serving, kafka, retrain, reload
#   scripts/bench.sh events -- --rounds 5     of one: what comes after -- goes to its script
#
# Ratios count, not seconds: run it on a quiet machine and compare within one run.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=()
while [ $# -gt 0 ]; do
  case "$1" in
    micro | events | serving | kafka | retrain | reload) parts+=("$1") ;;
    --) shift && break ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) echo "unknown argument \`$1\`; see scripts/bench.sh --help" >&2 && exit 2 ;;
  esac
  shift
done
if [ ${#parts[@]} = 0 ]; then parts=(micro events serving kafka retrain reload); fi
if [ $# -gt 0 ] && [ ${#parts[@]} != 1 ]; then echo "arguments after -- are for one part; name it" >&2 && exit 2; fi

[ -x .venv/bin/python ] || { echo "no .venv: run scripts/test.sh once, it makes it" >&2; exit 1; }
mkdir -p "${CARGO_TARGET_DIR:-target}/bench"
rows=${CARGO_TARGET_DIR:-target}/bench/rows.jsonl
: >"$rows"

for part in "${parts[@]}"; do
  printf '\n=== %s\n' "$part"
  case "$part" in
    micro) cargo bench --locked --bench '*' "$@" | .venv/bin/python scripts/bench_table.py micro "$rows" ;;
    events)
      cargo build --release --locked
      .venv/bin/python scripts/bench.py --rows "$rows" "$@"
      ;;
    serving)
      cargo build --release --locked --bin tidemill --example load
      .venv/bin/python scripts/bench_serve.py --rows "$rows" "$@"
      ;;
    kafka)
      cargo build --release --locked --bin tidemill --example drain
      .venv/bin/python scripts/bench_kafka.py --rows "$rows" "$@"
      ;;
    retrain)
      cargo build --release --locked --bin tidemill
      .venv/bin/python scripts/bench_retrain.py --rows "$rows" "$@"
      ;;
    reload)
      cargo build --release --locked --bin tidemill --example load
      .venv/bin/python scripts/bench_reload.py --versions 62 --step 2600 --cache --rows "$rows" "$@"
      ;;
  esac
done

printf '\n=== %s; %s cores, load %s\n\n' "$(date -u +%F)" "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg)"
.venv/bin/python scripts/bench_table.py print "$rows"
