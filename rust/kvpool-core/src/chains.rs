//! Bucket chains: a table of heads and one intrusive list per bucket, over the indices of the slab.
//!
//! Nodes enter at the head only, so the CAS on the head that was read *before* a search shows that
//! nothing entered since: no two nodes with the same content. A node leaves in two steps: its own next
//! word is marked (from then on nothing can be linked behind it), then whoever meets the mark
//! unlinks it (Harris 2001, Michael 2002). Words carry the incarnation, so no CAS takes a node for its successor.
//!
//! - a link in a chain names a node at the incarnation at which it was published, until it is unlinked
//! - walking from a dead node leads to no node that was published before it and is live, except by
//!   its frozen next word: a walk never skips a live node
//!
//! find: lock-free (a restart means that a node was recycled meanwhile). publish, unlink: lock-free.

use crate::sync::{warm, weak, AtomicU64, Ordering, Weak};
use crate::words::{Link, MARK};

/// See the module.
#[derive(Debug)]
pub struct Chains {
    heads: Vec<AtomicU64>,
    next: Vec<AtomicU64>,
}

/// What a visitor thinks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// Go on.
    Next,
    /// This is it.
    Found,
    /// It was recycled while we looked: start again.
    Recycled,
}

/// A node was recycled under a walk: somebody else got on, start again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recycled;

impl Chains {
    /// Empty chains for `nodes` indices in twice as many buckets.
    pub fn new(nodes: u32) -> Self {
        Self::with_buckets(nodes, 2 * nodes as usize)
    }

    /// As `new`, in at least so many buckets.
    pub fn with_buckets(nodes: u32, buckets: usize) -> Self {
        Self {
            heads: (0..buckets.next_power_of_two())
                .map(|_| AtomicU64::new(Link::NIL.0))
                .collect(),
            next: (0..nodes).map(|_| AtomicU64::new(Link::NIL.0)).collect(),
        }
    }

    /// The bucket of a hash.
    pub fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.heads.len() - 1)
    }

    /// The word that holds the first link of a bucket.
    pub fn cell(&self, bucket: usize) -> &AtomicU64 {
        &self.heads[bucket]
    }

    /// Brings the head of a bucket closer.
    pub fn warm_bucket(&self, bucket: usize) {
        warm(&self.heads[bucket]);
    }

    /// Brings the link behind a node closer.
    pub fn warm_next(&self, index: usize) {
        warm(&self.next[index]);
    }

    /// The first link of a bucket; needed before a search whose miss is to be published.
    pub fn head(&self, bucket: usize) -> Link {
        Self::first(self.cell(bucket))
    }

    /// As `head`, of a chain whose first link is kept elsewhere.
    pub fn first(cell: &AtomicU64) -> Link {
        Link(cell.load(Ordering::Acquire)) // Acquire: partner the CAS in `publish`
    }

    /// The next link of a chain at rest.
    #[cfg(kvpool_loom)]
    pub fn next_of(&self, node: Link) -> Link {
        Link(self.next[node.index()].load(Ordering::Acquire)).unmarked() // Acquire: partner the store in `publish`
    }

    /// Walks from `head`. `visit` looks at a node; `is` tells whether the node is still the one linked.
    /// `Err`: start again from a fresh head.
    pub fn walk(
        &self,
        head: Link,
        is: impl Fn(Link) -> bool,
        mut visit: impl FnMut(Link) -> Visit,
    ) -> Result<Option<Link>, Recycled> {
        let mut at = head;
        while !at.is_nil() {
            match visit(at) {
                Visit::Found => return Ok(Some(at)),
                Visit::Recycled => return Err(Recycled),
                Visit::Next => {}
            }
            let next = Link(self.next[at.index()].load(Ordering::Acquire)); // Acquire: partner the store in `publish`
            if !is(at) {
                return Err(Recycled);
            }
            at = next.unmarked();
        }
        Ok(None)
    }

    /// Links a node that the caller owns in front of `head`. `false`: the chain changed since.
    pub fn publish(&self, cell: &AtomicU64, head: Link, node: Link) -> bool {
        self.next[node.index()].store(head.0, Ordering::Release); // Release: partner the load in `walk`, for links that outlive the head
        let head = if weak(Weak::PublishHead) {
            let now = Self::first(cell);
            self.next[node.index()].store(now.0, Ordering::Release); // Release: the planted weakness
            now
        } else {
            head
        };
        let success = if weak(Weak::PublishOrder) {
            Ordering::Relaxed // Relaxed: the planted weakness
        } else {
            Ordering::Release // Release: partner the load in `head`; the node's fields are visible to who sees the link
        };
        cell.compare_exchange(head.0, node.0, success, Ordering::Relaxed)
            .is_ok() // Relaxed on failure: nothing is read
    }

    /// Takes a dead node that the caller owns out of its chain; afterwards no walk that starts meets it.
    pub fn unlink(&self, cell: &AtomicU64, node: Link, is: impl Fn(Link) -> bool) {
        // Alone in its bucket: nothing comes behind it any more, and what comes before it changes the head.
        let next = self.next[node.index()].load(Ordering::Acquire); // Acquire: partner the CAS in `sweep`
        let nil = Link::NIL.0;
        // AcqRel: partner the loads in `head` and `sweep`. Relaxed on failure: the long way reads again.
        if next == nil
            && cell
                .compare_exchange(node.0, nil, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            return;
        }
        if !weak(Weak::UnlinkMark) {
            self.next[node.index()].fetch_or(MARK, Ordering::AcqRel); // AcqRel: partner the CAS in `sweep`: the frozen word is the last one written
        }
        while !self.sweep(cell, node, &is) {}
    }

    /// One walk that unlinks every marked node it meets. `false`: something changed, walk again.
    fn sweep(&self, head: &AtomicU64, node: Link, is: &impl Fn(Link) -> bool) -> bool {
        let mut cell = head;
        let mut at = Link(cell.load(Ordering::Acquire)); // Acquire: partner the CAS in `publish`
        while !at.is_nil() {
            let next = Link(self.next[at.index()].load(Ordering::Acquire)); // Acquire: partner the store in `publish` and the CAS below
            if !is(at) {
                return false;
            }
            let leaves = next.is_marked() || (weak(Weak::UnlinkMark) && at == node);
            if leaves {
                let (old, new) = (at.0, next.unmarked().0);
                // AcqRel: partner the loads in `walk` and `sweep`, which go on behind `next` from here.
                // Relaxed on failure: the walk starts again.
                if cell
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                    .is_err()
                {
                    return false;
                }
            } else {
                cell = &self.next[at.index()];
            }
            at = next.unmarked();
        }
        true
    }
}
