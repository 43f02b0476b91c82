//! A synthetic stream of impressions and clicks with a known truth.
//!
//! Each impression's probability of a click is a function of user, item, context and time that is known here, so the
//! best log loss and AUC that any model could reach on the stream are known too ([`Stats`]). The stream has what real
//! ones have: Zipf users and items, tastes that drift, a position effect, clicks that come late, records out of order,
//! duplicates, clicks without an impression, and lines that nobody can parse.
//!
//! Everything is a function of [`Settings`], on every machine: chance comes from [`rand_pcg`] as raw 64-bit words, and
//! what is made of them uses plain arithmetic and the `libm` crate only. (`rand_distr`'s Zipf, log-normal and normal
//! go through the standard library's `powf` and `ln`, whose last bits differ between platforms, so they are not used.)
//! The truth (who sees what when, who clicks, how late) is drawn apart from the disturbances, so `disorder`, `late`,
//! `duplicates`, `orphans`, `garbage` and `partitions` never change it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::f64::consts::{PI, SQRT_2};

use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::Rng as _;

use crate::event::{Stream, Time};

const SECOND: f64 = 1000.0;
const DAY: f64 = 86_400.0 * SECOND;
const DIM: usize = 8;
/// Positions of a page, counted from 1.
const POSITIONS: usize = 10;
const COUNTRIES: [&str; 12] = ["CN", "US", "IN", "ID", "BR", "JP", "DE", "FR", "GB", "TR", "PL", "NL"];
const DEVICES: [&str; 4] = ["android", "ios", "desktop", "tablet"];
const TAGS: u64 = 200;
/// Bins of the logit in which the AUC of the truth is counted; the error is below 1e-5.
const BINS: usize = 1 << 20;

/// What stream to make. The defaults give a small clean-enough stream of a million users.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub seed: u64,
    /// Distinct impressions; duplicates and garbage come on top.
    pub impressions: u64,
    pub users: u64,
    pub items: u64,
    pub categories: u64,
    /// Exponents of the Zipf laws of users and items, `> 0`.
    pub user_skew: f64,
    pub item_skew: f64,
    /// Event time of the first impression.
    pub start: Time,
    /// Impressions per second of event time.
    pub rate: f64,
    /// Mean probability of a click, whenever it comes, `0 < ctr < 1`.
    pub ctr: f64,
    /// Period of the slow turn of tastes, in days of event time.
    pub drift_days: f64,
    /// Click delay: log-normal, median in seconds and sigma of its logarithm.
    pub delay_median: f64,
    pub delay_sigma: f64,
    /// A click later than this after its impression is emitted, but is no positive. Milliseconds.
    pub window: i64,
    /// How much later than its event time a record that is not late arrives at most. Milliseconds.
    pub disorder: i64,
    /// Share of records that arrive later than `disorder` after their event time, by up to `4 x disorder + 1 s` more.
    pub late: f64,
    /// Share of records that arrive twice.
    pub duplicates: f64,
    /// Share of clicks that belong to no impression.
    pub orphans: f64,
    /// Share of lines that cannot be read.
    pub garbage: f64,
    /// Partitions of each stream; a user's records share one.
    pub partitions: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            seed: 1,
            impressions: 1_000_000,
            users: 1_000_000,
            items: 100_000,
            categories: 50,
            user_skew: 0.8,
            item_skew: 1.0,
            start: Time(1_767_225_600_000), // 2026-01-01T00:00:00Z
            rate: 1000.0,
            ctr: 0.05,
            drift_days: 7.0,
            delay_median: 15.0,
            delay_sigma: 1.3,
            window: 30 * 60 * 1000,
            disorder: 2_000,
            late: 0.0,
            duplicates: 0.0,
            orphans: 0.0,
            garbage: 0.0,
            partitions: 1,
        }
    }
}

/// A setting outside of what makes sense.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("`{key}` must be {expected}, got {got}")]
pub struct Error {
    pub key: &'static str,
    pub expected: &'static str,
    pub got: f64,
}

/// One line of the stream. Comes out of [`Generator`] in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    pub stream: Stream,
    /// `0..partitions`.
    pub partition: u32,
    /// When the log took it: never before its event time, never before the event that came out before.
    pub arrival: Time,
    /// The second copy of an event that has come out before.
    pub copy: bool,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    Impression {
        impression: Impression,
        truth: Truth,
    },
    /// `id` is the impression's.
    Click {
        id: u64,
        time: Time,
        origin: Origin,
    },
    Garbage {
        shape: u8,
        noise: u64,
    },
}

/// What a click has to do with an impression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    InsideWindow,
    OutsideWindow,
    /// There is no such impression.
    Orphan,
}

