//! `tidemill snapshots`: what is in a store, and whether all of it can be served. What changes a store is in [`super::operate`].

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, bail};
use serde_json::json;

use super::operate::Operation;
use crate::feature::Schema;
use crate::snapshot::manifest::Manifest;
use crate::snapshot::publish::check_channel;
use crate::snapshot::{Delta, Store, Version, Weights};

/// Look into a snapshot store, move its channels, clean it up.
#[derive(Debug, clap::Args)]
pub struct Snapshots {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List all versions, newest last, with the channels that name them.
    List(Where),
    /// Show the manifest of one version.
    Show {
        /// Version to show; without it, what the channel names.
        version: Option<u64>,
        /// Load it, and count rows and vectors by feature.
        #[arg(long)]
        features: bool,
        #[command(flatten)]
        place: Where,
    },
    /// Check every byte, tensor and golden vector of all versions, and the channels' history. Fails if anything is wrong.
    Verify {
        /// Check only this version.
        version: Option<u64>,
        #[command(flatten)]
        place: Where,
    },
    /// Show what differs between two versions: rows, weights, sizes, schema, counts, metrics.
    Diff {
        /// The earlier one, by custom.
        from: u64,
        to: u64,
        #[command(flatten)]
        place: Where,
    },
    #[command(flatten)]
    Operation(Operation),
}

#[derive(Debug, clap::Args)]
struct Where {
    /// Directory of the snapshots, or an address such as `s3://bucket/prefix` (`snapshots.store` in the training config).
    #[arg(long, value_name = "URL")]
    store: String,
    /// Only this channel. For `show` the default is `live`, otherwise all.
    #[arg(long)]
    channel: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

impl Snapshots {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut out = String::new();
        let done = runtime.block_on(self.write(&mut out));
        // Whoever closes the pipe has seen enough.
        let _ = std::io::stdout().write_all(out.as_bytes());
        done
    }

    async fn write(self, out: &mut String) -> anyhow::Result<()> {
        let place = match &self.command {
            Command::Operation(operation) => return operation.run(out).await,
            Command::List(place)
            | Command::Show { place, .. }
            | Command::Verify { place, .. }
            | Command::Diff { place, .. } => place,
        };
        if let Some(channel) = &place.channel {
            check_channel(channel)?;
        }
        let store = Store::open(&place.store)?;
        match &self.command {
            Command::List(place) => list(&store, place, out).await,
            Command::Show { version, features, place } => {
                show(&store, version.map(Version), *features, place, out).await
            }
            Command::Verify { version, place } => verify(&store, version.map(Version), place, out).await,
            Command::Diff { from, to, place } => diff(&store, [Version(*from), Version(*to)], place, out).await,
            Command::Operation(_) => unreachable!("ran above"),
        }
    }
}

