# Apache Kafka for scripts/services.sh: one node that is broker and controller, from the published jars, with a listener for each way to connect.
# shellcheck shell=bash
# shellcheck disable=SC2154 # scripts, downloads and state are services.sh's

kafka_pom=$scripts/services/kafka-pom.xml
kafka_version=$(sed -n 's:.*<kafka.version>\(.*\)</kafka.version>.*:\1:p' "$kafka_pom")
kafka_cache=$downloads/kafka/$kafka_version
kafka_home=$state/kafka

# Users of the SASL listeners, each known to one mechanism only, so that a client that comes in has used that one.
kafka_users=(PLAIN:plain-user:plain-secret SCRAM-SHA-256:scram-256-user:scram-256-secret SCRAM-SHA-512:scram-512-user:scram-512-secret)

kafka_java() { # version needed: is a Java of that version or newer there?
  local line
  line=$(java -version 2>&1 | head -1) || return 1
  [[ $line =~ \"([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -ge "$1" ]
}

kafka_install() {
  local missing=()
  kafka_java 17 || missing+=(default-jre-headless)
  command -v openssl >/dev/null || missing+=(openssl)
  if ! cmp -s "$kafka_pom" "$kafka_cache/pom.xml"; then command -v mvn >/dev/null || missing+=(maven); fi
  if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}" || return 1; fi
  kafka_java 17 || { echo "Kafka $kafka_version needs Java 17 or newer; \`java\` is $(java -version 2>&1 | head -1)" >&2; return 1; }
  if cmp -s "$kafka_pom" "$kafka_cache/pom.xml"; then return; fi

  echo "fetching the jars of Kafka $kafka_version ..."
  rm -rf "$kafka_cache" && mkdir -p "$kafka_cache" || return 1
  mvn -B -q --strict-checksums -f "$kafka_pom" \
    dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$kafka_cache/libs" >"$kafka_cache/mvn.log" 2>&1 ||
    { echo "kafka: mvn could not fetch the jars:" >&2 && tail -n 25 "$kafka_cache/mvn.log" >&2; return 1; }
  cp "$kafka_pom" "$kafka_cache/pom.xml" # last: says that libs is whole
}

kafka_prepare() {
  local data=$kafka_home/data port
  port=$(ports_for kafka 5) || return 1
  self_signed kafka "$data/tls" || return 1
  kafka_properties "$port" >"$data/server.properties"
  kafka_clients "$data" >"$kafka_home/env"

  local scram=() user mechanism name password
  for user in "${kafka_users[@]}"; do
    IFS=: read -r mechanism name password <<<"$user"
    if [ "$mechanism" != PLAIN ]; then scram+=(--add-scram "$mechanism=[name=$name,password=$password]"); fi
  done
  local said
  said=$(kafka_run kafka.tools.StorageTool format --config "$data/server.properties" --cluster-id "$(openssl rand -hex 16 | cut -c 1-21)A" \
    "${scram[@]}" 2>&1) || { printf 'kafka: the data folder could not be formatted:\n%s\n' "$said" >&2; return 1; }
}

kafka_properties() { # first port
  local data=$kafka_home/data port=$1 at=127.0.0.1 listener plain= user mechanism name password
  cat <<END
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@$at:$((port + 4))
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://$at:$port,SASL_PLAINTEXT://$at:$((port + 1)),SASL_SSL://$at:$((port + 2)),SSL://$at:$((port + 3)),CONTROLLER://$at:$((port + 4))
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs=$data/log

authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
super.users=User:ANONYMOUS
ssl.keystore.type=PEM
ssl.keystore.location=$data/tls/server.pem
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
END
  for user in "${kafka_users[@]}"; do
    IFS=: read -r mechanism name password <<<"$user"
    if [ "$mechanism" = PLAIN ]; then plain+=" user_$name=\"$password\""; fi
  done
  for listener in sasl_plaintext sasl_ssl; do
    echo "listener.name.$listener.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required$plain;"
    for mechanism in scram-sha-256 scram-sha-512; do
      echo "listener.name.$listener.$mechanism.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;"
    done
  done
  cat <<'END'

# One node
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
auto.create.topics.enable=false

# Small: a thread where the defaults take several, few partitions, 16 MiB where the log cleaner takes 128
num.network.threads=1
num.io.threads=2
background.threads=2
num.recovery.threads.per.data.dir=1
group.coordinator.threads=1
share.coordinator.threads=1
offsets.topic.num.partitions=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.num.partitions=1
log.cleaner.dedupe.buffer.size=16777216

# Quick, so that a test sees within seconds that retention or compaction dropped records or that a transaction timed out; and a broker that
# was killed is let in again only when its former session has ended
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
log.initial.task.delay.ms=1000
log.retention.check.interval.ms=1000
log.segment.delete.delay.ms=1000
log.cleaner.backoff.ms=1000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
END
}

# Writes a properties file for Kafka's own clients for each way to connect, and prints the lines of the env file.
kafka_clients() { # data folder
  local dir=$1/clients properties=$1/server.properties user mechanism name password listener
  mkdir -p "$dir"
  printf 'TIDEMILL_TEST_KAFKA=%s\n' "$(kafka_listener PLAINTEXT "$properties")"
  printf 'TIDEMILL_TEST_KAFKA_SSL=%s\n' "$(kafka_listener SSL "$properties")"
  printf 'TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT=%s\n' "$(kafka_listener SASL_PLAINTEXT "$properties")"
  printf 'TIDEMILL_TEST_KAFKA_SASL_SSL=%s\n' "$(kafka_listener SASL_SSL "$properties")"
  printf 'TIDEMILL_TEST_KAFKA_CA=%q\n' "$1/tls/ca.pem"
  local ssl="ssl.truststore.type=PEM
ssl.truststore.location=$1/tls/ca.pem"
  printf 'security.protocol=SSL\n%s\n' "$ssl" >"$dir/ssl.properties"
  for user in "${kafka_users[@]}"; do
    IFS=: read -r mechanism name password <<<"$user"
    printf 'TIDEMILL_TEST_KAFKA_%s_USER=%s\n' "${mechanism//-/_}" "$name"
    printf 'TIDEMILL_TEST_KAFKA_%s_PASSWORD=%s\n' "${mechanism//-/_}" "$password"
    local module=scram.ScramLoginModule
    if [ "$mechanism" = PLAIN ]; then module=plain.PlainLoginModule; fi
    for listener in SASL_PLAINTEXT SASL_SSL; do
      {
        printf 'security.protocol=%s\nsasl.mechanism=%s\n' $listener "$mechanism"
        printf 'sasl.jaas.config=org.apache.kafka.common.security.%s required username="%s" password="%s";\n' $module "$name" "$password"
        if [ $listener = SASL_SSL ]; then echo "$ssl"; fi
      } >"$dir/$(tr '[:upper:]' '[:lower:]' <<<"$listener-$mechanism").properties"
    done
  done
  printf 'TIDEMILL_TEST_KAFKA_CLIENTS=%q\n' "$dir"
}

# Prints the address of a listener, 127.0.0.1:PORT.
kafka_listener() { # name, server.properties
  sed -n "s:^listeners=\(.*,\)\{0,1\}$1\:\//\([^,]*\).*:\2:p" "$2"
}

kafka_run() { # class, argument...
  local tiered=(-XX:TieredStopAtLevel=1) # most tools end before the second compiler pays
  if [[ $1 = *Performance ]]; then tiered=(); fi
  java -Xmx256m -XX:+UseSerialGC "${tiered[@]}" -Dlog4j2.configurationFile="$scripts/services/kafka-log4j2.xml" -cp "$kafka_cache/libs/*" "$@"
}

kafka_launch() {
  spawn kafka java -Xms64m -Xmx512m -XX:+UseSerialGC -Djava.awt.headless=true -Dtidemill.log=info \
    -Dlog4j2.configurationFile="$scripts/services/kafka-log4j2.xml" -cp "$kafka_cache/libs/*" kafka.Kafka "$kafka_home/data/server.properties"
}

# The broker says that it has started once it is registered, unfenced and open on all listeners.
kafka_answers() {
  local listener address
  grep -q 'Kafka Server started' "$kafka_home/log" || return 1
  for listener in PLAINTEXT SASL_PLAINTEXT SASL_SSL SSL; do
    address=$(kafka_listener $listener "$kafka_home/data/server.properties")
    connects "${address##*:}" || return 1
  done
}

kafka_about() {
  echo "Kafka $kafka_version at $(kafka_listener PLAINTEXT "$kafka_home/data/server.properties")"
}

kafka_next() {
  cat <<END
  set -a; . $kafka_home/env; set +a   # then \`cargo test --test kafka\`, or any client at \$TIDEMILL_TEST_KAFKA
  scripts/services.sh kafka topics --create --topic impressions --partitions 4   # \`scripts/services.sh down\` takes all away
END
}

# NAME CLASS, of tools that take --bootstrap-server; a name that ends with ! does not.
kafka_tools="
topics                 TopicCommand
configs                ConfigCommand
acls                   AclCommand
console-producer       ConsoleProducer
console-consumer       consumer.ConsoleConsumer
producer-perf-test     ProducerPerformance
consumer-perf-test     ConsumerPerformance
verifiable-producer    VerifiableProducer
get-offsets            GetOffsetShell
delete-records         DeleteRecordsCommand
consumer-groups        consumer.group.ConsumerGroupCommand
transactions           TransactionsCommand
log-dirs               LogDirsCommand
dump-log!              DumpLogSegments
"

kafka_tool() { # name, argument...
  local name class
  while read -r name class; do
    if [ "${name%!}" = "${1:-}" ]; then break; fi
  done <<<"$kafka_tools"
  if [ $# = 0 ] || [ "${name%!}" != "$1" ]; then
    if [ $# = 0 ]; then echo "Kafka's tools, each with --help:"; else echo "kafka: no tool \`$1\`; there are:" >&2; fi
    # shellcheck disable=SC2086 # words are wanted
    printf '  %s\n' $(awk '{ sub(/!$/, "", $1); print $1 }' <<<"$kafka_tools")
    if [ $# = 0 ]; then return 0; else return 2; fi
  fi
  shift
  if [ ! -e "$kafka_home/prepared" ]; then echo "kafka is not up: run scripts/services.sh up kafka" >&2 && return 1; fi
  local broker=(--bootstrap-server "$(kafka_listener PLAINTEXT "$kafka_home/data/server.properties")")
  if [[ $name = *! || " $* " = *" --bootstrap-server "* ]]; then broker=(); fi
  kafka_run "org.apache.kafka.tools.$class" "${broker[@]}" "$@"
}
