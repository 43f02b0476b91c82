//! The command line: one file per command.
pub mod generate;
pub mod snapshots;

pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
