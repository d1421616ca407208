//! Every operation, each in a situation in which it has something to do.

use super::{branch, ready, sequence, shared, Kind, Request};
use kvpool_core::words::Tier;
use kvpool_core::Claim;
use kvpool_trials::World;

pub struct Case {
    pub name: &'static str,
    pub applies: fn(Kind) -> bool,
    pub prepare: fn(&World) -> Vec<Request>,
    pub operation: fn(&World, &mut Vec<Request>),
}

const fn case(
    name: &'static str,
    applies: fn(Kind) -> bool,
    prepare: fn(&World) -> Vec<Request>,
    operation: fn(&World, &mut Vec<Request>),
) -> Case {
    Case {
        name,
        applies,
        prepare,
        operation,
    }
}

const ANYWHERE: fn(Kind) -> bool = |_| true;
const ROOMY: fn(Kind) -> bool = Kind::roomy;
const TWO_TIERS: fn(Kind) -> bool = |kind| kind.roomy() && kind.tiers == 2;
const NOBODY: fn(&World) -> Vec<Request> = |_| Vec::new();

/// What is cached, and a token behind it.
fn behind(mut tokens: Vec<i32>) -> Vec<i32> {
    tokens.push(99);
    tokens
}

pub const CASES: &[Case] = &[
    case("create", ANYWHERE, NOBODY, |world, held| {
        held.push(Request::create(world, &behind(shared())));
        held.push(Request::create(world, &behind(sequence(1000, 2))));
    }),
    case("create, partial match", ROOMY, NOBODY, |world, held| {
        held.push(Request::create(world, &[100, 101, 102, 99, 98]));
    }),
    case("probe", ANYWHERE, NOBODY, |world, _| {
        world.core.probe(&behind(shared()), b"", None).unwrap();
    }),
    case(
        "resume, with copies",
        ROOMY,
        |world| vec![Request::create(world, &[100, 101, 102, 99, 98])],
        |world, held| {
            held[0].resume(world);
        },
    ),
    case(
        "resume, from the host",
        TWO_TIERS,
        |world| vec![Request::create(world, &behind(shared()))],
        |world, held| {
            held[0].resume(world);
        },
    ),
    case(
        "suspend",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            world.core.suspend(&mut held[0].cache).unwrap();
        },
    ),
    case(
        "suspend and resume",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            world.core.suspend(&mut held[0].cache).unwrap();
            held[0].resume(world);
        },
    ),
    case(
        "resize",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            held[0].grow(world, 6);
        },
    ),
    case(
        "resize, down and stale",
        ROOMY,
        |world| vec![ready(world, &sequence(500, 12))],
        |world, held| {
            let cache = &mut held[0].cache;
            world.core.resize(cache, 10, Some(10)).unwrap();
        },
    ),
    case(
        "commit, new blocks",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            held[0].grow(world, 4);
            held[0].commit(world, 4);
        },
    ),
    case(
        "commit, blocks of others",
        ROOMY,
        |world| {
            let tokens = sequence(600, 6);
            let late = ready(world, &tokens);
            super::serve(world, &tokens);
            vec![late]
        },
        |world, held| {
            held[0].commit(world, 6);
        },
    ),
    case(
        "close",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            world.core.close(&mut held[0].cache).unwrap();
            held.clear();
        },
    ),
    case(
        "close, deep",
        ROOMY,
        |world| vec![Request::create(world, &behind(branch()))],
        |world, held| {
            world.core.close(&mut held[0].cache).unwrap();
            held.clear();
        },
    ),
    case(
        "close in flight",
        ROOMY,
        |world| {
            let mut one = ready(world, &sequence(500, 6));
            world.core.step_begin(&mut one.cache, 1).unwrap();
            vec![one]
        },
        |world, held| {
            let one = &mut held[0];
            one.commit(world, 5);
            world.core.close(&mut one.cache).unwrap();
            assert!(world.core.step_end(&mut one.cache, 1).unwrap());
            held.clear();
        },
    ),
    case("evict", ANYWHERE, NOBODY, |world, _| {
        world.core.evict(2);
    }),
    case("evict all", ANYWHERE, NOBODY, |world, _| {
        world.core.evict(99);
    }),
    case("clear", ANYWHERE, NOBODY, |world, _| world.core.clear()),
    case("set_epoch", ANYWHERE, NOBODY, |world, _| {
        let _ = world.core.set_epoch(1);
    }),
    case("drain", ANYWHERE, NOBODY, |world, _| world.read_events()),
    case("batch", ANYWHERE, NOBODY, batch),
    case("batch, starts", ROOMY, NOBODY, starts),
    case("batch, given back", ANYWHERE, NOBODY, |world, held| {
        batch_claimed(world, held);
        for mut one in held.drain(..) {
            world.core.close(&mut one.cache).unwrap();
        }
    }),
    case(
        "lose and drop",
        ROOMY,
        |world| vec![ready(world, &sequence(500, 6))],
        |world, held| {
            held[0].commit(world, 6);
            let slot = world.core.table(&held[0].cache, 0).unwrap()[1];
            world.core.lose(0, Tier::Device, slot);
            world.core.close(&mut held.remove(0).cache).unwrap();
            world.core.drop_lost();
        },
    ),
    case("retire", ROOMY, NOBODY, |world, _| {
        world.retire(Tier::Device, 0, 24)
    }),
    case(
        "monitors",
        ANYWHERE,
        |world| vec![started(world)],
        |world, held| {
            let core = &world.core;
            let cache = &mut held[0].cache;
            core.books(Tier::Device);
            core.books(Tier::Host);
            core.counters();
            core.available_tokens();
            core.pressure();
            core.stuck();
            core.holds(cache).unwrap();
            core.below(cache).unwrap();
            core.costs(cache);
            core.fitting(cache, 8, 2, &[]).unwrap();
            core.lacking(cache, 8, &[]).unwrap();
        },
    ),
];

