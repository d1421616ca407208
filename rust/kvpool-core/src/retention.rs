//! How long a block keeps its priority.
//!
//! A block has a priority and a duration. When its last claim ends the clock starts; at the expiry the priority
//! falls to the default and the expiry counts as its use. Expiries are applied when they can first be noticed: before a
//! victim is chosen, and by who claims the block. All words are hints for the order of eviction: they never decide
//! whether a page may go.

use crate::core::Core;
use crate::error::{CoreError, Result};
use crate::sync::Field;
use crate::tree::Node;
use crate::types::{Retain, DEFAULT_PRIORITY};
use crate::words::{clock_word, seconds, Stamp};
use std::collections::TryReserveError;

/// What a block has besides once durations are given.
#[derive(Debug)]
struct Timing {
    /// Time of the last use.
    time: Field,
    /// Seconds, as the bits of a positive f64: their order is that of the numbers.
    duration: Field,
    /// When the priority ends; 0: it does not, or did.
    expiry: Field,
}

/// What durations need: made when a request gives the first one.
#[derive(Debug)]
pub struct Times {
    nodes: Vec<Timing>,
    /// By windowed pool (none for others) and node: the time of [`Pages::used`](crate::tree::Pages::used).
    pages: Vec<Vec<Field>>,
}

impl Times {
    /// Of nodes that never lived.
    fn new(nodes: usize, windowed: &[bool]) -> std::result::Result<Self, TryReserveError> {
        let mut times = Self {
            nodes: Vec::new(),
            pages: windowed.iter().map(|_| Vec::new()).collect(),
        };
        times.nodes.try_reserve_exact(nodes)?;
        times.nodes.extend((0..nodes).map(|_| Timing {
            time: Field::new(0),
            duration: Field::new(f64::INFINITY.to_bits()),
            expiry: Field::new(0),
        }));
        for (pages, _) in times
            .pages
            .iter_mut()
            .zip(windowed)
            .filter(|(_, &windowed)| windowed)
        {
            pages.try_reserve_exact(nodes)?;
            pages.extend((0..nodes).map(|_| Field::new(0)));
        }
        Ok(times)
    }
}

impl Core {
    /// Whether some request gave a duration: from then on the clock is asked.
    pub fn is_timed(&self) -> bool {
        self.times.get().is_some()
    }

    /// A request gives a duration: from now on there is room for those of all blocks. On an error nothing has changed.
    pub(crate) fn give_time(&self) -> Result<()> {
        if self.is_timed() {
            return Ok(());
        }
        let nodes = self.tree.nodes.len();
        let times = Times::new(nodes, &self.tree.windowed).map_err(|_| {
            CoreError::Memory(format!(
                "durations need tables for {nodes} nodes, which cannot be allocated now: give none, or call again"
            ))
        })?;
        self.times.set(times);
        Ok(())
    }

    /// The clock shows `now` seconds; a clock that goes back is taken as standing still.
    pub fn advance(&self, now: f64) {
        self.clock.raise(clock_word(now));
    }

    fn timing(&self, index: usize) -> Option<&Timing> {
        self.times.get().map(|times| &times.nodes[index])
    }

    pub(crate) fn tick(&self) -> Stamp {
        Stamp {
            time: if self.is_timed() { self.clock.get() } else { 0 },
            count: self.stamp.next(),
        }
    }

    /// The time of the use of a page of a windowed pool.
    pub(crate) fn page_time(&self, pool: usize, index: usize) -> u64 {
        self.times.get().map_or(0, |times| times.pages[pool][index].get())
    }

    /// A page of a windowed pool is used, or not used yet, with 0.
    pub(crate) fn set_page_time(&self, pool: usize, index: usize, time: u64) {
        if let Some(times) = self.times.get() {
            times.pages[pool][index].set(time);
        }
    }

    /// A page of a windowed pool is ranked as used at this time.
    pub(crate) fn raise_page_time(&self, pool: usize, index: usize, time: u64) {
        if let Some(times) = self.times.get() {
            times.pages[pool][index].raise(time);
        }
    }

    /// Retention of a node that is being made.
    pub(crate) fn first_retain(&self, index: usize, retain: Retain) {
        if let Some(timing) = self.timing(index) {
            timing.time.set(0);
            timing.expiry.set(0);
            timing.duration.set(retain.duration.to_bits());
        }
    }

    /// Reuse with retention: the maximum of each.
    pub(crate) fn raise_retain(&self, index: usize, retain: Retain) {
        self.tree.nodes[index].priority.raise(retain.priority);
        if let Some(timing) = self.timing(index) {
            timing.duration.raise(retain.duration.to_bits());
        }
    }

    /// The last use of a node.
    pub(crate) fn used(&self, index: usize) -> Stamp {
        Stamp {
            time: self.timing(index).map_or(0, |timing| timing.time.get()),
            count: self.tree.nodes[index].used.get(),
        }
    }

    /// The last claim on a node is about to end.
    #[inline]
    pub(crate) fn record_use(&self, index: usize, node: &Node, stamp: Stamp) {
        node.used.advance(stamp.count);
        if let Some(timing) = self.timing(index).filter(|_| stamp != Stamp::NONE) {
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
        if let Some(timing) = self.timing(index) {
            timing.time.raise(stamp.time);
        }
    }

    /// When the priority of an unclaimed node ends, 0 for never.
    pub(crate) fn expiry(&self, index: usize) -> u64 {
        self.timing(index).map_or(0, |timing| timing.expiry.get())
    }

    /// As `expire`, by who has the first claim: the orders hear of it.
    #[inline]
    pub(crate) fn expire_at_claim(&self, index: usize) {
        if self.is_timed() {
            self.expire_claimed(index);
        }
    }

    #[cold]
    fn expire_claimed(&self, index: usize) {
        if self.expire(index) {
            self.keeper.report_lowered(index);
        }
    }

    /// Applies the expiry of a node if its time has come, and tells whether it has. The caller sees it unclaimed, or has
    /// the first claim: then a reuse that raises the priority meanwhile makes `replace` fail.
    pub(crate) fn expire(&self, index: usize) -> bool {
        let Some(timing) = self.timing(index) else {
            return false;
        };
        let when = timing.expiry.get();
        if when == 0 || when > self.clock.get() {
            return false;
        }
        let node = &self.tree.nodes[index];
        let priority = node.priority.get();
        if priority > DEFAULT_PRIORITY {
            node.priority.replace(priority, DEFAULT_PRIORITY);
        }
        timing.expiry.replace(when, 0);
        timing.time.raise(when);
        node.used.set(0);
        true
    }
}
