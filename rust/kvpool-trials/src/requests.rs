//! What is done with one request: resume and suspend, resize, commit, steps, loss, close.

use crate::actor::{Actor, Lost, Open, Phase};
use crate::choose::Choose;
use crate::world::World;
use kvpool_core::types::{CacheState, PageCopy};
use kvpool_core::words::Tier;
use kvpool_core::CacheInfo;

impl Actor {
    pub(crate) fn suspend_or_resume(
        &mut self,
        world: &World,
        choose: &mut dyn Choose,
        mut one: Open,
    ) -> Option<Open> {
        if Self::info(world, &one).state == CacheState::Suspended {
            return self.resume(world, choose, one);
        }
        self.call(world).suspend(&mut one.cache).unwrap();
        Some(one)
    }

    /// ACTIVE with its pages verified, with copies out, or still SUSPENDED; `None`: closed.
    pub(crate) fn resume(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let mut copies = Vec::new();
        if !self.call(world).resume(&mut one.cache, &mut copies).unwrap() {
            // A resize that was broken off may have left the history ahead of the capacity: then it needs more.
            let info = Self::info(world, &one);
            let short = info.history > info.capacity;
            assert!(
                world.spec.tiered() || short,
                "one tier, and no room for what is there"
            );
            return Some(one);
        }
        if copies.is_empty() {
            return self.arrived(world, one);
        }
        self.take_out(world, choose, one, copies)
    }

    /// Copies are out; mostly they are reported at once.
    pub(crate) fn take_out(
        &mut self,
        world: &World,
        choose: &mut dyn Choose,
        mut one: Open,
        copies: Vec<PageCopy>,
    ) -> Option<Open> {
        one.phase = Phase::Out(copies, std::thread::current().id());
        if choose.one_in(3) {
            return Some(one);
        }
        self.report(world, choose, one)
    }

    /// The copies that are out are made, or they failed, or nobody waits for them.
    pub(crate) fn report(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let Phase::Out(copies, by) = std::mem::replace(&mut one.phase, Phase::Idle) else {
            return Some(one);
        };
        let fate = choose.below(12);
        if fate == 0 && by == std::thread::current().id() {
            self.end_one(world, one);
            return None;
        }
        world.make(&copies);
        // A source that was lost meanwhile gave who knows what.
        if fate == 1 || world.core.is_lost(&one.cache) {
            self.call(world).copies_failed(&mut one.cache);
            self.end_one(world, one);
            return None;
        }
        self.call(world).copies_done(&mut one.cache);
        self.arrived(world, one)
    }

    /// ACTIVE from now on: all that was there is right, and what is not final is computed.
    pub(crate) fn arrived(&mut self, world: &World, mut one: Open) -> Option<Open> {
        one.phase = Phase::Idle;
        if let Err(Lost) = self.verify(world, &one) {
            self.end_one(world, one);
            return None;
        }
        world.compute(&one.cache, &one.content);
        Some(one)
    }

    /// Decode steps, a chunk, a history that runs ahead, or less capacity.
    pub(crate) fn resize(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let info = Self::info(world, &one);
        let most = world.spec.config.max_seq_len.unwrap_or(16);
        let by = choose.below(8) as u64;
        let shrink = choose.one_in(5);
        let capacity = match shrink {
            true => info.capacity.saturating_sub(by),
            false => info.capacity + by,
        };
        // Once a resize was refused for want of a promised slot the history may be ahead of the capacity.
        let capacity = capacity.max(info.history).min(most);
        let ahead = choose
            .one_in(4)
            .then(|| (info.history + choose.below(4) as u64).min(capacity));
        if info.state != CacheState::Active {
            assert!(world.core.resize(&mut one.cache, capacity, ahead).is_err());
            return Some(one);
        }
        self.grow(world, &mut one, capacity, ahead);
        Some(one)
    }

