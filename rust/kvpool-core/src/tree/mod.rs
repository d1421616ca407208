//! The radix tree of cached blocks: a slab of nodes, the chains that find them (by key, by beginning, by parent), and
//! their pages.
//!
//! A node is one token block. Its key is the hash of the whole prefix; its parent, at its incarnation, and
//! its tokens are compared on every look-up, so a collision costs time and nothing else.
//!
//! - `refs(n) == claims on n + children c of n with refs(c) > 0`: an unclaimed node has no claimed descendant
//! - `children(n) == nodes whose parent is n`; a node outlives its children
//! - a claimed page belongs to a claimed node
//! - a node's fields change only while it is dead and owned ([`Dead`]), except counts, pages, use, priority, segment
//!
//! Who may call: any thread. Orderings and hazards: docs/CONCURRENCY.md.

mod families;
mod life;
mod lookup;
#[cfg(all(test, kvpool_loom))]
mod models;
#[cfg(all(test, kvpool_loom))]
mod move_models;
mod moves;
#[cfg(all(test, kvpool_loom))]
mod start_models;
mod starts;
#[cfg(all(test, not(kvpool_loom)))]
mod starts_tests;

pub use life::{Claimed, Dead};

use crate::chains::Chains;
use crate::stack::Stack;
use crate::sync::{fence, warm, weak, AtomicU32, AtomicU64, Counter, Field, Ordering, Weak};
use crate::words::{Link, Page, State};
use families::Families;
use siphasher::sip128::{Hasher128, SipHasher24};
use starts::Starts;
use std::hash::Hasher;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// One token block in the tree, or a dead one. The first cache line has all that claims, releases and look-ups touch.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Node {
    /// [`State`]: version, live, refs.
    state: AtomicU64,
    /// Version at which this incarnation was born; links carry it.
    born: AtomicU64,
    /// Hash of the whole prefix.
    pub key: Field,
    /// [`Link`] to the parent, nil for the first block of a root. Marked: a page of the block is bad, and no look-up
    /// finds it any more.
    parent: Field,
    /// [`Link`] to the first of the children that are in the chain of this node: see `starts.rs`.
    below: AtomicU64,
    /// Stamp of the last release.
    pub used: Field,
    /// Claims whose deepest block this is, by [`Holder`].
    pub holders: Counter,
    /// Nodes below.
    children: AtomicU32,
    /// Nodes below that are on the device.
    near: AtomicU32,
    /// ACTIVE caches, and batches in work, whose path contains this node, and the mark [`moves::NEAR`]; with a host tier only.
    pins: AtomicU64,
    /// Blocks before this one, and where its beginning is found: see `starts.rs`.
    place: Field,
    /// Retention priority.
    pub priority: Field,
    /// Segment of the policy.
    pub segment: Field,
    /// Insertion number.
    pub seq: Field,
    /// Weights epoch of its root.
    pub epoch: Field,
    /// Digest of its root; compared for first blocks only.
    scope: [Field; 2],
}

impl Node {
    /// Version at which it was born.
    fn born(&self) -> u64 {
        self.born.load(Ordering::Acquire) // Acquire: partner the store in `Tree::write`: who sees the birth finds the node's former places left
    }

    /// Its state.
    pub fn state(&self) -> State {
        State(self.state.load(Ordering::Acquire)) // Acquire: partner the CAS in `Tree::release`, the store in `Tree::publish`
    }

    /// Nodes below.
    pub fn children(&self) -> u32 {
        self.children.load(Ordering::Relaxed) // Relaxed: ordered by the Acquire load of the state before it, see `Tree::kill`
    }

    /// Its parent, if it is claimed or owned.
    pub fn parent(&self) -> Link {
        Link(self.parent.get()).unmarked()
    }
}

/// What a claim's owner is, packed into one count each: `[fenced 22 | held 21 | active 21]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Holder {
    /// An ACTIVE cache.
    Active = 1,
    /// A SUSPENDED cache.
    Held = 1 << 21,
    /// A CLOSED cache that a launched step may still touch.
    Fenced = 1 << 42,
}

impl Holder {
    /// Whether a packed count contains any of this kind.
    pub fn is_in(self, count: u64) -> bool {
        let bits = if self == Self::Fenced { 22 } else { 21 };
        (count / self as u64) & ((1 << bits) - 1) != 0
    }
}

/// Pages of one pool, by node.
#[derive(Debug)]
pub struct Pages {
    /// [`Page`]: slot, stale, claims.
    word: Vec<AtomicU64>,
    /// When it went stale if it is stale, else its last release (windowed pools only).
    pub used: Vec<Field>,
    /// The time of it.
    pub time: Vec<Field>,
    /// Claims by [`Holder`] (windowed pools only).
    pub holders: Vec<Counter>,
    /// Pages on the device that only SUSPENDED caches claim; with a host tier only.
    pub held: Counter,
}

/// Identity under which reuse is allowed: a digest of scope and weights epoch.
///
/// SipHash-2-4 with 128 bits, keyed: equal digests are taken as equal scopes (2^64 scopes for a
/// collision, and the key is secret per process by default).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Root {
    digest: [u64; 2],
    /// Weights epoch.
    pub epoch: u64,
}

