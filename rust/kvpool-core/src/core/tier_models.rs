//! Models of moves over the whole core: units, resume, commit, close and plans while a block goes down or comes up.

use super::models::config;
use super::Core;
use crate::cache::Cache;
use crate::models::{fails, holds};
use crate::sync::{AtomicU32, Ordering, Weak};
use crate::types::CacheState;
use crate::words::Tier;
use loom::sync::Arc;
use loom::thread;

/// One token per block; slots of both tiers by pool.
fn core(pools: &[(u32, u32, Option<u64>)]) -> Arc<Core> {
    Arc::new(Core::new(config(pools.iter().copied(), 2)).unwrap())
}

fn open(core: &Core, tokens: &[i32]) -> Cache {
    let mut cache = core.create(tokens, b"", None, None).unwrap();
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    assert!(core.resize(&mut cache, tokens.len() as u64, None).unwrap());
    cache
}

/// ACTIVE, all of it in the tree.
fn committed(core: &Core, tokens: &[i32]) -> Cache {
    let mut cache = open(core, tokens);
    let have = core.info(&cache).unwrap().committed as usize;
    core.commit(&mut cache, &tokens[have..]).unwrap();
    cache
}

fn cached(core: &Core, tokens: &[i32]) {
    let mut cache = committed(core, tokens);
    core.close(&mut cache).unwrap();
}

/// All is closed and dropped: every slot of both tiers is free, and every unit available.
fn all_is_free(core: &Core) {
    core.check(&[]).unwrap();
    core.clear();
    core.check(&[]).unwrap();
    for tier in [Tier::Device, Tier::Host] {
        let free = |(books, slots): (crate::types::PoolBooks, &crate::pool::SlotPool)| {
            books.free == books.slots && slots.available() == slots.num_slots()
        };
        assert!(
            core.books(tier).into_iter().zip(core.slots(tier)).all(free),
            "a slot was lost"
        );
    }
}

fn balance(core: &Core, caches: &[&Cache]) {
    core.check(caches)
        .unwrap_or_else(|error| panic!("the books do not balance: {error}"));
}

/// H19: a claim and its release while the block goes down: available + promised + claimed + private == slots afterwards, on
/// both tiers.
fn claim_against_move() {
    let core = core(&[(1, 1, None)]);
    let mut held = committed(&core, &[1]);
    core.suspend(&mut held).unwrap();
    let other = {
        let core = core.clone();
        thread::spawn(move || core.evict(1))
    };
    core.close(&mut held).unwrap();
    let mut cache = core.create(&[1, 2], b"", None, None).unwrap();
    other.join().unwrap();
    balance(&core, &[&cache]);
    core.close(&mut cache).unwrap();
    all_is_free(&core);
}

#[test]
fn claim_and_release_and_move() {
    holds(2, claim_against_move);
}

#[test]
fn move_whose_units_follow_the_beginning() {
    fails(
        Weak::SettleUnits,
        "the books do not balance",
        2,
        claim_against_move,
    );
}

/// H18: who resumes while a block goes down has it on the device, or is refused and nothing has changed.
#[test]
fn resume_and_move() {
    holds(2, || {
        let core = core(&[(2, 1, None), (2, 1, Some(1))]);
        let mut cache = committed(&core, &[1]);
        core.suspend(&mut cache).unwrap();
        let other = {
            let core = core.clone();
            thread::spawn(move || core.evict(1))
        };
        let mut copies = Vec::new();
        let resumed = core.resume(&mut cache, &mut copies).unwrap();
        core.copies_done(&mut cache);
        if resumed {
            let index = cache.nodes[0].index();
            let state = core.tree.state(index);
            assert!(
                state.tier() == Tier::Device && !state.is_busy(),
                "ACTIVE, and on the host"
            );
            assert_eq!(core.tree.page(0, index).slot(), cache.tables[0][0]);
        } else {
            assert_eq!(cache.state, CacheState::Suspended);
        }
        other.join().unwrap();
        balance(&core, &[&cache]);
        core.close(&mut cache).unwrap();
        all_is_free(&core);
    });
}

