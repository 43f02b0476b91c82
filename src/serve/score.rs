//! Scoring a request.

use serde::{Deserialize, Serialize};

use super::model::{Model, Scratch};
use crate::feature::overlay::Values;
use crate::source::decode::request::{Body, Part, Refused, RequestDecoder, Wrong};

/// The score of one candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    pub logit: f32,
    /// `1 / (1 + exp(-logit))`: the probability of a click.
    pub prediction: f64,
}

/// Scratch for scoring, to be kept and used again, one for each thread: it allocates nothing per candidate once it has
/// grown. It belongs to no model; for one with another schema it is made anew.
#[derive(Debug, Default)]
pub struct Scorer {
    decoder: Option<RequestDecoder>,
    /// Hash of the decoder's schema.
    schema: String,
    scratch: Scratch,
    logits: Vec<f32>,
    scores: Vec<Score>,
}

impl Scorer {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Scores candidates in a context, both JSON objects as the log has them: each candidate is scored as the record with
    /// the context's members, those of the candidate in the place of members of the same name. For the schema of a slate,
    /// candidates are its elements.
    pub fn score<'s, 'c>(
        &'s mut self,
        model: &Model,
        context: &[u8],
        candidates: impl IntoIterator<Item = &'c [u8]>,
    ) -> Result<&'s [Score], Refused> {
        let decoder = self.decoder(model)?;
        decoder.context(context)?;
        for candidate in candidates {
            decoder.candidate(candidate)?;
        }
        Ok(self.finish(model))
    }

    /// The same for values that are not JSON: `context` and `candidate` push them by feature index
    /// ([`Schema::index_of`](crate::feature::Schema::index_of)); `candidate` is called for 0, 1 and so on up to `count`.
    pub fn score_values<E: From<Refused>>(
        &mut self,
        model: &Model,
        context: impl FnOnce(&mut Values<'_>) -> Result<(), E>,
        count: usize,
        mut candidate: impl FnMut(usize, &mut Values<'_>) -> Result<(), E>,
    ) -> Result<&[Score], E> {
        let decoder = self.decoder(model)?;
        decoder.context_of(context)?;
        for i in 0..count {
            decoder.candidate_of(|values| candidate(i, values))?;
        }
        Ok(self.finish(model))
    }

    /// Scores the body of a request, `{"context": {…}, "candidates": [{…}, …], "ids": […]}`, of at most `most` candidates.
    pub fn score_body<'b>(
        &mut self,
        model: &Model,
        body: &'b [u8],
        most: usize,
    ) -> Result<(&[Score], Body<'b>), Refused> {
        let rest = self.decoder(model)?.body(body, most)?;
        Ok((self.finish(model), rest))
    }

    fn decoder(&mut self, model: &Model) -> Result<&mut RequestDecoder, Refused> {
        let hash = &model.manifest().model.schema_hash;
        if self.decoder.is_none() || self.schema != *hash {
            // Cannot fail, for training has compiled the same paths; if it did, the message would say so.
            self.decoder = Some(RequestDecoder::new(model.schema()).map_err(|error| Refused {
                part: Part::Body,
                wrong: Wrong::Form,
                field: None,
                problem: error.to_string(),
            })?);
            self.schema.clone_from(hash);
        }
        Ok(self.decoder.as_mut().expect("made just now"))
    }

    fn finish(&mut self, model: &Model) -> &[Score] {
        self.logits.clear();
        self.scores.clear();
        if let Some(decoder) = &self.decoder {
            model.logits(decoder.overlay(), &mut self.scratch, &mut self.logits);
        }
        self.scores.extend(self.logits.iter().map(|&logit| Score { logit, prediction: prediction(logit) }));
        &self.scores
    }
}

fn prediction(logit: f32) -> f64 {
    1.0 / (1.0 + libm::exp(-f64::from(logit)))
}
