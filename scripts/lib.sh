# Shell functions that several scripts of this folder share. To be sourced; all print to stderr what went wrong and return non-zero.
# shellcheck shell=bash

# Installs Debian packages, with sudo where it takes one.
apt_install() { # package...
  command -v apt-get >/dev/null || { echo "please install: $*" >&2; return 1; }
  local sudo=()
  if [ "$(id -u)" != 0 ]; then sudo=(sudo); fi
  "${sudo[@]}" apt-get update -q || return 1
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}
