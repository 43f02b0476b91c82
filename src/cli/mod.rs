//! The command line: one file per command.

pub mod check;
pub mod demo;
pub mod examples;
pub mod generate;
pub mod operate;
pub mod replay;
pub mod retrain;
pub mod score;
pub mod serve;
pub mod snapshots;
pub mod train;
pub mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use crate::app::topics::Speed;
use crate::event::Time;

/// Trains a click-through model from streams of impressions and clicks, moments after they happen.
#[derive(Parser, Debug)]
#[command(version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Train(train::Train),
    Retrain(retrain::Retrain),
    Verify(verify::Verify),
    Score(score::Score),
    Serve(serve::Serve),
    Demo(demo::Demo),
    Check(check::Check),
    Generate(generate::Generate),
    Replay(replay::Replay),
    Examples(examples::Examples),
    Snapshots(snapshots::Snapshots),
}

/// The configuration, as every command that needs one takes it.
#[derive(clap::Args, Clone, Debug)]
pub struct ConfigArgs {
    /// Configuration file (TOML); `configs/reference.toml` has every key.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Lay a setting over the file: `--set batch.examples=1024`. May be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    pub fn load(&self) -> Result<crate::config::Config, crate::config::Error> {
        crate::config::Config::load(&self.config, &self.set)
    }
}

/// Runs the command line; 0 when all went well, 1 when a promise was broken or something failed, 2 for wrong usage.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    // The demo has the screen for itself and logs to a file.
    if !matches!(command, Command::Demo(_)) {
        tracing_subscriber::fmt()
            .with_env_filter(log_filter())
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_target(false)
            .init();
    }
    let result = match command {
        Command::Train(command) => command.run(),
        // It says more by its exit status than that something failed.
        Command::Retrain(command) => match command.run() {
            Ok(status) => return status,
            Err(error) => Err(error),
        },
        Command::Verify(command) => match command.run() {
            Ok(status) => return status,
            Err(error) => Err(error),
        },
        Command::Score(command) => command.run(),
        Command::Serve(command) => command.run(),
        Command::Demo(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Replay(command) => command.run(),
        Command::Examples(command) => command.run(),
        Command::Snapshots(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader of our output that goes away, as `head` does, is no failure.
        Err(error) if broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidemill: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log_filter() -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_env("TIDEMILL_LOG").unwrap_or_else(|_| "info".into())
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.into_iter().any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A flag that SIGTERM and Ctrl-C set. A second signal ends the process at once.
fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    let (mut interrupt, mut terminate) = {
        use tokio::signal::unix::{SignalKind, signal};
        let _guard = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async move {
            for _ in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                tracing::info!("stopping: the last checkpoint and snapshot are written; a second signal ends at once");
            }
        });
    })?;
    Ok(stop)
}

fn parse_time(text: &str) -> Result<Time, String> {
    if let Ok(ms) = text.parse() {
        return Ok(Time(ms));
    }
    chrono::DateTime::parse_from_rfc3339(text)
        .map(|at| Time(at.timestamp_millis()))
        .map_err(|why| format!("expected Unix milliseconds or RFC 3339 like 2026-01-01T00:00:00Z: {why}"))
}

fn parse_speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed::Max);
    }
    match text.trim_end_matches('x').parse() {
        Ok(times) if times > 0.0 && f64::is_finite(times) => Ok(Speed::Times(times)),
        _ => Err("expected `max` or a number above 0, such as 1 or 60".into()),
    }
}
