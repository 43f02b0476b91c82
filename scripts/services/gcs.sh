# What stands in for Google Cloud Storage in scripts/services.sh: SeaweedFS, whose protocol shares its requests, lists and uploads in parts
# with the XML API of GCS; by HTTP, open to all. In front of it Apache's web server makes of the one header that they do not share,
# `x-goog-if-generation-match: 0` (create only what is absent), the one that says so in S3's protocol, `If-None-Match: *`. What lies behind
# it, which ignores that header, is a store without create-if-absent. The emulators of GCS that can be had do the JSON API, and of the
# XML API not both writing and listing.
# shellcheck shell=bash
# shellcheck disable=SC2154 # downloads and state are services.sh's, and s3.sh brings SeaweedFS

gcs_home=$state/gcs
gcs_bucket=snapshots

gcs_apache=/usr/sbin/apache2
gcs_modules=/usr/lib/apache2/modules

gcs_install() {
  # The programs alone: nothing of it runs but what is started here.
  if [ ! -x $gcs_apache ]; then apt_install apache2-bin || return 1; fi
  s3_install
}

gcs_prepare() {
  local data=$gcs_home/data port
  port=$(ports_for gcs 9) || return 1
  mkdir "$data/files" || return 1
  echo "$port" >"$data/port"
  # The usual account of emulators: no token is asked for.
  echo '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}' >"$data/account.json"
  local modules=(mpm_event authz_core setenvif headers proxy proxy_http)
  {
    echo "ServerRoot \"$data\""
    echo "DefaultRuntimeDir \"$data\""
    echo "PidFile \"$data/apache.pid\""
    echo "ErrorLog \"$gcs_home/apache.log\""
    local module
    for module in "${modules[@]}"; do echo "LoadModule ${module}_module $gcs_modules/mod_$module.so"; done
    cat <<END
ServerName localhost
Listen 127.0.0.1:$port
SetEnvIf x-goog-if-generation-match "^0\$" absent
RequestHeader set If-None-Match "*" env=absent
RequestHeader unset x-goog-if-generation-match
AllowEncodedSlashes NoDecode
ProxyPreserveHost On
ProxyPass / http://127.0.0.1:$((port + 1))/ nocanon
END
  } >"$data/apache.conf"
  cat >"$gcs_home/env" <<END
TIDEMILL_TEST_GCS=http://127.0.0.1:$port
TIDEMILL_TEST_GCS_UNSAFE=http://127.0.0.1:$((port + 1))
TIDEMILL_TEST_GCS_BUCKET=$gcs_bucket
GOOGLE_SERVICE_ACCOUNT=$(printf %q "$data/account.json")
END
}

gcs_port() {
  cat "$gcs_home/data/port"
}

gcs_launch() {
  local port i
  port=$(gcs_port)
  for ((i = 0; i < 100; i++)); do # the web server of a run that was killed ends a moment later
    connects "$port" || break
    sleep 0.1
  done
  # One process to know of: the web server ends with it.
  # shellcheck disable=SC2034 # seaweed's
  local beside=(bash -c 'setpriv --pdeathsig TERM "$0" -f "$1" -DFOREGROUND & shift; exec "$@"' $gcs_apache "$gcs_home/data/apache.conf")
  seaweed gcs $((port + 1)) $((port + 2))
}

gcs_answers() {
  local port
  port=$(gcs_port) && has_bucket "$port" "$gcs_bucket"
}

gcs_about() {
  echo "SeaweedFS $s3_version, spoken to as GCS, at http://127.0.0.1:$(gcs_port), without create-if-absent at http://127.0.0.1:$(($(gcs_port) + 1))"
}

gcs_next() {
  cat <<END
  set -a; . $gcs_home/env; set +a   # then \`cargo test --test gcs\`
  GOOGLE_SERVICE_ACCOUNT=$gcs_home/data/account.json tidemill snapshots list --store \\
    'gs://$gcs_bucket/demo?endpoint=http://127.0.0.1:$(gcs_port)&allow_http=true'
END
}
