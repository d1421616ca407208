//! What the slots hold.

use kvpool_core::sync::{AtomicU64, Ordering};
use kvpool_core::types::PoolSpec;
use kvpool_core::words::Tier;

/// `pages[tier][pool][slot][position in block]`
#[derive(Debug)]
pub struct Pages([Vec<Vec<Vec<AtomicU64>>>; 2]);

impl Pages {
    /// All zero.
    pub fn new(pools: &[PoolSpec], tokens_per_block: usize) -> Self {
        let page = |_| (0..tokens_per_block).map(|_| AtomicU64::new(0)).collect();
        let tier = |slots: fn(&PoolSpec) -> u32| {
            let pool = |pool: &PoolSpec| (0..=slots(pool)).map(page).collect();
            pools.iter().map(pool).collect()
        };
        Self([tier(|pool| pool.num_slots), tier(|pool| pool.host_slots)])
    }

    /// What stands at a position.
    pub fn read(&self, tier: Tier, pool: usize, slot: u32, at: usize) -> u64 {
        self.0[tier as usize][pool][slot as usize][at].load(Ordering::Acquire) // Acquire: partner the store in `write`
    }

    /// Writes one position.
    pub fn write(&self, tier: Tier, pool: usize, slot: u32, at: usize, value: u64) {
        self.0[tier as usize][pool][slot as usize][at].store(value, Ordering::Release);
        // Release: partner the load in `read`
    }

    /// All of a page into another one.
    pub fn copy(&self, pool: usize, from: (Tier, u32), to: (Tier, u32)) {
        for at in 0..self.0[from.0 as usize][pool][from.1 as usize].len() {
            self.write(to.0, pool, to.1, at, self.read(from.0, pool, from.1, at));
        }
    }
}

/// What belongs at each position of a sequence: a hash of scope, epoch and the tokens up to there.
pub fn content(scope: usize, epoch: u64, tokens: &[i32]) -> Vec<u64> {
    let mut hash = (scope as u64 + 1) << 32 | epoch;
    let step = |token: &i32| {
        // A step of splitmix64 (Steele, Lea and Flood 2014).
        hash = (hash ^ (*token as u64 + 1)).wrapping_add(0x9E37_79B9_7F4A_7C15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        hash ^= hash >> 31;
        hash
    };
    tokens.iter().map(step).collect()
}
