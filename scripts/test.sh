#!/usr/bin/env bash
# Every check of this repository, from a bare checkout: format, lints, docs, Rust tests, Python tests.
#
#   scripts/test.sh           all of it; this is what CI runs
#   scripts/test.sh --fast    leaves out the docs, the tests against real services and the Python tests, and says so
#
# Needs Rust (rustup) and network for what is not installed yet. Installs build-essential and Python's venv by apt-get where they are
# missing, and scripts/requirements.txt into .venv. The services come from scripts/services.sh, which installs what they need; they are
# this run's own, beside any that is up already, and gone at the end. Any failure fails the script.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

fast=false
for arg in "$@"; do
  case "$arg" in
    --fast) fast=true ;;
    -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) echo "unknown option \`$arg\`; see scripts/test.sh --help" >&2 && exit 2 ;;
  esac
done

# shellcheck source=/dev/null
[ -f "${CARGO_HOME:-$HOME/.cargo}/env" ] && . "${CARGO_HOME:-$HOME/.cargo}/env"

times=()
step() { # name, command...
  local name=$1 began=$SECONDS
  shift
  printf '\n=== %s: %s\n' "$name" "$*"
  if ! "$@"; then
    printf '\nFAILED after %ss: %s\n' $((SECONDS - began)) "$name" >&2
    exit 1
  fi
  times+=("$(printf '%5ss  %s' $((SECONDS - began)) "$name")")
}

tools() {
  local missing=()
  # librdkafka and the OpenSSL that it is linked with are built from source: that takes make, and more of Perl than every system has
  if ! { command -v cc && command -v c++ && command -v make && perl -MIPC::Cmd -e 1; } >/dev/null 2>&1; then missing+=(build-essential); fi
  command -v python3 >/dev/null || missing+=(python3)
  if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then missing+=(python3-venv); fi
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}" || return 1; fi
  command -v cargo >/dev/null || { echo "cargo not found; install Rust from https://rustup.rs" >&2; return 1; }
  if ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
    rustup component add rustfmt clippy || return 1
  fi
  cargo --version && cc --version | head -1 && python3 --version
}

python_packages() {
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; return 1; }
  if cmp -s scripts/requirements.txt .venv/installed.txt; then
    echo ".venv is up to date"
    return
  fi
  python3 -m venv .venv || return 1
  .venv/bin/python -m pip install -q --disable-pip-version-check -r scripts/requirements.txt || return 1
  cp scripts/requirements.txt .venv/installed.txt
}

# Fresh services for this run alone, since tests restart them. The tests learn the addresses, and by TIDEMILL_SERVICES which services
# `scripts/services.sh restart` means.
services_up() {
  export TIDEMILL_SERVICES=$PWD/.services/test
  trap 'scripts/services.sh down' EXIT
  scripts/services.sh down || return 1 # of a run that was cut off
  scripts/services.sh up || return 1
  local env
  set -a
  for env in "$TIDEMILL_SERVICES"/*/env; do
    # shellcheck source=/dev/null
    . "$env"
  done
  set +a
}

services_down() {
  scripts/services.sh down && trap - EXIT
}

# The test targets that want a real service (they fail without its address), and the options that name all others.
real=()
others=()
for file in tests/*.rs; do
  case "$file" in
    tests/kafka* | tests/s3* | tests/azure* | tests/gcs*) real+=("$file") ;;
    *) others+=(--test "$(basename "$file" .rs)") ;;
  esac
done

step tools tools
step format cargo fmt --check
step lints cargo clippy --locked --all-targets -- -D warnings
if ! $fast; then step docs env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps; fi
if $fast; then
  step "rust tests" cargo test --locked --lib --bins "${others[@]}"
  step "doc tests" cargo test --locked --doc
else
  step scripts/test_services.sh scripts/test_services.sh
  step "services up" services_up
  step "rust tests" cargo test --locked
  step "services down" services_down
  step "python packages" python_packages
  step "the commands" cargo build --locked --bin tidemill --example load # the Python tests run them
  for file in scripts/test_*.py; do
    step "$file" .venv/bin/python "$file"
  done
fi

printf '\nall passed:\n'
printf '%s\n' "${times[@]}"
if $fast; then
  printf '\nLEFT OUT by --fast: docs (cargo doc -D warnings), real services (%s) and the Python tests (%s)\n' \
    "scripts/test_services.sh ${real[*]-}" "$(echo scripts/test_*.py)"
fi
