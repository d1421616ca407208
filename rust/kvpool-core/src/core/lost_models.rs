//! Models of pages that are lost and slots that are taken out of use.

use super::models::{cached, core};
use crate::models::{fails, holds};
use crate::sync::{AtomicU32, Ordering, Weak};
use crate::words::Tier;
use loom::sync::Arc;
use loom::thread;

/// H28: who claimed a page before it was lost learns that before it can read what is wrong; who comes later does not
/// find it.
fn lose_against_create() {
    let core = core(&[2], 2);
    cached(&core, &[1]);
    let byte = Arc::new(AtomicU32::new(0));
    let other = {
        let (core, byte) = (core.clone(), byte.clone());
        thread::spawn(move || {
            let bad = core.lose(0, Tier::Device, 1);
            byte.store(1, Ordering::Release); // Release: the model's own page, partner the load below
            assert_eq!(
                core.probe(&[1, 2], b"", None).unwrap(),
                0,
                "a lost block is found"
            );
            bad
        })
    };
    let mut cache = core.create(&[1, 2], b"", None, None).unwrap();
    let claimed = core.info(&cache).unwrap().reused == 1;
    let wrong = byte.load(Ordering::Acquire) == 1; // Acquire: the model's own page, partner the store above
    if claimed && wrong {
        assert!(core.is_lost(&cache), "who has a bad page is not told");
    }
    let bad = other.join().unwrap();
    assert!(
        !claimed || core.has_bad(&cache, &bad),
        "who has a bad page is not told"
    );
    core.check(&[&cache]).unwrap();
    core.close(&mut cache).unwrap();
    core.drop_lost();
    core.check(&[]).unwrap();
    assert_eq!(core.pools[0].available(), 2);
    assert_eq!(core.pools[0].free_slots().len(), 2, "a lost block keeps its slot");
}

#[test]
fn lose_and_create() {
    holds(2, lose_against_create);
}

#[test]
fn lose_without_a_mark() {
    fails(
        Weak::LoseUnmarked,
        "a lost block is found",
        2,
        lose_against_create,
    );
}

/// A block is lost while it goes: one of the two takes it out, the books hold, and its slot is free.
#[test]
fn lose_and_evict() {
    holds(2, || {
        let core = core(&[2], 2);
        cached(&core, &[1]);
        let other = {
            let core = core.clone();
            thread::spawn(move || core.evict(1))
        };
        core.lose(0, Tier::Device, 1);
        // Claimed, not probed: a probe may still be answered as of the moment before an eviction that runs.
        let mut cache = core.create(&[1, 3], b"", None, None).unwrap();
        assert_eq!(core.info(&cache).unwrap().reused, 0, "a lost block is claimed");
        core.close(&mut cache).unwrap();
        other.join().unwrap();
        core.check(&[]).unwrap();
        assert_eq!(core.pools[0].free_slots().len(), 2, "a lost block keeps its slot");
    });
}

/// H29: a slot that was promised is there, also while another thread looks for the one that it takes out of use.
fn retire_against_take() {
    let core = core(&[2], 1);
    let other = {
        let core = core.clone();
        thread::spawn(move || core.retire(0, Tier::Device, 2))
    };
    let pool = &core.pools[0];
    let taken = pool
        .reserve(1)
        .then(|| pool.take().expect("a promised slot is not there"));
    let retired = other.join().unwrap();
    assert!(taken != Some(2) || !retired, "out of use, and somebody's");
    if let Some(slot) = taken {
        pool.give(slot);
        pool.unreserve(1);
    }
    assert_eq!(pool.available(), 2 - u32::from(retired));
    core.check(&[]).unwrap();
}

#[test]
fn retire_and_take() {
    holds(3, retire_against_take);
}

#[test]
fn retire_with_one_unit() {
    fails(
        Weak::RetireUncovered,
        "a promised slot is not there",
        3,
        retire_against_take,
    );
}
