//! Indices that something happened to, on their way to the one thread that keeps an order.
//!
//! Many push, one takes all. An index is in the inbox at most once: its flags are 0 outside. The
//! taker clears the flags *before* it looks at the node; so a pusher who finds the flags set knows that what
//! it did before will still be looked at.
//!
//! push, take_all: lock-free, linearized at the swap of the flags and of the head.

use crate::sync::{weak, AtomicU32, AtomicU8, Ordering, Weak};

const NIL: u32 = u32::MAX;

/// Became evictable, maybe.
pub const IDLE: u8 = 1;
/// Its place in the order fell: what the order knows is no lower bound.
pub const LOWERED: u8 = 2;
/// It rose to segment 1.
pub const ROSE: u8 = 4;

/// See the module.
#[derive(Debug)]
pub struct Inbox {
    head: AtomicU32,
    next: Vec<AtomicU32>,
    flags: Vec<AtomicU8>,
}

impl Inbox {
    /// For indices below `count`.
    pub fn new(count: u32) -> Self {
        Self {
            head: AtomicU32::new(NIL),
            next: (0..count).map(|_| AtomicU32::new(NIL)).collect(),
            flags: (0..count).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// Whether the index can be reported here.
    pub fn has(&self, index: usize) -> bool {
        index < self.flags.len()
    }

    /// Reports an index; what the caller did to its node before will be seen by the taker.
    pub fn push(&self, index: usize, flags: u8) {
        // AcqRel: partner the swap in `take`: either it comes later and sees the node as the caller left it,
        // or it came earlier and this push links the index anew.
        if self.flags[index].fetch_or(flags, Ordering::AcqRel) != 0 {
            return;
        }
        let mut head = self.head.load(Ordering::Relaxed); // Relaxed: only its value is used
        loop {
            self.next[index].store(head, Ordering::Relaxed); // Relaxed: published by the CAS below
                                                             // Release: partner the swap in `take_all`. Relaxed on failure: only its value is used.
            match self
                .head
                .compare_exchange_weak(head, index as u32, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Takes all indices. Returns the first that was pushed; [`Inbox::after`] tells the next. One thread at a time.
    pub fn take_all(&self) -> Option<u32> {
        if self.head.load(Ordering::Relaxed) == NIL {
            return None; // Relaxed: a push that is not seen here is found by the next taker
        }
        let mut at = self.head.swap(NIL, Ordering::Acquire); // Acquire: partner the CAS in `push`
        let mut before = NIL;
        // Turned round in place: nobody pushes an index again before it is opened.
        while at != NIL {
            let next = self.next[at as usize].load(Ordering::Relaxed); // Relaxed: ordered by the swap above
            self.next[at as usize].store(before, Ordering::Relaxed); // Relaxed: the index is ours, until the swap in `open`
            before = at;
            at = next;
        }
        (before != NIL).then_some(before)
    }

    /// The taken index that was pushed after a taken one, which is not opened yet.
    pub fn after(&self, index: u32) -> Option<u32> {
        let next = self.next[index as usize].load(Ordering::Relaxed); // Relaxed: the index is ours, until the swap in `open`
        (next != NIL).then_some(next)
    }

    /// Clears the flags of a taken index and returns them. From here on it may be pushed again.
    pub fn open(&self, index: u32) -> u8 {
        if weak(Weak::InboxFlag) {
            return self.flags[index as usize].load(Ordering::Relaxed); // Relaxed: the planted weakness
        }
        self.flags[index as usize].swap(0, Ordering::AcqRel) // AcqRel: partner the fetch_or in `push`
    }

    /// The planted weakness: clears the flags after the look.
    #[cfg(kvpool_loom)]
    pub fn clear_late(&self, index: u32) {
        if weak(Weak::InboxFlag) {
            self.flags[index as usize].store(0, Ordering::Release); // Release: the planted weakness
        }
    }
}
