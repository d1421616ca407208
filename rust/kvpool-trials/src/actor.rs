//! One thread's requests, and what it does next.

use crate::choose::Choose;
use crate::pages::content;
use crate::world::{World, Write, TIERS};
use kvpool_core::types::{CacheState, PageCopy, RangeSpec, Retain, RetentionSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, CacheInfo, Core};
use std::thread::ThreadId;

/// Names of the scopes.
pub(crate) const SCOPES: [&[u8]; 2] = [b"a", b"b"];

/// Where a request stands.
#[derive(Debug)]
pub(crate) enum Phase {
    /// A batch claimed it and has not provided it.
    Claimed,
    /// Nothing is under way.
    Idle,
    /// Copies are out, made by this thread.
    Out(Vec<PageCopy>, ThreadId),
}

/// One request.
#[derive(Debug)]
pub(crate) struct Open {
    pub cache: Cache,
    /// Tokens of the prompt; those behind it are what it will generate.
    pub prompt: usize,
    pub tokens: Vec<i32>,
    /// What belongs at each position.
    pub content: Vec<u64>,
    pub phase: Phase,
    pub in_flight: bool,
    /// What a launched step is still going to write.
    pub writes: Vec<Write>,
}

/// What its pages hold is not what belongs there, because a page was lost.
pub(crate) struct Lost;

/// See the module.
#[derive(Debug, Default)]
pub struct Actor {
    pub(crate) open: Vec<Open>,
    /// Whether nobody else does anything: then the answers must be exact.
    pub alone: bool,
    /// Calls of the core that may change something, and probes.
    pub calls: u64,
    /// Positions of reused pages that were compared.
    pub verified: u64,
}

impl Actor {
    /// Without requests.
    pub fn new(alone: bool) -> Self {
        Self {
            alone,
            ..Self::default()
        }
    }

    /// What it holds.
    pub fn caches(&self) -> impl Iterator<Item = &Cache> {
        self.open.iter().map(|one| &one.cache)
    }

    /// Does one thing: one call of the core or a few.
    pub fn step(&mut self, world: &World, choose: &mut dyn Choose) {
        let busy = self.open.len() >= 4;
        match choose.below(32) {
            0..=4 if !busy => self.serve(world, choose),
            5..=6 if !busy => self.create(world, choose),
            7..=8 if !busy => self.batch(world, choose),
            9 => self.evict(world, choose.between(1, 3) as u64),
            10 => self.probe(world, choose),
            11 => self.rare(world, choose),
            12 => self.look(world, choose),
            13 => world.read_events(),
            _ if self.open.is_empty() => self.serve(world, choose),
            14 => self.ask(world, choose),
            15 if world.spec.losses => self.lose(world, choose),
            15..=17 => self.with_one(world, choose, Self::fence),
            18..=20 => self.with_one(world, choose, Self::suspend_or_resume),
            21..=24 => self.with_one(world, choose, Self::resize),
            25..=28 => self.with_one(world, choose, Self::commit),
            _ => {
                let at = choose.below(self.open.len());
                let one = self.open.swap_remove(at);
                self.end_one(world, one);
            }
        }
    }

    /// Closes all.
    pub fn end(&mut self, world: &World) {
        for one in std::mem::take(&mut self.open) {
            self.end_one(world, one);
        }
    }

