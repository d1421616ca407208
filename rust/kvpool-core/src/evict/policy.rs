//! Policies: the place of a block within its priority. Run by the one thread that keeps the order.

use crate::words::Link;
use std::collections::{HashMap, VecDeque};

/// Places blocks into segments within their priority; segment 0 goes first.
///
/// Contract: `overflow` names a block only while more are protected than the policy wants; the core
/// answers every name with exactly one of `demoted` (it left the segment or the tree) or `keep`.
pub trait Policy: Send + std::fmt::Debug {
    /// Whether `request` looks at keys past the match; only then it is told by `removed` what left.
    fn wants_keys(&self) -> bool;
    /// A request looked for the blocks with these keys and found the first `matched`.
    /// Returns the segment that its blocks get when they are released.
    fn request(&mut self, keys: &[u64], matched: usize) -> u8;
    /// A block moved from segment 0 to segment 1, last used at `used`.
    fn protect(&mut self, node: Link, used: u64);
    /// The next block to demote, with its use when it was named last.
    fn overflow(&mut self) -> Option<(Link, u64)>;
    /// The block is no longer in segment 1.
    fn demoted(&mut self);
    /// The block was used since: it stays, at the end of the queue.
    fn keep(&mut self, node: Link, used: u64);
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
    fn protect(&mut self, _node: Link, _used: u64) {}
    fn overflow(&mut self) -> Option<(Link, u64)> {
        None
    }
    fn demoted(&mut self) {}
    fn keep(&mut self, _node: Link, _used: u64) {}
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
    queue: VecDeque<(Link, u64)>,
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
            // Twice the room: a table at most half full cleans up in place and never grows.
            ghosts: HashMap::with_capacity(2 * (capacity * 4 + 1)),
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

    fn protect(&mut self, node: Link, used: u64) {
        self.protected += 1;
        self.queue.push_back((node, used));
    }

    fn overflow(&mut self) -> Option<(Link, u64)> {
        if self.protected > self.max_protected {
            self.queue.pop_front()
        } else {
            None
        }
    }

    fn demoted(&mut self) {
        self.protected -= 1;
    }

    fn keep(&mut self, node: Link, used: u64) {
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
