//! Whether a batch's click-through rate can be believed, before anything is learned from it.

use serde::{Deserialize, Serialize};

/// The band of click-through rates, as multiples of the recent one, or `"never"`: no batch is held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Band(pub Option<[f64; 2]>);

impl Serialize for Band {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(band) => band.serialize(serializer),
            None => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for Band {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected two multiples of the recent CTR such as [0.33, 3.0], or \"never\"")]
        enum Written {
            Band([f64; 2]),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Band(band) => Ok(Self(Some(band))),
            Written::Word(word) if word == "never" => Ok(Self(None)),
            Written::Word(word) => Err(serde::de::Error::custom(format!(
                "expected two multiples of the recent CTR such as [0.33, 3.0], or \"never\", got \"{word}\""
            ))),
        }
    }
}

/// `[fuse]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// A silent click partition is idle only while fewer clicks than this are missing by its share of the stream; then it
    /// is stalled, and awaited. 0: never stalled. Lower: fewer false negatives, more false alarms. Default 20.
    pub expected: u64,
    /// A batch is held when the CTR leaves this band of multiples of the recent one, or "never". Default [0.33, 3.0].
    pub ctr_band: Band,
    /// The recent CTR is that of the latest impressions with this many clicks, up to twice as many; before the first so
    /// many no batch is held. Default 1000.
    pub ctr_clicks: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { expected: 20, ctr_band: Band(Some([0.33, 3.0])), ctr_clicks: 1000 }
    }
}

/// Impressions that got a label, and the positives among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    pub impressions: u64,
    pub clicks: u64,
}

impl Tally {
    fn plus(self, other: Self) -> Self {
        Self { impressions: self.impressions + other.impressions, clicks: self.clicks + other.clicks }
    }

    fn less(self, part: Self) -> Self {
        Self { impressions: self.impressions - part.impressions, clicks: self.clicks - part.clicks }
    }

    /// Click-through rate; a click and an impression more than there were, so that it is never 0.
    fn rate(self) -> f64 {
        (self.clicks as f64 + 1.0) / (self.impressions as f64 + 1.0)
    }
}

/// The latest batches, which taken together lie outside of the band.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    side: Side,
    tally: Tally,
    /// Clicks that they would have at the edge of the band.
    edge: f64,
}

impl Run {
    /// `tally` against an edge of so many clicks: a run, if it lies outside.
    fn outside(side: Side, tally: Tally, edge: f64) -> Option<Self> {
        let clicks = tally.clicks as f64;
        let out = match side {
            Side::Low => clicks < edge,
            Side::High => clicks > edge,
        };
        out.then_some(Self { side, tally, edge })
    }

    fn surprise(&self) -> f64 {
        surprise(self.tally.clicks as f64, self.edge)
    }
}

/// A click-through rate that is taken for normal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Level {
    /// Of the batches before `run`: what lies outside of the band does not move it.
    recent: Tally,
    run: Option<Run>,
}

impl Level {
    fn of(recent: Tally) -> Self {
        Self { recent, run: None }
    }

    /// The run that `batch` makes: with the one before it or alone, whichever is less like chance; none if it is inside.
    fn with(&self, band: [f64; 2], batch: Tally) -> Option<Run> {
        let edge = |side: Side| batch.impressions as f64 * self.recent.rate() * band[side as usize];
        let joint = self.run.and_then(|run| Run::outside(run.side, run.tally.plus(batch), run.edge + edge(run.side)));
        let mut alone = [Side::Low, Side::High].into_iter().filter_map(|side| Run::outside(side, batch, edge(side)));
        match (joint, alone.next()) {
            (Some(joint), Some(alone)) => Some(if alone.surprise() > joint.surprise() { alone } else { joint }),
            (joint, alone) => joint.or(alone),
        }
    }
}

/// What the fuse remembers, at a batch boundary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    level: Level,
    /// Clicks counted into `level`.
    clicks: u64,
    /// The level before an operator accepted another one, until that is established.
    before: Option<Tally>,
}

/// Which side of the band.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Low,
    High,
}

/// Why a batch is not believed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Jump {
    pub side: Side,
    /// The batch.
    pub batch: Tally,
    /// The batch, or the batch and those just before it, whichever is less like chance.
    pub run: Tally,
    /// Click-through rate before.
    pub recent_ctr: f64,
    /// Clicks that `run` would have at the edge of the band.
    pub clicks_at_edge: f64,
}

/// Holds the click-through rate of each batch against that of those before it. A function of the order alone.
#[derive(Clone, Debug)]
pub struct Fuse {
    band: Option<[f64; 2]>,
    clicks: u64,
    state: State,
}

