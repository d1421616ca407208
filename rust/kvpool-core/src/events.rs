//! What happened to the tree, for whoever wants to follow it: a bounded ring that never blocks.
//!
//! ```text
//! slot state:  [ lap 48 | pool 11 | host 1 | has_parent 1 | kind 2 | writing 1 ]      lap 0: never written
//! ```
//!
//! Writers take the next number and the slot that belongs to it (the lap is which of that slot's numbers it is); a slot
//! that somebody still writes, or that a later number has, is left alone and the event is lost. One reader at a time goes
//! from number to number: what was overwritten or lost shows as a gap in the numbers.
//!
//! push: wait-free. drain: lock-free for one reader; a second one meanwhile gets nothing.

use crate::sync::{fence, weak, AtomicU64, Counter, Field, Ordering, Sole, Weak};
use crate::words::Tier;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// A page of a block is in the tree.
    Stored,
    /// A page of a block left the tree.
    Removed,
    /// A page of a block changed its tier.
    Moved,
}

/// One page of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// From 1; a gap means that events were lost.
    pub number: u64,
    /// What happened.
    pub kind: EventKind,
    /// Tier on which the page is, of a removed one where it was.
    pub tier: Tier,
    /// In which pool.
    pub pool: u32,
    /// Key of the block: the hash of its whole prefix and scope.
    pub key: u64,
    /// Key of the block before it, if it is not the first and was stored.
    pub parent: Option<u64>,
}

const WRITING: u64 = 1;
const KIND_SHIFT: u32 = 1;
const KIND: u64 = 3;
const HAS_PARENT: u64 = 8;
const HOST: u64 = 16;
const POOL_SHIFT: u32 = 5;
const LAP_SHIFT: u32 = 16;
const LAP: u64 = u64::MAX << LAP_SHIFT;

/// Pools that an event can tell apart.
pub const MAX_POOLS: usize = 1 << (LAP_SHIFT - POOL_SHIFT);

#[derive(Debug)]
struct Slot {
    state: AtomicU64,
    key: Field,
    parent: Field,
}

/// See the module.
#[derive(Debug)]
pub struct Events {
    slots: Vec<Slot>,
    /// Bits of a number that tell its slot, and how many.
    mask: usize,
    bits: u32,
    last: Counter,
    /// The next number to be read.
    reader: Sole<u64>,
}

impl Events {
    /// For so many unread events, a power of two; with 0 nothing is kept.
    pub fn new(capacity: usize) -> Self {
        assert!(
            capacity == 0 || capacity.is_power_of_two(),
            "capacity: {capacity}"
        );
        let slot = |_| Slot {
            state: AtomicU64::new(0),
            key: Field::new(0),
            parent: Field::new(0),
        };
        Self {
            slots: (0..capacity).map(slot).collect(),
            mask: capacity.saturating_sub(1),
            bits: capacity.trailing_zeros() % usize::BITS,
            last: Counter::default(),
            reader: Sole::new(1),
        }
    }

    /// Adds an event. Wait-free.
    pub fn push(&self, kind: EventKind, tier: Tier, pool: usize, key: u64, parent: Option<u64>) {
        if !self.slots.is_empty() {
            self.put(self.last.next(), kind, tier, pool, key, parent);
        }
    }

    /// The first of the next `n` numbers, each for one `put`. Wait-free.
    pub fn reserve(&self, n: usize) -> u64 {
        self.last.next_run(n as u64)
    }

    /// Writes the event of a number that the caller has. Wait-free.
    pub fn put(&self, number: u64, kind: EventKind, tier: Tier, pool: usize, key: u64, parent: Option<u64>) {
        let Some(slot) = self.slots.get(number as usize & self.mask) else {
            return;
        };
        let lap = self.lap(number);
        let before = slot.state.load(Ordering::Relaxed); // Relaxed: the CAS below decides
        if before & WRITING != 0 || before & LAP > lap {
            return;
        }
        // Acquire: partner the store below: the former writer's fields come before ours. Relaxed on failure: the event is lost.
        let taken = slot
            .state
            .compare_exchange(before, lap | WRITING, Ordering::Acquire, Ordering::Relaxed);
        if taken.is_err() {
            return;
        }
        fence(Ordering::Release); // Release: partner the fence in `read`: who sees a field of ours sees that we write
        let has_parent = if parent.is_some() { HAS_PARENT } else { 0 };
        let host = if tier == Tier::Host { HOST } else { 0 };
        let what = (pool as u64) << POOL_SHIFT | host | has_parent | (kind as u64) << KIND_SHIFT;
        slot.key.set(key);
        slot.parent.set(parent.unwrap_or(0));
        slot.state.store(lap | what, Ordering::Release); // Release: partner the load in `read`: the fields are there
    }