/// What is known about an impression and not told to the learner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truth {
    /// Probability of a click inside the window.
    pub p: f64,
    /// Was there one.
    pub positive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Impression {
    pub id: u64,
    pub time: Time,
    /// Ranks in the Zipf order, counted from 1.
    pub user: u64,
    pub item: u64,
    pub category: u32,
    pub price_cents: u32,
    /// Index into the list of countries.
    pub country: u8,
    /// Years; `None` for a tenth of the users.
    pub age: Option<u8>,
    /// Counted from 1.
    pub position: u8,
    pub device: u8,
    /// Of the day, UTC.
    pub hour: u8,
    pub tags: [u8; 4],
    pub tags_len: u8,
}

/// Says what the stream held and how well it can be predicted at best.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    /// Distinct impressions, in arrival order counted at their first copy.
    pub impressions: u64,
    /// Of these, how many were clicked inside the window.
    pub positives: u64,
    /// Distinct clicks with an impression, inside or outside of the window.
    pub clicks: u64,
    pub clicks_outside_window: u64,
    pub orphans: u64,
    pub duplicate_impressions: u64,
    pub duplicate_clicks: u64,
    pub garbage_impressions: u64,
    pub garbage_clicks: u64,
    /// Records that stand behind their partition's largest event time by more than `disorder`.
    pub late_impressions: u64,
    pub late_clicks: u64,
    /// `positives / impressions`.
    pub ctr: f64,
    /// Event times of the first and last impression, ms.
    pub first: i64,
    pub last: i64,
    /// Mean of `-[y ln p + (1-y) ln(1-p)]` over the drawn labels: what a model that knew the truth would get.
    pub best_logloss: f64,
    /// Its expectation: the mean entropy of the labels.
    pub best_logloss_expected: f64,
    /// AUC of the true probability on the drawn labels.
    pub best_auc: f64,
    /// Log loss of the best constant.
    pub constant_logloss: f64,
}

/// The stream, in order of arrival. See the module.
pub struct Generator {
    settings: Settings,
    truth: World,
    noise: Rng,
    users: Zipf,
    items: Zipf,
    made: u64,
    orphans: u64,
    orphan_debt: f64,
    garbage_debt: f64,
    next_ms: f64,
    pending: BinaryHeap<Reverse<(i64, u64, u32)>>, // (arrival, sequence, place in `slab`)
    slab: Vec<Event>,
    free: Vec<u32>,
    sequence: u64,
    tally: Tally,
}

impl Generator {
    /// # Errors
    /// Names the first setting that makes no sense.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        settings.check()?;
        let (users, items) =
            (Zipf::new(settings.users, settings.user_skew), Zipf::new(settings.items, settings.item_skew));
        let truth = World::new(&settings, &users, &items);
        Ok(Self {
            noise: Rng::new(settings.seed, 2),
            next_ms: settings.start.0 as f64,
            tally: Tally::new(settings.partitions),
            made: 0,
            orphans: 0,
            orphan_debt: 0.0,
            garbage_debt: 0.0,
            pending: BinaryHeap::new(),
            slab: Vec::new(),
            free: Vec::new(),
            sequence: 0,
            settings,
            truth,
            users,
            items,
        })
    }

    /// What has come out so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.tally.stats()
    }

    /// Draws the next impression and all that follows from it, and puts it on the way.
    fn make(&mut self) {
        let impression = self.truth.impression(self.made, self.next_ms, &self.users, &self.items);
        let logit = self.truth.logit(&impression);
        let chance = sigmoid(logit);
        let drawn = self.truth.rng.unit() < chance;
        let partition = (mix(impression.user) % u64::from(self.settings.partitions)) as u32;
        let delay = drawn.then(|| self.truth.delay());
        let positive = delay.is_some_and(|ms| ms <= self.settings.window);
        let truth = Truth { p: chance * self.truth.inside_window, positive };
        self.send(Stream::Impressions, partition, impression.time, What::Impression { impression, truth });
        if let Some(ms) = delay {
            let time = impression.time.plus(ms);
            let origin = if positive { Origin::InsideWindow } else { Origin::OutsideWindow };
            self.send(Stream::Clicks, partition, time, What::Click { id: impression.id, time, origin });
            // o of all clicks are orphans, so o / (1 - o) for each that is not. They look like any click.
            self.orphan_debt += self.settings.orphans / (1.0 - self.settings.orphans);
            while self.orphan_debt >= 1.0 {
                self.orphan_debt -= 1.0;
                self.orphans += 1;
                let id = mix(self.truth.id_key ^ (2 * self.orphans + 1)); // those of impressions are even
                let partition = (self.noise.next() % u64::from(self.settings.partitions)) as u32;
                self.send(Stream::Clicks, partition, time, What::Click { id, time, origin: Origin::Orphan });
            }
        }
        self.made += 1;
        self.next_ms += -libm::log(1.0 - self.truth.rng.unit()) * SECOND / self.settings.rate;
    }

    /// Puts a record on its way, now and then twice, now and then with garbage beside it.
    fn send(&mut self, stream: Stream, partition: u32, time: Time, what: What) {
        let arrival = self.arrival(time);
        self.push(Event { stream, partition, arrival, copy: false, what });
        if self.noise.hits(self.settings.duplicates) {
            let arrival = self.arrival(time).max(arrival);
            self.push(Event { stream, partition, arrival, copy: true, what });
        }
        // g of all lines are garbage, so g / (1 - g) for each that is not.
        self.garbage_debt += self.settings.garbage / (1.0 - self.settings.garbage);
        while self.garbage_debt >= 1.0 {
            self.garbage_debt -= 1.0;
            let what = What::Garbage { shape: (self.noise.next() % 5) as u8, noise: self.noise.next() };
            let arrival = self.arrival(time);
            self.push(Event { stream, partition, arrival, copy: false, what });
        }
    }

    fn arrival(&mut self, time: Time) -> Time {
        let bound = self.settings.disorder;
        let ms = if self.noise.hits(self.settings.late) {
            bound + 1 + self.noise.below(4 * bound + 1000)
        } else {
            self.noise.below(bound + 1)
        };
        time.plus(ms)
    }

    fn push(&mut self, event: Event) {
        let place = match self.free.pop() {
            Some(place) => {
                self.slab[place as usize] = event;
                place
            }
            None => {
                self.slab.push(event);
                (self.slab.len() - 1) as u32
            }
        };
        self.pending.push(Reverse((event.arrival.0, self.sequence, place)));
        self.sequence += 1;
    }
}