/// -ln of the probability, one in a million, below which what is outside of the band is not chance.
const SURE: f64 = 13.8;

impl Fuse {
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self { band: settings.ctr_band.0, clicks: settings.ctr_clicks.max(1), state: State::default() }
    }

    /// A fuse that never holds.
    #[must_use]
    pub fn off() -> Self {
        Self::new(&Settings { ctr_band: Band(None), ..Settings::default() })
    }

    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    pub fn restore(&mut self, state: State) {
        self.state = state;
    }

    /// The recent click-through rate; `None` before it is established.
    #[must_use]
    pub fn recent_ctr(&self) -> Option<f64> {
        (self.state.clicks >= self.clicks).then(|| self.state.level.recent.rate())
    }

    /// Whether `batch`, with those just before it, has left the band. Changes nothing.
    #[must_use]
    pub fn judge(&self, batch: Tally) -> Option<Jump> {
        let band = self.band?;
        if self.state.clicks < self.clicks {
            return None;
        }
        let jump = jump(band, &self.state.level, batch)?;
        // Back at the level before an operator accepted another one: by this batch alone.
        let back = self.state.before.is_some_and(|before| self::jump(band, &Level::of(before), batch).is_none());
        (!back).then_some(jump)
    }

    /// Counts a batch that is learned.
    pub fn learned(&mut self, batch: Tally) {
        let Some(band) = self.band else { return };
        let State { level, clicks, before } = &mut self.state;
        if let Some(normal) = *before
            && jump(band, level, batch).is_some()
        {
            *level = Level::of(normal);
            *before = None;
        }
        let run = if *clicks >= self.clicks { level.with(band, batch) } else { None };
        // What is no longer part of a run has turned out to be normal.
        let all = level.run.map_or(batch, |run| run.tally.plus(batch));
        level.recent = level.recent.plus(all.less(run.map_or(Tally::default(), |run| run.tally)));
        level.run = run;
        while level.recent.clicks >= 2 * self.clicks {
            level.recent = Tally { impressions: level.recent.impressions / 2, clicks: level.recent.clicks / 2 };
        }
        *clicks += batch.clicks;
        if level.recent.clicks >= self.clicks {
            *before = None;
        }
    }

    /// Counts a batch that is learned because an operator accepted it: its click-through rate is the normal one from now
    /// on. That from before is still taken for normal until the new one has its `ctr_clicks`.
    pub fn accepted(&mut self, batch: Tally) {
        let before = self.state.before.unwrap_or(self.state.level.recent);
        self.state.before = Some(before);
        self.state.level = Level::of(batch);
        self.state.clicks += batch.clicks;
    }
}

/// Whether the run that `batch` makes is outside of the band beyond chance.
fn jump(band: [f64; 2], level: &Level, batch: Tally) -> Option<Jump> {
    let Run { side, tally, edge } = level.with(band, batch).filter(|run| run.surprise() >= SURE)?;
    Some(Jump { side, batch, run: tally, recent_ctr: level.recent.rate(), clicks_at_edge: edge })
}

