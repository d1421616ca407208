//! What monitors and schedulers ask.

use crate::actor::{Actor, Open, Phase, SCOPES};
use crate::choose::Choose;
use crate::world::{World, TIERS};
use kvpool_core::types::CacheState;

impl Actor {
    /// Questions that change nothing, whoever else is in a call.
    pub(crate) fn look(&mut self, world: &World, choose: &mut dyn Choose) {
        for tier in TIERS {
            for books in world.core.books(tier) {
                let sum = books.free + books.active + books.held + books.cached + books.fenced;
                assert_eq!(sum, books.slots, "free + active + held + cached + fenced");
            }
        }
        let counters = world.core.counters();
        if self.alone {
            assert!(counters.reused_tokens <= counters.prompt_tokens);
        }
        for ((available, _), pool) in world.core.pressure().into_iter().zip(&world.spec.config.pools) {
            assert!(
                available <= pool.num_slots,
                "{available} available of {}",
                pool.num_slots
            );
        }
        world.core.stuck();
        let tokens = world.core.available_tokens();
        assert!(tokens <= world.spec.config.max_seq_len.unwrap_or(u64::MAX));
        if self.alone && world.spec.faults == 0 && choose.one_in(4) {
            self.take_all(world, tokens);
        }
        let (prompt, tokens, scope) = Self::sequence(world, choose);
        let keys = world
            .core
            .block_keys(&tokens[..prompt], SCOPES[scope], None)
            .unwrap();
        assert_eq!(keys.len(), prompt / world.t());
    }

    /// `available_tokens` is the largest capacity that one new unmatched cache can get.
    fn take_all(&mut self, world: &World, tokens: u64) {
        let mut cache = self.call(world).create(&[], SCOPES[0], None, None).unwrap();
        assert!(self.call(world).resume(&mut cache, &mut Vec::new()).unwrap());
        if tokens < world.spec.config.max_seq_len.unwrap_or(u64::MAX) {
            let more = self.call(world).resize(&mut cache, tokens + 1, None).unwrap();
            assert!(!more, "more than {tokens} available tokens");
        }
        let all = self.call(world).resize(&mut cache, tokens, None).unwrap();
        assert!(all, "less than {tokens} available tokens");
        self.call(world).close(&mut cache).unwrap();
    }

    /// Questions about one request; what is said to fit does fit.
    pub(crate) fn ask(&mut self, world: &World, choose: &mut dyn Choose) {
        let at = choose.below(self.open.len());
        let one = self.open.swap_remove(at);
        let one = self.asked(world, choose, one);
        self.open.extend(one);
    }

    fn asked(&mut self, world: &World, choose: &mut dyn Choose, mut one: Open) -> Option<Open> {
        let core = &world.core;
        assert!(core.can_provide(&one.cache, 0).is_ok() != matches!(one.phase, Phase::Out(..)));
        if matches!(one.phase, Phase::Out(..)) {
            assert!(core.suspend(&mut one.cache).is_err() && core.commit(&mut one.cache, &[]).is_err());
            return Some(one);
        }
        let pools = core.num_pools();
        assert_eq!(core.is_in_flight(&one.cache), one.in_flight);
        assert_eq!(core.is_in_work(&one.cache), matches!(one.phase, Phase::Claimed));
        assert_eq!(core.can_end(&one.cache, 1).is_ok(), one.in_flight);
        for (pool, (here, own)) in core.holds(&one.cache).unwrap().into_iter().enumerate() {
            assert!(
                own <= here && here <= core.held(&one.cache, pool),
                "{own} own of {here} here"
            );
        }
        core.costs(&one.cache);
        if Self::info(world, &one).state == CacheState::Active {
            core.below(&one.cache).unwrap();
        }
        let (tokens, unit) = (choose.below(20) as u64, choose.below(4) as u64);
        let leave = vec![choose.below(3) as u32; pools];
        let found = core.fitting(&mut one.cache, tokens, unit, &leave).unwrap();
        assert!(found <= tokens, "{found} of {tokens} fit");
        let exact = self.alone && world.spec.faults == 0;
        let info = Self::info(world, &one);
        let most = tokens.min(world.spec.config.max_seq_len.unwrap_or(u64::MAX) - info.history);
        let lacking = core.lacking(&mut one.cache, most, &leave).unwrap();
        if exact && most > 0 && unit > 0 {
            let fits = lacking.iter().all(|&lacks| lacks == 0);
            assert_eq!(fits, found == most, "{found} of {most} fit, lacking {lacking:?}");
            if found < most && leave.iter().all(|&slots| slots == 0) {
                let more = info.history + (found + unit).min(most);
                let refused = self.call(world).provide(&mut one.cache, more, &mut Vec::new());
                assert!(
                    !refused.unwrap(),
                    "{found} tokens fit, and there is room for more"
                );
            }
        }
        if found > 0 && choose.one_in(2) {
            let mut copies = Vec::new();
            let provided = self
                .call(world)
                .provide(&mut one.cache, info.history + found, &mut copies)
                .unwrap();
            assert!(provided || !exact, "{found} tokens fit, and were refused");
            if provided {
                return self.take_out(world, choose, one, copies);
            }
        }
        Some(one)
    }
}