impl Iterator for Generator {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        // What is not made yet arrives no earlier than its event time, and that is no earlier than `next_ms`.
        while self.made < self.settings.impressions
            && self.pending.peek().is_none_or(|first| first.0.0 >= self.next_ms as i64)
        {
            self.make();
        }
        let Reverse((_, _, place)) = self.pending.pop()?;
        self.free.push(place);
        let event = self.slab[place as usize];
        self.tally.count(&event, self.settings.disorder);
        Some(event)
    }
}

impl Settings {
    fn check(&self) -> Result<(), Error> {
        let need = |ok: bool, key, expected, got| if ok { Ok(()) } else { Err(Error { key, expected, got }) };
        let share = |key, got: f64| need((0.0..=0.9).contains(&got), key, "a share between 0 and 0.9", got);
        let above_zero = |key, got: f64| need(got > 0.0 && got < 1e15, key, "a number above 0", got);
        share("late", self.late)?;
        share("duplicates", self.duplicates)?;
        share("orphans", self.orphans)?;
        share("garbage", self.garbage)?;
        above_zero("impressions", self.impressions as f64)?;
        above_zero("users", self.users as f64)?;
        above_zero("items", self.items as f64)?;
        above_zero("categories", self.categories as f64)?;
        above_zero("user_skew", self.user_skew)?;
        above_zero("item_skew", self.item_skew)?;
        above_zero("rate", self.rate)?;
        above_zero("drift_days", self.drift_days)?;
        above_zero("delay_median", self.delay_median)?;
        above_zero("partitions", f64::from(self.partitions))?;
        need((0.0..=10.0).contains(&self.delay_sigma), "delay_sigma", "between 0 and 10", self.delay_sigma)?;
        need((1e-6..=0.9).contains(&self.ctr), "ctr", "between 0.000001 and 0.9", self.ctr)?;
        let year = 366 * 86_400_000;
        need((0..=year).contains(&self.window), "window", "between 0 and a year", self.window as f64)?;
        need((0..=year).contains(&self.disorder), "disorder", "between 0 and a year", self.disorder as f64)?;
        let (start, ages) = (self.start.0, 4_102_444_800_000);
        need((0..=ages).contains(&start), "start", "a time between 1970 and 2100", start as f64)
    }
}

/// Who sees what, and how likely a click is. Users and items are functions of their number: nothing is stored for them.
#[derive(Clone)]
struct World {
    seed: u64,
    id_key: u64,
    rng: Rng,
    start: f64,
    categories: u64,
    intercept: f64,
    drift: f64,
    delay_mu: f64,
    delay_sigma: f64,
    /// Probability that a click's delay is at most the window.
    inside_window: f64,
    // Effects on the logit.
    position: [f64; POSITIONS],
    hour: [f64; 24],
    country: [f64; COUNTRIES.len()],
    tag: [f64; TAGS as usize],
}