impl Where {
    async fn channels(&self, store: &Store) -> anyhow::Result<Vec<String>> {
        let all = store.channels().await?;
        match &self.channel {
            None => Ok(all),
            Some(one) if all.contains(one) => Ok(vec![one.clone()]),
            Some(one) => bail!("there is no channel `{one}` in `{}`, only {all:?}", self.store),
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- list

async fn list(store: &Store, place: &Where, out: &mut String) -> anyhow::Result<()> {
    let mut marks = Vec::new();
    for channel in place.channels(store).await? {
        let entry = store.latest(&channel).await?;
        let pinned = entry.as_ref().is_some_and(|entry| entry.pinned);
        marks.push((entry.and_then(|entry| entry.version), pinned, channel));
    }
    let mut rows = Vec::new();
    for version in store.versions().await?.into_keys() {
        let here = marks.iter().filter(|(v, ..)| *v == Some(version));
        let named: Vec<_> = here.clone().map(|(.., channel)| channel.as_str()).collect();
        let pinned: Vec<_> = here.filter(|(_, pinned, _)| *pinned).map(|(.., channel)| channel.as_str()).collect();
        if place.channel.is_some() && named.is_empty() {
            continue;
        }
        rows.push(match store.manifest(version, "the list").await {
            Ok(manifest) => json!({
                "version": version, "channels": named, "pinned": pinned,
                "lineage": manifest.lineage, "epoch": manifest.epoch,
                "batch": manifest.facts.batch, "frontier": manifest.facts.frontier_time.map(|t| t.to_string()),
                "kind": manifest.kind, "rows": manifest.rows, "bytes": bytes(&manifest),
                "logloss": metric(&manifest, "logloss"), "auc": metric(&manifest, "auc"),
            }),
            Err(e) => {
                let error = format!("{:#}", anyhow::Error::from(e));
                json!({ "version": version, "channels": named, "pinned": pinned, "error": error })
            }
        });
    }
    if place.json {
        return Ok(writeln!(out, "{}", serde_json::Value::from(rows))?);
    }
    writeln!(
        out,
        "{:>8} {:>10} {:<24} {:>10} {:<5} {:>12} {:>9} {:>7}  channels",
        "version", "batch", "frontier", "rows", "kind", "bytes", "logloss", "auc"
    )?;
    for row in &rows {
        let number = |key: &str| row[key].as_u64().map_or_else(|| "-".to_owned(), |n| n.to_string());
        let float = |key: &str, digits| row[key].as_f64().map_or_else(|| "-".to_owned(), |f| format!("{f:.digits$}"));
        if let Some(error) = row["error"].as_str() {
            writeln!(out, "{:>8} {error}", number("version"))?;
            continue;
        }
        let list = |key: &str| row[key].as_array().into_iter().flatten().filter_map(|c| c.as_str());
        let mark = |channel| if list("pinned").any(|c| c == channel) { " (pinned)" } else { "" };
        let named: Vec<_> = list("channels").map(|channel| format!("{channel}{}", mark(channel))).collect();
        writeln!(
            out,
            "{:>8} {:>10} {:<24} {:>10} {:<5} {:>12} {:>9} {:>7}  {}",
            number("version"),
            number("batch"),
            row["frontier"].as_str().unwrap_or("-"),
            number("rows"),
            row["kind"].as_str().unwrap_or("-"),
            number("bytes"),
            float("logloss", 5),
            float("auc", 4),
            named.join(" ")
        )?;
    }
    Ok(())
}

fn bytes(manifest: &Manifest) -> u64 {
    manifest.objects.iter().map(|object| object.length).sum()
}

/// A cumulative figure of the progressive report.
fn metric(manifest: &Manifest, name: &str) -> Option<f64> {
    manifest.facts.metrics.get("cumulative")?.get(name)?.as_f64()
}

// ------------------------------------------------------------------------------------------------------------- show

async fn show(
    store: &Store,
    version: Option<Version>,
    features: bool,
    place: &Where,
    out: &mut String,
) -> anyhow::Result<()> {
    let version = match version {
        Some(version) => version,
        None => {
            let channel = place.channel.as_deref().unwrap_or("live");
            let entry = store.latest(channel).await?;
            let version = entry.and_then(|entry| entry.version);
            version.with_context(|| format!("channel `{channel}` in `{}` names no version yet", place.store))?
        }
    };
    let manifest = store.manifest(version, "the command line").await?;
    let holdings = if features { Some(Holdings::of(store, version).await?) } else { None };
    if place.json {
        let shown = Shown { manifest: &manifest, features: holdings };
        return Ok(writeln!(out, "{}", serde_json::to_string(&shown)?)?);
    }
    let Manifest { facts, model, .. } = &manifest;
    let mut line = |name: &str, value: &dyn std::fmt::Display| writeln!(out, "{name:<16} {value}");
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".to_owned());
    line("version", &version)?;
    line("parent", &or_none(manifest.parent.map(|v| v.to_string())))?;
    line("lineage", &manifest.lineage)?;
    line("epoch", &format_args!("{}, writer {}", manifest.epoch, manifest.writer))?;
    line("created", &manifest.created)?;
    line("build", &format_args!("tidemill {} on {}", manifest.build.crate_version, manifest.build.target))?;
    line(
        "kind",
        &match &manifest.delta {
            None => "full".to_owned(),
            Some(link) => format!(
                "delta {} after full {}, changes version {}: {} rows new or other, {} gone",
                link.number, link.full, link.after, link.changed, link.removed
            ),
        },
    )?;
    let precision = serde_json::to_value(manifest.precision)?;
    line(
        "precision",
        &format_args!("{}, moves golden logits by up to {}", precision.as_str().unwrap_or("?"), manifest.rounding),
    )?;
    for object in &manifest.objects {
        line("object", &format_args!("{}, {} bytes", object.name, object.length))?;
    }
    line("model", &format_args!("{}, {} rows", model.kind, manifest.rows))?;
    line("model config", &model.config)?;
    line("schema hash", &model.schema_hash)?;
    line("batch", &facts.batch)?;
    line("frontier", &or_none(facts.frontier_time.map(|t| t.to_string())))?;
    line("event times", &or_none(facts.event_times.map(|(from, to)| format!("{from} to {to}"))))?;
    for position in &facts.positions {
        line("position", &format_args!("{} {} at {}", position.stream.name(), position.name, position.offset))?;
    }
    for (name, count) in &facts.counts {
        line("count", &format_args!("{name} {count}"))?;
    }
    if let Some(metrics) = facts.metrics.get("cumulative").and_then(|m| m.as_object()) {
        for (name, value) in metrics {
            line("metric", &format_args!("{name} {value}"))?;
        }
    }
    if let Some(gate) = &manifest.gate {
        let verdict = serde_json::to_value(gate.verdict)?;
        let reason = gate.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
        line("gate", &format_args!("{}{reason}", verdict.as_str().unwrap_or("?")))?;
        let figures = [("candidate", &gate.candidate), ("as served", &gate.as_served)];
        for (name, figures) in figures.into_iter().filter(|_| gate.examples > 0) {
            let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.5}"));
            let (loss, auc, calibration) = (figures.logloss, figures.auc, figures.calibration);
            line(
                "gate",
                &format_args!(
                    "{name}: logloss {}, auc {}, calibration {} on {} examples",
                    or_dash(loss),
                    or_dash(auc),
                    or_dash(calibration),
                    gate.examples
                ),
            )?;
        }
    }
    line("journal", &format_args!("{} entries", facts.journal.len()))?;
    line("golden vectors", &manifest.golden.len())?;
    line("model digest", &or_none(facts.model_digest.clone()))?;
    line("order digest", &or_none(facts.order_digest.clone()))?;
    let Some(Holdings { by_name, unclear }) = holdings else { return Ok(()) };
    writeln!(out, "\n{:<32} {:>12} {:>12}", "feature", "rows", "vectors")?;
    for Held { name, rows, vectors } in by_name {
        writeln!(out, "{name:<32} {rows:>12} {vectors:>12}")?;
    }
    writeln!(out, "{:<32} {:>12} {:>12}", "of several, or of none", unclear[0], unclear[1])?;
    Ok(())
}

#[derive(serde::Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    #[serde(skip_serializing_if = "Option::is_none")]
    features: Option<Holdings>,
}

/// The one owner there is; none of several.
fn sole(mut owners: impl Iterator<Item = usize>) -> Option<usize> {
    owners.next().filter(|_| owners.next().is_none())
}

/// What the tables of a version hold, by feature.
#[derive(serde::Serialize)]
struct Holdings {
    by_name: Vec<Held>,
    /// Rows and vectors that several features could own, or none.
    unclear: [u64; 2],
}

#[derive(serde::Serialize)]
struct Held {
    name: String,
    rows: u64,
    vectors: u64,
}

impl Holdings {
    async fn of(store: &Store, version: Version) -> anyhow::Result<Self> {
        let snapshot = store.load(version).await?;
        let schema = Schema::from_json(&snapshot.manifest.model.schema.to_string())?;
        let name = |i| Held { name: schema.name(i).to_owned(), rows: 0, vectors: 0 };
        let mut holdings = Self { by_name: (0..schema.len()).map(name).collect(), unclear: [0; 2] };
        // Features that share vectors stand for one: the first of them.
        let vectors: Vec<u64> = (0..schema.len()).map(|i| schema.default_row(i) ^ schema.embedding_key(i)).collect();
        let first = |i: usize| !(0..i).any(|j| vectors[j] == vectors[i] && schema.may_use_vector(j, vectors[j]));
        let heads: Vec<usize> = (0..schema.len()).filter(|&i| first(i)).collect();
        for &row in snapshot.weights.ids() {
            match sole((0..schema.len()).filter(|&i| schema.may_own(i, row))) {
                Some(i) => holdings.by_name[i].rows += 1,
                None => holdings.unclear[0] += 1,
            }
        }
        for &id in snapshot.weights.towers().map_or(&[][..], |towers| towers.ids()) {
            match sole(heads.iter().copied().filter(|&i| schema.may_use_vector(i, id))) {
                Some(i) => holdings.by_name[i].vectors += 1,
                None => holdings.unclear[1] += 1,
            }
        }
        Ok(holdings)
    }
}

// ------------------------------------------------------------------------------------------------------------- diff

async fn diff(store: &Store, versions: [Version; 2], place: &Where, out: &mut String) -> anyhow::Result<()> {
    let (from, to) = (store.load(versions[0]).await?, store.load(versions[1]).await?);
    let (a, b) = (&from.manifest, &to.manifest);
    let mut lines: Vec<(String, serde_json::Value, serde_json::Value)> = Vec::new();
    let mut line = |name: &str, a: serde_json::Value, b: serde_json::Value| lines.push((name.to_owned(), a, b));
    line("lineage", json!(a.lineage), json!(b.lineage));
    line("epoch", json!(a.epoch), json!(b.epoch));
    line("created", json!(a.created.to_string()), json!(b.created.to_string()));
    line("kind", json!(a.kind), json!(b.kind));
    line("precision", json!(a.precision), json!(b.precision));
    line("bytes", json!(bytes(a)), json!(bytes(b)));
    line("schema hash", json!(a.model.schema_hash), json!(b.model.schema_hash));
    line("model", json!(a.model.kind), json!(b.model.kind));
    line("model config", json!(a.model.config.to_string()), json!(b.model.config.to_string()));
    line("build", json!(a.build.crate_version), json!(b.build.crate_version));
    line("batch", json!(a.facts.batch), json!(b.facts.batch));
    let frontier = |m: &Manifest| json!(m.facts.frontier_time.map(|time| time.to_string()));
    line("frontier", frontier(a), frontier(b));
    let rows = |w: &Weights| (w.ids().len(), w.towers().map_or(0, |towers| towers.ids().len()));
    line("logistic rows", json!(rows(&from.weights).0), json!(rows(&to.weights).0));
    line("embedding rows", json!(rows(&from.weights).1), json!(rows(&to.weights).1));
    line("intercept", json!(from.weights.intercept()), json!(to.weights.intercept()));
    let names: std::collections::BTreeSet<_> = a.facts.counts.keys().chain(b.facts.counts.keys()).collect();
    for name in names {
        line(&format!("count {name}"), json!(a.facts.counts.get(name)), json!(b.facts.counts.get(name)));
    }
    let metrics = |m: &Manifest| m.facts.metrics.get("cumulative").and_then(|m| m.as_object()).cloned();
    let (ours, theirs) = (metrics(a).unwrap_or_default(), metrics(b).unwrap_or_default());
    let names: std::collections::BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    for name in names {
        line(&format!("metric {name}"), json!(ours.get(name)), json!(theirs.get(name)));
    }
    let rows = moved(&from.weights, &to.weights);
    if place.json {
        let fields: serde_json::Map<_, _> =
            lines.into_iter().map(|(name, a, b)| (name, json!({ "from": a, "to": b }))).collect();
        return Ok(writeln!(out, "{}", json!({ "from": a.version, "to": b.version, "fields": fields, "rows": rows }))?);
    }
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::Null => "-".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    writeln!(out, "{:<28} {:>26} {:>26}", "", format!("version {}", a.version), format!("version {}", b.version))?;
    for (name, a, b) in lines {
        let mark = if a == b { "" } else { "  *" };
        let (a, b) = (text(&a), text(&b));
        if a.len() > 60 && a == b {
            writeln!(out, "{name:<28} {:>26}", "the same")?;
        } else {
            writeln!(out, "{name:<28} {a:>26} {b:>26}{mark}")?;
        }
    }
    for (name, value) in rows.as_object().into_iter().flatten() {
        writeln!(out, "{name:<28} {}", text(value))?;
    }
    Ok(())
}

/// What became of the rows, from one version to another.
fn moved(from: &Weights, to: &Weights) -> serde_json::Value {
    let Some(delta) = Delta::between(from, to) else {
        return json!({ "rows": "cannot be compared: the two have other features, towers or precision" });
    };
    let new = delta.ids().iter().filter(|row| !from.knows(**row)).count();
    let moves = delta.ids().iter().zip(delta.weights()).filter(|(row, _)| from.knows(**row));
    let largest = moves.map(|(row, weight)| (weight - from.weight(*row, u16::MAX)).abs()).fold(0.0_f32, f32::max);
    let mut rows = json!({
        "logistic rows new": new,
        "logistic rows gone": delta.removed().len(),
        "logistic rows changed": delta.ids().len() - new,
        "largest change of a weight": largest,
    });
    if let (Some(before), Some(towers)) = (from.towers(), delta.towers()) {
        let new = towers.ids().iter().filter(|row| before.ids().binary_search(row).is_err()).count();
        rows["embedding rows new"] = json!(new);
        rows["embedding rows gone"] = json!(towers.removed().len());
        rows["embedding rows changed"] = json!(towers.ids().len() - new);
    }
    rows
}

// ----------------------------------------------------------------------------------------------------------- verify

async fn verify(store: &Store, version: Option<Version>, place: &Where, out: &mut String) -> anyhow::Result<()> {
    let mut checked = Vec::new();
    let mut note = |what: String, error: Option<String>| checked.push((what, error));
    let versions = match version {
        Some(version) => vec![version],
        None => store.versions().await?.into_keys().collect(),
    };
    for version in versions {
        let loaded = store.load(version).await;
        note(format!("version {version}"), loaded.err().map(|e| format!("{:#}", anyhow::Error::from(e))));
    }
    if version.is_none() {
        for channel in place.channels(store).await? {
            note(format!("channel {channel}"), history(store, &channel).await.err().map(|e| format!("{e:#}")));
        }
    }
    let failures = checked.iter().filter(|(_, error)| error.is_some()).count();
    if place.json {
        let list: Vec<_> = checked.iter().map(|(what, error)| json!({ "what": what, "error": error })).collect();
        writeln!(out, "{}", json!({ "ok": failures == 0, "checked": list }))?;
    } else {
        for (what, error) in &checked {
            writeln!(out, "{what}: {}", error.as_deref().unwrap_or("ok"))?;
        }
    }
    if checked.is_empty() {
        bail!("`{}` holds no snapshot, so there is nothing to verify", place.store);
    }
    if failures > 0 {
        let first = checked.iter().find_map(|(what, error)| error.as_ref().map(|error| format!("{what}: {error}")));
        bail!("{failures} of {} checks failed, the first: {}", checked.len(), first.unwrap_or_default());
    }
    Ok(())
}

/// Walks all entries of a channel: none missing, epochs never fall, and the version of the last one is there.
async fn history(store: &Store, channel: &str) -> anyhow::Result<()> {
    let Some(last) = store.latest(channel).await? else { return Ok(()) };
    let mut epoch = None;
    for number in 1..=last.number {
        let entry = store.entry(channel, number).await?;
        let entry =
            entry.with_context(|| format!("entry {number} is missing, up to {} all must be there", last.number))?;
        if Some(entry.epoch) < epoch {
            bail!("entry {number} has epoch {}, after a larger one: a fenced writer was let through", entry.epoch);
        }
        epoch = Some(entry.epoch);
    }
    if let Some(version) = last.version {
        store.manifest(version, &format!("channel `{channel}`")).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::event::{Slot, Time};
    use crate::snapshot::{Facts, Golden, ModelInfo, Outcome, Publisher, Settings, Weights};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        snapshots: Snapshots,
    }

    fn call(args: &[&str], dir: &Path) -> (String, anyhow::Result<()>) {
        let all = ["tidemill"].iter().chain(args).copied().chain(["--store", dir.to_str().unwrap()]);
        let cli = Cli::try_parse_from(all).unwrap();
        let mut out = String::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let done = runtime.block_on(cli.snapshots.write(&mut out));
        (out, done)
    }

    fn publish(dir: &Path) {
        let settings = Settings { store: dir.to_str().unwrap().to_owned(), deltas: 0, ..Settings::default() };
        let plan = settings.check().unwrap();
        let weights = Weights::new(vec![3, 9], vec![0.5, -0.25], -1.0, vec![3]).unwrap();
        let golden = [Golden::new(&[Slot { row: 9, value: 1.0, feature: 0, flags: 0 }], -1.25)];
        let facts = |batch| Facts {
            batch,
            frontier_time: Some(Time(1_700_000_000_000)),
            metrics: json!({ "cumulative": { "logloss": 0.61, "auc": 0.7125 } }),
            ..Facts::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
            let mut publisher = Publisher::open(plan.open().unwrap(), &plan, "main", model).await.unwrap();
            publisher.publish(&weights.clone().into(), facts(7), &golden, None).await.unwrap();
            publisher.publish(&weights.clone().into(), facts(8), &golden, None).await.unwrap();
        });
    }

