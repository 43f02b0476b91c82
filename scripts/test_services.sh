#!/usr/bin/env bash
# What scripts/services.sh promises, against the real thing: services of its own, beside any that runs already. Takes a minute or two.
set -euo pipefail
services=$(cd "$(dirname "$0")" && pwd)/services.sh
scratch=$(mktemp -d)
cleanup() {
  for one in first second; do TIDEMILL_SERVICES=$scratch/$one "$services" down >/dev/null; done
  rm -rf "$scratch"
}
trap cleanup EXIT
cd "$scratch" # it may be called from anywhere
export TIDEMILL_SERVICES=$scratch/first
home=$TIDEMILL_SERVICES/kafka

checks=0
check() { # what is promised, command...
  local what=$1
  shift
  if ! "$@" >"$scratch/said" 2>&1; then
    printf 'FAILED: %s\n  command: %s\n  it said:\n' "$what" "$*" >&2
    sed 's/^/  | /' "$scratch/said" >&2
    exit 1
  fi
  checks=$((checks + 1))
  printf '%4ss  %s\n' "$SECONDS" "$what"
}
fails() { # words that it must say, command...
  local words=$1 code=0
  shift
  "$@" >"$scratch/out" 2>&1 || code=$?
  cat "$scratch/out"
  [ $code != 0 ] || { echo "it succeeded" && return 1; }
  grep -qF -- "$words" "$scratch/out" || { echo "it did not say \`$words\`" && return 1; }
}
says() { # words, command...
  local words=$1
  shift
  "$@" >"$scratch/out" 2>&1 || { cat "$scratch/out" && return 1; }
  cat "$scratch/out"
  grep -qF -- "$words" "$scratch/out" || { echo "it did not say \`$words\`" && return 1; }
}
pid() { cut -d ' ' -f 1 "$home/pid"; }
brokers() { # how many run on the state of this test
  local args # taken before grep runs, whose arguments would count too
  args=$(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n')
  grep -cxF "$home/data/server.properties" <<<"$args" || true
}
is() { # value, value
  [ "$1" = "$2" ] || { echo "\`$1\` is not \`$2\`" && return 1; }
}
kafka() { "$services" kafka "$@"; }
consume() { # topic, how many: the values, sorted
  kafka console-consumer --topic "$1" --from-beginning --max-messages "$2" --timeout-ms 20000 2>/dev/null | sort
}
earliest() { # topic
  kafka get-offsets --topic "$1" --time earliest
}
eventually() { # seconds, words, command...
  local until=$((SECONDS + $1))
  shift
  until says "$@"; do
    [ $SECONDS -lt $until ] || return 1
    sleep 0.5
  done
}

check "status of nothing is not 0" fails "not up" "$services" status kafka
check "start of nothing fails and names what to run" fails "scripts/services.sh up kafka" "$services" start kafka

both() {
  "$services" up kafka &
  "$services" up kafka && wait $!
}
check "two that come up at once make one broker" says "is up already" both
check "... and only one" is "$(brokers)" 1
check "status of a broker is 0 and says where" says "$home/env" "$services" status kafka
before=$(pid)
check "up again changes nothing" says "is up already" "$services" up kafka
check "... and keeps the process" is "$(pid)" "$before"

set -a
# shellcheck source=/dev/null
. "$home/env"
set +a
clients=$TIDEMILL_TEST_KAFKA_CLIENTS

# Every way to connect, each codec at least once. The broker keeps a batch as it was compressed, so its log tells the codec.
check "Kafka's own tools make a topic" says "Created topic" kafka topics --create --topic ways --partitions 1
ways() { cat <<END
none   $TIDEMILL_TEST_KAFKA
gzip   $TIDEMILL_TEST_KAFKA_SSL ssl
snappy $TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT sasl_plaintext-plain
lz4    $TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT sasl_plaintext-scram-sha-256
zstd   $TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT sasl_plaintext-scram-sha-512
gzip   $TIDEMILL_TEST_KAFKA_SASL_SSL sasl_ssl-plain
snappy $TIDEMILL_TEST_KAFKA_SASL_SSL sasl_ssl-scram-sha-256
zstd   $TIDEMILL_TEST_KAFKA_SASL_SSL sasl_ssl-scram-sha-512
END
}
produce() { # codec, address, name of a client's properties or nothing
  local auth=()
  if [ -n "$3" ]; then auth=(--command-config "$clients/$3.properties"); fi
  echo "$1 by ${3:-plaintext}" | kafka console-producer --bootstrap-server "$2" --topic ways --compression-codec "$1" "${auth[@]}"
}
while read -r codec address client; do
  check "a $codec record by ${client:-plaintext}" produce "$codec" "$address" "$client"
done < <(ways)
check "all of them can be read" is "$(consume ways 8)" "$(ways | awk '{ print $1 " by " ($3 ? $3 : "plaintext") }' | sort)"
codecs() {
  kafka dump-log --files "$home/data/log/ways-0/00000000000000000000.log" | grep -o 'compresscodec: [a-z0-9]*' | sort | uniq -c | xargs
}
check "... as they were compressed" is "$(codecs)" "2 compresscodec: gzip 1 compresscodec: lz4 1 compresscodec: none 2 compresscodec: snappy 2 compresscodec: zstd"

list_as() { # address, properties
  kafka topics --list --bootstrap-server "$1" --command-config "$2"
}
sed 's/-secret/-guess/' "$clients/sasl_ssl-scram-sha-512.properties" >wrong_password
sed 's/SCRAM-SHA-256/SCRAM-SHA-512/' "$clients/sasl_plaintext-scram-sha-256.properties" >wrong_mechanism
grep -v truststore "$clients/ssl.properties" >no_ca
check "a wrong password is refused" fails "Authentication failed" list_as "$TIDEMILL_TEST_KAFKA_SASL_SSL" wrong_password
check "a user is known to its own mechanism only" fails "Authentication failed" list_as "$TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT" wrong_mechanism
check "without the CA the broker is not trusted" fails "SSL handshake failed" list_as "$TIDEMILL_TEST_KAFKA_SSL" no_ca

read_as() { # listener's address, name of a client's properties
  kafka console-consumer --topic ways --from-beginning --max-messages 1 --timeout-ms 20000 --bootstrap-server "$1" --command-config "$clients/$2.properties"
}
check "a user may read" read_as "$TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT" sasl_plaintext-plain
check "... until an access rule" kafka acls --add --topic ways --operation Read --allow-principal User:someone-else
check "... keeps it out" says "Not authorized to access topics: [ways]" read_as "$TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT" sasl_plaintext-plain

check "a restart is a kill and a start" says "is up again" "$services" restart kafka
check "... on the same ports" says "$TIDEMILL_TEST_KAFKA" "$services" status kafka
[ "$(pid)" != "$before" ] || { echo "FAILED: restart kept the process" >&2 && exit 1; }
check "... with the same data" is "$(consume ways 8 | wc -l)" 8

check "stop ends it in good order" says "is stopped" "$services" stop kafka
check "... so that it says so in its log" grep -q "shut down completed" "$home/log"
check "status tells stopped from gone" fails "stopped, its data kept" "$services" status kafka
check "start brings it back" says "is up again" "$services" start kafka
check "... with its SCRAM users" list_as "$TIDEMILL_TEST_KAFKA_SASL_SSL" "$clients/sasl_ssl-scram-sha-512.properties"

check "a topic of five records" kafka topics --create --topic dropped --partitions 1
five() { seq 5 | kafka console-producer --topic dropped; }
check "..." five
echo '{"version": 1, "partitions": [{"topic": "dropped", "partition": 0, "offset": 2}]}' >offsets.json
check "... loses those that are deleted by hand" says "low_watermark: 2" kafka delete-records --offset-json-file offsets.json
check "... and, given a short retention" kafka configs --alter --topic dropped --add-config retention.ms=1000,segment.ms=1000
check "... the rest within seconds" eventually 30 "dropped:0:5" earliest dropped

first_port=${TIDEMILL_TEST_KAFKA##*:}
beside() { # command...
  TIDEMILL_SERVICES=$scratch/second "$@"
}
check "a fixed port that is taken is refused, by name" fails "port $first_port is taken" \
  env TIDEMILL_KAFKA_PORT="$first_port" TIDEMILL_SERVICES="$scratch/second" "$services" up kafka
check "a second set of services comes up beside the first" says "is up:" beside "$services" up kafka
check "... and knows nothing of its topics" is "$(beside "$services" kafka topics --list)" ""
check "... and goes without it" says "its data wiped" beside "$services" down
check "the first is still there" says "$TIDEMILL_TEST_KAFKA" "$services" status kafka

kill -9 "$(pid)"
sleep 300 &
stranger=$!
echo "$stranger $(cut -d ' ' -f 2 "$home/pid")" >"$home/pid"
check "a pid that now belongs to another process is not taken for the broker's" fails "stopped, its data kept" "$services" status kafka
check "... and up brings the broker back" says "is up again on its kept data" "$services" up kafka
check "down" says "its data wiped" "$services" down
check "... leaves the stranger alone" kill -0 "$stranger"
kill "$stranger"
check "... leaves no process" is "$(brokers)" 0
check "... and no data, env or pid file" is "$(cd "$home" && echo ./*)" "./log ./log.before"
check "down of nothing is no error" says "was not up" "$services" down

# S3, Azure and GCS.
answers() { # address, certificate's verification off: what an unsigned request for it is told
  python3 - "$1" <<'END'
import ssl, sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=5, context=ssl._create_unverified_context() if "https" in sys.argv[1] else None).status)
except urllib.error.HTTPError as e:
    print(e.code)
END
}
check "an S3 server comes up" says "is up" "$services" up s3
set -a
# shellcheck source=/dev/null
. "$TIDEMILL_SERVICES/s3/env"
set +a
check "... and up again changes nothing" says "is up already" "$services" up s3
check "... status says where" says "$TIDEMILL_SERVICES/s3/env" "$services" status s3
check "... which wants a signature" is "$(answers "$TIDEMILL_TEST_S3/$TIDEMILL_TEST_S3_BUCKET")" 403
check "... by TLS too" is "$(answers "$TIDEMILL_TEST_S3_TLS/$TIDEMILL_TEST_S3_BUCKET")" 403
check "... a restart keeps the address" says "is up again" "$services" restart s3
check "... and answers there" is "$(answers "$TIDEMILL_TEST_S3/$TIDEMILL_TEST_S3_BUCKET")" 403
check "... and down wipes it" says "its data wiped" "$services" down s3
check "... so that it is gone" fails "not up" "$services" status s3