impl World {
    fn new(settings: &Settings, users: &Zipf, items: &Zipf) -> Self {
        let seed = mix(settings.seed ^ 0x7469_6465_6d69_6c6c);
        let delay_mu = libm::log(settings.delay_median * SECOND);
        let mut world = Self {
            seed,
            id_key: mix(seed ^ 0x6964),
            rng: Rng::new(settings.seed, 0),
            start: settings.start.0 as f64,
            categories: settings.categories,
            intercept: 0.0,
            drift: 2.0 * PI / (settings.drift_days * DAY),
            delay_mu,
            delay_sigma: settings.delay_sigma,
            inside_window: log_normal_cdf(settings.window as f64 + 1.0, delay_mu, settings.delay_sigma),
            position: std::array::from_fn(|i| -0.45 * libm::log(1.0 + i as f64)),
            hour: std::array::from_fn(|h| 0.2 * libm::sin(2.0 * PI * (h as f64 - 14.0) / 24.0)),
            country: std::array::from_fn(|c| 0.3 * near_normal(hash(seed, 20, c as u64))),
            tag: std::array::from_fn(|t| 0.25 * near_normal(hash(seed, 21, t as u64))),
        };
        // The intercept that gives the wanted CTR, found on a sample of the stream's own kind over its whole span.
        let mut sampler = Self { rng: Rng::new(settings.seed, 1), ..world.clone() };
        let span = settings.impressions as f64 * SECOND / settings.rate;
        let logits: Vec<f64> = (0..20_000)
            .map(|k| {
                let at = sampler.start + span * (f64::from(k) + 0.5) / 20_000.0;
                let drawn = sampler.impression(0, at, users, items);
                sampler.logit(&drawn)
            })
            .collect();
        let (mut low, mut high) = (-30.0, 30.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            let mean = logits.iter().map(|z| sigmoid(z + middle)).sum::<f64>() / logits.len() as f64;
            if mean < settings.ctr { low = middle } else { high = middle }
        }
        world.intercept = 0.5 * (low + high);
        world
    }

    fn impression(&mut self, n: u64, at: f64, users: &Zipf, items: &Zipf) -> Impression {
        let time = Time(at as i64);
        let user = users.sample(&mut self.rng);
        let item = items.sample(&mut self.rng);
        let word = self.rng.next();
        let about_user = hash(self.seed, 1, user);
        let about_item = hash(self.seed, 2, item);
        let tags_len = (1 + (about_item >> 8) % 4) as u8;
        let mut tags = [0; 4];
        for (k, tag) in tags.iter_mut().enumerate().take(tags_len as usize) {
            *tag = (squared(hash(self.seed, 3 + k as u64, item)) * TAGS as f64) as u8;
        }
        Impression {
            id: mix(self.id_key ^ n.wrapping_mul(2)),
            time,
            user,
            item,
            category: (squared(hash(self.seed, 8, item)) * self.categories as f64) as u32,
            price_cents: (libm::exp(7.6 + 0.9 * near_normal(hash(self.seed, 9, item))) as u32).max(1),
            country: (squared(about_user) * COUNTRIES.len() as f64) as u8,
            age: (!about_user.is_multiple_of(10)).then_some((15 + (about_user >> 5) % 60) as u8),
            position: (1 + (word & 0xffff) * POSITIONS as u64 / 0x1_0000) as u8,
            // A user has a main device and uses another one now and then.
            device: if (word >> 16) & 7 == 0 { (word >> 20) & 3 } else { (about_user >> 12) & 3 } as u8,
            hour: (time.0.rem_euclid(86_400_000) / 3_600_000) as u8,
            tags,
            tags_len,
        }
    }

    fn logit(&self, i: &Impression) -> f64 {
        let angle = (i.time.0 as f64 - self.start) * self.drift;
        let (sin, cos) = (libm::sin(angle), libm::cos(angle));
        let turn = |kind: u64, key: u64| {
            cos * near_normal(hash(self.seed, kind, key)) + sin * near_normal(hash(self.seed, kind + 1, key))
        };
        let category = u64::from(i.category);
        let mut dot = 0.0;
        for d in 0..DIM as u64 {
            let (k, cell) = (100 + 8 * d, category * DIM as u64 + d);
            // A user's taste turns slowly; half of it is that of his country and device, so it can be learned early.
            let peers = near_normal(hash(self.seed, k + 2, u64::from(i.country) * 4 + u64::from(i.device)));
            let user = 0.7 * turn(k, i.user) + 0.7 * peers;
            let item =
                0.8 * near_normal(hash(self.seed, k + 3, cell)) + 0.6 * near_normal(hash(self.seed, k + 4, i.item));
            dot += user * item;
        }
        let age = i.age.map_or(-0.1, |age| (f64::from(age) - 40.0) / 20.0);
        let tags: f64 = i.tags[..i.tags_len as usize].iter().map(|t| self.tag[*t as usize]).sum();
        self.intercept
            + 0.35 * dot
            + 0.4 * near_normal(hash(self.seed, 30, i.user))
            + 0.5 * turn(31, i.item)
            + 0.4 * turn(33, category)
            + self.position[i.position as usize - 1]
            + self.hour[i.hour as usize]
            + self.country[i.country as usize]
            + 0.3 * near_normal(hash(self.seed, 35, category * 4 + u64::from(i.device)))
            + 0.3 * age * near_normal(hash(self.seed, 36, category))
            - 0.15 * (libm::log(f64::from(i.price_cents)) - 7.6)
            + tags
    }

    /// Whole milliseconds from an impression to its click.
    fn delay(&mut self) -> i64 {
        // Box-Muller, one of the two.
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.rng.unit()));
        let normal = radius * libm::cos(2.0 * PI * self.rng.unit());
        // A delay over 30 years says nothing; the cap keeps times in range.
        libm::exp(self.delay_mu + self.delay_sigma * normal).min(1e12) as i64
    }
}