/// H22: a commit of a block that the tree has and that goes down: one's own pages become the tree's, or stay private.
#[test]
fn commit_and_move() {
    holds(1, || {
        let core = core(&[(2, 1, None)]);
        let mut ours = open(&core, &[1]);
        cached(&core, &[1]);
        let other = {
            let core = core.clone();
            thread::spawn(move || core.evict(1))
        };
        core.commit(&mut ours, &[1]).unwrap();
        other.join().unwrap();
        let private = ours.nodes.is_empty();
        let page = |index: usize| core.tree.page(0, index);
        let joined =
            |index: usize| (page(index).tier(), page(index).slot()) == (Tier::Device, ours.tables[0][0]);
        assert!(
            private || joined(ours.nodes[0].index()),
            "ACTIVE, and on the host"
        );
        balance(&core, &[&ours]);
        core.close(&mut ours).unwrap();
        all_is_free(&core);
    });
}

/// H23: two caches that resume the same block bring it up once, and both have it.
#[test]
fn resume_and_resume() {
    holds(1, || {
        let core = core(&[(2, 1, None)]);
        cached(&core, &[1]);
        assert_eq!(core.evict(1), 1);
        let claim = || core.create(&[1, 2], b"", None, None).unwrap();
        let (mut ours, mut theirs) = (claim(), claim());
        let up = |core: &Core, cache: &mut Cache| {
            let resumed = core.resume(cache, &mut Vec::new()).unwrap();
            core.copies_done(cache);
            let page = core.tree.page(0, cache.nodes[0].index());
            let here = (page.tier(), page.slot()) == (Tier::Device, cache.tables[0][0]);
            assert!(!resumed || here, "ACTIVE, and on the host");
        };
        let other = {
            let core = core.clone();
            thread::spawn(move || {
                up(&core, &mut theirs);
                theirs
            })
        };
        up(&core, &mut ours);
        let mut theirs = other.join().unwrap();
        balance(&core, &[&ours, &theirs]);
        core.close(&mut ours).unwrap();
        core.close(&mut theirs).unwrap();
        all_is_free(&core);
    });
}

/// H24: private blocks of a cache that is closed while they move are gone with it.
fn close_against_move() {
    let core = core(&[(2, 2, None)]);
    let mut cache = open(&core, &[1, 2]);
    core.suspend(&mut cache).unwrap();
    assert_eq!(cache.parked, 2);
    let other = {
        let core = core.clone();
        thread::spawn(move || core.evict(1))
    };
    core.close(&mut cache).unwrap();
    other.join().unwrap();
    assert!(
        (0..core.tree.nodes.len()).all(|index| !core.tree.state(index).is_live()),
        "a private block is left"
    );
    all_is_free(&core);
}

#[test]
fn close_and_move() {
    holds(1, close_against_move);
}

#[test]
fn close_that_sees_old_children() {
    fails(
        Weak::ChildrenStale,
        "a private block is left",
        1,
        close_against_move,
    );
}

/// H25: a host slot that a plan reads is not used again before the plan is made.
fn plan_against_landing() {
    let core = core(&[(1, 1, None)]);
    cached(&core, &[1]);
    assert_eq!(core.evict(1), 1);
    let mut up = core.create(&[1, 2], b"", None, None).unwrap();
    let mut reader = core.create(&[2, 3], b"", None, None).unwrap();
    reader.source = up.nodes[0];
    let host = Arc::new(AtomicU32::new(1));
    let other = {
        let (core, host) = (core.clone(), host.clone());
        thread::spawn(move || {
            assert!(core.resume(&mut up, &mut Vec::new()).unwrap());
            core.copies_done(&mut up);
            if let Some(slot) = core.hosts[0].take() {
                host.store(2, Ordering::Relaxed); // Relaxed: what `lend` must order
                core.hosts[0].give(slot);
            }
            up
        })
    };
    if core.lend(&mut reader, 0).tier() == Tier::Host {
        assert_eq!(host.load(Ordering::Relaxed), 1, "read a slot that was used again");
        // Relaxed: what `lend` must order
    }
    core.read(&mut reader);
    reader.source = crate::words::Link::NIL;
    let mut up = other.join().unwrap();
    balance(&core, &[&up, &reader]);
    core.close(&mut up).unwrap();
    core.close(&mut reader).unwrap();
    all_is_free(&core);
}

#[test]
fn plan_and_landing() {
    holds(2, plan_against_landing);
}

#[test]
fn plan_without_a_second_look() {
    fails(
        Weak::LendOnce,
        "read a slot that was used again",
        2,
        plan_against_landing,
    );
}
