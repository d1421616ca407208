//! Faults on purpose, for tests: only a mover that was made with `faults` takes them.

use crate::types::{Direction, Random};

/// What goes wrong from now on.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Pages until the one that fails; 0 for none.
    fail_in: u64,
    /// Direction of that page; `None`: any.
    direction: Option<Direction>,
    /// Probability that a page fails, and where it comes from.
    rate: Option<(f64, Random)>,
    /// Per direction: submissions that find the queue full.
    pub full: [u64; 3],
}

impl Faults {
    /// The k-th page from now, from 1, fails.
    pub fn fail(&mut self, k: u64, direction: Option<Direction>) {
        (self.fail_in, self.direction) = (k, direction);
    }

    /// Every page fails with this probability.
    pub fn fail_at_random(&mut self, rate: f64, seed: u64) {
        self.rate = (rate > 0.0).then_some((rate, Random(seed)));
    }

    /// Numbers of the pages of a batch that will fail.
    pub fn failing(&mut self, direction: Direction, pages: usize) -> Vec<u32> {
        let mut failing = Vec::new();
        let counts = self.fail_in > 0 && self.direction.is_none_or(|only| only == direction);
        if !counts && self.rate.is_none() {
            return failing;
        }
        for index in 0..pages {
            let mut fails = false;
            if counts && self.fail_in > 0 {
                self.fail_in -= 1;
                fails = self.fail_in == 0;
            }
            if let Some((rate, random)) = &mut self.rate {
                fails |= random.unit() < *rate;
            }
            if fails {
                failing.push(index as u32);
            }
        }
        failing
    }

    /// Whether this submission finds the queue full.
    pub fn is_full(&mut self, direction: Direction) -> bool {
        let left = &mut self.full[direction as usize];
        let full = *left > 0;
        *left -= u64::from(full);
        full
    }
}