impl Event {
    /// When it happened; garbage does not say.
    #[must_use]
    pub fn time(&self) -> Option<Time> {
        match &self.what {
            What::Impression { impression, .. } => Some(impression.time),
            What::Click { time, .. } => Some(*time),
            What::Garbage { .. } => None,
        }
    }

    /// The impression's; garbage has none.
    #[must_use]
    pub fn id(&self) -> Option<u64> {
        match &self.what {
            What::Impression { impression, .. } => Some(impression.id),
            What::Click { id, .. } => Some(*id),
            What::Garbage { .. } => None,
        }
    }

    /// Appends the line as it stands in the log, with its line end. About 250 bytes for an impression.
    pub fn write_line(&self, out: &mut Vec<u8>) {
        match &self.what {
            What::Impression { impression, .. } => impression.write_json(out),
            What::Click { id, time, .. } => {
                out.extend_from_slice(b"{\"id\":\"");
                write_hex(out, *id);
                out.extend_from_slice(b"\",\"ts\":");
                write_int(out, time.0);
                out.push(b'}');
            }
            What::Garbage { shape, noise } => {
                match shape {
                    0 => out.extend_from_slice(b"{\"id\":\""),                         // cut off
                    1 => out.extend_from_slice(b"#!\x00\xff\xfe not json \t"),         // not even text
                    2 => out.extend_from_slice(b"{\"ts\":\"yesterday\",\"noise\":\""), // no id, no time
                    3 => out.extend_from_slice(b"{\"id\":null,\"ts\":null,\"noise\":\""), // both are null
                    _ => out.extend_from_slice(b"[\""),                                // not an object
                }
                write_hex(out, *noise);
                match shape {
                    2 | 3 => out.extend_from_slice(b"\"}"),
                    4 => out.extend_from_slice(b"\"]"),
                    _ => {}
                }
            }
        }
        out.push(b'\n');
    }
}

impl Impression {
    fn write_json(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"id\":\"");
        write_hex(out, self.id);
        out.extend_from_slice(b"\",\"ts\":");
        write_int(out, self.time.0);
        out.extend_from_slice(b",\"request\":\"");
        write_hex(out, mix(self.id));
        out.extend_from_slice(b"\",\"user\":{\"id\":\"u");
        write_int(out, self.user as i64);
        out.extend_from_slice(b"\",\"country\":\"");
        out.extend_from_slice(COUNTRIES[self.country as usize].as_bytes());
        out.extend_from_slice(b"\",\"age\":");
        match self.age {
            Some(age) => write_int(out, i64::from(age)),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b"},\"item\":{\"id\":\"i");
        write_int(out, self.item as i64);
        out.extend_from_slice(b"\",\"category\":\"c");
        write_int(out, i64::from(self.category));
        out.extend_from_slice(b"\",\"price\":");
        write_int(out, i64::from(self.price_cents / 100));
        let cents = self.price_cents % 100;
        out.extend_from_slice(&[b'.', b'0' + (cents / 10) as u8, b'0' + (cents % 10) as u8]);
        out.extend_from_slice(b"},\"position\":");
        write_int(out, i64::from(self.position));
        out.extend_from_slice(b",\"device\":\"");
        out.extend_from_slice(DEVICES[self.device as usize].as_bytes());
        out.extend_from_slice(b"\",\"hour\":");
        write_int(out, i64::from(self.hour));
        out.extend_from_slice(b",\"tags\":[");
        for (k, tag) in self.tags[..self.tags_len as usize].iter().enumerate() {
            out.extend_from_slice(if k == 0 { b"\"t" } else { b",\"t" });
            write_int(out, i64::from(*tag));
            out.push(b'"');
        }
        out.extend_from_slice(b"]}");
    }
}

/// The id of an event as its line and the truth write it.
pub fn write_hex(out: &mut Vec<u8>, id: u64) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend((0..16).rev().map(|k| DIGITS[(id >> (4 * k)) as usize & 15]));
}

fn write_int(out: &mut Vec<u8>, n: i64) {
    out.extend_from_slice(itoa::Buffer::new().format(n).as_bytes());
}

/// Counts what has come out.
struct Tally {
    stats: Stats,
    latest: [Vec<Time>; 2],
    loss: f64,
    entropy: f64,
    bins: Vec<[u32; 2]>,
}

impl Tally {
    fn new(partitions: u32) -> Self {
        let none = vec![Time::MIN; partitions as usize];
        Self {
            stats: Stats { first: i64::MAX, last: i64::MIN, ..Stats::default() },
            latest: [none.clone(), none],
            loss: 0.0,
            entropy: 0.0,
            bins: vec![[0; 2]; BINS],
        }
    }

