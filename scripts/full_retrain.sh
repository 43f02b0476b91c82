#!/usr/bin/env bash
# A full retrain, for cron, Airflow or Argo: builds the model anew from history beside the live job, compares the two, and hands the better
# one over. One at a time; what was interrupted goes on with the same settings; reports and the newest directories are kept.
#
#   scripts/full_retrain.sh -c train.toml [--last 30d] [options of `tidemill retrain`]
#
#   --last SPAN   learn the last SPAN of the log (90m, 36h, 30d) instead of all of it; `--from` as it is at the first start
#
# Environment: TIDEMILL (the binary; default: `tidemill` on the PATH, else target/release/tidemill here), TIDEMILL_RETRAINS (where
# directories and reports are kept; default: ./retrains), TIDEMILL_RETRAINS_KEEP (how many stay; default 3), TIDEMILL_NICE (default 10).
# Exit status, that of `tidemill retrain`: 0 done, 1 failed, 2 wrong usage, 3 not promoted, 4 promotion pending, 130 interrupted; and 5:
# another one is running.
set -euo pipefail

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }
root=${TIDEMILL_RETRAINS:-retrains} keep=${TIDEMILL_RETRAINS_KEEP:-3}
here=$(cd "$(dirname "$0")/.." && pwd)
tidemill=${TIDEMILL:-$(command -v tidemill || echo "$here/target/release/tidemill")}
command -v "$tidemill" >/dev/null || { echo "\`$tidemill\` is not there; set TIDEMILL to the binary, or run \`cargo build --release\`" >&2; exit 2; }

options=() last='' config=false
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --last) last=${2:?--last takes a span such as 30d} && shift 2 ;;
    --dir | --dir=*) echo "the directory is this script's: set TIDEMILL_RETRAINS" >&2 && exit 2 ;;
    *)
      case "$1" in -c | --config | -c?* | --config=*) config=true ;; esac
      options+=("$1") && shift
      ;;
  esac
done
$config || { usage >&2; exit 2; }
if [ -n "$last" ]; then
  [[ $last =~ ^([0-9]+)([mhd])$ ]] || { echo "--last $last: expected a number and m, h or d, such as 36h" >&2; exit 2; }
  declare -A seconds=([m]=60 [h]=3600 [d]=86400)
  from=$(($(date +%s) - BASH_REMATCH[1] * seconds[${BASH_REMATCH[2]}]))
fi

mkdir -p "$root"
exec 9>"$root/LOCK"
flock -n 9 || { echo "another retrain is running in \`$root\`" >&2; exit 5; }

# What was interrupted goes on as it was asked for; the times in its options stay what they were.
dir='' asked=("${options[@]}" ${last:+--last "$last"})
if [ -L "$root/current" ] && [ -f "$root/current/asked" ]; then
  if [ "$(printf '%s\n' "${asked[@]}")" != "$(cat "$root/current/asked")" ]; then
    echo "an interrupted retrain was asked for otherwise: \`$(tr '\n' ' ' <"$root/current/asked")\`;" \
      "go on with that, or remove \`$root/current\` to begin anew" >&2
    exit 2
  fi
  dir=$root/$(readlink "$root/current")
  from=$(cat "$dir/from" 2>/dev/null || true)
  echo "going on in $dir" >&2
else
  name=$(date -u +%Y%m%dT%H%M%SZ)
  dir=$root/$name
  mkdir "$dir"
  printf '%s\n' "${asked[@]}" >"$dir/asked"
  if [ -n "$last" ]; then echo "$from" >"$dir/from"; fi
  ln -sfn "$name" "$root/current"
fi

status=0
nice -n "${TIDEMILL_NICE:-10}" "$tidemill" retrain "${options[@]}" ${from:+--from "${from}000"} --dir "$dir" || status=$?
case $status in
  0 | 3 | 4)
    rm "$root/current"
    if [ -f "$dir/report.json" ]; then cp "$dir/report.json" "$root/report-$(basename "$dir").json"; fi
    # The newest stay: a live job that is down takes its candidate from there when it starts.
    find "$root" -mindepth 1 -maxdepth 1 -type d -name '2*Z' | sort -r | tail -n "+$((keep + 1))" | xargs -r rm -r
    ;;
esac
exit $status
