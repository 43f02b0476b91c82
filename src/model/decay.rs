//! Forgetting of accumulators, by periods of event time, in closed form at a row's next touch.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::event::Time;

/// Each time event time crosses a multiple of `per`, every accumulator above `floor` becomes `max(floor, n * keep)`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecaySettings {
    /// Length of a period of event time. Default 1d.
    #[serde(with = "humantime_serde")]
    pub per: Duration,
    /// What is left of an accumulator after a period. `0 < keep < 1`. Default 0.9.
    pub keep: f64,
    /// Decay takes no accumulator below it, so a row that rests keeps a sane rate. `>= 0`. Default 10.
    pub floor: f64,
}

impl Default for DecaySettings {
    fn default() -> Self {
        Self { per: Duration::from_secs(24 * 60 * 60), keep: 0.9, floor: 10.0 }
    }
}

impl DecaySettings {
    /// The checked form. `keys` are those of `per`, `keep` and `floor`, for the message.
    pub(super) fn check(&self, keys: [&'static str; 3]) -> Result<Decay, Error> {
        let refuse = |key, expected, got| Err(Error::Setting { key, expected, got });
        let &Self { per, keep, floor } = self;
        let per_ms = i64::try_from(per.as_millis()).unwrap_or(0);
        if per_ms < 1 {
            let got = humantime_serde::re::humantime::format_duration(per).to_string();
            return refuse(keys[0], "at least 1ms", got);
        }
        if !(keep > 0.0 && keep < 1.0) {
            return refuse(keys[1], "between 0 and 1, both exclusive", keep.to_string());
        }
        if !(0.0..=1e30).contains(&floor) {
            return refuse(keys[2], "between 0 and 1e30", floor.to_string());
        }
        Ok(Decay { per_ms, keep, floor })
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Decay {
    per_ms: i64,
    keep: f64,
    floor: f64,
}

impl Decay {
    /// Enters the period of a batch at `time`. Returns the first batch of the current period: rows last touched before
    /// it have rested.
    pub(super) fn enter(self, periods: &mut Vec<(u32, i64)>, batch: u32, time: Time) -> u32 {
        let period = time.0.div_euclid(self.per_ms);
        if periods.last().is_none_or(|&(_, last)| last < period) {
            periods.push((batch, period));
        }
        periods.last().map_or(0, |&(first, _)| first)
    }

    /// `n` as it is in `batch`, when it was last touched in an earlier one.
    pub(super) fn rested(self, periods: &[(u32, i64)], batch: u32, touched: u32, n: f64) -> f64 {
        let period_of = |batch: u32| {
            let next = periods.partition_point(|&(first, _)| first <= batch);
            periods[next.saturating_sub(1)].1
        };
        self.after(period_of(batch) - period_of(touched), n)
    }

    /// `n` after `periods` periods, in closed form. What is at or below the floor stays.
    fn after(self, periods: i64, n: f64) -> f64 {
        if n > self.floor { self.floor.max(n * libm::pow(self.keep, periods as f64)) } else { n }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decay_in_closed_form_equals_stepping_through_the_periods() {
        let decay = Decay { per_ms: 1, keep: 0.9, floor: 2.0 };
        for n in [0.5, 2.0, 2.1, 7.0, 1e6] {
            let mut stepped = n;
            for periods in 0..200 {
                let closed = decay.after(periods, n);
                assert!((closed - stepped).abs() <= 1e-12 * stepped, "{closed} against {stepped} after {periods}");
                stepped = decay.after(1, stepped);
            }
            assert_eq!(stepped, if n < 2.0 { n } else { 2.0 });
        }
    }
}