    fn count(&mut self, event: &Event, disorder: i64) {
        let stats = &mut self.stats;
        let time = match &event.what {
            What::Impression { .. } | What::Click { .. } if event.copy => {
                match event.stream {
                    Stream::Impressions => stats.duplicate_impressions += 1,
                    Stream::Clicks => stats.duplicate_clicks += 1,
                }
                event.time()
            }
            What::Impression { impression, truth: Truth { p, positive } } => {
                stats.impressions += 1;
                stats.positives += u64::from(*positive);
                stats.first = stats.first.min(impression.time.0);
                stats.last = stats.last.max(impression.time.0);
                let (hit, miss) = (-libm::log(*p), -libm::log1p(-p));
                self.loss += if *positive { hit } else { miss };
                self.entropy += p * hit + (1.0 - p) * miss;
                let bin = (miss - hit + 20.0) * (BINS as f64 / 40.0);
                self.bins[(bin as usize).min(BINS - 1)][usize::from(*positive)] += 1;
                Some(impression.time)
            }
            What::Click { time, origin, .. } => {
                match origin {
                    Origin::InsideWindow => stats.clicks += 1,
                    Origin::OutsideWindow => {
                        stats.clicks += 1;
                        stats.clicks_outside_window += 1;
                    }
                    Origin::Orphan => stats.orphans += 1,
                }
                Some(*time)
            }
            What::Garbage { .. } => {
                match event.stream {
                    Stream::Impressions => stats.garbage_impressions += 1,
                    Stream::Clicks => stats.garbage_clicks += 1,
                }
                None
            }
        };
        let Some(time) = time else { return };
        let latest = &mut self.latest[event.stream as usize][event.partition as usize];
        if time.plus(disorder) < *latest {
            match event.stream {
                Stream::Impressions => stats.late_impressions += 1,
                Stream::Clicks => stats.late_clicks += 1,
            }
        }
        *latest = time.max(*latest);
    }

    fn stats(&self) -> Stats {
        let n = (self.stats.impressions as f64).max(1.0);
        let (hits, misses) = (self.stats.positives as f64, n - self.stats.positives as f64);
        let (mut below, mut wins) = (0.0, 0.0);
        for [miss, hit] in &self.bins {
            wins += f64::from(*hit) * (below + 0.5 * f64::from(*miss));
            below += f64::from(*miss);
        }
        let part = |k: f64| if k > 0.0 { -k / n * libm::log(k / n) } else { 0.0 };
        Stats {
            ctr: hits / n,
            best_logloss: self.loss / n,
            best_logloss_expected: self.entropy / n,
            best_auc: if hits > 0.0 && misses > 0.0 { wins / (hits * misses) } else { 0.5 },
            constant_logloss: part(hits) + part(misses),
            ..self.stats.clone()
        }
    }
}

/// Raw words of a seeded generator, and what is made of them.
#[derive(Clone)]
struct Rng(Pcg64Mcg);

impl Rng {
    fn new(seed: u64, purpose: u64) -> Self {
        let low = mix(seed ^ mix(purpose));
        Self(Pcg64Mcg::new((u128::from(mix(low)) << 64) | u128::from(low)))
    }

    fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in `[0, 1)`.
    fn unit(&mut self) -> f64 {
        unit(self.next())
    }

    /// True with probability `share`. Draws a word even where the share is 0, so that one share does not move another.
    fn hits(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// Uniform in `0..n`.
    fn below(&mut self, n: i64) -> i64 {
        (self.unit() * n as f64) as i64
    }
}

/// Ranks `1..=n` with probability proportional to `rank^-s`, by rejection-inversion (Hormann and Derflinger 1996,
/// ACM TOMACS 6(3)): no table, whatever `n`.
struct Zipf {
    s: f64,
    n: f64,
    h_first: f64,
    h_last: f64,
    squeeze: f64,
}

impl Zipf {
    fn new(n: u64, s: f64) -> Self {
        let n = n as f64;
        let mut zipf = Self { s, n, h_first: 0.0, h_last: 0.0, squeeze: 0.0 };
        zipf.h_first = zipf.integral(1.5) - 1.0;
        zipf.h_last = zipf.integral(n + 0.5);
        zipf.squeeze = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.density(2.0));
        zipf
    }

    fn sample(&self, rng: &mut Rng) -> u64 {
        loop {
            let u = self.h_last + rng.unit() * (self.h_first - self.h_last);
            let x = self.inverse(u);
            let k = libm::round(x).clamp(1.0, self.n);
            if k - x <= self.squeeze || u >= self.integral(k + 0.5) - self.density(k) {
                return k as u64;
            }
        }
    }

    fn density(&self, x: f64) -> f64 {
        libm::exp(-self.s * libm::log(x))
    }

    /// Integral of the density, up to a constant: `(x^(1-s) - 1) / (1 - s)`, and `ln x` where s = 1.
    fn integral(&self, x: f64) -> f64 {
        let log = libm::log(x);
        let t = (1.0 - self.s) * log;
        if t.abs() < 1e-8 { log * (1.0 + 0.5 * t) } else { log * libm::expm1(t) / t }
    }

