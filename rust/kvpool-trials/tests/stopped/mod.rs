//! Worlds in which a thread is stopped, and requests in them.

pub mod cases;
pub mod others;

use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::Cache;
use kvpool_trials::pages::content;
use kvpool_trials::{Spec, World};

/// What a world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub tiers: u32,
    pub windowed: bool,
    pub cached: Cached,
}

/// What is in the tree to begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// Some sequences, and much room beside them.
    Some,
    /// All slots, each block a leaf.
    Leaves,
    /// All slots, one sequence.
    Chain,
}

const fn kind(tiers: u32, windowed: bool, cached: Cached) -> Kind {
    Kind {
        tiers,
        windowed,
        cached,
    }
}

/// Room for all, then hardly any.
pub const KINDS: [Kind; 7] = [
    kind(1, false, Cached::Some),
    kind(1, true, Cached::Some),
    kind(2, false, Cached::Some),
    kind(2, true, Cached::Some),
    kind(1, false, Cached::Leaves),
    kind(1, false, Cached::Chain),
    kind(2, false, Cached::Leaves),
];

impl Kind {
    pub fn roomy(self) -> bool {
        self.cached == Cached::Some
    }

    /// Two tokens per block, nothing cached but what `fill` puts there.
    pub fn world(self) -> World {
        let slots = if self.roomy() { 48 } else { 6 };
        let pool = |window| PoolSpec {
            name: "p".into(),
            num_slots: slots,
            host_slots: (self.tiers - 1) * slots,
            window,
            sink_tokens: 0,
        };
        let mut pools = vec![pool(None)];
        if self.windowed {
            pools.push(pool(Some(5)));
        }
        let config = CoreConfig {
            tokens_per_block: 2,
            pools,
            max_blocks: 2 * slots,
            max_seq_len: Some(24),
            partial_reuse: true,
            hash_seed: 1,
            policy: PolicyKind::Lru,
            offload_min_priority: 30,
            collide: false,
        };
        let world = World::new(Spec {
            config,
            alphabet: 3,
            faults: 0,
            losses: false,
        });
        match self.cached {
            Cached::Some => {
                for tokens in [shared(), branch(), sequence(300, 4)] {
                    serve(&world, &tokens);
                }
                if self.tiers == 2 {
                    assert_eq!(world.core.evict(3), 3);
                }
            }
            Cached::Leaves => (1..=6).for_each(|first| serve(&world, &sequence(1000 * first, 2))),
            Cached::Chain => serve(&world, &sequence(1000, 12)),
        }
        world
    }
}

/// Tokens that no other sequence has.
pub fn sequence(first: i32, count: usize) -> Vec<i32> {
    (first..).take(count).collect()
}

/// Cached in every roomy world.
pub fn shared() -> Vec<i32> {
    sequence(100, 12)
}

/// Cached too: the same first blocks, then others.
pub fn branch() -> Vec<i32> {
    [sequence(100, 4), sequence(200, 4)].concat()
}

/// A request of one thread.
#[derive(Debug)]
pub struct Request {
    pub cache: Cache,
    pub tokens: Vec<i32>,
    pub content: Vec<u64>,
}

impl Request {
    pub fn new(cache: Cache, tokens: &[i32]) -> Self {
        Self {
            cache,
            content: content(0, 0, tokens),
            tokens: tokens.to_vec(),
        }
    }

    /// All of `tokens` is the prompt.
    pub fn create(world: &World, tokens: &[i32]) -> Self {
        Self::new(world.core.create(tokens, b"", None, None).unwrap(), tokens)
    }

    pub fn committed(&self, world: &World) -> usize {
        world.core.info(&self.cache).unwrap().committed as usize
    }

    /// The copies of a plan are made and reported, and all that is there is right. False: it was refused.
    pub fn resume(&mut self, world: &World) -> bool {
        let mut copies = Vec::new();
        let resumed = world.core.resume(&mut self.cache, &mut copies).unwrap();
        if resumed {
            self.land(world, &copies);
        }
        resumed
    }

    pub fn land(&mut self, world: &World, copies: &[kvpool_core::types::PageCopy]) {
        world.make(copies);
        world.core.copies_done(&mut self.cache);
        self.verify(world);
        world.compute(&self.cache, &self.content);
    }

    pub fn verify(&self, world: &World) {
        if let Err(wrong) = world.compare(&self.cache, &self.content) {
            panic!("{wrong}");
        }
    }

    pub fn grow(&mut self, world: &World, capacity: usize) -> bool {
        let grown = world.core.resize(&mut self.cache, capacity as u64, None).unwrap();
        if grown {
            world.compute(&self.cache, &self.content);
        }
        grown
    }

    pub fn commit(&mut self, world: &World, to: usize) {
        let from = self.committed(world);
        world
            .core
            .commit(&mut self.cache, &self.tokens[from..to])
            .unwrap();
        self.verify(world);
    }

    pub fn close(mut self, world: &World) {
        assert!(world.core.close(&mut self.cache).unwrap());
    }
}

/// ACTIVE with room for all its tokens.
pub fn ready(world: &World, tokens: &[i32]) -> Request {
    let mut one = Request::create(world, tokens);
    assert!(
        one.resume(world) && one.grow(world, tokens.len()),
        "no room to begin with"
    );
    one
}

pub fn serve(world: &World, tokens: &[i32]) {
    let mut one = ready(world, tokens);
    one.commit(world, tokens.len());
    one.close(world);
}

/// SUSPENDED, on blocks of its own.
pub fn suspended(world: &World) -> Request {
    let tokens = sequence(800, 6);
    let mut one = ready(world, &tokens);
    one.commit(world, 5);
    world.core.suspend(&mut one.cache).unwrap();
    one
}
