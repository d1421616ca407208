//! Whole runs: many threads with a seed, or one thread with bytes.

use crate::{Actor, Bytes, Choose, Rng, Spec, World};
use std::sync::Arc;

/// Calls of a thread between two quiet points.
const ROUND: u64 = 2_000;
/// Calls of all threads in one world.
const WORLD: u64 = 100_000;

/// What was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Calls of the core that may change something, and probes.
    pub calls: u64,
    /// Positions of reused pages that were compared.
    pub verified: u64,
    /// Times at which all threads stood still and all books were recomputed.
    pub quiet: u64,
    /// Pages that were copied down.
    pub copies: u64,
    /// Worlds, and those whose events were all read.
    pub worlds: u64,
    /// See `worlds`.
    pub whole: u64,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.verified += other.verified;
        self.quiet += other.quiet;
        self.copies += other.copies;
        self.worlds += other.worlds;
        self.whole += other.whole;
    }
}

/// Threads that do everything at once in the world of a seed, until so many calls are made: no wrong byte, no lost page,
/// all books whole at every quiet point. Panics where something does not hold.
pub fn threads(seed: u64, threads: usize, calls: u64) -> Tally {
    let world = World::new(Spec::choose(&mut Rng::new(seed)));
    let mut actors: Vec<(Actor, Rng)> = (0..threads as u64)
        .map(|at| (Actor::new(threads == 1), Rng::new(seed ^ (at + 1) << 40)))
        .collect();
    let mut tally = Tally {
        worlds: 1,
        ..Tally::default()
    };
    let made = |actors: &[(Actor, Rng)]| actors.iter().map(|(actor, _)| actor.calls).sum::<u64>();
    while made(&actors) < calls {
        let round = (calls - made(&actors)).div_ceil(threads as u64).min(ROUND);
        together(&mut actors, |actor, rng| {
            let until = actor.calls + round;
            while actor.calls < until {
                actor.step(&world, rng);
            }
        });
        world.check(actors.iter().flat_map(|(actor, _)| actor.caches()));
        tally.quiet += 1;
    }
    together(&mut actors, |actor, _| actor.end(&world));
    tally.whole = u64::from(world.end());
    tally.calls = made(&actors);
    tally.verified = actors.iter().map(|(actor, _)| actor.verified).sum();
    tally.copies = world.copies();
    tally
}

fn together(actors: &mut [(Actor, Rng)], f: impl Fn(&mut Actor, &mut Rng) + Sync) {
    std::thread::scope(|scope| {
        let f = &f;
        let all: Vec<_> = actors
            .iter_mut()
            .map(|(actor, rng)| scope.spawn(move || f(actor, rng)))
            .collect();
        for thread in all {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// World after world, with seeds from `seed` on, until so many calls are made. `progress` is told after each.
pub fn soak(seed: u64, threads: usize, calls: u64, mut progress: impl FnMut(u64, &Tally)) -> Tally {
    let mut tally = Tally::default();
    let mut at = seed;
    while tally.calls < calls {
        let left = (calls - tally.calls).min(WORLD);
        tally.add(self::threads(at, threads, left));
        progress(at, &tally);
        at += 1;
    }
    tally
}

/// One thread does what the bytes say: first what the world is like, then what happens in it. Everything is checked after
/// every step. In the middle of each copy down a second actor does something, if the bytes want that.
pub fn bytes(bytes: &[u8]) -> Tally {
    let mut choose = Bytes::new(bytes);
    let world = Arc::new(World::new(Spec::choose(&mut choose)));
    let meddles = world.spec.tiered() && choose.below(2) == 1;
    let other = Arc::new(std::sync::Mutex::new(Actor::new(false)));
    if meddles {
        let (there, other, mut choose) = (Arc::downgrade(&world), other.clone(), choose.clone());
        let meddle = move || {
            if let (Some(world), Ok(mut other)) = (there.upgrade(), other.try_lock()) {
                if !choose.is_over() && choose.below(2) == 1 {
                    other.step(&world, &mut choose);
                }
            }
        };
        *world.down.meanwhile.lock().unwrap() = Some(Box::new(meddle));
    }
    let mut actor = Actor::new(!meddles);
    while !choose.is_over() {
        if meddles && choose.one_in(4) {
            other.lock().unwrap().step(&world, &mut choose);
        } else {
            actor.step(&world, &mut choose);
        }
        let other = other.lock().unwrap();
        world.check(actor.caches().chain(other.caches()));
    }
    *world.down.meanwhile.lock().unwrap() = None;
    let mut other = other.lock().unwrap();
    other.end(&world);
    actor.end(&world);
    Tally {
        calls: actor.calls + other.calls,
        verified: actor.verified + other.verified,
        copies: world.copies(),
        worlds: 1,
        whole: u64::from(world.end()),
        quiet: 0,
    }
}
