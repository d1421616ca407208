//! Order of eviction: a heap of lower bounds, and the policies that place a block within its priority.
//!
//! An entry's key is never above the true key of its page. Popping the least entry therefore finds
//! the exact victim: an entry whose page has a higher key by now goes back with that key; an entry of
//! a page that is claimed or gone is dropped. Whoever lowers a key pushes a fresh entry.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

/// Place in the order; the smallest goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Priority, -1 for an older weights epoch.
    pub priority: i16,
    /// `false` for windowed pages that went stale under their cache: they go first.
    pub in_window: bool,
    /// Segment that the policy gave.
    pub segment: u8,
    /// Stamp of the last release.
    pub used: u64,
    /// Deepest first.
    pub depth: Reverse<u32>,
    /// Lowest slot first.
    pub slot: u32,
}

/// A node at one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeRef {
    /// Index in the slab.
    pub id: u32,
    /// Generation it was seen in.
    pub gen: u32,
}

/// Entries of one order.
#[derive(Debug)]
pub struct Order {
    heap: BinaryHeap<Reverse<(Key, NodeRef)>>,
    limit: usize,
}

impl Order {
    /// For at most `pages` pages; never allocates afterwards as long as [`Order::is_full`] is obeyed.
    pub fn new(pages: usize) -> Self {
        let limit = 2 * pages + 64;
        Self {
            heap: BinaryHeap::with_capacity(limit),
            limit,
        }
    }

    /// Whether a push would grow the heap: rebuild it first.
    pub fn is_full(&self) -> bool {
        self.heap.len() >= self.limit
    }

    /// Forgets all entries.
    pub fn clear(&mut self) {
        self.heap.clear();
    }

    /// Adds a lower bound.
    pub fn push(&mut self, key: Key, node: NodeRef) {
        self.heap.push(Reverse((key, node)));
    }

    /// Takes the least entry.
    pub fn pop(&mut self) -> Option<(Key, NodeRef)> {
        self.heap.pop().map(|Reverse(entry)| entry)
    }
}

/// Places blocks into segments within their priority; segment 0 goes first.
///
/// Contract: `overflow` names a block only while more are protected than the policy wants; the core
/// answers every name with exactly one of `demoted` (it left the segment or the tree) or `keep`.
pub trait Policy: Send + std::fmt::Debug {
    /// Whether `request` looks at keys past the match.
    fn wants_keys(&self) -> bool;
    /// A request looked for the blocks with these keys and found the first `matched`.
    /// Returns the segment that its blocks get when they are released.
    fn request(&mut self, keys: &[u64], matched: usize) -> u8;
    /// A block moved from segment 0 to segment 1, last used at `used`.
    fn protect(&mut self, node: NodeRef, used: u64);
    /// The next block to demote, with its use when it was named last.
    fn overflow(&mut self) -> Option<(NodeRef, u64)>;
    /// The block is no longer in segment 1.
    fn demoted(&mut self);
    /// The block was used since: it stays, at the end of the queue.
    fn keep(&mut self, node: NodeRef, used: u64);
    /// A block left the tree.
    fn removed(&mut self, key: u64);
}

/// Least recently used: one segment.
#[derive(Debug, Default)]
pub struct Lru;

impl Policy for Lru {
    fn wants_keys(&self) -> bool {
        false
    }
    fn request(&mut self, _keys: &[u64], _matched: usize) -> u8 {
        0
    }
    fn protect(&mut self, _node: NodeRef, _used: u64) {}
    fn overflow(&mut self) -> Option<(NodeRef, u64)> {
        None
    }
    fn demoted(&mut self) {}
    fn keep(&mut self, _node: NodeRef, _used: u64) {}
    fn removed(&mut self, _key: u64) {}
}

/// Request-level segmented LRU: blocks of a request that itself reused more than
/// [`Slru::MIN_HITS`] blocks are protected, at most 30 % of the nodes; the keys of the last
/// `4 * capacity` blocks that left the tree are remembered and count as reused.
#[derive(Debug)]
pub struct Slru {
    max_protected: usize,
    max_ghosts: usize,
    protected: usize,
    queue: VecDeque<(NodeRef, u64)>,
    ghost_order: VecDeque<u64>,
    ghosts: HashMap<u64, u32>,
}

impl Slru {
    /// A request that reused more blocks than this protects its blocks.
    pub const MIN_HITS: usize = 3;

    /// For a tree of at most `capacity` cached blocks.
    pub fn new(capacity: usize) -> Self {
        Self {
            max_protected: capacity * 3 / 10,
            max_ghosts: capacity * 4,
            protected: 0,
            queue: VecDeque::with_capacity(capacity + 1),
            ghost_order: VecDeque::with_capacity(capacity * 4 + 1),
            ghosts: HashMap::with_capacity(capacity * 4 + 1),
        }
    }
}

impl Policy for Slru {
    fn wants_keys(&self) -> bool {
        true
    }

    fn request(&mut self, keys: &[u64], matched: usize) -> u8 {
        let ghosts = keys[matched.min(keys.len())..]
            .iter()
            .take_while(|key| self.ghosts.contains_key(key))
            .count();
        u8::from(matched + ghosts > Self::MIN_HITS)
    }

    fn protect(&mut self, node: NodeRef, used: u64) {
        self.protected += 1;
        self.queue.push_back((node, used));
    }

    fn overflow(&mut self) -> Option<(NodeRef, u64)> {
        if self.protected > self.max_protected {
            self.queue.pop_front()
        } else {
            None
        }
    }

    fn demoted(&mut self) {
        self.protected -= 1;
    }

    fn keep(&mut self, node: NodeRef, used: u64) {
        self.queue.push_back((node, used));
    }

    fn removed(&mut self, key: u64) {
        self.ghost_order.push_back(key);
        *self.ghosts.entry(key).or_insert(0) += 1;
        if self.ghost_order.len() > self.max_ghosts {
            let Some(old) = self.ghost_order.pop_front() else {
                return;
            };
            if let Some(count) = self.ghosts.get_mut(&old) {
                *count -= 1;
                if *count == 0 {
                    self.ghosts.remove(&old);
                }
            }
        }
    }
}
