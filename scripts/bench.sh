#!/usr/bin/env bash
# Speed, in one run on one machine: the micro benches (cargo bench), then events to weights beside Vowpal Wabbit (scripts/bench.py).
#
#   scripts/bench.sh                      both; arguments after -- go to scripts/bench.py
#   scripts/bench.sh --events -- --impressions 2000000 --rounds 5
#   scripts/bench.sh --micro
#
# Ratios count, not seconds: run it on a quiet machine and compare within one run.
set -euo pipefail
cd "$(dirname "$0")/.."

micro=true
events=true
while [ $# -gt 0 ]; do
  case "$1" in
    --micro) events=false ;;
    --events) micro=false ;;
    --) shift && break ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) echo "unknown option \`$1\`; see scripts/bench.sh --help" >&2 && exit 2 ;;
  esac
  shift
done

if $micro; then cargo bench --locked; fi
if $events; then
  [ -x .venv/bin/python ] || { echo "no .venv: run scripts/test.sh once, it makes it" >&2; exit 1; }
  cargo build --release --locked
  .venv/bin/python scripts/bench.py "$@"
fi