check "Azure and a stand-in for GCS come up together" says "gcs is up" "$services" up azure gcs
set -a
# shellcheck source=/dev/null
. "$TIDEMILL_SERVICES/azure/env"
# shellcheck source=/dev/null
. "$TIDEMILL_SERVICES/gcs/env"
set +a
container="$TIDEMILL_TEST_AZURE/$TIDEMILL_TEST_AZURE_CONTAINER?restype=container&comp=list"
bucket="$TIDEMILL_TEST_GCS/$TIDEMILL_TEST_GCS_BUCKET?list-type=2"
check "... of which Azure wants a signature" is "$(answers "$container")" 403
check "... and takes the token that may read" is "$(answers "$container&$TIDEMILL_TEST_AZURE_READER_TOKEN")" 200
check "... and the other is open to all" is "$(answers "$bucket")" 200
puts() { # url, header, its value: what a PUT of one byte is told
  python3 - "$@" <<'END'
import sys, urllib.error, urllib.request
url, header, value = sys.argv[1:]
try:
    print(urllib.request.urlopen(urllib.request.Request(url, b"x", {header: value}, method="PUT"), timeout=5).status)
except urllib.error.HTTPError as e:
    print(e.code)
END
}
object="$TIDEMILL_TEST_GCS/$TIDEMILL_TEST_GCS_BUCKET/once"
check "... and creates what is absent" is "$(puts "$object" x-goog-if-generation-match 0)" 200
check "... once" is "$(puts "$object" x-goog-if-generation-match 0)" 412
check "... and writes over what is there where that is not asked" is "$(puts "$object" x-other 0)" 200
behind="$TIDEMILL_TEST_GCS_UNSAFE/$TIDEMILL_TEST_GCS_BUCKET/once"
check "... and behind it nothing is heard of it" is "$(puts "$behind" x-goog-if-generation-match 0)" 200
azure_port=${TIDEMILL_TEST_AZURE#https://127.0.0.1:} gcs_port=${TIDEMILL_TEST_GCS##*:}
check "... each refuses a port that is taken, by name" fails "port ${azure_port%%/*} is taken" \
  env TIDEMILL_AZURE_PORT="${azure_port%%/*}" TIDEMILL_SERVICES="$scratch/second" "$services" up azure
check "... and so does the other" fails "port $gcs_port is taken" \
  env TIDEMILL_GCS_PORT="$gcs_port" TIDEMILL_SERVICES="$scratch/second" "$services" up gcs
check "... a restart keeps their addresses" says "gcs is up again" "$services" restart azure gcs
check "... where one still wants its signature" is "$(answers "$container")" 403
check "... and the other none" is "$(answers "$bucket")" 200
check "... and creates once, still" is "$(puts "$object" x-goog-if-generation-match 0)" 412
check "... and down wipes both" says "gcs is down, its data wiped" "$services" down azure gcs
check "... so that nothing is up" fails "azure: not up" "$services" status

echo "$checks checks passed"
