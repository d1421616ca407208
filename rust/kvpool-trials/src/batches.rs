//! Batches: all claims first, then slots.

use crate::actor::{Actor, Open, Phase, SCOPES};
use crate::choose::Choose;
use crate::world::World;
use kvpool_core::{Cache, Claim};

impl Actor {
    /// Some requests are claimed; they are provided now, together or one by one, or later.
    pub(crate) fn batch(&mut self, world: &World, choose: &mut dyn Choose) {
        let epoch = world.core.epoch();
        let count = choose.between(1, 3);
        let wanted: Vec<(usize, Vec<i32>, usize)> =
            (0..count).map(|_| Self::sequence(world, choose)).collect();
        let mut claims = Vec::new();
        for (prompt, tokens, scope) in &wanted {
            claims.push(Claim {
                tokens: tokens[..*prompt].into(),
                scope: SCOPES[*scope],
                epoch: Some(epoch),
                retention: Self::retention(choose),
                least: [None, Some(1)][choose.below(2)],
                most: [None, None, Some(4)][choose.below(3)],
            });
        }
        let caches: Vec<Option<Cache>> = if choose.one_in(3) {
            let unit = [None, Some(2)][choose.below(2)];
            let budget = choose.between(1, 20) as u64;
            let starts = self.call(world).claim_starts(claims, unit, budget).unwrap();
            starts.into_iter().map(Result::ok).collect()
        } else {
            self.call(world).claim_all(claims, choose.below(4) > 0).unwrap()
        };
        let mut claimed = Vec::new();
        for (cache, (prompt, tokens, scope)) in caches.into_iter().zip(wanted) {
            let Some(cache) = cache else { continue };
            let mut one = Self::opened(cache, prompt, tokens, scope, epoch);
            one.phase = Phase::Claimed;
            claimed.push(one);
        }
        match choose.below(4) {
            0 => self.open.extend(claimed),
            1 => self.provide_together(world, choose, claimed),
            _ => {
                for one in claimed {
                    let one = self.provide(world, choose, one);
                    self.open.extend(one);
                }
            }
        }
    }

    /// A claim of a batch gets slots, or is given back.
    pub(crate) fn provide(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let wanted = Self::wanted(choose, &one);
        let mut copies = Vec::new();
        if choose.one_in(8)
            || !self
                .call(world)
                .provide(&mut one.cache, wanted, &mut copies)
                .unwrap()
        {
            self.end_one(world, one);
            return None;
        }
        self.take_out(world, choose, one, copies)
    }

    fn wanted(choose: &mut dyn Choose, one: &Open) -> u64 {
        match choose.below(3) {
            0 => one.prompt as u64 / 2,
            _ => one.prompt as u64,
        }
    }

    /// One plan for all: what one brings up the next one needs not.
    fn provide_together(&mut self, world: &World, choose: &mut dyn Choose, claimed: Vec<Open>) {
        let (mut copies, mut provided) = (Vec::new(), Vec::new());
        for mut one in claimed {
            let wanted = Self::wanted(choose, &one);
            if self
                .call(world)
                .provide(&mut one.cache, wanted, &mut copies)
                .unwrap()
            {
                provided.push(one);
            } else {
                self.end_one(world, one);
            }
        }
        let failed = choose.one_in(6);
        if !failed {
            world.make(&copies);
        }
        if failed || provided.iter().any(|one| world.core.is_lost(&one.cache)) {
            for mut one in provided {
                self.call(world).copies_failed(&mut one.cache);
                self.end_one(world, one);
            }
            return;
        }
        for one in &mut provided {
            self.call(world).copies_done(&mut one.cache);
        }
        for one in provided {
            let one = self.arrived(world, one);
            self.open.extend(one);
        }
    }
}
