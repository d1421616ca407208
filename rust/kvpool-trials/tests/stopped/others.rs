//! What all the others do while one thread is stopped. What must succeed is asserted; what may be refused is returned.

use super::cases::claims;
use super::{branch, ready, sequence, shared, Request};
use kvpool_core::words::Tier;
use kvpool_trials::world::TIERS;
use kvpool_trials::{Actor, Rng, World};

/// A block of a cache of theirs is on the move.
pub const MOVING: &str = "resume of blocks that may move";

/// All operations, in a world with room for all of them. `theirs`: a SUSPENDED cache that they have.
pub fn everything(world: &World, theirs: Option<Request>) -> Vec<&'static str> {
    let mut refused = Vec::new();
    if let Some(mut theirs) = theirs {
        if !theirs.resume(world) {
            refused.push(MOVING);
        }
        theirs.close(world);
    }
    fresh(world);
    joined(world);
    cached(world);
    batches(world);
    in_flight(world);
    losses(world);
    assert_eq!(world.core.evict(1), 1, "there are leaves that nobody claims");
    monitors(world);
    world.read_events();
    epochs(world);
    world.core.clear();
    // And once more, whatever comes.
    let mut actor = Actor::new(false);
    let mut rng = Rng::new(7);
    for _ in 0..60 {
        actor.step(world, &mut rng);
    }
    actor.end(world);
    refused
}

/// A whole request on blocks of its own, and all of it is there for the next one.
fn fresh(world: &World) {
    let tokens = sequence(2000, 12);
    let mut one = Request::create(world, &tokens);
    assert_eq!(one.committed(world), 0);
    assert!(one.resume(world), "resume of nothing");
    assert!(one.grow(world, 8), "there is room");
    one.commit(world, 8);
    assert!(one.grow(world, 12), "there is room");
    one.commit(world, 11);
    assert!(one.grow(world, 11), "less is always granted");
    world.core.suspend(&mut one.cache).unwrap();
    assert!(one.resume(world), "resume of blocks of one's own");
    assert!(one.grow(world, 12), "there is room");
    one.commit(world, 12);
    let next = [tokens, vec![1]].concat();
    assert_eq!(
        world.core.probe(&next, b"", None).unwrap(),
        12,
        "what was committed is found"
    );
    one.close(world);
    assert_eq!(
        world.core.probe(&next, b"", None).unwrap(),
        12,
        "what was committed stays"
    );
    let mut again = Request::create(world, &next);
    assert_eq!(again.committed(world), 12, "what is cached is claimed");
    assert!(again.resume(world) && again.grow(world, 13), "there is room");
    again.commit(world, 13);
    again.close(world);
}

/// Two requests commit the same blocks: both have the same pages then.
fn joined(world: &World) {
    let tokens = sequence(3000, 6);
    let (mut first, mut second) = (ready(world, &tokens), ready(world, &tokens));
    first.commit(world, 6);
    second.commit(world, 6);
    let table = |one: &Request| world.core.table(&one.cache, 0).unwrap().to_vec();
    assert_eq!(table(&first), table(&second), "two pages of one block");
    first.close(world);
    second.close(world);
}

/// Requests on the blocks that the stopped thread may be at: any match is right, and what was matched is resumed.
fn cached(world: &World) {
    for tokens in [
        [shared(), vec![7]].concat(),
        vec![100, 101, 102, 7, 7],
        [branch(), vec![7, 7, 7]].concat(),
        [sequence(400, 4), vec![7]].concat(),
        [sequence(600, 6), vec![7]].concat(),
    ] {
        let mut one = Request::create(world, &tokens);
        assert!(one.resume(world), "nobody moves what was claimed");
        assert!(one.grow(world, tokens.len()), "there is room");
        one.commit(world, tokens.len());
        world.core.suspend(&mut one.cache).unwrap();
        one.close(world);
    }
}

fn batches(world: &World) {
    let prompts = [
        sequence(4000, 4),
        sequence(5000, 7),
        [sequence(2000, 12), vec![2]].concat(),
    ];
    let starts = world.core.claim_starts(claims(&prompts), None, 100).unwrap();
    assert_eq!(starts.len(), 3);
    for mut cache in starts.into_iter().flatten() {
        assert!(world.core.close(&mut cache).unwrap());
    }
    let caches = world.core.claim_all(claims(&prompts), true).unwrap();
    for (cache, tokens) in caches.into_iter().zip(&prompts) {
        let mut one = Request::new(cache.expect("there is room"), tokens);
        let mut copies = Vec::new();
        let provided = world
            .core
            .provide(&mut one.cache, tokens.len() as u64, &mut copies);
        assert!(provided.unwrap(), "what was promised is provided");
        one.land(world, &copies);
        one.commit(world, tokens.len());
        one.close(world);
    }
}

