//! How long a block keeps its priority.
//!
//! A block has a priority and a duration. When its last claim ends the clock starts; at the expiry the priority
//! falls to the default and the expiry counts as its use. Expiries are applied when they can first be noticed: before a
//! victim is chosen, and by who claims the block. All words are hints for the order of eviction: they never decide
//! whether a page may go.

use crate::core::Core;
use crate::sync::Field;
use crate::tree::Node;
use crate::types::{Retain, DEFAULT_PRIORITY};
use crate::words::{clock_word, seconds, Stamp};

/// What a block with a duration has besides. Touched only once some request gave a duration.
#[derive(Debug)]
pub struct Timing {
    /// Time of the last use.
    time: Field,
    /// Seconds, as the bits of a positive f64: their order is that of the numbers.
    duration: Field,
    /// When the priority ends; 0: it does not, or did.
    expiry: Field,
}

impl Timing {
    /// Of a node that never lived.
    pub fn new() -> Self {
        Self {
            time: Field::new(0),
            duration: Field::new(f64::INFINITY.to_bits()),
            expiry: Field::new(0),
        }
    }
}

impl Core {
    /// Whether some request gave a duration: from then on the clock is asked.
    pub fn is_timed(&self) -> bool {
        self.timed.get() != 0
    }

    /// The clock shows `now` seconds; a clock that goes back is taken as standing still.
    pub fn advance(&self, now: f64) {
        self.clock.raise(clock_word(now));
    }

    /// A time word; 0 as long as no request gave a duration.
    pub(crate) fn time(&self, word: &Field) -> u64 {
        if self.is_timed() {
            word.get()
        } else {
            0
        }
    }

    pub(crate) fn tick(&self) -> Stamp {
        Stamp {
            time: self.time(&self.clock),
            count: self.stamp.next(),
        }
    }

    /// Retention of a node that is being made.
    pub(crate) fn first_retain(&self, index: usize, retain: Retain) {
        if self.is_timed() {
            self.timing[index].time.set(0);
            self.timing[index].expiry.set(0);
            self.timing[index].duration.set(retain.duration.to_bits());
        }
    }

    /// Reuse with retention: the maximum of each.
    pub(crate) fn raise_retain(&self, index: usize, retain: Retain) {
        self.tree.nodes[index].priority.raise(u64::from(retain.priority));
        if self.is_timed() {
            self.timing[index].duration.raise(retain.duration.to_bits());
        }
    }

    /// The last use of a node.
    pub(crate) fn used(&self, index: usize) -> Stamp {
        Stamp {
            time: self.time(&self.timing[index].time),
            count: self.tree.nodes[index].used.get(),
        }
    }

    /// The last claim on a node is about to end.
    #[inline]
    pub(crate) fn record_use(&self, index: usize, node: &Node, stamp: Stamp) {
        node.used.advance(stamp.count);
        if self.is_timed() && stamp != Stamp::NONE {
            let timing = &self.timing[index];
            timing.time.raise(stamp.time);
            let duration = f64::from_bits(timing.duration.get());
            timing.expiry.set(if duration.is_finite() {
                clock_word(seconds(stamp.time) + duration)
            } else {
                0
            });
        }
    }

    /// A claimed node is ranked as used at this time.
    pub(crate) fn rank_time(&self, index: usize, stamp: Stamp) {
        if self.is_timed() {
            self.timing[index].time.raise(stamp.time);
        }
    }

    /// When the priority of an unclaimed node ends, 0 for never.
    pub(crate) fn expiry(&self, index: usize) -> u64 {
        self.time(&self.timing[index].expiry)
    }

    /// As `expire`, by who has the first claim: the orders hear of it.
    pub(crate) fn expire_at_claim(&self, index: usize) {
        if self.is_timed() && self.expire(index) {
            self.keeper.report_lowered(index);
        }
    }

    /// Applies the expiry of a node if its time has come, and tells whether it has. The caller sees it unclaimed, or has
    /// the first claim: then a reuse that raises the priority meanwhile makes `replace` fail.
    pub(crate) fn expire(&self, index: usize) -> bool {
        let when = self.expiry(index);
        if when == 0 || when > self.clock.get() {
            return false;
        }
        let node = &self.tree.nodes[index];
        let priority = node.priority.get();
        if priority > u64::from(DEFAULT_PRIORITY) {
            node.priority.replace(priority, u64::from(DEFAULT_PRIORITY));
        }
        self.timing[index].expiry.replace(when, 0);
        self.timing[index].time.raise(when);
        node.used.set(0);
        true
    }
}
