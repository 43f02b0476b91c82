//! Where mini-batches end: a function of the order alone, never of the wall clock.

use crate::event::Time;

/// Cuts batches at n examples, or where time crosses a multiple of the period, where the count starts anew.
#[derive(Clone, Copy, Debug)]
pub struct Cutter {
    examples: usize,
    period: Option<i64>,
    count: usize,
    current: Option<i64>,
}

impl Cutter {
    /// `examples` > 0; `period` in ms, `None` for batches by count only.
    #[must_use]
    pub fn new(examples: usize, period: Option<i64>) -> Self {
        Self { examples, period, count: 0, current: None }
    }

    /// Whether the record at `time`, about to be released, lies in another period than the one before it: then the open
    /// batch ends before it. Ask once per released impression, whatever becomes of it.
    pub fn crosses(&mut self, time: Time) -> bool {
        let Some(period) = self.period.filter(|_| time != Time::MIN) else { return false };
        let now = time.0.div_euclid(period);
        let crossed = self.current.is_some_and(|before| before != now);
        self.current = Some(now);
        if crossed {
            self.count = 0;
        }
        crossed
    }

    /// Counts an example into the open batch; whether that fills it.
    pub fn fills(&mut self) -> bool {
        self.count += 1;
        if self.count < self.examples {
            return false;
        }
        self.count = 0;
        true
    }

    /// Takes up at a boundary whose frontier lies at `time`.
    pub fn resume(&mut self, time: Option<Time>) {
        self.count = 0;
        self.current = self.period.zip(time.filter(|&t| t != Time::MIN)).map(|(p, t)| t.0.div_euclid(p));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_at_n_examples() {
        let mut cutter = Cutter::new(3, None);
        let filled: Vec<bool> = (0..7).map(|_| cutter.fills()).collect();
        assert_eq!(filled, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn a_batch_ends_where_time_crosses_a_multiple_of_the_period_and_the_count_starts_anew() {
        let mut cutter = Cutter::new(3, Some(10));
        assert!(!cutter.crosses(Time(8)));
        assert!(!cutter.fills());
        assert!(!cutter.crosses(Time(9)));
        assert!(!cutter.fills());
        assert!(cutter.crosses(Time(10)));
        assert!(!cutter.fills());
        assert!(!cutter.crosses(Time(19)));
        assert!(!cutter.fills());
        assert!(cutter.fills());
    }

    #[test]
    fn a_resumed_cutter_knows_the_period_of_the_frontier() {
        let mut cutter = Cutter::new(3, Some(10));
        cutter.resume(Some(Time(15)));
        assert!(!cutter.crosses(Time(19)));
        assert!(cutter.crosses(Time(20)));
    }
}
