//! The façade: every operation of a cache, one call each.
//!
//! `&Core` is shared by all threads; a [`Cache`] is used by one at a time (`&mut`), so what only its
//! owner changes needs no atomics. An operation takes its whole need off `available` of all pools first;
//! only then does it look for slots and evict. What is not enough is a value (`false`), and nothing has changed.
//!
//! - per pool and tier: `available + promised + claimed + private == slots`
//! - per pool and tier: `free + active + held + cached + fenced == slots`

mod ask;
mod batch;
mod commit;
mod create;
mod lost;
#[cfg(all(test, kvpool_loom))]
mod lost_models;
#[cfg(all(test, kvpool_loom))]
mod models;
mod paths;
mod provide;
mod release;
mod resize;
#[cfg(all(test, kvpool_loom))]
mod tier_models;
mod tiers;

pub use batch::{Claim, Refusal, Start};
pub use lost::BadPage;

use crate::cache::Cache;
use crate::error::{CoreError, Result};
use crate::events::{EventKind, Events, MAX_POOLS};
use crate::evict::{Keeper, Order};
use crate::pool::SlotPool;
use crate::retention::Times;
use crate::sync::{unique, AtomicU64, Counter, Field, Late, Ordering};
use crate::tree::{Root, Tree};
use crate::types::{CacheState, CoreConfig, Counters, Mover, NoMover, PoolBooks};
use crate::words::{Tier, MAX_NODES, MAX_SLOTS};

/// What a cache tells of itself.
#[derive(Debug, Clone, Copy)]
pub struct CacheInfo {
    /// Public state.
    pub state: CacheState,
    /// Tokens found in the tree.
    pub reused: u64,
    /// Tokens with storage.
    pub capacity: u64,
    /// Tokens before the next step's input.
    pub history: u64,
    /// Final tokens.
    pub committed: u64,
}

/// [`Counters`], counting.
#[derive(Debug, Default)]
pub(crate) struct Tallies {
    pub requests: Counter,
    pub prompt_tokens: Counter,
    pub reused_tokens: Counter,
    pub prompt_blocks: Counter,
    pub reused_blocks: Counter,
    pub evicted: Counter,
    pub dropped: Counter,
    pub offloaded: Counter,
    pub onboarded: Counter,
}

/// Unread events that are kept. loom and shuttle look at the ring by itself; others make many cores.
const EVENTS: usize = if cfg!(any(kvpool_loom, kvpool_shuttle)) {
    0
} else if cfg!(any(kvpool_stops, fuzzing, miri)) {
    1 << 10
} else {
    1 << 16
};

/// Tree, pools and their books.
#[derive(Debug)]
pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) tree: Tree,
    /// Device slots.
    pub(crate) pools: Vec<SlotPool>,
    /// Host slots; none without a host tier.
    pub(crate) hosts: Vec<SlotPool>,
    pub(crate) keeper: Keeper,
    pub(crate) counters: Tallies,
    /// The first full-attention pool.
    pub(crate) first_full: Option<usize>,
    /// Who copies pages to the host.
    pub(crate) mover: Box<dyn Mover>,
    /// Whether there is a host tier.
    pub(crate) tiered: bool,
    /// Tells its caches from those of another core.
    pub(crate) id: u64,
    /// What happened to the tree.
    pub events: Events,
    /// Durations, once one was given.
    pub(crate) times: Late<Times>,
    /// Claims of batches that are not settled.
    pub(crate) in_work: Counter,
    /// What the clock showed last, as a word.
    pub(crate) clock: Field,
    /// Number of the last release.
    pub(crate) stamp: Counter,
    /// Test switch: the k-th search for a slot from now finds none; 0 for never.
    #[cfg(test)]
    pub(crate) fault: Field,
    epoch: AtomicU64,
}

/// Another call has handed out copies of this cache and waits for their report.
fn pending() -> CoreError {
    CoreError::State(
        "copies of an earlier call of this cache are not reported yet: one call at a time".into(),
    )
}

/// Asks for the largest tables before they are made: a failed `vec!` would end the process.
fn check_memory(config: &CoreConfig) -> Result<()> {
    let nodes = config.max_blocks as usize;
    let slots: usize = config
        .pools
        .iter()
        .map(|pool| pool.num_slots as usize + pool.host_slots as usize)
        .sum();
    let pools = config.pools.len();
    let per_node = Tree::bytes_per_node(config.tokens_per_block as usize, pools)
        + (1 + pools) * (Order::bytes_per_node() + 16);
    let bytes = nodes.saturating_mul(per_node).saturating_add(20 * slots);
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| {
        CoreError::Memory(format!(
            "the tables of max_blocks = {nodes} nodes and {slots} slots need {bytes} bytes, which cannot be \
             allocated: lower max_blocks or the number of slots"
        ))
    })
}

