//! A heap of lower bounds.
//!
//! An entry's key is never above the true key of its page. Popping the least entry therefore finds
//! the exact victim: an entry whose page has a higher key by now goes back with that key; an entry of
//! a page that is claimed or gone is dropped. Whoever lowers a key pushes a fresh entry.
//!
//! What nobody gave a priority or a duration comes in the order in which it was released: such entries wait in a line
//! as long as none comes out of turn, and only the others in the heap. The least entry is the lesser of the two firsts.
//!
//! Both grow with the entries that there are. Where memory cannot be had an entry is left out and the order is short: it
//! is built anew at the next look, and until then who finds no entry takes a page by a scan.

use crate::types::DEFAULT_PRIORITY;
use crate::words::{Link, Stamp};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

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

/// An entry of the line: what is not the same in all of them.
#[derive(Debug, Clone, Copy)]
struct InLine {
    count: u64,
    depth: Reverse<u32>,
    slot: u32,
    node: Link,
}

impl InLine {
    /// If the key is one for the line.
    fn new(key: Key, node: Link) -> Option<Self> {
        let entry = Self {
            count: key.used.count,
            depth: key.depth,
            slot: key.slot,
            node,
        };
        (entry.key() == key).then_some(entry)
    }

    fn key(&self) -> Key {
        Key {
            priority: i16::from(DEFAULT_PRIORITY),
            in_window: true,
            segment: 0,
            used: Stamp {
                time: 0,
                count: self.count,
            },
            depth: self.depth,
            slot: self.slot,
        }
    }
}

/// An index has an entry, and the last bits of the version at which that node was born.
const QUEUED: u32 = 1 << 31;

fn queued(node: Link) -> u32 {
    QUEUED | node.born() as u32
}

/// Entries of one order. An index has one entry that counts (`queued`), and maybe older ones that do not. A node that is
/// born 2^31 versions of its index after another one whose entry is still there would be taken to have it; who pops that
/// entry sees that it has not.
#[derive(Debug)]
pub struct Order {
    heap: BinaryHeap<Reverse<(Key, Link)>>,
    line: VecDeque<InLine>,
    /// [`queued`] by index, or 0.
    queued: Vec<u32>,
    limit: usize,
    short: bool,
}

impl Order {
    /// For the pages of so many nodes.
    pub fn new(nodes: usize) -> Self {
        Self {
            heap: BinaryHeap::new(),
            line: VecDeque::new(),
            queued: vec![0; nodes],
            limit: Self::limit(nodes),
            short: false,
        }
    }

    /// Bytes for one node that are had from the beginning, for the question whether they can be had.
    pub fn bytes_per_node() -> usize {
        std::mem::size_of::<u32>()
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
        self.queued[node.index()] == queued(node)
    }

    /// What is known of this node is no lower bound any more: the next report queues it anew.
    pub fn forget(&mut self, node: Link) {
        if self.has(node) {
            self.queued[node.index()] = 0;
        }
    }

    /// Whether an entry was left out for want of memory since the last `clear`.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// An entry that was taken out could not be put back.
    pub fn set_short(&mut self) {
        self.short = true;
    }

    /// Forgets all entries.
    pub fn clear(&mut self) {
        self.short = false;
        self.heap.clear();
        self.line.clear();
        self.queued.fill(0);
    }

    /// Indices of the nodes in it, some of them twice, some gone.
    pub fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        let in_heap = self.heap.iter().map(|Reverse((_, node))| node.index());
        in_heap.chain(self.line.iter().map(|entry| entry.node.index()))
    }

    /// Adds a lower bound.
    pub fn push(&mut self, key: Key, node: Link) {
        if let Some(entry) = InLine::new(key, node) {
            let last = self.line.back().map(InLine::key);
            if last.is_none_or(|last| last <= key) && self.line.len() < self.limit && self.has_room_in_line()
            {
                self.queued[node.index()] = queued(node);
                self.line.push_back(entry);
                return;
            }
        }
        if self.has_room_in_heap() {
            self.queued[node.index()] = queued(node);
            self.heap.push(Reverse((key, node)));
        } else {
            self.forget(node);
            self.short = true;
        }
    }

    fn has_room_in_line(&mut self) -> bool {
        let len = self.line.len();
        len < self.line.capacity() || self.line.try_reserve_exact(more(len, self.limit)).is_ok()
    }

    fn has_room_in_heap(&mut self) -> bool {
        let len = self.heap.len();
        len < self.heap.capacity() || self.heap.try_reserve_exact(more(len, self.limit)).is_ok()
    }

    /// The least key.
    pub fn least(&self) -> Option<Key> {
        let in_heap = self.heap.peek().map(|Reverse((key, _))| *key);
        let in_line = self.line.front().map(InLine::key);
        in_heap.into_iter().chain(in_line).min()
    }

    /// Takes the least entry.
    pub fn pop(&mut self) -> Option<(Key, Link)> {
        let first = self.line.front().map(|entry| (entry.key(), entry.node));
        let in_line = match (first, self.heap.peek()) {
            (Some(first), Some(Reverse(other))) => first <= *other,
            (first, _) => first.is_some(),
        };
        let (key, node) = if in_line {
            self.line.pop_front();
            first?
        } else {
            let Reverse(entry) = self.heap.pop()?;
            entry
        };
        self.forget(node);
        Some((key, node))
    }
}

/// Entries by which a full list grows.
fn more(len: usize, limit: usize) -> usize {
    (len / 2).max(64).min(limit.saturating_sub(len)).max(1)
}

#[cfg(all(test, not(any(kvpool_loom, kvpool_shuttle))))]
mod tests {
    use super::*;

    fn key(priority: u8, count: u64, depth: u32) -> Key {
        Key {
            priority: i16::from(priority),
            in_window: true,
            segment: 0,
            used: Stamp { time: 0, count },
            depth: Reverse(depth),
            slot: 1,
        }
    }

    /// The line and the heap together give the order that sorting gives, whatever comes out of turn.
    #[test]
    fn entries_come_out_in_the_order_of_their_keys() {
        let mut state = 7u64;
        for _ in 0..200 {
            let mut order = Order::new(64);
            let mut keys = Vec::new();
            let mut popped = Vec::new();
            for i in 0..64u64 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let out_of_turn = (state >> 40) % 4 == 0;
                let priority = if (state >> 50) % 5 == 0 {
                    80
                } else {
                    DEFAULT_PRIORITY
                };
                let count = if out_of_turn { (state >> 30) % 64 } else { i };
                let key = key(priority, count, (state >> 20) as u32 % 3);
                order.push(key, Link::new(0, i as u32));
                keys.push((key, Link::new(0, i as u32)));
            }
            assert_eq!(order.indices().count(), 64);
            keys.sort_unstable();
            while let Some(least) = order.least() {
                popped.push(order.pop().unwrap());
                assert_eq!(popped.last().unwrap().0, least);
            }
            assert!(order.line.is_empty() && order.heap.is_empty());
            assert_eq!(popped, keys);
        }
    }
}