/// ACTIVE with one committed block.
fn started(world: &World) -> Request {
    let mut one = Request::create(world, &sequence(400, 8));
    assert!(one.resume(world) && one.grow(world, 2));
    one.commit(world, 2);
    one
}

/// Of all their tokens.
pub fn claims<'a>(prompts: &'a [Vec<i32>]) -> Vec<Claim<'a>> {
    let claim = |tokens: &'a Vec<i32>| Claim {
        tokens: tokens[..].into(),
        scope: b"",
        epoch: None,
        retention: None,
        least: None,
        most: None,
    };
    prompts.iter().map(claim).collect()
}

fn batch_claimed(world: &World, held: &mut Vec<Request>) {
    let prompts = [behind(shared()), behind(sequence(1000, 2)), sequence(700, 4)];
    let caches = world.core.claim_all(claims(&prompts), true).unwrap();
    for (cache, tokens) in caches.into_iter().zip(&prompts) {
        held.extend(cache.map(|cache| Request::new(cache, tokens)));
    }
}

fn provide_all(world: &World, held: &mut Vec<Request>) {
    for mut one in std::mem::take(held) {
        let mut copies = Vec::new();
        let tokens = one.tokens.len();
        if world
            .core
            .provide(&mut one.cache, tokens as u64, &mut copies)
            .unwrap()
        {
            one.land(world, &copies);
            one.commit(world, tokens);
            held.push(one);
        } else {
            one.close(world);
        }
    }
}

fn batch(world: &World, held: &mut Vec<Request>) {
    batch_claimed(world, held);
    provide_all(world, held);
}

fn starts(world: &World, held: &mut Vec<Request>) {
    let prompts = [behind(branch()), sequence(700, 4)];
    let starts = world.core.claim_starts(claims(&prompts), Some(2), 8).unwrap();
    for (start, tokens) in starts.into_iter().zip(&prompts) {
        held.extend(start.ok().map(|cache| Request::new(cache, tokens)));
    }
    provide_all(world, held);
}