    fn inverse(&self, u: f64) -> f64 {
        let t = (u * (1.0 - self.s)).max(-1.0);
        libm::exp(if t.abs() < 1e-8 { u * (1.0 - 0.5 * t) } else { u * libm::log1p(t) / t })
    }
}

/// A bijection that leaves no pattern (the finaliser of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A word that belongs to (seed, kind, key) for ever.
fn hash(seed: u64, kind: u64, key: u64) -> u64 {
    mix(seed ^ kind.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ mix(key))
}

fn unit(word: u64) -> f64 {
    (word >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// In `[0, 1)`, the small ones more often.
fn squared(word: u64) -> f64 {
    unit(word) * unit(word)
}

/// Mean 0, variance 1, bounded by 3.5: the sum of a word's four quarters.
fn near_normal(word: u64) -> f64 {
    let sum = (word & 0xffff) + ((word >> 16) & 0xffff) + ((word >> 32) & 0xffff) + (word >> 48);
    (sum as f64 * (1.0 / 65536.0) - 2.0) * 1.732_050_807_568_877_2
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + libm::exp(-z))
}

fn log_normal_cdf(x: f64, mu: f64, sigma: f64) -> f64 {
    if sigma == 0.0 {
        return if libm::log(x) > mu { 1.0 } else { 0.0 };
    }
    0.5 * libm::erfc((mu - libm::log(x)) / (sigma * SQRT_2))
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn rough() -> Settings {
        Settings {
            impressions: 20_000,
            users: 5_000,
            items: 500,
            late: 0.02,
            duplicates: 0.03,
            orphans: 0.1,
            garbage: 0.01,
            partitions: 3,
            ..Settings::default()
        }
    }

    fn lines(settings: Settings) -> (Vec<u8>, Stats) {
        let mut generator = Generator::new(settings).unwrap();
        let mut out = Vec::new();
        for event in &mut generator {
            event.write_line(&mut out);
        }
        (out, generator.stats())
    }

    #[test]
    fn the_same_settings_give_the_same_bytes_on_every_machine() {
        let (bytes, stats) = lines(rough());
        assert_eq!((&bytes, &stats), (&lines(rough()).0, &lines(rough()).1));
        assert_ne!(bytes, lines(Settings { seed: 2, ..rough() }).0);
        // Pinned: a new version of a crate or another machine must not change what a seed stands for.
        assert_eq!(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&bytes)), "8aac0a9a1e3ed9e4");
    }

    #[test]
    fn what_is_known_of_the_truth_does_not_depend_on_the_disturbances() {
        let truth = |settings| -> Vec<(u64, Truth)> {
            let mut all: Vec<_> = Generator::new(settings)
                .unwrap()
                .filter(|event| !event.copy)
                .filter_map(|event| match event.what {
                    What::Impression { impression, truth } => Some((impression.id, truth)),
                    _ => None,
                })
                .collect();
            all.sort_by_key(|(id, _)| *id);
            all
        };
        let calm = Settings { impressions: 5_000, disorder: 0, ..Settings::default() };
        let wild = Settings {
            disorder: 60_000,
            late: 0.2,
            duplicates: 0.2,
            orphans: 0.3,
            garbage: 0.2,
            partitions: 7,
            ..calm.clone()
        };
        assert_eq!(truth(calm), truth(wild));
    }

    #[test]
    fn records_arrive_in_order_and_within_the_bound() {
        let settings = Settings { late: 0.0, ..rough() };
        let mut generator = Generator::new(settings.clone()).unwrap();
        let (mut last, mut out_of_order, mut newest) = (Time::MIN, 0, Time::MIN);
        for event in &mut generator {
            assert!(event.arrival >= last, "{event:?}");
            last = event.arrival;
            let Some(time) = event.time() else { continue };
            assert!((0..=settings.disorder).contains(&(event.arrival.0 - time.0)), "{event:?}");
            out_of_order += u64::from(time < newest);
            newest = newest.max(time);
        }
        let stats = generator.stats();
        assert!(out_of_order > 1000, "the bound is used: {out_of_order}");
        assert_eq!((stats.late_impressions, stats.late_clicks), (0, 0));
        let late = lines(rough()).1.late_impressions as f64 / 20_600.0;
        assert!((0.015..=0.025).contains(&late), "{late}");
    }

    #[test]
    fn clicks_refer_to_impressions_unless_they_are_orphans() {
        let settings = rough();
        let events: Vec<Event> = Generator::new(settings.clone()).unwrap().collect();
        let mut shown: HashMap<u64, (Impression, Truth, u32)> = HashMap::new();
        for event in &events {
            if let (What::Impression { impression, truth }, false) = (event.what, event.copy) {
                assert!(shown.insert(impression.id, (impression, truth, event.partition)).is_none(), "an id twice");
            }
        }
        assert_eq!(shown.len() as u64, settings.impressions);
        let mut clicked = HashSet::new();
        for event in &events {
            let What::Click { id, time, origin } = event.what else { continue };
            let known = shown.get(&id);
            assert_eq!(origin == Origin::Orphan, known.is_none(), "{event:?}");
            if let Some((impression, truth, partition)) = known {
                let delay = time.0 - impression.time.0;
                assert!(delay >= 0);
                assert_eq!(truth.positive, delay <= settings.window);
                assert_eq!(truth.positive, origin == Origin::InsideWindow);
                assert_eq!(*partition, event.partition);
                assert_eq!(clicked.insert(id), !event.copy);
            }
        }
        assert!(shown.values().all(|(i, truth, _)| !truth.positive || clicked.contains(&i.id)));
    }

    #[test]
    fn the_shares_are_what_was_asked_for() {
        let stats = lines(Settings { impressions: 100_000, ctr: 0.2, ..rough() }).1;
        let near = |got: f64, want: f64, by: f64| assert!((got / want - 1.0).abs() < by, "{got} against {want}");
        near(stats.ctr, 0.2, 0.03);
        near(stats.duplicate_impressions as f64 / stats.impressions as f64, 0.03, 0.1);
        near(stats.orphans as f64 / (stats.clicks + stats.orphans) as f64, 0.1, 0.1);
        let read = stats.impressions + stats.garbage_impressions;
        near(stats.garbage_impressions as f64 / read as f64, 0.01, 0.1);
    }

    #[test]
    fn the_window_cuts_off_the_share_of_clicks_that_the_delay_says() {
        let settings = Settings { impressions: 200_000, ctr: 0.3, window: 15_000, ..Settings::default() };
        let stats = lines(settings).1;
        // The window is the median.
        let outside = stats.clicks_outside_window as f64 / stats.clicks as f64;
        assert!((outside - 0.5).abs() < 0.01, "{outside}");
        assert_eq!(stats.clicks - stats.clicks_outside_window, stats.positives);
        let drawn_against_expected = stats.best_logloss / stats.best_logloss_expected;
        assert!((drawn_against_expected - 1.0).abs() < 0.01, "{stats:?}");
    }

    #[test]
    fn the_truth_can_be_predicted_better_than_by_a_constant() {
        let stats = lines(Settings { impressions: 50_000, ctr: 0.2, ..Settings::default() }).1;
        assert!(stats.best_logloss < 0.9 * stats.constant_logloss, "{stats:?}");
        assert!(stats.best_auc > 0.75, "{stats:?}");
    }

    #[test]
    fn users_follow_their_zipf_law() {
        for s in [0.5, 1.0, 1.7] {
            let (zipf, mut rng) = (Zipf::new(1000, s), Rng::new(1, 9));
            let mut counts = vec![0u32; 1001];
            for _ in 0..200_000 {
                counts[zipf.sample(&mut rng) as usize] += 1;
            }
            assert_eq!(counts[0], 0);
            let total: f64 = (1..=1000).map(|k| libm::pow(f64::from(k), -s)).sum();
            for k in [1, 2, 3, 10] {
                let want = 200_000.0 * libm::pow(k as f64, -s) / total;
                let got = f64::from(counts[k]);
                assert!((got - want).abs() < 5.0 * libm::sqrt(want), "s {s} rank {k}: {got} against {want}");
            }
        }
    }

    #[test]
    fn an_impression_is_a_json_object_of_about_250_bytes() {
        let (bytes, _) = lines(Settings { impressions: 1000, ..Settings::default() });
        let (mut total, mut n, mut no_age) = (0, 0, 0);
        for line in bytes.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let value: serde_json::Value = serde_json::from_slice(line).unwrap();
            if value.get("user").is_none() {
                continue;
            }
            (total, n) = (total + line.len(), n + 1);
            no_age += usize::from(value["user"]["age"].is_null());
            assert!(value["item"]["price"].as_f64().unwrap() > 0.0);
            assert!((1..=10).contains(&value["position"].as_i64().unwrap()));
            assert!((1..=4).contains(&value["tags"].as_array().unwrap().len()));
        }
        assert_eq!(n, 1000);
        assert!((200..=280).contains(&(total / n)), "{}", total / n);
        assert!((50..=160).contains(&no_age), "{no_age}");
    }

    #[test]
    fn garbage_has_no_id_and_time() {
        let (bytes, stats) = lines(Settings { impressions: 2000, garbage: 0.2, ..Settings::default() });
        let bad = bytes
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .filter(|line| match serde_json::from_slice::<serde_json::Value>(line) {
                Ok(value) => value["id"].as_str().is_none() || value["ts"].as_i64().is_none(),
                Err(_) => true,
            })
            .count() as u64;
        assert!(bad > 300);
        assert_eq!(bad, stats.garbage_impressions + stats.garbage_clicks);
    }

    #[test]
    fn a_setting_out_of_range_is_named() {
        let refused = Generator::new(Settings { ctr: 2.0, ..Settings::default() }).err().unwrap();
        assert_eq!(refused.to_string(), "`ctr` must be between 0.000001 and 0.9, got 2");
    }
}
