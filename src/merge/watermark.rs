//! The place of a record in the order, from its event time and its partition's local watermark.

use crate::event::Time;

/// How far a stream's clocks may be off, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// A record may come this much after a younger one of its partition and still keep its event time as its place.
    pub out_of_order: i64,
    /// A record may be stamped this much past its log time; further, it is rejected.
    pub ahead: i64,
}

/// Largest event time accepted in a partition, less the disorder allowed. Never falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermark(pub Time);

/// What became of a record at its partition's watermark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placing {
    /// `late`: its event time lay before the watermark, and it took the watermark's place.
    Accepted { time: Time, late: bool },
    /// Its event time is more than [`Bounds::ahead`] past its log time. It takes the watermark's place, as a reject.
    Ahead { time: Time },
}

impl Watermark {
    /// Places a record with event time `e` and log time `l` (for files without one, the clock at reading):
    ///
    /// | record            | time | counted  | watermark after             |
    /// |-------------------|------|----------|-----------------------------|
    /// | `e > l + ahead`   | `W`  | rejected | `W`                         |
    /// | `e >= W`          | `e`  |          | `max(W, min(e, l) - out_of_order)` |
    /// | `e < W`           | `W`  | late     | `W`                         |
    ///
    /// `log` is `None` where nothing is known about it, that is, on replay of a record that was read before.
    pub fn place(&mut self, event: Time, log: Option<Time>, bounds: Bounds) -> Placing {
        if log.is_some_and(|log| event > log.plus(bounds.ahead)) {
            return Placing::Ahead { time: self.0 };
        }
        let (time, late) = if event < self.0 { (self.0, true) } else { (event, false) };
        let credible = log.map_or(event, |log| event.min(log));
        self.0 = self.0.max(credible.minus(bounds.out_of_order));
        Placing::Accepted { time, late }
    }

    /// Lifts the watermark to at least `w`.
    pub fn lift(&mut self, w: Time) {
        self.0 = self.0.max(w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { out_of_order: 10, ahead: 5 };

    fn run(records: &[(i64, Option<i64>)]) -> Vec<(Placing, i64)> {
        let mut w = Watermark(Time::MIN);
        records.iter().map(|&(e, l)| (w.place(Time(e), l.map(Time), BOUNDS), w.0.0)).collect()
    }

    fn at(time: i64, late: bool) -> Placing {
        Placing::Accepted { time: Time(time), late }
    }

    #[test]
    fn a_record_inside_the_disorder_bound_keeps_its_event_time() {
        assert_eq!(run(&[(100, None), (90, None)])[1], (at(90, false), 90));
    }

    #[test]
    fn a_record_older_than_the_watermark_is_late_and_takes_the_watermarks_place() {
        assert_eq!(run(&[(100, None), (89, None)])[1], (at(90, true), 90));
    }

    #[test]
    fn a_clock_far_ahead_is_rejected_and_moves_nothing() {
        assert_eq!(run(&[(100, Some(100)), (106, Some(100))])[1], (Placing::Ahead { time: Time(90) }, 90));
    }

    #[test]
    fn a_clock_a_little_ahead_moves_the_watermark_only_as_far_as_the_log_time_would() {
        assert_eq!(run(&[(100, Some(100)), (105, Some(101))])[1], (at(105, false), 91));
    }

    #[test]
    fn the_watermark_never_falls() {
        let placed = run(&[(100, None), (95, None), (91, None), (200, None), (150, None)]);
        assert!(placed.windows(2).all(|pair| pair[0].1 <= pair[1].1));
    }
}
