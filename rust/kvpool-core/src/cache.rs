//! What one request holds.
//!
//! Token ranges of a cache, T = tokens per block:
//!
//! ```text
//! 0 ........... nodes.len()*T ..... committed ..... history ..... capacity
//! [ in the tree, claimed      )[ private, final  )[ private, being written )
//! ```
//!
//! `tables[pool][i]` is the slot of block i, 0 when the block is stale or has no page there.

use crate::types::{CacheState, RetentionSpec, NIL};

/// State of one request's cache.
#[derive(Debug)]
pub struct Cache {
    /// Counts reuses of this index.
    pub gen: u32,
    /// Public state.
    pub state: CacheState,
    /// Root of its scope, `NIL` if the scope's epoch was already old at creation.
    pub root: u32,
    /// Epoch of its scope.
    pub epoch: u64,
    /// The prompt as given.
    pub prompt: Vec<i32>,
    /// Final tokens of the block that is not full yet.
    pub tail: Vec<i32>,
    /// Tokens found in the tree at creation.
    pub reused: u64,
    /// Final tokens.
    pub committed: u64,
    /// Tokens before the next step's input.
    pub history: u64,
    /// Tokens with storage.
    pub capacity: u64,
    /// The path in the tree; the last one carries the claim.
    pub nodes: Vec<u32>,
    /// Hash of the prefix that `nodes` is.
    pub key: u64,
    /// No further block enters the tree.
    pub detached: bool,
    /// Claimed node whose first tokens are to be copied at resume.
    pub source: u32,
    /// Whether the copy of `source` was handed out and not yet reported as done.
    pub copying: bool,
    /// Slots per pool and block.
    pub tables: Vec<Vec<u32>>,
    /// Per pool: blocks below this index are stale or sinks.
    pub stale_end: Vec<usize>,
    /// Launched steps that may still touch its slots.
    pub in_flight: u32,
    /// Slots (pool, slot) given up while in flight.
    pub fenced: Vec<(u32, u32)>,
    /// Retention of its blocks.
    pub retention: Option<RetentionSpec>,
    /// Segment that its blocks get at release.
    pub segment: u8,
}

impl Cache {
    /// The deepest node of its path.
    pub fn deepest(&self) -> u32 {
        self.nodes.last().copied().unwrap_or(NIL)
    }

    /// Priority of the block that begins at token `first`.
    pub fn priority(&self, first: u64) -> u8 {
        let Some(retention) = &self.retention else {
            return crate::types::DEFAULT_PRIORITY;
        };
        if first >= self.prompt.len() as u64 {
            return retention.decode_priority;
        }
        retention
            .ranges
            .iter()
            .find(|range| range.start <= first && first < range.end)
            .map_or(crate::types::DEFAULT_PRIORITY, |range| range.priority)
    }
}