/// A lower bound of -ln of the probability of `seen` clicks or more extreme where `mean` are expected (Chernoff's, for a
/// Poisson number).
fn surprise(seen: f64, mean: f64) -> f64 {
    let seen_over_mean = if seen > 0.0 { seen * libm::log(seen / mean) } else { 0.0 };
    seen_over_mean + mean - seen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tally(impressions: u64, clicks: u64) -> Tally {
        Tally { impressions, clicks }
    }

    /// A fuse that knows a click-through rate of `per_mille` per mille.
    fn fuse(per_mille: u64) -> Fuse {
        let mut fuse = Fuse::new(&Settings::default());
        for _ in 0..2000 / per_mille {
            assert_eq!(fuse.judge(tally(1000, per_mille)), None);
            fuse.learned(tally(1000, per_mille));
        }
        fuse
    }

    /// Probability of `n` clicks or fewer where `mean` are expected, term by term.
    fn poisson_tail(n: u64, mean: f64) -> f64 {
        let mut term = libm::exp(-mean);
        let mut sum = term;
        for k in 1..=n {
            term *= mean / k as f64;
            sum += term;
        }
        sum
    }

    proptest! {
        #[test]
        fn the_bound_on_chance_is_never_more_certain_than_the_exact_probability(n in 0u64..60, mean in 0.1f64..80.0) {
            let exact = if (n as f64) < mean { poisson_tail(n, mean) } else { 1.0 - poisson_tail(n.max(1) - 1, mean) };
            prop_assume!(exact > 1e-12);
            prop_assert!(libm::exp(-surprise(n as f64, mean)) >= exact * (1.0 - 1e-6));
        }

        #[test]
        fn no_stream_inside_the_band_is_ever_held(rates in prop::collection::vec(60u64..150, 1..300)) {
            // Whatever of these rates the recent one is, all the others lie between a third and three times of it.
            let mut fuse = fuse(100);
            for (i, rate) in rates.into_iter().enumerate() {
                let n = [10, 100, 512, 4000][i % 4];
                let batch = tally(n, (n * rate).div_ceil(1000));
                prop_assert_eq!(fuse.judge(batch), None);
                fuse.learned(batch);
            }
        }
    }

    #[test]
    fn a_large_batch_without_clicks_is_held_at_once() {
        let jump = fuse(100).judge(tally(512, 0)).expect("51 clicks were to be expected");
        assert_eq!((jump.side, jump.batch.clicks), (Side::Low, 0));
        assert!((jump.recent_ctr - 0.1).abs() < 1e-3);
        assert_eq!(fuse(100).judge(tally(512, 160)), None, "inside of the band, or hardly outside");
        assert_eq!(fuse(100).judge(tally(512, 300)).unwrap().side, Side::High);
    }

    #[test]
    fn small_batches_are_held_together_once_they_cannot_be_chance() {
        let mut fuse = fuse(10);
        let mut learned = 0;
        while fuse.judge(tally(100, 0)).is_none() {
            fuse.learned(tally(100, 0));
            learned += 1;
        }
        // 13.8 clicks at the edge of the band, a third of the recent rate: 42 clicks, of 4200 impressions.
        assert!((40..48).contains(&learned), "{learned} batches of 100 were learned");
    }

    #[test]
    fn a_run_begins_where_it_is_least_like_chance_and_does_not_move_the_recent_rate() {
        let mut fuse = fuse(100);
        let before = fuse.recent_ctr().unwrap();
        // Low, though not by enough; then nothing at all.
        fuse.learned(tally(600, 19));
        let mut learned = 0;
        while fuse.judge(tally(60, 0)).is_none() {
            fuse.learned(tally(60, 0));
            learned += 1;
        }
        assert!(learned <= 7, "{learned} batches of 60 were learned, with 2 clicks each at the edge");
        assert!((fuse.recent_ctr().unwrap() - before).abs() < 0.01);
    }

    #[test]
    fn a_batch_inside_the_band_ends_a_run() {
        let mut fuse = fuse(10);
        for _ in 0..100 {
            for _ in 0..30 {
                assert_eq!(fuse.judge(tally(100, 0)), None);
                fuse.learned(tally(100, 0));
            }
            fuse.learned(tally(3000, 40));
        }
    }

    #[test]
    fn what_an_operator_accepts_is_normal_from_then_on_and_what_was_normal_stays_so() {
        let mut fuse = fuse(100);
        assert!(fuse.judge(tally(1000, 5)).is_some());
        fuse.accepted(tally(1000, 5));
        for _ in 0..50 {
            assert_eq!(fuse.judge(tally(1000, 6)), None);
            fuse.learned(tally(1000, 6));
        }
        // Back to the old rate: not held, and the accepted one is a jump again.
        assert_eq!(fuse.judge(tally(1000, 100)), None);
        fuse.learned(tally(1000, 100));
        assert!(fuse.judge(tally(1000, 5)).is_some());
    }

    #[test]
    fn nothing_is_held_before_the_recent_rate_is_established_nor_with_the_band_off() {
        let mut young = Fuse::new(&Settings::default());
        young.learned(tally(9_000, 900));
        assert_eq!(young.judge(tally(9_000, 0)), None);
        let mut off = Fuse::off();
        off.learned(tally(100_000, 10_000));
        assert_eq!(off.judge(tally(100_000, 0)), None);
    }

    #[test]
    fn what_came_before_the_rate_was_established_is_not_held_against_a_batch() {
        let mut fuse =
            Fuse::new(&Settings { ctr_band: Band(Some([0.8, 1.25])), ctr_clicks: 100, ..Settings::default() });
        fuse.learned(tally(2500, 240));
        assert_eq!(fuse.judge(tally(2500, 230)), None);
        assert!(fuse.judge(tally(2500, 100)).is_some());
    }

    #[test]
    fn the_state_survives_its_text_exactly() {
        let mut fuse = fuse(30);
        fuse.learned(tally(333, 1));
        fuse.accepted(tally(777, 7));
        fuse.learned(tally(333, 1));
        let text = serde_json::to_string(&fuse.state()).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), fuse.state());
    }
}