    #[test]
    fn list_and_show_say_what_a_person_asks_first() {
        let dir = tempfile::tempdir().unwrap();
        publish(dir.path());
        let (text, done) = call(&["list"], dir.path());
        done.unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[2][..4], ["2", "8", "2023-11-14T22:13:20.000Z", "2"]);
        assert_eq!(lines[2][4], "full");
        assert_eq!(lines[2][6..], ["0.61000", "0.7125", "live"]);
        let (text, done) = call(&["show"], dir.path());
        done.unwrap();
        assert!(text.contains("version          2\n") && text.contains("metric           auc 0.7125"), "{text}");
        let (text, done) = call(&["show", "1", "--json"], dir.path());
        done.unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["facts"]["batch"], 7);
    }

    #[test]
    fn verify_passes_on_a_good_store_and_names_version_and_object_on_a_damaged_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(call(&["verify"], dir.path()).1.unwrap_err().to_string().contains("nothing to verify"));
        publish(dir.path());
        let (text, done) = call(&["verify"], dir.path());
        done.unwrap();
        assert_eq!(text, "version 1: ok\nversion 2: ok\nchannel live: ok\n");
        let object = std::fs::read_dir(dir.path().join("objects")).unwrap().next().unwrap().unwrap();
        let mut bytes = std::fs::read(object.path()).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(object.path(), bytes).unwrap();
        let (text, done) = call(&["verify", "--json"], dir.path());
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["ok"], false);
        let error = done.unwrap_err().to_string();
        assert!(error.contains("version 1") && error.contains(object.file_name().to_str().unwrap()), "{error}");
        std::fs::remove_file(dir.path().join("channels/live/000000000002.json")).unwrap();
        let (text, _) = call(&["verify"], dir.path());
        assert!(text.contains("channel live: entry 2 is missing"), "{text}");
    }

    /// A trainer that runs on while a person acts on its channel; of each batch it publishes another model.
    struct Trainer {
        runtime: tokio::runtime::Runtime,
        publisher: Publisher,
    }

    impl Trainer {
        fn start(dir: &Path) -> Self {
            let settings = Settings { store: dir.to_str().unwrap().to_owned(), deltas: 0, ..Settings::default() };
            let plan = settings.check().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
            let publisher = runtime.block_on(Publisher::open(plan.open().unwrap(), &plan, "main", model)).unwrap();
            Self { runtime, publisher }
        }

        fn publish(&mut self, batch: u64) -> Outcome {
            let weights = Weights::new(vec![3, 9, 10 + batch], vec![0.5, -0.25, batch as f32], -1.0, vec![3]).unwrap();
            let golden = [Golden::new(&[Slot { row: 9, value: 1.0, feature: 0, flags: 0 }], -1.25)];
            let facts = Facts { batch, ..Facts::default() };
            self.runtime.block_on(self.publisher.publish(&weights.into(), facts, &golden, None)).unwrap()
        }
    }

    fn json_of(args: &[&str], dir: &Path) -> serde_json::Value {
        let (text, done) = call(&[args, &["--json"]].concat(), dir);
        done.unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn refused(args: &[&str], dir: &Path) -> String {
        format!("{:#}", call(args, dir).1.unwrap_err())
    }

    #[test]
    fn a_channel_that_was_rolled_back_stays_while_the_trainer_goes_on_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = Trainer::start(dir.path());
        trainer.publish(1);
        trainer.publish(2);
        let (text, done) = call(&["rollback"], dir.path());
        done.unwrap();
        assert!(text.starts_with("live: from version 2 to version 1, pinned (entry 4, rollback)\n"), "{text}");
        assert!(text.contains("stays there until `tidemill snapshots unpin`"), "{text}");
        assert_eq!(trainer.publish(3), Outcome::Pinned { version: Version(3), at: Version(1) });
        let list = json_of(&["list"], dir.path());
        assert_eq!((&list[0]["pinned"], &list[2]["channels"]), (&json!(["live"]), &json!([])));
        assert!(call(&["list"], dir.path()).0.contains("live (pinned)\n"));
        // A trainer that starts anew takes the pin over.
        let mut trainer = Trainer::start(dir.path());
        assert_eq!(trainer.publish(4), Outcome::Pinned { version: Version(4), at: Version(1) });
        let (text, done) = call(&["unpin"], dir.path());
        done.unwrap();
        assert!(text.contains("the trainer's next publication moves it"), "{text}");
        assert_eq!(trainer.publish(5), Outcome::Published(Version(5)));
        call(&["verify"], dir.path()).1.unwrap();
    }

    #[test]
    fn a_pin_holds_what_is_live_and_only_a_change_is_written() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refused(&["pin"], dir.path()).contains("channel `live`"));
        let mut trainer = Trainer::start(dir.path());
        trainer.publish(1);
        let pinned = json_of(&["pin"], dir.path());
        assert_eq!((&pinned["changed"], &pinned["entry"]), (&json!(true), &json!(3)));
        assert_eq!(pinned["after"], json!({ "version": 1, "pinned": true }));
        let again = json_of(&["pin"], dir.path());
        assert_eq!((&again["changed"], &again["entry"]), (&json!(false), &json!(3)));
        trainer.publish(2);
        let error = refused(&["promote", "2"], dir.path());
        assert!(error.contains("it is pinned at version 1: `unpin` it first"), "{error}");
        assert_eq!(json_of(&["pin", "2"], dir.path())["after"], json!({ "version": 2, "pinned": true }));
        let error = refused(&["rollback", "2"], dir.path());
        assert!(error.contains("version 2 is not earlier than version 2"), "{error}");
        assert!(refused(&["pin", "--channel", "a/b"], dir.path()).contains("letters, digits"));
    }

    #[test]
    fn no_channel_is_moved_to_a_version_that_cannot_be_served() {
        let dir = tempfile::tempdir().unwrap();
        publish(dir.path());
        assert!(refused(&["promote", "7"], dir.path()).contains("manifests/000000000007.json"));
        let object = std::fs::read_dir(dir.path().join("objects")).unwrap().next().unwrap().unwrap();
        let mut bytes = std::fs::read(object.path()).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(object.path(), bytes).unwrap();
        let error = refused(&["rollback"], dir.path());
        assert!(error.contains(object.file_name().to_str().unwrap()), "{error}");
        assert_eq!(json_of(&["list"], dir.path())[1]["channels"], json!(["live"]));
    }
}