    /// Appends what happened since the last call, at most `most` events, in the order of their numbers.
    pub fn drain(&self, most: usize, into: &mut Vec<Event>) {
        let Some(mut next) = self.reader.enter() else {
            return;
        };
        let last = self.last.get();
        let oldest = (last + 1).saturating_sub(self.slots.len() as u64);
        *next = (*next).max(oldest);
        let full = into.len().saturating_add(most);
        while *next <= last && into.len() < full {
            match self.read(*next) {
                Read::Event(event) => into.push(event),
                Read::Lost => {}
                Read::NotYet => return,
            }
            *next += 1;
        }
    }

    /// The lap of a number, where the state of its slot has it.
    fn lap(&self, number: u64) -> u64 {
        ((number >> self.bits) + 1) << LAP_SHIFT
    }

    fn read(&self, number: u64) -> Read {
        let slot = &self.slots[number as usize & self.mask];
        let state = slot.state.load(Ordering::Acquire); // Acquire: partner the store in `push`
        let lap = self.lap(number);
        if state & LAP > lap {
            return Read::Lost;
        }
        if state & LAP < lap || state & WRITING != 0 {
            // A writer on its way, unless it gave up: then a younger event stands already.
            let gave_up = state & LAP < lap && self.last.get() >= number + self.slots.len() as u64 / 2;
            return if gave_up { Read::Lost } else { Read::NotYet };
        }
        let (key, parent) = (slot.key.get(), slot.parent.get());
        fence(Ordering::Acquire); // Acquire: partner the fence in `push`
        let again = slot.state.load(Ordering::Relaxed); // Relaxed: ordered by the fence above
        if again != state && !weak(Weak::EventAgain) {
            return Read::Lost;
        }
        Read::Event(Event {
            number,
            kind: match state >> KIND_SHIFT & KIND {
                0 => EventKind::Stored,
                1 => EventKind::Removed,
                _ => EventKind::Moved,
            },
            tier: if state & HOST == 0 {
                Tier::Device
            } else {
                Tier::Host
            },
            pool: (state >> POOL_SHIFT) as u32 % MAX_POOLS as u32,
            key,
            parent: (state & HAS_PARENT != 0).then_some(parent),
        })
    }
}

enum Read {
    Event(Event),
    Lost,
    NotYet,
}

#[cfg(all(test, not(any(kvpool_loom, kvpool_shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_in_order_and_a_gap_shows() {
        let events = Events::new(4);
        let mut out = Vec::new();
        for key in 1..=3 {
            events.push(
                EventKind::Stored,
                Tier::Device,
                7,
                key,
                (key > 1).then_some(key - 1),
            );
        }
        events.drain(2, &mut out);
        events.drain(9, &mut out);
        let seen: Vec<_> = out.iter().map(|e| (e.number, e.pool, e.key, e.parent)).collect();
        assert_eq!(seen, [(1, 7, 1, None), (2, 7, 2, Some(1)), (3, 7, 3, Some(2))]);
        for key in 4..=10 {
            events.push(EventKind::Removed, Tier::Device, 0, key, None);
        }
        out.clear();
        events.drain(9, &mut out);
        let numbers: Vec<_> = out.iter().map(|e| e.number).collect();
        assert_eq!(numbers, [7, 8, 9, 10]);
        assert!(out
            .iter()
            .all(|e| e.kind == EventKind::Removed && e.key == e.number));
        events.drain(9, &mut out);
        assert_eq!(out.len(), 4);
    }

    /// Each value of each part, through several laps.
    #[test]
    fn parts_of_an_event_do_not_touch_each_other() {
        let events = Events::new(2);
        let mut number = 0;
        for kind in [EventKind::Stored, EventKind::Removed, EventKind::Moved] {
            for tier in [Tier::Device, Tier::Host] {
                for pool in [0, 1, MAX_POOLS - 1] {
                    for parent in [None, Some(0), Some(u64::MAX)] {
                        number += 1;
                        events.push(kind, tier, pool, !number, parent);
                        let mut out = Vec::new();
                        events.drain(9, &mut out);
                        let whole = Event {
                            number,
                            kind,
                            tier,
                            pool: pool as u32,
                            key: !number,
                            parent,
                        };
                        assert_eq!(out, [whole]);
                    }
                }
            }
        }
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let events = Events::new(0);
        events.push(EventKind::Stored, Tier::Device, 0, 1, None);
        let mut out = Vec::new();
        events.drain(9, &mut out);
        assert!(out.is_empty());
    }
}
