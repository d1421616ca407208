//! A lock-free stack of indices below a fixed number: free nodes, free slots.
//!
//! Each index has a word: on the stack the way to the one below, off it a note of whoever owns the index.
//!
//! Head = [tag 32 | index 32], word = [on the stack 1 | index below or note 31]. Every change of the head steps the tag, so a pop whose `next` was read
//! before others popped and pushed the same index fails (2^32 steps during one pop are taken as
//! impossible). An index is on the stack at most once: who pops it owns it until the push.
//!
//! push and pop: lock-free, linearized at the CAS of the head.

use crate::sync::{weak, AtomicU32, AtomicU64, Ordering, Weak};

const ON: u32 = 1 << 31;
const NIL: u32 = ON - 1;

/// See the module.
#[derive(Debug)]
pub struct Stack {
    head: AtomicU64,
    words: Vec<AtomicU32>,
}

fn step(head: u64, index: u32) -> u64 {
    let tag = if weak(Weak::StackTag) {
        0
    } else {
        (head >> 32).wrapping_add(1) & 0xFFFF_FFFF
    };
    tag << 32 | u64::from(index)
}

impl Stack {
    /// All indices below `count` are on it, the lowest on top.
    pub fn full(count: u32) -> Self {
        assert!(count < NIL, "count: {count}");
        let below = |i: u32| ON | if i + 1 < count { i + 1 } else { NIL };
        Self {
            head: AtomicU64::new(u64::from(if count == 0 { NIL } else { 0 })),
            words: (0..count).map(|i| AtomicU32::new(below(i))).collect(),
        }
    }

    /// The note of who owns an index; `None`: it is on the stack, or nothing was noted since it was.
    pub fn note(&self, index: u32) -> Option<u32> {
        let word = self.words[index as usize].load(Ordering::Relaxed); // Relaxed: a monitor's reading, or the owner's own
        (word & ON == 0).then_some(word)
    }

    /// Notes something below 2^31 at an index that the caller owns.
    pub fn set_note(&self, index: u32, note: u32) {
        debug_assert!(note & ON == 0, "note: {note}");
        self.words[index as usize].store(note, Ordering::Relaxed); // Relaxed: ordered before the push by the next owner as all that the owner did
    }

    /// Takes the index on top.
    pub fn pop(&self) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire); // Acquire: partner the CAS in `push_chain`
        loop {
            let index = head as u32;
            if index == NIL {
                return None;
            }
            let below = self.words[index as usize].load(Ordering::Relaxed) & !ON; // Relaxed: a word of another turn fails the CAS by its tag
            let success = if weak(Weak::StackOrder) {
                Ordering::Relaxed // Relaxed: the planted weakness
            } else {
                Ordering::Acquire // Acquire: partner the CAS in `push_chain`
            };
            let (old, new) = (head, step(head, below));
            // Acquire on failure: partner the CAS in `push_chain`.
            match self
                .head
                .compare_exchange_weak(old, new, success, Ordering::Acquire)
            {
                Ok(_) => return Some(index),
                Err(now) => head = now,
            }
        }
    }

    /// Takes up to `n` indices in one step, appended from the top down.
    pub fn pop_many<T>(&self, n: usize, into: &mut Vec<T>, own: impl Fn(u32) -> T) {
        let before = into.len();
        let mut head = self.head.load(Ordering::Acquire); // Acquire: partner the CAS in `push_chain`
        loop {
            into.truncate(before);
            let mut at = head as u32;
            while let Some(word) = self.words.get(at as usize).filter(|_| into.len() - before < n) {
                into.push(own(at));
                at = word.load(Ordering::Relaxed) & !ON; // Relaxed: a word of another turn, a note too, fails the CAS by its tag
            }
            if into.len() == before {
                return;
            }
            let (old, new) = (head, step(head, at));
            // Acquire, on failure too: partner the CAS in `push_chain`.
            match self
                .head
                .compare_exchange_weak(old, new, Ordering::Acquire, Ordering::Acquire)
            {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Gives an index that the caller owns back.
    pub fn push(&self, index: u32) {
        self.push_chain(index, index);
    }

    /// Gives several back at once, the last on top.
    pub fn push_each(&self, mut indices: impl Iterator<Item = u32>) {
        let Some(first) = indices.next() else {
            return;
        };
        let mut top = first;
        for index in indices {
            self.words[index as usize].store(ON | top, Ordering::Relaxed); // Relaxed: published by the CAS in `push_chain`
            top = index;
        }
        self.push_chain(top, first);
    }

    fn push_chain(&self, top: u32, bottom: u32) {
        let mut head = self.head.load(Ordering::Relaxed); // Relaxed: only its value is used
        loop {
            self.words[bottom as usize].store(ON | head as u32, Ordering::Relaxed); // Relaxed: published by the CAS below
            let success = if weak(Weak::StackOrder) {
                Ordering::Relaxed // Relaxed: the planted weakness
            } else {
                Ordering::Release // Release: partner the loads and the CAS in `pop`
            };
            let (old, new) = (head, step(head, top));
            // Relaxed on failure: only its value is used.
            match self
                .head
                .compare_exchange_weak(old, new, success, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// The indices from the top, for `check` of a core at rest.
    pub fn indices(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut at = self.head.load(Ordering::Acquire) as u32; // Acquire: partner the CAS in `push_chain`
        while at != NIL && found.len() <= self.words.len() {
            found.push(at);
            at = self.words[at as usize].load(Ordering::Relaxed) & !ON; // Relaxed: the stack is at rest
        }
        found
    }
}
