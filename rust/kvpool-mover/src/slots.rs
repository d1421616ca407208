//! Two event sets per slot and tier: its last write, and the reads since.
//!
//! Streams are FIFO, so the latest read of each stream stands for all of it: a set is one place per stream.

use crate::checker::Checker;
use crate::hazard::{Access, Hazard};
use crate::memory::Pool;
use crate::types::{Clock, Event, Tier, STREAMS};

const STREAM_BITS: u32 = 3;

/// One cache line per slot.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Events {
    /// Last write: `place << 3 | stream`; 0 for none.
    write: u64,
    /// Reads since, by stream; 0 for none.
    reads: Clock,
    /// Number of the last batch that writes it: finds a slot that is listed twice.
    batch: u64,
}

impl Events {
    fn written(&self) -> Event {
        Event {
            stream: (self.write & ((1 << STREAM_BITS) - 1)) as usize,
            place: self.write >> STREAM_BITS,
        }
    }

    /// What must be done before this access, event by event.
    fn before(&self, access: Access, mut each: impl FnMut(Event, Access)) {
        each(self.written(), Access::Write);
        if access == Access::Write {
            for (stream, &place) in self.reads.iter().enumerate() {
                each(Event { stream, place }, Access::Read);
            }
        }
    }
}

/// Slots of a pool on a tier that one piece of work uses in one way.
#[derive(Debug, Clone, Copy)]
pub struct Slots<'a> {
    /// Pool index.
    pub pool: usize,
    /// Tier.
    pub tier: Tier,
    /// Slots, valid ones.
    pub slots: &'a [i32],
    /// How.
    pub access: Access,
}

/// Event sets of all slots.
#[derive(Debug)]
pub(crate) struct Books {
    events: Vec<[Vec<Events>; 3]>,
    batch: u64,
}

impl Books {
    pub fn new(pools: &[Pool]) -> Self {
        let rows = |pool: &Pool, tier| vec![Events::default(); pool.rows(tier) as usize];
        let tiers = |pool| [Tier::Device, Tier::Host, Tier::Staging].map(|tier| rows(pool, tier));
        Self {
            events: pools.iter().map(tiers).collect(),
            batch: 0,
        }
    }

    /// All slots exist. Changes nothing.
    pub fn exist(&self, pools: &[Pool], slots: Slots<'_>) -> Result<(), String> {
        let Some(tiers) = self.events.get(slots.pool) else {
            return Err(format!("pool: {} is none of {}", slots.pool, self.events.len()));
        };
        let rows = tiers[slots.tier as usize].len();
        match slots.slots.iter().find(|&&slot| slot as u32 as usize >= rows) {
            None => Ok(()),
            Some(slot) => {
                let there = rows
                    .checked_sub(1)
                    .map_or("no slots".to_owned(), |last| format!("slots 0 to {last}"));
                Err(format!(
                    "slot {slot} of pool {:?} is not on the {}: it has {there}",
                    pools[slots.pool].name,
                    slots.tier.name()
                ))
            }
        }
    }

    /// Existing destinations are all different, and no source of the same tier is among them.
    pub fn differ(&mut self, pools: &[Pool], src: Slots<'_>, dst: Slots<'_>) -> Result<(), String> {
        self.batch += 1;
        let events = &mut self.events[dst.pool][dst.tier as usize];
        for &slot in dst.slots {
            let seen = std::mem::replace(&mut events[slot as usize].batch, self.batch);
            if seen == self.batch {
                let name = &pools[dst.pool].name;
                return Err(format!("dst: slot {slot} of pool {name:?} is listed twice"));
            }
        }
        if src.tier != dst.tier {
            return Ok(());
        }
        match src
            .slots
            .iter()
            .find(|&&slot| events[slot as usize].batch == self.batch)
        {
            None => Ok(()),
            Some(slot) => Err(format!(
                "src: slot {slot} of pool {:?} is a destination of the same batch",
                pools[src.pool].name
            )),
        }
    }

    /// Adds to `waits` what work on `stream` must wait for before it uses these slots. `plant`: the kind of wait that a test
    /// leaves out.
    pub fn waits(&self, stream: usize, slots: Slots<'_>, plant: Option<Hazard>, waits: &mut Clock) {
        let events = &self.events[slots.pool][slots.tier as usize];
        if let Some(plant) = plant {
            for &slot in slots.slots {
                events[slot as usize].before(slots.access, |event, before| {
                    if Hazard::of(stream, slots.access, slots.tier, event.stream, before) != plant {
                        waits[event.stream] = waits[event.stream].max(event.place);
                    }
                });
            }
            return;
        }
        for &slot in slots.slots {
            let events = &events[slot as usize];
            let written = events.written();
            waits[written.stream] = waits[written.stream].max(written.place);
            if slots.access == Access::Write {
                crate::types::join(waits, &events.reads);
            }
        }
    }

    /// Has the checker look at every pair that this work makes with what is in the books.
    pub fn check(&self, work: Event, slots: Slots<'_>, checker: &mut Checker) {
        let events = &self.events[slots.pool][slots.tier as usize];
        for &slot in slots.slots {
            events[slot as usize].before(slots.access, |event, before| {
                checker.pair(
                    work,
                    slots.access,
                    event,
                    before,
                    slots.pool,
                    slots.tier,
                    slot as u32,
                );
            });
        }
    }

    /// Work that uses these slots is enqueued.
    pub fn mark(&mut self, work: Event, slots: Slots<'_>) {
        let events = &mut self.events[slots.pool][slots.tier as usize];
        for &slot in slots.slots {
            let events = &mut events[slot as usize];
            match slots.access {
                Access::Read => events.reads[work.stream] = work.place,
                Access::Write => {
                    events.write = work.place << STREAM_BITS | work.stream as u64;
                    events.reads = [0; STREAMS];
                }
            }
        }
    }
}

const _: () = assert!(STREAMS <= 1 << STREAM_BITS && std::mem::size_of::<Events>() == 64);
