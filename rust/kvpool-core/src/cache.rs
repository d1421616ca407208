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
use std::borrow::Cow;
use std::cell::Cell;

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
    /// How often entries that were there before were given another slot, or taken away.
    pub(crate) alterations: u64,
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
    /// Pages (block, pool, device slot) that the running call brings up.
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

/// The tables of a cache without their content.
#[derive(Debug, Default)]
struct Shell {
    prompt: Vec<i32>,
    tail: Vec<i32>,
    nodes: Vec<Link>,
    tables: Vec<Vec<u32>>,
    stale_end: Vec<usize>,
    units: [Vec<u32>; 7],
    onboards: Vec<(u32, u32, u32)>,
    lent: Vec<(u32, u32)>,
    fenced: Vec<(u32, u32)>,
}

/// Shells that a thread keeps.
const SHELLS: usize = 64;
/// Tokens for which a shell keeps room.
const MOST_KEPT: usize = 1 << 15;
/// Blocks for which the shells of a thread keep room in all, about.
const MOST_BLOCKS: usize = 1 << 18;

thread_local! {
    static KEPT: Cell<Vec<Shell>> = const { Cell::new(Vec::new()) };
}

impl Shell {
    /// One that was kept, or a new one, empty, for so many pools.
    fn take(pools: usize) -> Self {
        let mut kept = KEPT.take();
        let mut shell = kept.pop().unwrap_or_default();
        KEPT.set(kept);
        shell.tables.resize_with(pools, Vec::new);
        shell.stale_end.resize(pools, 0);
        shell.units.iter_mut().for_each(|units| units.resize(pools, 0));
        shell
    }

    /// Keeps it for the next cache, if there is a place.
    fn give(mut self) {
        if self.prompt.capacity() > MOST_KEPT {
            self.prompt = Vec::new();
        }
        self.prompt.clear();
        self.tail.clear();
        self.nodes.clear();
        self.tables.iter_mut().for_each(Vec::clear);
        self.stale_end.clear();
        self.units.iter_mut().for_each(Vec::clear);
        self.onboards.clear();
        self.lent.clear();
        self.fenced.clear();
        let mut kept = KEPT.take();
        if kept.len() < SHELLS && kept.len() * self.nodes.capacity() < MOST_BLOCKS {
            kept.push(self);
        }
        KEPT.set(kept);
    }
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
    pub(crate) fn new(
        core: &Core,
        root: Root,
        tokens: Cow<'_, [i32]>,
        retention: Option<RetentionSpec>,
    ) -> Self {
        let t = core.config.tokens_per_block as usize;
        let pools = core.pools.len();
        let most = core.config.max_seq_len.unwrap_or(0).div_ceil(t as u64) as usize;
        let room = most.max(tokens.len().div_ceil(t) + 1);
        let mut shell = Shell::take(pools);
        shell.nodes.reserve(room);
        shell.tail.reserve(t);
        shell.tables.iter_mut().for_each(|table| table.reserve(room));
        shell.fenced.reserve(room * pools);
        if core.tiered {
            shell.onboards.reserve(room * pools);
            shell.lent.reserve(pools);
        }
        let prompt = match tokens {
            Cow::Owned(tokens) => tokens,
            Cow::Borrowed(tokens) => {
                shell.prompt.extend_from_slice(tokens);
                shell.prompt
            }
        };
        let [purse, promise, promise_before, far, debt, returning, paid] = shell.units;
        Self {
            core: core.id,
            state: CacheState::Suspended,
            key: root.key(),
            root,
            prompt,
            tail: shell.tail,
            reused: 0,
            committed: 0,
            history: 0,
            capacity: 0,
            nodes: shell.nodes,
            detached: false,
            source: Link::NIL,
            source_pools: 0,
            copying: false,
            tables: shell.tables,
            alterations: 0,
            stale_end: shell.stale_end,
            purse,
            promise,
            promise_before,
            in_work: false,
            undo: None,
            pinned: false,
            parked: 0,
            onboards: shell.onboards,
            lent: shell.lent,
            far,
            debt,
            in_flight: 0,
            returning,
            paid,
            fenced: shell.fenced,
            retention,
            segment: 0,
        }
    }

    /// A closed cache that holds nothing lends its tables to the next one of this thread.
    pub(crate) fn shed(&mut self) {
        use std::mem::take;
        Shell {
            prompt: take(&mut self.prompt),
            tail: take(&mut self.tail),
            nodes: take(&mut self.nodes),
            tables: take(&mut self.tables),
            stale_end: take(&mut self.stale_end),
            units: [
                take(&mut self.purse),
                take(&mut self.promise),
                take(&mut self.promise_before),
                take(&mut self.far),
                take(&mut self.debt),
                take(&mut self.returning),
                take(&mut self.paid),
            ],
            onboards: take(&mut self.onboards),
            lent: take(&mut self.lent),
            fenced: take(&mut self.fenced),
        }
        .give();
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
