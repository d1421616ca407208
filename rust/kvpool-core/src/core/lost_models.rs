//! Models of pages that are lost and slots that are taken out of use.

use super::models::{cached, config, core};
use super::Core;
use crate::cache::Cache;
use crate::models::{fails, holds};
use crate::sync::{AtomicU32, Ordering, Weak};
use crate::types::{Mover, NoMover};
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

/// ACTIVE, with storage for one token that is not in the tree.
fn open(core: &Core) -> Cache {
    let mut cache = core.create(&[1], b"", None, None).unwrap();
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    assert!(core.resize(&mut cache, 1, None).unwrap());
    cache
}

/// Closed and dropped: nothing is left of it.
fn nothing_is_left(core: &Core, mut cache: Cache) {
    core.check(&[&cache]).unwrap();
    core.close(&mut cache).unwrap();
    core.drop_lost();
    core.check(&[]).unwrap();
    core.clear();
    for tier in [Tier::Device, Tier::Host] {
        for slots in core.slots(tier) {
            assert_eq!(
                slots.free_slots().len() as u32,
                slots.num_slots(),
                "a slot was lost"
            );
        }
    }
}

/// H32: a page is lost while its block enters the tree. Who claims the block by then is told, nobody finds it from then on,
/// and whose page it is has it in its books.
fn lose_against_publish() {
    let core = core(&[2], 2);
    let mut ours = open(&core);
    let slot = ours.tables[0][0];
    let other = {
        let core = core.clone();
        thread::spawn(move || {
            core.commit(&mut ours, &[1]).unwrap();
            ours
        })
    };
    let mut joined = core.create(&[1, 2], b"", None, None).unwrap();
    let bad = core.lose(0, Tier::Device, slot);
    if core.info(&joined).unwrap().reused == 1 {
        assert!(core.has_bad(&joined, &bad), "who has a bad page is not told");
    }
    let late = core.probe(&[1, 2], b"", None).unwrap();
    assert_eq!(late, 0, "a lost block is found");
    let ours = other.join().unwrap();
    assert!(core.has_bad(&ours, &bad), "whose page is bad is not told");
    let late = core.probe(&[1, 2], b"", None).unwrap();
    assert_eq!(late, 0, "a lost block is found");
    core.check(&[&ours, &joined]).unwrap();
    core.close(&mut joined).unwrap();
    nothing_is_left(&core, ours);
}

#[test]
fn lose_and_publish() {
    holds(2, lose_against_publish);
}

#[test]
fn lose_of_a_page_whose_owner_comes_late() {
    fails(Weak::OwnerLate, "a lost block is found", 2, lose_against_publish);
}

#[test]
fn lose_of_a_page_that_is_passed_on_quietly() {
    fails(
        Weak::PassQuietly,
        "a lost block is found",
        2,
        lose_against_publish,
    );
}

/// One token per block; two slots on either tier.
fn tiered(windows: &[Option<u64>], mover: Box<dyn Mover>) -> Arc<Core> {
    let pools = windows.iter().map(|&window| (2, 2, window));
    Arc::new(Core::with_mover(config(pools, 2), mover).unwrap())
}

/// H32: a page is lost while it takes the place of the one that the tree has on the host.
fn lose_against_taking_over(windows: &[Option<u64>]) {
    let core = tiered(windows, Box::new(NoMover));
    cached(&core, &[1]);
    assert_eq!(core.evict(1), 1);
    let mut ours = open(&core);
    let pool = windows.len() - 1;
    let slot = ours.tables[pool][0];
    let other = {
        let core = core.clone();
        thread::spawn(move || core.lose(pool, Tier::Device, slot))
    };
    core.commit(&mut ours, &[1]).unwrap();
    let bad = other.join().unwrap();
    assert!(core.has_bad(&ours, &bad), "whose page is bad is not told");
    let late = core.probe(&[1, 2], b"", None).unwrap();
    assert_eq!(late, 0, "a lost block is found");
    nothing_is_left(&core, ours);
}

#[test]
fn lose_and_bring_up() {
    holds(2, || lose_against_taking_over(&[None]));
}

#[test]
fn lose_and_take_over() {
    holds(2, || lose_against_taking_over(&[None, Some(2)]));
}

#[test]
fn lose_and_bring_up_quietly() {
    fails(Weak::PassQuietly, "a lost block is found", 2, || {
        lose_against_taking_over(&[None]);
    });
}

#[test]
fn lose_and_take_over_quietly() {
    fails(Weak::PassQuietly, "a lost block is found", 2, || {
        lose_against_taking_over(&[None, Some(2)]);
    });
}

