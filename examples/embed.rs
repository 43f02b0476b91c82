//! A node inside of a program of one's own: `cargo run --example embed -- STORE`, where a trainer has published.
//!
//! The node follows the channel on its own thread. A request takes the model once and keeps it to its end, so all of its
//! scores are of one version, whatever is swapped in meanwhile.

use std::error::Error;
use std::time::Duration;

use tidemill::serve::{Node, Scorer, Settings};

fn main() -> Result<(), Box<dyn Error>> {
    let store = std::env::args().nth(1).ok_or("usage: embed STORE")?;
    let node = Node::open(&Settings { store, ..Settings::default() })?;
    let Some(model) = node.wait(Duration::from_secs(10)) else {
        return Err(node.status().reasons().join("; ").into());
    };

    // Scratch: keep one for each thread that answers requests.
    let mut scorer = Scorer::new();

    // As the log has them: members of a candidate take the place of the context's members of the same name.
    let context = br#"{"user": {"id": 7, "country": "DE"}, "device": "phone"}"#;
    let candidates = [&br#"{"item": {"id": 1}}"#[..], br#"{"item": {"id": 2}}"#];
    for score in scorer.score(&model, context, candidates)? {
        println!("version {}: logit {}, prediction {}", model.version(), score.logit, score.prediction);
    }

    // Without JSON, by the features of the schema.
    let first = 0;
    println!("the same by value, for `{}`:", model.schema().name(first));
    let scores = scorer.score_values::<Box<dyn Error>>(
        &model,
        |_context| Ok(()),
        2,
        |i, candidate| Ok(candidate.u64(first, i as u64).or_else(|_| candidate.f64(first, i as f64))?),
    )?;
    println!("{scores:?}");
    Ok(())
}