impl Root {
    /// Key of the prefix that ends before the first block.
    pub fn key(&self) -> u64 {
        self.digest[0]
    }
}

/// See the module.
#[derive(Debug)]
pub struct Tree {
    t: usize,
    seed: u64,
    collide: bool,
    /// The slab.
    pub nodes: Vec<Node>,
    /// Two tokens per field.
    tokens: Vec<Field>,
    /// By pool.
    pub pages: Vec<Pages>,
    /// Pools that have a window.
    pub windowed: Vec<bool>,
    by_key: Chains,
    starts: Starts,
    /// With a host tier only.
    families: Option<Families>,
    free: Stack,
    /// Nodes beyond `max_blocks`, for private blocks of SUSPENDED caches.
    spare: Stack,
    max_blocks: u32,
    seq: Counter,
    /// Claimed nodes on the device; with a host tier only.
    claimed_near: Counter,
    /// Pinned nodes on the device.
    pinned_near: Counter,
}

impl Tree {
    /// An empty tree of at most `max_blocks` nodes of `t` tokens. `spare`: private blocks that SUSPENDED caches can have
    /// beside, if there is a host tier. `partial`: whether [`Tree::closest_child`] is going to be asked.
    pub fn new(
        t: usize,
        max_blocks: u32,
        spare: Option<u32>,
        windowed: Vec<bool>,
        seed: u64,
        collide: bool,
        partial: bool,
    ) -> Self {
        let n = max_blocks as usize + spare.unwrap_or(0) as usize;
        let node = || Node {
            state: AtomicU64::new(State::NEW.0),
            born: AtomicU64::new(0),
            key: Field::new(0),
            parent: Field::new(Link::NIL.0),
            below: AtomicU64::new(Link::NIL.0),
            children: AtomicU32::new(0),
            near: AtomicU32::new(0),
            pins: AtomicU64::new(0),
            place: Field::new(0),
            used: Field::new(0),
            priority: Field::new(0),
            segment: Field::new(0),
            seq: Field::new(0),
            epoch: Field::new(0),
            scope: [Field::new(0), Field::new(0)],
            holders: Counter::default(),
        };
        let pages = |windowed: &bool| {
            let extra = if *windowed { n } else { 0 };
            Pages {
                word: (0..n).map(|_| AtomicU64::new(Page::NONE.0)).collect(),
                used: (0..extra).map(|_| Field::new(0)).collect(),
                time: (0..extra).map(|_| Field::new(0)).collect(),
                holders: (0..extra).map(|_| Counter::default()).collect(),
                held: Counter::default(),
            }
        };
        Self {
            t,
            seed,
            collide,
            nodes: (0..n).map(|_| node()).collect(),
            tokens: (0..max_blocks as usize * t.div_ceil(2))
                .map(|_| Field::new(0))
                .collect(),
            pages: windowed.iter().map(pages).collect(),
            windowed,
            by_key: Chains::new(max_blocks),
            starts: Starts::new(t, max_blocks, partial),
            families: spare.map(|_| Families::new(max_blocks)),
            free: Stack::full(max_blocks),
            spare: Stack::full(spare.unwrap_or(0)),
            max_blocks,
            seq: Counter::default(),
            claimed_near: Counter::default(),
            pinned_near: Counter::default(),
        }
    }

    /// Bytes of all tables for a node, for the question whether they can be had.
    pub fn bytes_per_node(t: usize, pools: usize) -> usize {
        let words = 8 * (t.div_ceil(2) + 4 * pools + 6) + 4;
        std::mem::size_of::<Node>() + words
    }

    // -- keys -------------------------------------------------------------------------------

    /// The root of a scope in a weights epoch. Makes nothing: roots need no place.
    pub fn root(&self, scope: &[u8], epoch: u64) -> Root {
        let mut hasher = SipHasher24::new_with_keys(self.seed, epoch);
        hasher.write(scope);
        let digest = hasher.finish128();
        Root {
            digest: [digest.h1, digest.h2],
            epoch,
        }
    }

    /// Key of the prefix `before` followed by one block. The block is hashed by itself and mixed in, so that the
    /// hashes of a prompt's blocks do not wait for each other.
    pub fn extend_key(&self, before: u64, tokens: &[i32]) -> u64 {
        if self.collide {
            return 0;
        }
        let hash = xxh3_64_with_seed(bytemuck::cast_slice(tokens), self.seed);
        let mut key = (before.rotate_left(23) ^ hash).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        key ^= key >> 32;
        key = key.wrapping_mul(0xBF58_476D_1CE4_E5B9);
        key ^ (key >> 29)
    }

    // -- memory on its way ------------------------------------------------------------------

    /// Brings all lines of a node closer.
    pub fn warm_node(&self, index: usize) {
        self.warm_reading(index);
        warm(&self.nodes[index].pins);
        if self.is_block(index) {
            self.by_key.warm_next(index);
            self.warm_start_next(index);
        }
    }

