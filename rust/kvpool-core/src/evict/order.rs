//! A heap of lower bounds.
//!
//! An entry's key is never above the true key of its page. Popping the least entry therefore finds
//! the exact victim: an entry whose page has a higher key by now goes back with that key; an entry of
//! a page that is claimed or gone is dropped. Whoever lowers a key pushes a fresh entry.

use crate::words::{Link, Stamp};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Place in the order; the smallest goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Priority, -1 for an older weights epoch.
    pub priority: i16,
    /// `false` for windowed pages that went stale under their cache: they go first.
    pub in_window: bool,
    /// Segment that the policy gave.
    pub segment: u8,
    /// Last release or expiry.
    pub used: Stamp,
    /// Deepest first.
    pub depth: Reverse<u32>,
    /// Lowest slot first.
    pub slot: u32,
}

/// Entries of one order. An index has one entry that counts (`queued`), and maybe older ones that do not.
#[derive(Debug)]
pub struct Order {
    heap: BinaryHeap<Reverse<(Key, Link)>>,
    queued: Vec<Link>,
    limit: usize,
}

impl Order {
    /// For the pages of so many nodes; never allocates afterwards as long as [`Order::is_full`] is obeyed.
    pub fn new(nodes: usize) -> Self {
        let limit = Self::limit(nodes);
        Self {
            heap: BinaryHeap::with_capacity(if nodes == 0 { 0 } else { limit }),
            queued: vec![Link::NIL; nodes],
            limit,
        }
    }

    /// Bytes for one node, for the question whether they can be had.
    pub fn bytes_per_node() -> usize {
        std::mem::size_of::<(Key, Link)>() * 5 / 4 + std::mem::size_of::<Link>()
    }

    /// A quarter more than there can be: it is built anew that often at most.
    fn limit(nodes: usize) -> usize {
        nodes + nodes / 4 + 64
    }

    /// Whether a push would grow the heap: rebuild it first.
    pub fn is_full(&self) -> bool {
        self.heap.len() >= self.limit
    }

    /// Whether there is an entry for this node whose key is a lower bound.
    pub fn has(&self, node: Link) -> bool {
        self.queued[node.index()] == node
    }

    /// What is known of this node is no lower bound any more: the next report queues it anew.
    pub fn forget(&mut self, node: Link) {
        if self.has(node) {
            self.queued[node.index()] = Link::NIL;
        }
    }

    /// Forgets all entries.
    pub fn clear(&mut self) {
        self.heap.clear();
        self.queued.fill(Link::NIL);
    }

    /// Indices of the nodes in it, some of them twice, some gone.
    pub fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        self.heap.iter().map(|Reverse((_, node))| node.index())
    }

    /// Adds a lower bound.
    pub fn push(&mut self, key: Key, node: Link) {
        self.queued[node.index()] = node;
        self.heap.push(Reverse((key, node)));
    }

    /// The least key.
    pub fn least(&self) -> Option<Key> {
        self.heap.peek().map(|Reverse((key, _))| *key)
    }

    /// Takes the least entry.
    pub fn pop(&mut self) -> Option<(Key, Link)> {
        let Reverse((key, node)) = self.heap.pop()?;
        if self.queued[node.index()] == node {
            self.queued[node.index()] = Link::NIL;
        }
        Some((key, node))
    }
}
