//! Calls that come at a bad moment: while copies are out, in flight, beside promises.

mod common;

use common::{claim, core, pool, serve};
use kvpool_core::types::PolicyKind;
use kvpool_core::words::Tier;

/// While copies are out every other call is refused, and the report ends that.
#[test]
fn a_cache_whose_copies_are_out_is_left_alone() {
    let c = core(4, vec![pool(8, None)], 8, PolicyKind::Lru);
    serve(&c, &[1, 2, 3, 4], None);
    let mut x = claim(&c, &[1, 2, 3, 9]).unwrap();
    let x = &mut x;
    let mut copies = vec![];
    assert!(c.provide(x, 4, &mut copies).unwrap());
    assert_eq!(copies.len(), 1);
    let mut more = vec![];
    assert!(c.suspend(x).is_err());
    assert!(c.resume(x, &mut more).is_err());
    assert!(c.provide(x, 4, &mut more).is_err());
    assert!(c.resize(x, 8, Some(4)).is_err());
    assert!(c.commit(x, &[9]).is_err());
    assert!(c.step_begin(x, 1).is_err());
    assert!(c.table(x, 0).is_err());
    // Another thread cannot close it under the hands of the one that copies.
    std::thread::scope(|scope| assert!(scope.spawn(|| c.close(x)).join().unwrap().is_err()));
    assert_eq!(c.info(x).unwrap().capacity, 4);
    c.copies_done(x);
    assert!(!c.is_in_work(x));
    assert!(c.commit(x, &[9]).is_ok());
    c.check(&[x]).unwrap();
    c.close(x).unwrap();
    assert_eq!(c.counters().requests, 2);
}

/// Who makes the copies may close instead; a failure that is reported afterwards changes nothing.
#[test]
fn closed_while_copies_are_out_stays_closed() {
    let c = core(4, vec![pool(8, None)], 8, PolicyKind::Lru);
    serve(&c, &[1, 2, 3, 4], None);
    let mut x = c.create(&[1, 2, 3, 9], b"", None, None).unwrap();
    let mut copies = vec![];
    assert!(c.resume(&mut x, &mut copies).unwrap());
    assert_eq!(copies.len(), 1);
    assert!(c.close(&mut x).unwrap());
    c.copies_failed(&mut x);
    c.check(&[]).unwrap();
    assert!(c.info(&x).is_err());
    assert_eq!(c.available_tokens(), 32);
}

/// A commit in flight meets an unclaimed block whose unit was promised to a batch: its own stays private.
fn commit_in_flight_beside_a_promise(window: Option<u64>) {
    let c = core(1, vec![pool(3, window)], 8, PolicyKind::Lru);
    serve(&c, &[7], None);
    let mut a = c.create(&[], b"", None, None).unwrap();
    c.resume(&mut a, &mut vec![]).unwrap();
    assert!(c.resize(&mut a, 1, None).unwrap());
    c.step_begin(&mut a, 1).unwrap();
    let mut x = claim(&c, &[5, 6]).expect("fits: one free, one evictable");
    c.commit(&mut a, &[7]).unwrap();
    c.check(&[&a, &x]).unwrap();
    assert!(
        c.provide(&mut x, 2, &mut vec![]).unwrap(),
        "what phase 1 counted is what phase 2 delivers"
    );
}

#[test]
fn a_commit_in_flight_keeps_the_promise_to_a_batch() {
    commit_in_flight_beside_a_promise(None);
}

#[test]
fn a_commit_in_flight_keeps_the_promise_of_a_windowed_page() {
    commit_in_flight_beside_a_promise(Some(8));
}

/// What a `provide` gave up of its promise is promised again when its copies fail.
#[test]
fn failed_copies_restore_the_whole_promise() {
    let c = core(2, vec![pool(6, None)], 8, PolicyKind::Lru);
    serve(&c, &[1, 2], None);
    let mut x = claim(&c, &[1, 9, 9, 9, 9, 9]).unwrap();
    let x = &mut x;
    let before = c.available_tokens();
    let mut copies = vec![];
    assert!(c.provide(x, 2, &mut copies).unwrap()); // less than promised: the rest is given up
    c.copies_failed(x);
    c.check(&[x]).unwrap();
    assert_eq!(c.available_tokens(), before, "the cache is as it was before");
}

/// What was lost never enters the tree: whose page it is keeps it private, and whoever joins another's block is rid of it.
#[test]
fn a_page_that_was_lost_before_its_commit_stays_private() {
    for window in [None, Some(8)] {
        let c = core(1, vec![pool(4, None), pool(4, window)], 8, PolicyKind::Lru);
        let mut a = c.create(&[], b"", None, None).unwrap();
        c.resume(&mut a, &mut vec![]).unwrap();
        assert!(c.resize(&mut a, 2, None).unwrap());
        let slot = c.table(&a, 1).unwrap()[1];
        let bad = c.lose(1, Tier::Device, slot);
        assert!(bad.node.is_none() && c.has_bad(&a, &bad));
        c.commit(&mut a, &[7, 8]).unwrap();
        assert_eq!(c.probe(&[7, 8, 9], b"", None).unwrap(), 1);
        assert!(c.has_bad(&a, &bad) && !c.is_lost(&a));
        c.check(&[&a]).unwrap();
        c.close(&mut a).unwrap();
        // The slot is as good as any other again.
        serve(&c, &[1, 2, 3, 4], None);
        assert_eq!(c.probe(&[1, 2, 3, 4, 5], b"", None).unwrap(), 4);
        c.check(&[]).unwrap();
    }
}
