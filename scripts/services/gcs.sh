# What stands in for Google Cloud Storage in scripts/services.sh: SeaweedFS, whose protocol shares its requests, lists and uploads in parts
# with the XML API of GCS; by HTTP, open to all. It knows no `x-goog-if-generation-match`, so it creates what is there already: a store
# without create-if-absent. The emulators of GCS that can be had do the JSON API, and of the XML API not both writing and listing.
# shellcheck shell=bash
# shellcheck disable=SC2154 # downloads and state are services.sh's, and s3.sh brings SeaweedFS

gcs_home=$state/gcs
gcs_bucket=snapshots

gcs_install() {
  s3_install
}

gcs_prepare() {
  local data=$gcs_home/data port
  port=$(ports_for gcs 8) || return 1
  mkdir "$data/files" || return 1
  echo "$port" >"$data/port"
  # The usual account of emulators: no token is asked for.
  echo '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}' >"$data/account.json"
  cat >"$gcs_home/env" <<END
TIDEMILL_TEST_GCS=http://127.0.0.1:$port
TIDEMILL_TEST_GCS_BUCKET=$gcs_bucket
GOOGLE_SERVICE_ACCOUNT=$(printf %q "$data/account.json")
END
}

gcs_port() {
  cat "$gcs_home/data/port"
}

gcs_launch() {
  local port
  port=$(gcs_port)
  seaweed gcs "$port" $((port + 1))
}

gcs_answers() {
  local port
  port=$(gcs_port) && has_bucket "$port" "$gcs_bucket"
}

gcs_about() {
  echo "SeaweedFS $s3_version, spoken to as GCS, at http://127.0.0.1:$(gcs_port)"
}

gcs_next() {
  cat <<END
  set -a; . $gcs_home/env; set +a   # then \`cargo test --test gcs\`
  GOOGLE_SERVICE_ACCOUNT=$gcs_home/data/account.json tidemill snapshots list --store \\
    'gs://$gcs_bucket/demo?endpoint=http://127.0.0.1:$(gcs_port)&allow_http=true&unsafe_create=single-writer'
END
}
