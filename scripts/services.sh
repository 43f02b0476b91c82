#!/usr/bin/env bash
# Services on loopback, for the tests and for trying Tidemill: Apache Kafka, one node in KRaft mode; an S3 server, SeaweedFS; Azurite,
# Microsoft's emulator of Azure Blob Storage; and for GCS, of which there is no emulator that does, SeaweedFS again, behind a header rewritten.
#
#   scripts/services.sh up      [SERVICE...]   start, from nothing or from kept data; says so where one runs already
#   scripts/services.sh status  [SERVICE...]   what runs, where, with which pid and log; exit code 0 if all of it answers, else 1
#   scripts/services.sh down    [SERVICE...]   kill and wipe the data; only what was downloaded stays
#
#   scripts/services.sh stop    [SERVICE...]   end it in good order, keep data and ports
#   scripts/services.sh kill    [SERVICE...]   kill -9, keep data and ports: an outage that starts with a crash
#   scripts/services.sh start   [SERVICE...]   start again what was stopped or killed, on the same data and ports
#   scripts/services.sh restart [SERVICE...]   kill, then start: a crash in the middle of a test
#
#   scripts/services.sh kafka TOOL [ARG...]    run one of Kafka's own tools on the broker; without TOOL, list them
#
# Services: kafka, s3, azure, gcs. None named means all.
#
# `up` writes addresses, users and passwords to .services/SERVICE/env, for `set -a; . .services/kafka/env; set +a`.
# All state lives in .services of this checkout; checkouts do not see each other's. Settings, by environment variable:
#   TIDEMILL_SERVICES     another folder for the state (downloads stay where they are): a second set of services beside the first
#   TIDEMILL_KAFKA_PORT   first of five ports in a row for Kafka; without it, free ones between 20000 and 32000
#   TIDEMILL_S3_PORT      first of nine ports in a row for S3, likewise
#   TIDEMILL_AZURE_PORT   the port for Azure, likewise
#   TIDEMILL_GCS_PORT     first of nine ports in a row for GCS, likewise
#
# Needs Linux. Installs a Java runtime (17 or newer), Maven, OpenSSL, Apache's web server and Python's venv by apt-get where they are missing. The first `up` of
# a checkout downloads some 40 MB for Kafka, some 60 MB for S3 and GCS, and for Azure some 130 MB (0.5 GB on the
# disk), Node.js with it. A service that does not answer within 120 s of its start has failed: the end of its log is shown.
set -euo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
downloads=$(dirname "$scripts")/.services
state=${TIDEMILL_SERVICES:-$downloads}
case "$state" in /*) ;; *) state=$PWD/$state ;; esac
patience=120

# What a service NAME is: functions in scripts/services/NAME.sh, which work in its home, "$state/NAME".
#   NAME_install    tools and downloads; quick when there is nothing to do
#   NAME_prepare    fills the empty folder home/data and writes home/env; picks the ports
#   NAME_launch     calls `spawn NAME COMMAND...` once
#   NAME_answers    succeeds once it serves requests
#   NAME_about      prints address and version, NAME_next what a user can do now
# shellcheck source=scripts/lib.sh
. "$scripts/lib.sh"
# shellcheck source=scripts/services/kafka.sh
. "$scripts/services/kafka.sh"
# shellcheck source=scripts/services/s3.sh
. "$scripts/services/s3.sh"
# shellcheck source=scripts/services/azure.sh
. "$scripts/services/azure.sh"
# shellcheck source=scripts/services/gcs.sh
. "$scripts/services/gcs.sh"
known=(kafka s3 azure gcs)

# --- for the functions of a service

# Starts its process apart from this shell and this shell's lock, and notes which it is.
spawn() { # service, command...
  local home=$state/$1
  shift
  if [ -e "$home/log" ]; then mv "$home/log" "$home/log.before"; fi
  : >"$home/log" # before the process: it is looked into at once
  setsid "$@" </dev/null >>"$home/log" 2>&1 9>&- &
  echo "$! $(birth $!)" >"$home/pid"
}

# Prints a port p such that p .. p + n - 1 are free. Below the range that the kernel takes outgoing connections' ports from, so that a
# service finds its ports free again after a restart.
free_ports() { # n
  local port i
  while :; do
    port=$((20000 + RANDOM % (12000 - $1)))
    for ((i = 0; i < $1; i++)); do
      if connects $((port + i)); then continue 2; fi
    done
    echo "$port"
    return
  done
}

# Prints the first of n ports in a row for a service: the one that TIDEMILL_SERVICE_PORT fixes, if all of them are free, or one that is free.
ports_for() { # service, n
  local name=TIDEMILL_${1^^}_PORT most=$((65536 - $2)) port taken
  port=${!name:-}
  if [ -z "$port" ]; then free_ports "$2" && return; fi
  [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le $most ]] || { echo "$name=$port is not a port from 1 to $most" >&2; return 1; }
  for ((taken = port; taken < port + $2; taken++)); do
    if connects $taken; then echo "$1: port $taken is taken ($name=$port wants $port to $((port + $2 - 1)))" >&2 && return 1; fi
  done
  echo "$port"
}

# Makes a folder with a virtual environment of Python, `venv`, that holds one package.
pip_venv() { # service, folder, package==version
  mkdir -p "$2" && python3 -m venv "$2/venv" || return 1
  "$2/venv/bin/python" -m pip install -q --disable-pip-version-check "$3" >"$2/pip.log" 2>&1 ||
    { echo "$1: pip could not install $3:" >&2 && tail -n 25 "$2/pip.log" >&2; return 1; }
}

# Makes a certificate authority (ca.pem), and for localhost a certificate that it signed (server.key, server.crt; server.pem is both).
self_signed() { # service, folder
  local dir=$2
  mkdir -p "$dir" || return 1
  {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Tidemill test CA" \
      -keyout "$dir/ca.key" -out "$dir/ca.pem" &&
      openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=localhost" -keyout "$dir/server.key" -out "$dir/server.csr" &&
      openssl x509 -req -in "$dir/server.csr" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -CAcreateserial -days 3650 -out "$dir/server.crt" \
        -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n')
  } 2>"$dir/openssl.log" || { echo "$1: openssl could not make certificates:" >&2; cat "$dir/openssl.log" >&2; return 1; }
  cat "$dir/server.key" "$dir/server.crt" >"$dir/server.pem"
}

connects() { # port
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# --- processes

# When a process began, in ticks since boot; nothing if there is none, or only a zombie. With the pid it names one process for good.
birth() { # pid
  local line fields
  line=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -ra fields <<<"${line##*) }" # from the third field on: the second, the name, may hold spaces
  if [ "${fields[0]}" != Z ]; then echo "${fields[19]}"; fi
}

# Prints the pid of a service's process, or fails if it does not run: a noted pid may be stale, and belong to another process by now.
pid_of() { # service
  local pid born
  read -r pid born 2>/dev/null <"$state/$1/pid" || return 1
  [ -n "$born" ] && [ "$(birth "$pid")" = "$born" ] && echo "$pid"
}

# Ends its process: TERM and, if that takes too long, KILL; or KILL at once.
end() { # service, TERM or KILL
  local pid i
  pid=$(pid_of "$1") || return 0
  kill "-$2" "$pid" 2>/dev/null || true
  for ((i = 0; i < patience * 10; i++)); do
    if ! pid_of "$1" >/dev/null; then
      rm -f "$state/$1/pid"
      return 0
    fi
    if [ "$2" = TERM ] && [ $i = 200 ]; then
      echo "$1 did not end within 20 s of a TERM signal: killing it" >&2
      kill -KILL "$pid" 2>/dev/null || true
    fi
    sleep 0.1
  done
  echo "$1: process $pid does not end" >&2
  return 1
}

# Starts it on what was prepared and waits until it answers; else shows the end of its log, and kills it.
run() { # service
  local home=$state/$1 until=$((SECONDS + patience)) why=
  "$1_launch" || return 1
  until "$1_answers"; do
    if ! pid_of "$1" >/dev/null; then
      why="$1 ended while starting"
    elif [ $SECONDS -ge $until ]; then
      why="$1 did not answer within $patience s"
    fi
    if [ -n "$why" ]; then
      printf '%s; the first errors and the end of %s:\n' "$why" "$home/log" >&2
      { grep -m 5 -iE '(error|fatal|exception)\b.*: ' "$home/log"; echo ...; tail -n 15 "$home/log"; } | sed 's/^/  | /' >&2
      end "$1" KILL
      return 1
    fi
    sleep 0.2
  done
}

# --- commands, one service each

up() { # service
  local home=$state/$1 began=$SECONDS try
  if pid_of "$1" >/dev/null && "$1_answers"; then
    echo "$1 is up already: $("$1_about") (pid $(pid_of "$1"))"
    return
  fi
  mkdir -p "$home"
  "$1_install" || return 1
  end "$1" KILL || return 1 # left behind by a start that was interrupted
  if [ -e "$home/prepared" ]; then
    run "$1" || return 1
    echo "$1 is up again on its kept data: $("$1_about") (pid $(pid_of "$1"), after $((SECONDS - began)) s)"
    return
  fi
  for try in 1 2 3; do
    wipe "$1"
    mkdir "$home/data"
    "$1_prepare" || return 1
    touch "$home/prepared"
    if run "$1"; then
      echo "$1 is up: $("$1_about") (pid $(pid_of "$1"), after $((SECONDS - began)) s)"
      "$1_next"
      return
    fi
    wipe "$1"
    # Another program took a port between the look for a free one and the start.
    if [ $try = 3 ] || ! grep -qi 'address already in use' "$home/log"; then return 1; fi
    echo "a port was taken meanwhile: trying others" >&2
  done
}

wipe() { # service
  rm -rf "$state/$1"/{prepared,env,pid,data}
}

down() { # service
  end "$1" KILL || return 1
  local was="was not up"
  if [ -e "$state/$1/data" ]; then was="is down, its data wiped"; fi
  wipe "$1"
  echo "$1 $was"
}

stop() { # service
  end "$1" TERM || return 1
  echo "$1 is stopped"
}

crash() { # service
  end "$1" KILL || return 1
  echo "$1 is killed"
}

start() { # service
  if [ ! -e "$state/$1/prepared" ]; then
    echo "$1 has no data to start on: run scripts/services.sh up $1" >&2
    return 1
  fi
  if pid_of "$1" >/dev/null && "$1_answers"; then
    echo "$1 runs already (pid $(pid_of "$1"))"
    return
  fi
  local began=$SECONDS
  end "$1" KILL || return 1
  run "$1" || return 1
  echo "$1 is up again: $("$1_about") (pid $(pid_of "$1"), after $((SECONDS - began)) s)"
}

restart() { # service
  crash "$1" && start "$1"
}

status() { # service
  local home=$state/$1 pid
  if ! pid=$(pid_of "$1"); then
    if [ -e "$home/prepared" ]; then
      echo "$1: stopped, its data kept in $home/data (scripts/services.sh start $1)"
    else
      echo "$1: not up"
    fi
    return 1
  fi
  if ! "$1_answers"; then
    echo "$1: runs (pid $pid) but does not answer; see $home/log"
    return 1
  fi
  printf '%s: up\n  address  %s\n  pid      %s\n  log      %s\n  data     %s\n  env      %s\n' \
    "$1" "$("$1_about")" "$pid" "$home/log" "$home/data" "$home/env"
}

# --- the command line

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

command=${1:-}
if [ $# -gt 0 ]; then shift; fi
case "$command" in
  up | down | status | stop | start | restart) act=$command ;;
  kill) act=crash ;;
  kafka) kafka_tool "$@" && exit 0 || exit $? ;;
  -h | --help) usage && exit 0 ;;
  *) echo "unknown command \`$command\`; see scripts/services.sh --help" >&2 && exit 2 ;;
esac
if [ $# = 0 ]; then set -- "${known[@]}"; fi
for service in "$@"; do
  case " ${known[*]} " in
    *" $service "*) ;;
    *) echo "unknown service \`$service\`; there are: ${known[*]}" >&2 && exit 2 ;;
  esac
done

if [ "$act" != status ]; then # one change at a time
  mkdir -p "$state"
  exec 9>"$state/lock"
  flock 9
fi
failed=false
for service in "$@"; do
  if ! "$act" "$service"; then failed=true; fi
done
if $failed; then exit 1; fi