impl Core {
    /// An empty core that keeps books only. All sizes are fixed from here on.
    pub fn new(config: CoreConfig) -> Result<Self> {
        Self::with_mover(config, Box::new(NoMover))
    }

    /// As `new`, with who copies pages to the host.
    pub fn with_mover(config: CoreConfig, mover: Box<dyn Mover>) -> Result<Self> {
        if config.tokens_per_block == 0 || config.pools.is_empty() || config.max_blocks == 0 {
            return Err(CoreError::Value(
                "tokens_per_block, pools and max_blocks must not be empty".into(),
            ));
        }
        if config.pools.len() > MAX_POOLS {
            return Err(CoreError::Value(format!(
                "pools: {} of them are above {MAX_POOLS}, the most that a core can have",
                config.pools.len()
            )));
        }
        check_memory(&config)?;
        if config.max_blocks > MAX_NODES {
            return Err(CoreError::Value(format!(
                "max_blocks: {} is above {MAX_NODES}, the most nodes that a tree can have",
                config.max_blocks
            )));
        }
        for pool in &config.pools {
            if pool.num_slots.max(pool.host_slots) > MAX_SLOTS {
                return Err(CoreError::Value(format!(
                    "pool {:?}: {} slots are above {MAX_SLOTS}, the most that a pool can have on a tier",
                    pool.name,
                    pool.num_slots.max(pool.host_slots)
                )));
            }
        }
        // Private blocks that are swapped out: no more than there are slots for them.
        let tiered = config.pools.iter().any(|pool| pool.host_slots > 0);
        let most = config
            .pools
            .iter()
            .map(|pool| pool.num_slots + pool.host_slots)
            .max();
        let spare = if tiered { most } else { None };
        let nodes = config.max_blocks + spare.unwrap_or(0);
        if nodes > MAX_NODES {
            return Err(CoreError::Value(format!(
                "max_blocks: {} and {} slots are above {MAX_NODES}, the most nodes that a tree can have",
                config.max_blocks,
                nodes - config.max_blocks
            )));
        }
        let windowed: Vec<bool> = config.pools.iter().map(|p| p.window.is_some()).collect();
        Ok(Self {
            first_full: windowed.iter().position(|w| !w),
            keeper: Keeper::new(nodes, tiered, &windowed, config.policy),
            pools: config
                .pools
                .iter()
                .map(|p| SlotPool::new(p.num_slots, p.window.is_some()))
                .collect(),
            hosts: config
                .pools
                .iter()
                .map(|p| SlotPool::lending(p.host_slots, p.window.is_some()))
                .collect(),
            tree: Tree::new(
                config.tokens_per_block as usize,
                config.max_blocks,
                spare,
                windowed,
                config.hash_seed,
                config.collide,
                config.partial_reuse,
            ),
            counters: Tallies::default(),
            tiered,
            mover,
            id: unique(),
            events: Events::new(EVENTS),
            times: Late::default(),
            in_work: Counter::default(),
            clock: Field::new(0),
            stamp: Counter::default(),
            #[cfg(test)]
            fault: Field::new(0),
            epoch: AtomicU64::new(0),
            config,
        })
    }

    pub(crate) fn t(&self) -> u64 {
        u64::from(self.config.tokens_per_block)
    }

