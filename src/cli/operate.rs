//! `tidemill snapshots pin|unpin|rollback|promote|gc`: what a person does to a store.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;

use crate::snapshot::decide::Wish;
use crate::snapshot::manifest::{Act, Entry};
use crate::snapshot::operate::{Done, collect, earlier, operate};
use crate::snapshot::publish::{Plan, check_channel};
use crate::snapshot::{Store, Version};

#[derive(Debug, clap::Subcommand)]
pub enum Operation {
    /// Hold a channel where it is, or at a version: the trainer goes on publishing versions, the channel does not move.
    Pin {
        /// Version to hold; without it, what the channel names.
        version: Option<u64>,
        #[command(flatten)]
        place: Target,
    },
    /// Let go of a channel: the trainer's next publication moves it.
    Unpin {
        #[command(flatten)]
        place: Target,
    },
    /// Take a channel back to an earlier version and hold it there.
    Rollback {
        /// Version to go back to; without it, the one that the channel named before.
        version: Option<u64>,
        #[command(flatten)]
        place: Target,
    },
    /// Name a version in a channel: that of another channel, or any.
    Promote {
        /// Version to name; without it, what `--from` names.
        version: Option<u64>,
        /// Channel whose version is taken.
        #[arg(long, value_name = "CHANNEL", default_value = "candidate", conflicts_with = "version")]
        from: String,
        /// Hold it there, so that a trainer that publishes to the same channel does not move it on.
        #[arg(long)]
        pin: bool,
        #[command(flatten)]
        place: Target,
    },
    /// Delete versions that nothing needs any more, and what crashes left behind.
    Gc {
        /// How many of the newest versions stay, beside those that a channel names and what their chains need.
        #[arg(long, default_value_t = 10)]
        keep: usize,
        /// Nothing younger is deleted; longer than a publish or a load takes.
        #[arg(long, default_value = "15m", value_parser = duration)]
        grace: Duration,
        /// Say what would be deleted, and delete nothing.
        #[arg(long)]
        dry_run: bool,
        /// Directory of the snapshots, or an address such as `s3://bucket/prefix`.
        #[arg(long, value_name = "URL")]
        store: String,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Target {
    /// Directory of the snapshots, or an address such as `s3://bucket/prefix` (`snapshots.store` in the training config).
    #[arg(long, value_name = "URL")]
    store: String,
    /// Channel to act on.
    #[arg(long, default_value = "live")]
    channel: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|e| format!("{e}; write `15m`, `2h`"))
}

impl Operation {
    pub async fn run(&self, out: &mut String) -> anyhow::Result<()> {
        match self {
            Self::Gc { keep, grace, dry_run, store, json } => {
                let store = Store::open(store)?;
                gc(&store, *keep, *grace, *dry_run, *json, out).await
            }
            Self::Pin { version, place } => place.act(Wish::Pin(version.map(Version)), out).await,
            Self::Unpin { place } => place.act(Wish::Unpin, out).await,
            Self::Rollback { version, place } => {
                let version = match version {
                    Some(version) => Version(*version),
                    None => place.before().await?,
                };
                place.act(Wish::Rollback(version), out).await
            }
            Self::Promote { version, from, pin, place } => {
                let version = match version {
                    Some(version) => Version(*version),
                    None => place.named_by(from).await?,
                };
                place.act(Wish::Promote { version, pin: *pin }, out).await
            }
        }
    }
}

impl Target {
    fn open(&self) -> anyhow::Result<Store> {
        check_channel(&self.channel)?;
        Ok(Store::open(&self.store)?)
    }

    async fn before(&self) -> anyhow::Result<Version> {
        earlier(&self.open()?, &self.channel).await?.with_context(|| {
            format!(
                "channel `{}` of `{}` named no earlier version that is still there; name one, `tidemill snapshots list` shows them",
                self.channel, self.store
            )
        })
    }

    async fn named_by(&self, channel: &str) -> anyhow::Result<Version> {
        check_channel(channel)?;
        let entry = self.open()?.latest(channel).await?;
        entry.and_then(|entry| entry.version).with_context(|| {
            format!(
                "channel `{channel}` of `{}` names no version; name one, or another channel by `--from`",
                self.store
            )
        })
    }

    async fn act(&self, wish: Wish, out: &mut String) -> anyhow::Result<()> {
        let store = self.open()?;
        let (entry, before) = match operate(&store, &self.channel, wish).await? {
            Done::Written { entry, before } => (Some(entry), before),
            Done::Already(entry) => (None, Some(entry)),
            Done::Refused(objection) => bail!("channel `{}` of `{}`: {objection}", self.channel, self.store),
        };
        let after = entry.as_ref().or(before.as_ref());
        let state = |entry: Option<&Entry>| {
            let entry = entry.filter(|entry| entry.version.is_some());
            json!(entry.map(|entry| json!({ "version": entry.version, "pinned": entry.pinned })))
        };
        let moves_on = entry.as_ref().is_some_and(|entry| entry.act == Act::Promote && !entry.pinned)
            && before.as_ref().is_some_and(|before| !before.act.is_by_operator());
        if self.json {
            let document = json!({
                "channel": self.channel, "changed": entry.is_some(), "entry": after.map(|entry| entry.number),
                "before": state(before.as_ref()), "after": state(after), "a_trainer_moves_it_on": moves_on,
            });
            return Ok(writeln!(out, "{document}")?);
        }
        let words = |entry: Option<&Entry>| match entry.and_then(|entry| Some((entry.version?, entry.pinned))) {
            None => "no version".to_owned(),
            Some((version, true)) => format!("version {version}, pinned"),
            Some((version, false)) => format!("version {version}"),
        };
        match &entry {
            None => writeln!(out, "{}: {}, as before", self.channel, words(after))?,
            Some(entry) => writeln!(
                out,
                "{}: from {} to {} (entry {}, {})",
                self.channel,
                words(before.as_ref()),
                words(after),
                entry.number,
                entry.act.name()
            )?,
        }
        match entry.as_ref().map(|entry| entry.act) {
            Some(Act::Unpin) => writeln!(out, "the trainer's next publication moves it")?,
            Some(Act::Pin | Act::Rollback) => writeln!(out, "it stays there until `tidemill snapshots unpin`")?,
            _ if moves_on => writeln!(
                out,
                "a trainer publishes to this channel: its next version moves it on, unless you `tidemill snapshots pin` it"
            )?,
            _ => {}
        }
        Ok(())
    }
}

async fn gc(
    store: &Store,
    keep: usize,
    grace: Duration,
    dry_run: bool,
    json: bool,
    out: &mut String,
) -> anyhow::Result<()> {
    let plan = Plan::of_retention(keep, grace)?;
    let removed = collect(store, &plan, dry_run).await?;
    if json {
        let document = json!({
            "dry_run": dry_run, "versions": removed.versions, "objects": removed.objects, "debris": removed.debris,
        });
        return Ok(writeln!(out, "{document}")?);
    }
    let verb = if dry_run { "would delete" } else { "deleted" };
    let versions: Vec<_> = removed.versions.iter().map(ToString::to_string).collect();
    writeln!(
        out,
        "{verb} {} version(s): {}",
        versions.len(),
        if versions.is_empty() { "none".to_owned() } else { versions.join(" ") }
    )?;
    for (what, keys) in [("payload(s)", &removed.objects), ("piece(s) of debris", &removed.debris)] {
        writeln!(out, "{verb} {} {what}", keys.len())?;
        keys.iter().try_for_each(|key| writeln!(out, "  {key}"))?;
    }
    Ok(())
}