    pub(crate) fn call<'w>(&mut self, world: &'w World) -> &'w Core {
        self.calls += 1;
        &world.core
    }

    /// Takes one request and does something with it; what comes back goes on.
    fn with_one(
        &mut self,
        world: &World,
        choose: &mut dyn Choose,
        f: impl Fn(&mut Self, &World, &mut dyn Choose, Open) -> Option<Open>,
    ) {
        let at = choose.below(self.open.len());
        let one = self.open.swap_remove(at);
        let one = match one.phase {
            Phase::Idle => f(self, world, choose, one),
            Phase::Claimed => self.provide(world, choose, one),
            Phase::Out(..) => self.report(world, choose, one),
        };
        self.open.extend(one);
    }

    // -- making requests ------------------------------------------------------------------------

    /// A prompt, what will be generated behind it, and its scope.
    pub(crate) fn sequence(world: &World, choose: &mut dyn Choose) -> (usize, Vec<i32>, usize) {
        let most = world.spec.config.max_seq_len.unwrap_or(16) as usize;
        let prompt = choose.below(most - 1);
        let mut tokens: Vec<i32> = (0..prompt)
            .map(|_| choose.below(world.spec.alphabet) as i32)
            .collect();
        // What is generated is alike too.
        let seed = choose.below(4);
        tokens.extend((prompt..most).map(|at| ((at * seed) % world.spec.alphabet) as i32));
        (prompt, tokens, choose.below(SCOPES.len()))
    }

    pub(crate) fn retention(choose: &mut dyn Choose) -> Option<RetentionSpec> {
        if choose.below(4) > 0 {
            return None;
        }
        let retain = |choose: &mut dyn Choose| Retain {
            priority: (choose.below(11) * 10) as u8,
            duration: [f64::INFINITY, 2.0, 30.0][choose.below(3)],
        };
        let start = choose.below(6) as u64;
        let range = RangeSpec {
            start,
            end: [start + 4, u64::MAX][choose.below(2)],
            retain: retain(choose),
        };
        Some(RetentionSpec {
            ranges: vec![range],
            decode: retain(choose),
        })
    }

    pub(crate) fn opened(cache: Cache, prompt: usize, tokens: Vec<i32>, scope: usize, epoch: u64) -> Open {
        Open {
            cache,
            prompt,
            content: content(scope, epoch, &tokens),
            tokens,
            phase: Phase::Idle,
            in_flight: false,
            writes: Vec::new(),
        }
    }

    fn create(&mut self, world: &World, choose: &mut dyn Choose) {
        let (prompt, tokens, scope) = Self::sequence(world, choose);
        let epoch = world.core.epoch(); // may be an old one by the time of the call
        let retention = Self::retention(choose);
        let given = &tokens[..prompt];
        let probed = world.core.probe(given, SCOPES[scope], Some(epoch)).unwrap();
        let cache = self
            .call(world)
            .create(given, SCOPES[scope], Some(epoch), retention)
            .unwrap();
        let reused = world.core.info(&cache).unwrap().reused;
        assert!(
            reused <= (prompt as u64).saturating_sub(1),
            "all of the prompt reused"
        );
        if self.alone {
            // Units that were promised to a batch can make it shorter.
            let promised = self.open.iter().any(|one| matches!(one.phase, Phase::Claimed));
            assert!(
                reused == probed || (promised && reused < probed),
                "probe {probed}, create {reused}"
            );
        }
        self.open.push(Self::opened(cache, prompt, tokens, scope, epoch));
    }

    /// A request up to the commit of its prompt.
    fn serve(&mut self, world: &World, choose: &mut dyn Choose) {
        self.create(world, choose);
        let Some(one) = self.open.pop() else { return };
        let Some(mut one) = self.resume(world, choose, one) else {
            return;
        };
        if matches!(one.phase, Phase::Idle) && Self::info(world, &one).state == CacheState::Active {
            let wanted = (one.prompt as u64).max(Self::info(world, &one).capacity);
            if self.grow(world, &mut one, wanted, None) {
                let have = Self::info(world, &one).committed as usize;
                let to = one.prompt.max(have);
                self.call(world)
                    .commit(&mut one.cache, &one.tokens[have..to])
                    .unwrap();
                return self.keep(world, one);
            }
        }
        self.open.push(one);
    }

    // -- verifying ------------------------------------------------------------------------------

    pub(crate) fn info(world: &World, one: &Open) -> CacheInfo {
        world.core.info(&one.cache).unwrap()
    }

    /// Every final position holds what belongs there.
    pub(crate) fn verify(&mut self, world: &World, one: &Open) -> Result<(), Lost> {
        match world.compare(&one.cache, &one.content) {
            Ok(compared) => self.verified += compared,
            Err(_) if world.core.is_lost(&one.cache) => return Err(Lost),
            Err(wrong) => panic!("{wrong}"),
        }
        Ok(())
    }

    /// Verified and kept, or closed.
    pub(crate) fn keep(&mut self, world: &World, one: Open) {
        match self.verify(world, &one) {
            Ok(()) => self.open.push(one),
            Err(Lost) => self.end_one(world, one),
        }
    }

    // -- the whole ------------------------------------------------------------------------------

    fn evict(&mut self, world: &World, most: u64) {
        let gone = self.call(world).evict(most);
        assert!(gone <= most, "{gone} evicted of {most}");
    }

    fn probe(&mut self, world: &World, choose: &mut dyn Choose) {
        let (prompt, tokens, scope) = Self::sequence(world, choose);
        let found = self
            .call(world)
            .probe(&tokens[..prompt], SCOPES[scope], None)
            .unwrap();
        assert!(found <= (prompt as u64).saturating_sub(1));
    }

    fn rare(&mut self, world: &World, choose: &mut dyn Choose) {
        match choose.below(32) {
            0 => {
                // Another thread may have been faster.
                let _ = self.call(world).set_epoch(world.core.epoch() + 1);
            }
            1..=2 => self.call(world).clear(),
            3..=4 => self.call(world).drop_lost(),
            5 if world.spec.losses => {
                let (tier, pool, slot) = Self::place(world, choose);
                if slot > 0 {
                    world.retire(tier, pool, slot);
                }
            }
            6 if world.spec.losses => {
                // What it held is right all the same; nobody finds it any more.
                let (tier, pool, slot) = Self::place(world, choose);
                if slot > 0 {
                    self.call(world).lose(pool, tier, slot);
                }
            }
            _ => world.core.advance(self.calls as f64 / 10.0),
        }
    }

    /// Any slot; 0 where there is none.
    fn place(world: &World, choose: &mut dyn Choose) -> (Tier, usize, u32) {
        let pool = choose.below(world.spec.config.pools.len());
        let (tier, spec) = (TIERS[choose.below(2)], &world.spec.config.pools[pool]);
        let slots = match tier {
            Tier::Device => spec.num_slots,
            Tier::Host => spec.host_slots,
        };
        let slot = if slots == 0 {
            0
        } else {
            choose.between(1, slots as usize)
        };
        (tier, pool, slot as u32)
    }
}
