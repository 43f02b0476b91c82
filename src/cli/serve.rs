//! `tidemill serve`: a node that answers requests for scores.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::recorder;
use crate::config;
use crate::serve::http::Server;
use crate::serve::{Node, Settings};

/// Serve: answer requests for scores with the newest version of a channel
///
/// Follows the channel and swaps in each new version once it is proved. On SIGTERM or Ctrl-C it finishes the requests it
/// has; a second signal ends at once. The exit code is 1 if requests had to be cut.
#[derive(clap::Args, Clone, Debug)]
pub struct Serve {
    /// Configuration file (TOML); `configs/serve.toml` has every key.
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
    /// Lay a setting over the file: `--set http.listen=0.0.0.0:80`. May be given often.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// How often the exporter tidies up when nobody reads it.
const UPKEEP: Duration = Duration::from_secs(5);

impl Serve {
    pub fn run(self) -> anyhow::Result<()> {
        let settings: Settings = config::read(&self.config, &self.set)?;
        settings.check()?;
        let metrics = recorder::install()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut terminate) = {
            let _guard = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let node = Arc::new(Node::open(&settings)?);
        let show = metrics.clone();
        let server = Server::start(Arc::clone(&node), &settings.http, move || show.render())?;
        // Scripts wait for this line; with port 0 it is the only way to learn the port.
        writeln!(std::io::stdout(), "listening on http://{}", server.address()).context("cannot write to stdout")?;
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => break,
                    _ = terminate.recv() => break,
                    () = tokio::time::sleep(UPKEEP) => metrics.run_upkeep(),
                }
            }
        });
        tracing::info!("stopping: open requests are finished; a second signal ends at once");
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async move {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                std::process::exit(130);
            });
        })?;
        let cut = server.drain();
        anyhow::ensure!(cut == 0, "{cut} connections did not finish within `http.grace` and were cut");
        Ok(())
    }
}
