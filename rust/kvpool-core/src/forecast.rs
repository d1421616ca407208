//! Whether started requests that grow to their expected ends will ever need more slots than a pool has.
//!
//! ```text
//! slots of a request, t steps from now            used
//!                                  most ────────┐
//!   min(ceil((tokens + t) / T), most)    ___,---┘│ back
//!                             held ──'''         └────────> t
//!                                  now          steps
//! ```
//!
//! The sum over all requests is largest just before one of them ends, so only those moments are looked at.

/// What one request does to one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// Steps until it ends; it is there in the last of them.
    pub steps: u64,
    /// Its tokens once its context is computed; one more in each step.
    pub tokens: u64,
    /// Most slots that it can come to hold.
    pub most: u64,
    /// Slots that it has now.
    pub held: u64,
    /// Slots of `held` that come back when it ends.
    pub back: u64,
}

impl Growth {
    fn extra(&self, step: u64, t: u64) -> u64 {
        (self.tokens + step)
            .div_ceil(t)
            .min(self.most)
            .saturating_sub(self.held)
    }
}

/// Requests that grow in one pool.
#[derive(Debug)]
pub struct Forecast {
    tokens_per_block: u64,
    /// By their ends, with `extra(0)` of each: a division that no question repeats.
    rows: Vec<(Growth, u64)>,
    /// The sum of those.
    base: u64,
}

impl Forecast {
    /// Of requests in any order.
    pub fn new(tokens_per_block: u64, rows: Vec<Growth>) -> Self {
        let extra = |row: Growth| (row, row.extra(0, tokens_per_block));
        let mut rows: Vec<_> = rows.into_iter().map(extra).collect();
        rows.sort_by_key(|(row, _)| row.steps);
        let base = rows.iter().map(|(_, extra)| extra).sum();
        Self {
            tokens_per_block,
            rows,
            base,
        }
    }

    /// One more; returns its place, for `remove`.
    pub fn insert(&mut self, row: Growth) -> usize {
        let extra = row.extra(0, self.tokens_per_block);
        let at = self.rows.partition_point(|(other, _)| other.steps <= row.steps);
        self.rows.insert(at, (row, extra));
        self.base += extra;
        at
    }

    /// Takes back the last insert.
    pub fn remove(&mut self, at: usize) {
        self.base -= self.rows.remove(at).1;
    }

    /// The first step in which they need more than `available` slots besides what they have, and how many more.
    ///
    /// Of n requests, n; n * n in the worst case where it is close.
    pub fn overflow(&self, available: u64) -> Option<(u64, u64)> {
        let t = self.tokens_per_block;
        let (mut base, mut back, mut at) = (self.base, 0, 0);
        while let Some(&(Growth { steps, .. }, _)) = self.rows.get(at) {
            let alive = &self.rows[at..];
            let most = base + alive.len() as u64 * steps.div_ceil(t);
            if most > available + back {
                let exact: u64 = alive.iter().map(|(row, _)| row.extra(steps, t)).sum();
                if exact > available + back {
                    return Some((steps, exact - available - back));
                }
            }
            for (row, extra) in alive.iter().take_while(|(row, _)| row.steps == steps) {
                base -= extra;
                back += row.back;
                at += 1;
            }
        }
        None
    }
}

#[cfg(all(test, not(any(kvpool_loom, kvpool_shuttle))))]
mod tests {
    use super::*;

    /// Step by step, slot by slot.
    fn walk(rows: &[Growth], t: u64, available: u64) -> Option<(u64, u64)> {
        let last = rows.iter().map(|row| row.steps).max().unwrap_or(0);
        (0..=last).find_map(|step| {
            let need: u64 = rows
                .iter()
                .filter(|r| r.steps >= step)
                .map(|r| r.extra(step, t))
                .sum();
            let back: u64 = rows.iter().filter(|r| r.steps < step).map(|r| r.back).sum();
            (need > available + back).then(|| (step, need - available - back))
        })
    }

    #[test]
    fn the_forecast_is_what_a_walk_through_every_step_finds() {
        let mut seed = 1u64;
        let mut random = |n: u64| {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (seed >> 33) % n
        };
        let (mut over, mut runs) = (0, 0);
        while runs < 3000 {
            let t = 1 + random(5);
            let rows: Vec<Growth> = (0..random(7))
                .map(|_| {
                    let tokens = 1 + random(20);
                    let held = random(tokens.div_ceil(t) + 1);
                    Growth {
                        steps: 1 + random(12),
                        tokens,
                        most: if random(3) == 0 {
                            held + random(3)
                        } else {
                            u64::MAX
                        },
                        held,
                        back: random(held + 1),
                    }
                })
                .collect();
            let available = random(20);
            let walked = walk(&rows, t, available);
            let found = Forecast::new(t, rows.clone()).overflow(available);
            assert_eq!(found.is_some(), walked.is_some(), "{rows:?}, {t}, {available}");
            let mut one_by_one = Forecast::new(t, vec![]);
            for &row in &rows {
                let at = one_by_one.insert(row);
                one_by_one.remove(at);
                one_by_one.insert(row);
            }
            assert_eq!(
                one_by_one.overflow(available),
                found,
                "{rows:?}, {t}, {available}"
            );
            over += usize::from(found.is_some());
            runs += 1;
        }
        assert!(over > 300 && over < 2700, "{over}");
    }
}
