//! What one request holds. Its owner is the one thread that has `&mut` of it.
//!
//! Token ranges of a cache, T = tokens per block:
//!
//! ```text
//! 0 ........... nodes.len()*T ..... committed ..... history ..... capacity
//! [ in the tree, claimed      )[ private, final  )[ private, being written )
//! ```
//!
//! `tables[pool][i]` is the slot of block i, 0 when the block is stale or has no page there. A cache owns one
//! reference on its deepest node, one on `source`, and one on each live page of windowed pools.

use crate::core::Core;
use crate::pool::Owner;
use crate::tree::{Holder, Root};
use crate::types::{CacheState, Retain, RetentionSpec};
use crate::words::Link;

/// State of one request's cache. To be given to `Core::close` in the end: dropping it loses its pages.
#[derive(Debug)]
#[must_use = "a cache that is not closed keeps its pages"]
pub struct Cache {
    pub(crate) core: u64,
    pub(crate) state: CacheState,
    pub(crate) root: Root,
    /// The prompt as given.
    pub(crate) prompt: Vec<i32>,
    /// Final tokens of the block that is not full yet.
    pub(crate) tail: Vec<i32>,
    /// Tokens found in the tree at creation.
    pub(crate) reused: u64,
    /// Final tokens.
    pub(crate) committed: u64,
    /// Tokens before the next step's input.
    pub(crate) history: u64,
    /// Tokens with storage.
    pub(crate) capacity: u64,
    /// The path in the tree; the last one carries the claim.
    pub(crate) nodes: Vec<Link>,
    /// Hash of the prefix that `nodes` is.
    pub(crate) key: u64,
    /// No further block enters the tree.
    pub(crate) detached: bool,
    /// Claimed node whose first tokens are to be copied at resume.
    pub(crate) source: Link,
    /// Pools `[0, source_pools)` in which the source's page is claimed, where they have a window.
    pub(crate) source_pools: usize,
    /// Whether the copy of `source` was handed out and not yet reported as done.
    pub(crate) copying: bool,
    /// Slots per pool and block.
    pub(crate) tables: Vec<Vec<u32>>,
    /// Per pool: blocks below this index are stale or sinks.
    pub(crate) stale_end: Vec<usize>,
    /// Per pool: units in the hands of the running operation.
    pub(crate) purse: Vec<u32>,
    /// Per pool: units promised to a claim of a batch, from call to call.
    pub(crate) promise: Vec<u32>,
    /// Per pool: the promise that the running operation has taken into the purse.
    pub(crate) promise_before: Vec<u32>,
    /// Claimed by a batch in work: it counts as active, and its claim leaves no trace until it is settled.
    pub(crate) in_work: bool,
    /// What the running batch would have to restore.
    pub(crate) undo: Option<Undo>,
    /// Whether the nodes of its path are pinned to the device.
    pub(crate) pinned: bool,
    /// The last nodes of its path that are private blocks.
    pub(crate) parked: usize,
    /// Per pool: pages on the host that the running call must bring up.
    pub(crate) far: Vec<u32>,
    /// Pages (pool, block, device slot) that the running call brings up.
    pub(crate) onboards: Vec<(u32, u32, u32)>,
    /// Host slots (pool, slot) that the copies which are out read, beside those of `onboards`.
    pub(crate) lent: Vec<(u32, u32)>,
    /// Per pool: pages whose price is the unit of a fenced slot.
    pub(crate) debt: Vec<u32>,
    /// Launched steps that may still touch its slots.
    pub(crate) in_flight: u32,
    /// Per pool: slots that come back at the end of the steps in flight.
    pub(crate) returning: Vec<u32>,
    /// Per pool: units that the claims of a start took.
    pub(crate) paid: Vec<u32>,
    /// Slots (pool, slot) given up while in flight.
    pub(crate) fenced: Vec<(u32, u32)>,
    /// Retention of its blocks.
    pub(crate) retention: Option<RetentionSpec>,
    /// Segment that its blocks get at release.
    pub(crate) segment: u8,
}

/// How a cache was before a batch gave it slots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Undo {
    pub state: CacheState,
    pub capacity: u64,
    /// Blocks of its tables; those behind have come since.
    pub blocks: usize,
    pub copying: bool,
    pub pinned: bool,
    /// Who makes the copies.
    pub by: std::thread::ThreadId,
}

impl Cache {
    /// A SUSPENDED cache that holds nothing. Allocates what its later life needs.
    pub(crate) fn new(core: &Core, root: Root, tokens: &[i32], retention: Option<RetentionSpec>) -> Self {
        let t = core.config.tokens_per_block as usize;
        let pools = core.pools.len();
        let most = core.config.max_seq_len.unwrap_or(0).div_ceil(t as u64) as usize;
        let room = most.max(tokens.len().div_ceil(t) + 1);
        Self {
            core: core.id,
            state: CacheState::Suspended,
            key: root.key(),
            root,
            prompt: tokens.to_vec(),
            tail: Vec::with_capacity(t),
            reused: 0,
            committed: 0,
            history: 0,
            capacity: 0,
            nodes: Vec::with_capacity(room),
            detached: false,
            source: Link::NIL,
            source_pools: 0,
            copying: false,
            tables: (0..pools).map(|_| Vec::with_capacity(room)).collect(),
            stale_end: vec![0; pools],
            purse: vec![0; pools],
            promise: vec![0; pools],
            promise_before: vec![0; pools],
            in_work: false,
            undo: None,
            pinned: false,
            parked: 0,
            onboards: Vec::with_capacity(if core.tiered { room * pools } else { 0 }),
            lent: Vec::with_capacity(if core.tiered { pools } else { 0 }),
            far: vec![0; pools],
            debt: vec![0; pools],
            in_flight: 0,
            returning: vec![0; pools],
            paid: vec![0; pools],
            fenced: Vec::with_capacity(room * pools),
            retention,
            segment: 0,
        }
    }

    /// The deepest node of its path.
    pub(crate) fn deepest(&self) -> Link {
        self.nodes.last().copied().unwrap_or(Link::NIL)
    }

    /// How its claims are counted.
    pub(crate) fn holder(&self) -> Holder {
        match self.state {
            CacheState::Active => Holder::Active,
            CacheState::Suspended if self.in_work => Holder::Active,
            CacheState::Suspended => Holder::Held,
            CacheState::Closed => Holder::Fenced,
        }
    }

    /// How its private slots are counted.
    pub(crate) fn private_owner(&self) -> Owner {
        match self.state {
            CacheState::Active => Owner::Active,
            CacheState::Suspended => Owner::Held,
            CacheState::Closed => Owner::Fenced,
        }
    }

    /// Retention of the block that begins at token `first`.
    pub(crate) fn retain(&self, first: u64) -> Retain {
        let Some(retention) = &self.retention else {
            return Retain::DEFAULT;
        };
        if first >= self.prompt.len() as u64 {
            return retention.decode;
        }
        retention
            .ranges
            .iter()
            .find(|range| range.start <= first && first < range.end)
            .map_or(Retain::DEFAULT, |range| range.retain)
    }
}