fn in_flight(world: &World) {
    let mut one = ready(world, &sequence(6000, 10));
    world.core.step_begin(&mut one.cache, 1).unwrap();
    one.commit(world, 9);
    assert!(one.grow(world, 9), "less is always granted");
    assert!(!world.core.step_end(&mut one.cache, 1).unwrap());
    world.core.step_begin(&mut one.cache, 1).unwrap();
    assert!(!world.core.close(&mut one.cache).unwrap());
    assert!(world.core.step_end(&mut one.cache, 1).unwrap());
}

fn losses(world: &World) {
    let tokens = sequence(8000, 5);
    let mut one = ready(world, &tokens);
    one.commit(world, 4);
    let slot = world.core.table(&one.cache, 0).unwrap()[0];
    let bad = world.core.lose(0, Tier::Device, slot);
    assert!(world.core.has_bad(&one.cache, &bad) && world.core.is_lost(&one.cache));
    assert_eq!(
        world.core.probe(&tokens, b"", None).unwrap(),
        0,
        "a lost block is found"
    );
    one.close(world);
    world.core.drop_lost();
}

fn monitors(world: &World) {
    for tier in TIERS {
        for books in world.core.books(tier) {
            let sum = books.free + books.active + books.held + books.cached + books.fenced;
            assert_eq!(sum, books.slots, "free + active + held + cached + fenced");
        }
    }
    assert!(world.core.available_tokens() <= 24);
    world.core.counters();
    world.core.pressure();
    world.core.stuck();
    let mut one = ready(world, &sequence(9000, 4));
    let fits = world.core.fitting(&mut one.cache, 6, 2, &[]).unwrap();
    assert_eq!(fits, 6, "there is room");
    world.core.lacking(&mut one.cache, 6, &[]).unwrap();
    world.core.below(&one.cache).unwrap();
    one.close(world);
}

/// Who asks after `set_epoch` finds nothing old.
fn epochs(world: &World) {
    let _ = world.core.set_epoch(1);
    let old = [sequence(2000, 12), vec![1]].concat();
    assert_eq!(
        world.core.probe(&old, b"", None).unwrap(),
        0,
        "old content after set_epoch"
    );
    let mut cache = world.core.create(&old, b"", None, None).unwrap();
    assert_eq!(
        world.core.info(&cache).unwrap().reused,
        0,
        "old content after set_epoch"
    );
    assert!(world.core.close(&mut cache).unwrap());
}

/// In a world of six slots, all of them wanted: what was refused, while whatever is granted is right.
pub fn everything_short(world: &World, theirs: Option<Request>) -> Vec<&'static str> {
    let mut refused = Vec::new();
    if let Some(theirs) = theirs {
        theirs.close(world);
    }
    let tokens = sequence(20_000, 12);
    let mut one = Request::create(world, &tokens);
    assert!(one.resume(world), "resume of nothing");
    let books = |tier| {
        for books in world.core.books(tier) {
            let sum = books.free + books.active + books.held + books.cached + books.fenced;
            assert_eq!(sum, books.slots, "free + active + held + cached + fenced");
        }
    };
    // From all slots down to what can be had. The history may be raised all the same: then the cache goes on from there.
    for blocks in (1..=6).rev() {
        let capacity = 2 * blocks as u64;
        if world.core.resize(&mut one.cache, capacity, Some(1)).unwrap() {
            world.compute(&one.cache, &one.content);
            one.commit(world, 2 * blocks);
            break;
        }
        let info = world.core.info(&one.cache).unwrap();
        assert_eq!(
            (info.capacity, info.committed),
            (0, 0),
            "a refused resize changed the cache"
        );
        world
            .core
            .can_provide(&one.cache, 0)
            .expect("a refused resize leaves a cache that goes on");
        refused.push(
            [
                "1 block", "2 blocks", "3 blocks", "4 blocks", "5 blocks", "6 blocks",
            ][blocks - 1],
        );
    }
    TIERS.into_iter().for_each(books);
    one.close(world);
    world.core.evict(1);
    let mut actor = Actor::new(false);
    let mut rng = Rng::new(7);
    for _ in 0..60 {
        actor.step(world, &mut rng);
    }
    actor.end(world);
    TIERS.into_iter().for_each(books);
    refused
}