    /// Brings what a look-up reads of a node closer, if there is such a node.
    #[inline]
    pub fn warm_reading(&self, index: usize) {
        if let Some(node) = self.nodes.get(index) {
            warm(&node.state);
            warm(&self.pages[0].word[index]);
            if let Some(tokens) = self.tokens.get(index * self.t.div_ceil(2)) {
                warm(tokens);
            }
        }
    }

    /// Brings what the burial of a node will touch closer: its own lines are here.
    pub fn warm_burial(&self, index: usize) {
        if self.is_block(index) {
            let n = &self.nodes[index];
            self.by_key.warm_bucket(self.by_key.bucket(n.key.get()));
            self.warm_own_start(index);
        }
    }

    /// Brings the buckets closer into which blocks with these keys will be put.
    pub fn warm_births(&self, keys: &[u64]) {
        for &key in keys {
            self.by_key.warm_bucket(self.by_key.bucket(key));
        }
    }

    // -- reading a node ---------------------------------------------------------------------

    /// Whether what was read of a node before belongs to the incarnation of `link`.
    pub fn is(&self, link: Link) -> bool {
        if weak(Weak::ReadAgain) {
            return true;
        }
        fence(Ordering::Acquire); // Acquire: partner the Release fence in `Tree::write`: fields of a later incarnation show its birth
        self.born(link.index()) == link.born()
    }

    /// Version at which the node that lives here was born.
    fn born(&self, index: usize) -> u64 {
        self.nodes[index].born()
    }

    /// The state of a node.
    pub fn state(&self, index: usize) -> State {
        self.nodes[index].state()
    }

    /// The node that lives at an index now.
    pub fn at(&self, index: usize) -> Link {
        Link::new(self.born(index), index as u32)
    }

    /// Whether the node is in the tree at this incarnation.
    pub fn is_live(&self, link: Link) -> bool {
        self.state(link.index()).is_live() && self.born(link.index()) == link.born()
    }

    /// Live, unclaimed and without children.
    pub fn is_leaf(&self, index: usize) -> bool {
        let state = self.state(index);
        state.is_live() && state.refs() == 0 && self.children(index) == 0
    }

    /// Whether it is a block of the tree, not a private one of a SUSPENDED cache.
    pub fn is_block(&self, index: usize) -> bool {
        index < self.max_blocks as usize
    }

    /// Nodes below that are on the device.
    pub fn near(&self, index: usize) -> u32 {
        self.nodes[index].near.load(Ordering::Relaxed) // Relaxed: it grows under a pin only; `Tree::seize` looks at it after the pins
    }

    /// ACTIVE caches whose path contains the node.
    pub fn pins(&self, index: usize) -> u64 {
        self.nodes[index].pins.load(Ordering::Acquire) & !moves::NEAR // Acquire: partner the CAS in `Tree::unpin`
    }

    /// Nodes below.
    pub fn children(&self, index: usize) -> u32 {
        self.nodes[index].children()
    }

    /// The parent of a claimed or owned node.
    pub fn parent(&self, index: usize) -> Link {
        self.nodes[index].parent()
    }

    /// No look-up finds this node any more.
    pub fn lose(&self, index: usize) {
        let parent = self.parent(index);
        self.nodes[index].parent.replace(parent.0, parent.marked().0);
    }

    /// Whether a page of the node is bad.
    pub fn is_lost(&self, index: usize) -> bool {
        Link(self.nodes[index].parent.get()).is_marked()
    }

    /// The root of a node, as far as its first block tells; for `check`.
    pub fn root_of(&self, index: usize) -> Root {
        let n = &self.nodes[index];
        Root {
            digest: [n.scope[0].get(), n.scope[1].get()],
            epoch: n.epoch.get(),
        }
    }

    /// The page of a node in a pool.
    pub fn page(&self, pool: usize, index: usize) -> Page {
        Page(self.pages[pool].word[index].load(Ordering::Acquire)) // Acquire: partner the CASes that change the word
    }

    /// Whether the node has a page in every pool.
    pub fn has_all_pages(&self, index: usize) -> bool {
        (0..self.pages.len()).all(|pool| self.page(pool, index).slot() != 0)
    }

    /// Whether the node has no page in any pool.
    pub fn has_no_page(&self, index: usize) -> bool {
        (0..self.pages.len()).all(|pool| self.page(pool, index).slot() == 0)
    }

    /// The tokens of a node.
    pub fn tokens(&self, index: usize) -> impl Iterator<Item = i32> + '_ {
        let words = self.t.div_ceil(2);
        let at = &self.tokens[index * words..(index + 1) * words];
        (0..self.t).map(move |i| (at[i / 2].get() >> (i % 2 * 32)) as i32)
    }

    /// The free nodes, for `check`.
    pub fn free_nodes(&self) -> Vec<u32> {
        let spare = self
            .spare
            .indices()
            .into_iter()
            .map(|index| index + self.max_blocks);
        self.free.indices().into_iter().chain(spare).collect()
    }
}
