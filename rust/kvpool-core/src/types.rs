//! Plain data shared by the core's parts.

use crate::words::{Link, Tier};

/// "No node", "no root": the end of an intrusive list.
pub const NIL: u32 = u32::MAX;

/// Retention priority of a block for which nothing was said.
pub const DEFAULT_PRIORITY: u8 = 35;

/// Half-open range `[stale.0, stale.1)` of blocks that fell out of a window.
pub type StaleRange = (usize, usize);

/// One pool as the core sees it: a number of equal slots and a retention rule.
#[derive(Debug, Clone)]
pub struct PoolSpec {
    /// Name, used in messages only.
    pub name: String,
    /// Device slots, numbered `1..=num_slots`; slot 0 is the null page.
    pub num_slots: u32,
    /// Host slots, numbered from 1 too; 0 without a host tier.
    pub host_slots: u32,
    /// Tokens of the attention window; `None` is full attention.
    pub window: Option<u64>,
    /// Leading tokens that never leave the window.
    pub sink_tokens: u64,
}

impl PoolSpec {
    /// Blocks that are stale when `history` tokens lie before the next input (DESIGN: sizing).
    pub fn stale(&self, history: u64, tokens_per_block: u64) -> StaleRange {
        let Some(window) = self.window else {
            return (0, 0);
        };
        let t = tokens_per_block;
        let s = history.div_ceil(t).min(self.sink_tokens.div_ceil(t));
        let e = s.max((history + 1).saturating_sub(window) / t);
        (s as usize, e as usize)
    }
}

/// Which order the evictable blocks have within one priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyKind {
    /// Least recently used.
    Lru,
    /// Request-level segmented LRU with ghosts.
    Slru,
}

/// Everything the core must know at construction. Nothing grows afterwards but the orders of eviction, with their entries.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Tokens of one block, at least 1.
    pub tokens_per_block: u32,
    /// At least one pool.
    pub pools: Vec<PoolSpec>,
    /// Nodes of the tree.
    pub max_blocks: u32,
    /// Longest sequence in tokens.
    pub max_seq_len: Option<u64>,
    /// Whether a match may end inside a block.
    pub partial_reuse: bool,
    /// Key of the block hash.
    pub hash_seed: u64,
    /// Lowest priority that merits a place on the host.
    pub offload_min_priority: u8,
    /// Order within a priority.
    pub policy: PolicyKind,
    /// Test switch: every block gets the same hash, so only token comparison separates them.
    pub collide: bool,
}

/// How long a block is worth keeping.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retain {
    /// 0..=100, lower goes first.
    pub priority: u8,
    /// Seconds after the last release for which the priority holds; infinite is for ever.
    pub duration: f64,
}

impl Retain {
    /// What a block has for which nothing was said.
    pub const DEFAULT: Self = Self {
        priority: DEFAULT_PRIORITY,
        duration: f64::INFINITY,
    };
}

/// Retention of one token range of a prompt.
#[derive(Debug, Clone, Copy)]
pub struct RangeSpec {
    /// First token.
    pub start: u64,
    /// One past the last token; `u64::MAX` is open.
    pub end: u64,
    /// For blocks that begin in it.
    pub retain: Retain,
}

/// Retention of one request.
#[derive(Debug, Clone)]
pub struct RetentionSpec {
    /// Disjoint ranges of the prompt.
    pub ranges: Vec<RangeSpec>,
    /// For blocks that begin past the prompt.
    pub decode: Retain,
}

impl RetentionSpec {
    /// Whether anything in it ends.
    pub fn is_timed(&self) -> bool {
        let retains = self.ranges.iter().map(|range| range.retain);
        retains
            .chain([self.decode])
            .any(|retain| retain.duration.is_finite())
    }
}

/// Life of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheState {
    /// Holds claims and pages, cannot grow.
    Suspended,
    /// All live pages are on the device.
    Active,
    /// Holds nothing (or only what a launched step may still touch).
    Closed,
}

impl CacheState {
    /// The public word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Suspended => "SUSPENDED",
            Self::Active => "ACTIVE",
            Self::Closed => "CLOSED",
        }
    }
}

/// Copies pages between the tiers when the core needs it at once: before a page has a new place, and while the core owns
/// both slots.
pub trait Mover: std::fmt::Debug + Send + Sync {
    /// All bytes of device slot `src` of a pool into its host slot `dst`, both from 1. `false`: it could not be done.
    fn offload(&self, pool: usize, src: u32, dst: u32) -> bool;
}

/// Keeps books only.
#[derive(Debug)]
pub struct NoMover;

impl Mover for NoMover {
    fn offload(&self, _: usize, _: u32, _: u32) -> bool {
        true
    }
}

/// Copy of a page inside one pool: all bytes of slot `src` into device slot `dst`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// Pool index.
    pub pool: u32,
    /// Tier of `src`.
    pub tier: Tier,
    /// Whether the page itself comes up; else a private copy is made of it.
    pub up: bool,
    /// Whose page it is.
    pub block: Link,
    /// Slot that is read, from 1.
    pub src: u32,
    /// Slot that is written.
    pub dst: u32,
}

/// Slots of one pool by what they are; the five sum up to `slots`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolBooks {
    /// Device slots.
    pub slots: u32,
    /// In nobody's hands.
    pub free: u32,
    /// Of an ACTIVE cache, or claimed by one.
    pub active: u32,
    /// Only of SUSPENDED caches.
    pub held: u32,
    /// In the tree, unclaimed.
    pub cached: u32,
    /// A launched step may still touch it.
    pub fenced: u32,
    /// Most slots that were ever not free.
    pub peak: u32,
}

/// Counters since construction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Caches created.
    pub requests: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Tokens of them found in the tree.
    pub reused_tokens: u64,
    /// Blocks of their prompts, rounded up.
    pub prompt_blocks: u64,
    /// Whole blocks of them found in the tree.
    pub reused_blocks: u64,
    /// Pages that eviction took from the device.
    pub evicted: u64,
    /// Pages that left for good.
    pub dropped: u64,
    /// Pages that moved from the device to the host.
    pub offloaded: u64,
    /// Pages that moved from the host to the device.
    pub onboarded: u64,
}