    /// The weights epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire) // Acquire: partner the fetch_max in `set_epoch`
    }

    // -- events -----------------------------------------------------------------------------

    /// A page of a node that the caller has claimed is in the tree.
    fn note_stored(&self, pool: usize, index: usize) {
        let (key, above) = self.keys_of(index);
        self.events
            .push(EventKind::Stored, Tier::Device, pool, key, above);
    }

    /// The key of a claimed node, and of the block before it.
    fn keys_of(&self, index: usize) -> (u64, Option<u64>) {
        let parent = self.tree.parent(index);
        let above = (!parent.is_nil()).then(|| self.tree.nodes[parent.index()].key.get());
        (self.tree.nodes[index].key.get(), above)
    }

    /// A page of a block is on this tier now.
    pub(crate) fn note_moved(&self, pool: usize, key: u64, tier: Tier) {
        self.events.push(EventKind::Moved, tier, pool, key, None);
    }

    /// Keys that the full blocks of a prompt have in the events.
    pub fn block_keys(&self, tokens: &[i32], scope: &[u8], epoch: Option<u64>) -> Result<Vec<u64>> {
        let root = self.root(scope, self.scope_epoch(epoch)?);
        let mut key = root.key();
        let blocks = tokens.chunks_exact(self.config.tokens_per_block as usize);
        Ok(blocks
            .map(|block| {
                key = self.tree.extend_key(key, block);
                key
            })
            .collect())
    }

    // -- the whole --------------------------------------------------------------------------

    /// Only grows: older epochs match no longer and go first.
    pub fn set_epoch(&self, epoch: u64) -> Result<()> {
        let before = self.epoch.fetch_max(epoch, Ordering::AcqRel); // AcqRel: partner the load in `epoch`
        if epoch < before {
            return Err(CoreError::Value(format!(
                "set_epoch({epoch}): the epoch is {before} and only grows"
            )));
        }
        Ok(())
    }

    pub(crate) fn scope_epoch(&self, epoch: Option<u64>) -> Result<u64> {
        let now = self.epoch();
        match epoch {
            None => Ok(now),
            Some(e) if e > now => Err(CoreError::Value(format!(
                "scope.epoch is {e}, above the manager's epoch {now}: call set_epoch first"
            ))),
            Some(e) => Ok(e),
        }
    }

    pub(crate) fn root(&self, scope: &[u8], epoch: u64) -> Root {
        self.tree.root(scope, epoch)
    }

    /// Largest capacity that one new unmatched cache could get now.
    pub fn available_tokens(&self) -> u64 {
        let tokens = u64::from(self.most_for_all()) * self.t();
        self.config.max_seq_len.map_or(tokens, |most| tokens.min(most))
    }

    /// Counters since construction.
    pub fn counters(&self) -> Counters {
        Counters {
            requests: self.counters.requests.get(),
            prompt_tokens: self.counters.prompt_tokens.get(),
            reused_tokens: self.counters.reused_tokens.get(),
            prompt_blocks: self.counters.prompt_blocks.get(),
            reused_blocks: self.counters.reused_blocks.get(),
            evicted: self.counters.evicted.get(),
            dropped: self.counters.dropped.get(),
            offloaded: self.counters.offloaded.get(),
            onboarded: self.counters.onboarded.get(),
        }
    }

    /// Books of every pool on a tier. Writes nothing, waits for nobody; each slot counts once whatever others do.
    pub fn books(&self, tier: Tier) -> Vec<PoolBooks> {
        crate::books::books(self, tier)
    }

    /// Recomputes all books from scratch. `caches` are all that are open or in flight; nobody else is in a call.
    pub fn check(&self, caches: &[&Cache]) -> Result<()> {
        crate::check::check(self, caches)
    }
}

#[cfg(all(test, not(kvpool_loom)))]
mod tests {
    use super::*;
    use crate::types::{PolicyKind, PoolSpec};
    use crate::words::MAX_REFS;

    /// Overflow of a count is refused: the match ends above the full block, nothing hangs, nothing is lost.
    #[test]
    fn a_block_with_as_many_references_as_can_be_counted_is_not_claimed_again() {
        let core = Core::new(CoreConfig {
            tokens_per_block: 1,
            pools: vec![PoolSpec {
                name: "kv".into(),
                num_slots: 8,
                host_slots: 0,
                window: None,
                sink_tokens: 0,
            }],
            max_blocks: 8,
            max_seq_len: None,
            partial_reuse: false,
            hash_seed: 1,
            policy: PolicyKind::Lru,
            offload_min_priority: 30,
            collide: false,
        });
        let core = core.unwrap();
        let mut first = core.create(&[1, 2], b"", None, None).unwrap();
        core.resume(&mut first, &mut Vec::new()).unwrap();
        assert!(core.resize(&mut first, 2, None).unwrap());
        core.commit(&mut first, &[1, 2]).unwrap();
        let mut caches = vec![first];
        let mut reused = Vec::new();
        for _ in 0..3 * MAX_REFS {
            let cache = core.create(&[1, 2, 3], b"", None, None).unwrap();
            reused.push(core.info(&cache).unwrap().reused);
            caches.push(cache);
        }
        let count = |n: u64| reused.iter().filter(|&&m| m == n).count() as u64;
        assert_eq!(
            (count(2), count(1), count(0)),
            (MAX_REFS - 1, MAX_REFS - 1, MAX_REFS + 2)
        );
        // A commit onto the full block keeps its own page.
        let mut last = caches.pop().unwrap();
        core.resume(&mut last, &mut Vec::new()).unwrap();
        assert!(core.resize(&mut last, 2, None).unwrap());
        assert!(!core.commit(&mut last, &[1, 2]).unwrap());
        caches.push(last);
        core.check(&caches.iter().collect::<Vec<_>>()).unwrap();
        for cache in &mut caches {
            core.close(cache).unwrap();
        }
        core.check(&[]).unwrap();
        assert_eq!(core.available_tokens(), 8);
    }
}