    /// Resizes an ACTIVE cache and computes what has storage.
    pub(crate) fn grow(
        &mut self,
        world: &World,
        one: &mut Open,
        capacity: u64,
        history: Option<u64>,
    ) -> bool {
        let before = Self::info(world, one);
        let books = self.alone.then(|| world.core.books(Tier::Device));
        let grown = self
            .call(world)
            .resize(&mut one.cache, capacity, history)
            .unwrap();
        let after = Self::info(world, one);
        if grown {
            let wanted = (capacity, history.unwrap_or(before.history));
            assert_eq!((after.capacity, after.history), wanted, "resize");
            world.compute(&one.cache, &one.content);
        } else if self.alone {
            let of = |info: &CacheInfo| (info.capacity, info.history, info.committed);
            assert_eq!(of(&after), of(&before), "a refused resize changed the cache");
            // On two tiers a copy down that failed may have been part of the need.
            if !world.spec.tiered() {
                assert_eq!(
                    Some(world.core.books(Tier::Device)),
                    books,
                    "a refused resize changed the books"
                );
            }
        }
        grown
    }

    pub(crate) fn commit(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let info = Self::info(world, &one);
        let from = info.committed as usize;
        let room = info.capacity as usize - from;
        let to = from + choose.below(9).min(room);
        if info.state != CacheState::Active {
            assert!(world.core.commit(&mut one.cache, &one.tokens[from..to]).is_err());
            return Some(one);
        }
        self.call(world)
            .commit(&mut one.cache, &one.tokens[from..to])
            .unwrap();
        assert_eq!(Self::info(world, &one).committed, to as u64);
        self.keep(world, one);
        None
    }

    /// A step is launched, or it ends: until then it may write what was not final when it began. In pools with a window the
    /// order of slots that went stale meanwhile is the mover's.
    pub(crate) fn fence(&mut self, world: &World, _: &mut dyn Choose, mut one: Open) -> Option<Open> {
        if one.in_flight {
            let closed = self.land(world, &mut one);
            assert!(!closed, "released, though nobody closed it");
        } else if Self::info(world, &one).state == CacheState::Active {
            one.writes = world.writes(&one.cache, &one.content, |pool| {
                world.spec.config.pools[pool].window.is_none()
            });
            self.call(world).step_begin(&mut one.cache, 1).unwrap();
            one.in_flight = true;
        }
        Some(one)
    }

    fn land(&mut self, world: &World, one: &mut Open) -> bool {
        for (pool, slot, at, value) in one.writes.drain(..) {
            world.pages.write(Tier::Device, pool, slot, at, value);
        }
        one.in_flight = false;
        self.call(world).step_end(&mut one.cache, 1).unwrap()
    }

    /// Closes, in flight or not.
    pub(crate) fn end_one(&mut self, world: &World, mut one: Open) {
        if let Phase::Out(copies, by) = &one.phase {
            if *by != std::thread::current().id() {
                world.make(copies);
                self.call(world).copies_done(&mut one.cache);
            }
        }
        let over = self.call(world).close(&mut one.cache).unwrap();
        assert_eq!(over, !one.in_flight, "close");
        if one.in_flight {
            assert!(
                self.land(world, &mut one),
                "closed in flight, not released at the end"
            );
        }
    }

    /// A page of one's own turns out to be bad: whoever has it learns that before it can read it.
    pub(crate) fn lose(&mut self, world: &World, choose: &mut dyn Choose) {
        let at = choose.below(self.open.len());
        let one = self.open.swap_remove(at);
        let idle = matches!(one.phase, Phase::Idle) && !one.in_flight;
        if !idle || Self::info(world, &one).state != CacheState::Active {
            return self.open.push(one);
        }
        let pool = choose.below(world.spec.config.pools.len());
        let table = world.core.table(&one.cache, pool).unwrap().to_vec();
        let Some(&slot) = table
            .get(choose.below(table.len().max(1)))
            .filter(|&&slot| slot != 0)
        else {
            return self.open.push(one);
        };
        let bad = self.call(world).lose(pool, Tier::Device, slot);
        assert!(
            world.core.has_bad(&one.cache, &bad),
            "who has the page is not told"
        );
        assert!(
            bad.node.is_none() || world.core.is_lost(&one.cache),
            "lost, and its claimant is not"
        );
        for position in 0..world.t() {
            world.pages.write(Tier::Device, pool, slot, position, u64::MAX);
        }
        self.end_one(world, one);
    }
}