/// H32: a page is lost while it comes up. Who else claims its block is told, or finds the block lost.
fn lose_against_landing() {
    let core = tiered(&[None], Box::new(NoMover));
    cached(&core, &[1]);
    assert_eq!(core.evict(1), 1);
    let claim = || core.create(&[1, 2], b"", None, None).unwrap();
    let (mut ours, mut theirs) = (claim(), claim());
    let mut copies = Vec::new();
    assert!(core.resume(&mut ours, &mut copies).unwrap());
    let slot = copies[0].dst;
    let other = {
        let core = core.clone();
        thread::spawn(move || core.lose(0, Tier::Device, slot))
    };
    core.copies_done(&mut ours);
    let bad = other.join().unwrap();
    for cache in [&ours, &theirs] {
        assert!(core.has_bad(cache, &bad), "who has a bad page is not told");
        assert!(core.is_lost(cache), "a lost block is not marked");
    }
    core.close(&mut theirs).unwrap();
    nothing_is_left(&core, ours);
}

#[test]
fn lose_and_land() {
    holds(2, lose_against_landing);
}

#[test]
fn lose_and_land_quietly() {
    fails(
        Weak::PassQuietly,
        "a lost block is not marked",
        2,
        lose_against_landing,
    );
}

/// H32: a private block becomes a node while its page is lost: its cache is told, also once it is private again.
fn lose_against_suspension() {
    let core = tiered(&[None], Box::new(NoMover));
    let mut ours = open(&core);
    let slot = ours.tables[0][0];
    let other = {
        let core = core.clone();
        thread::spawn(move || core.lose(0, Tier::Device, slot))
    };
    core.suspend(&mut ours).unwrap();
    assert!(core.resume(&mut ours, &mut Vec::new()).unwrap());
    core.commit(&mut ours, &[1]).unwrap();
    let bad = other.join().unwrap();
    assert!(core.has_bad(&ours, &bad), "whose page is bad is not told");
    let late = core.probe(&[1, 2], b"", None).unwrap();
    assert_eq!(late, 0, "a lost block is found");
    nothing_is_left(&core, ours);
}

#[test]
fn lose_and_suspend() {
    holds(2, lose_against_suspension);
}

#[test]
fn lose_and_suspend_quietly() {
    fails(
        Weak::PassQuietly,
        "a lost block is found",
        2,
        lose_against_suspension,
    );
}

/// Tells when a copy was begun.
#[derive(Debug)]
struct Begun(Arc<AtomicU32>);

impl Mover for Begun {
    fn offload(&self, _: usize, _: u32, _: u32) -> bool {
        self.0.store(1, Ordering::Release); // Release: the model's own flag, partner the load in the model
        true
    }
}

/// H32: a copy to the host turns out to have failed before its block has gone there.
fn lose_against_offload() {
    let begun = Arc::new(AtomicU32::new(0));
    let core = tiered(&[None], Box::new(Begun(begun.clone())));
    cached(&core, &[1]);
    let other = {
        let core = core.clone();
        thread::spawn(move || core.evict(1))
    };
    // Acquire: the model's own flag, partner the store in `offload`
    let lost = begun.load(Ordering::Acquire) == 1;
    if lost {
        core.lose(0, Tier::Host, 1);
    }
    other.join().unwrap();
    let mut cache = core.create(&[1, 2], b"", None, None).unwrap();
    if core.info(&cache).unwrap().reused == 1 && lost {
        let page = core.tree.page(0, cache.nodes[0].index());
        assert_eq!(page.tier(), Tier::Device, "a lost block is found");
    }
    core.resume(&mut cache, &mut Vec::new()).unwrap();
    core.copies_done(&mut cache);
    nothing_is_left(&core, cache);
}

#[test]
fn lose_and_offload() {
    holds(2, lose_against_offload);
}

#[test]
fn lose_and_offload_quietly() {
    fails(
        Weak::PassQuietly,
        "a lost block is found",
        2,
        lose_against_offload,
    );
}

/// A block is lost while it goes: one of the two takes it out, the books hold, and its slot is free.
fn lose_against_evict() {
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
    assert_eq!(core.pools[0].taken(), 0, "a lost block's slot is not free once");
    core.check(&[]).unwrap();
    assert_eq!(core.pools[0].free_slots().len(), 2, "a lost block keeps its slot");
}

#[test]
fn lose_and_evict() {
    holds(2, lose_against_evict);
}

#[test]
fn lose_and_evict_both() {
    fails(
        Weak::KillTwice,
        "a lost block's slot is not free once",
        2,
        lose_against_evict,
    );
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
