//! The exact order of eviction on one thread, where a key changes behind the order's back.

mod common;

use common::{cached, claim, core, keep, pool, serve, serve_open};
use kvpool_core::types::PolicyKind;

/// A batch claim that is given back keeps the use of a cache that closed meanwhile.
#[test]
fn a_discarded_claim_keeps_the_use_of_others() {
    let c = core(1, vec![pool(8, None)], 8, PolicyKind::Lru);
    serve(&c, &[1], None); // old
    let mut x = serve_open(&c, &[2], None);
    let mut held = claim(&c, &[2, 3]).unwrap();
    c.close(&mut x).unwrap(); // use of block 2: now, younger than block 1
    c.close(&mut held).unwrap();
    c.check(&[]).unwrap();
    assert_eq!(c.evict(1), 1);
    assert_eq!(
        (cached(&c, &[1]), cached(&c, &[2])),
        (0, 1),
        "the older block goes first"
    );
}

/// Expired at a claim: the entry in the heap is no lower bound any more.
#[test]
fn a_block_that_expired_at_a_claim_goes_by_its_new_priority() {
    let c = core(1, vec![pool(8, None)], 8, PolicyKind::Lru);
    c.advance(1.0);
    serve(&c, &[1], keep(80, 1.0));
    serve(&c, &[7], keep(0, f64::INFINITY));
    assert_eq!(c.evict(1), 1); // takes 7; 1 is queued with priority 80
    assert_eq!((cached(&c, &[1]), cached(&c, &[7])), (1, 0));
    c.advance(5.0); // 1 expired at t = 2: priority 35
    let mut x = c.create(&[1, 2], b"", None, None).unwrap(); // notices it
    c.close(&mut x).unwrap(); // priority 35 for good (until its clock: again 35)
    serve(&c, &[5], keep(50, f64::INFINITY));
    c.check(&[]).unwrap();
    assert_eq!(c.evict(1), 1);
    assert_eq!(
        (cached(&c, &[1]), cached(&c, &[5])),
        (0, 1),
        "priority 35 goes before 50"
    );
}

/// Expired while it has a child.
#[test]
fn a_block_that_expired_as_a_parent_goes_by_its_new_priority() {
    let c = core(1, vec![pool(8, None)], 8, PolicyKind::Lru);
    c.advance(1.0);
    serve(&c, &[1], keep(80, 10.0));
    serve(&c, &[7], keep(0, f64::INFINITY));
    assert_eq!(c.evict(1), 1); // 1 is queued with priority 80
    assert_eq!((cached(&c, &[1]), cached(&c, &[7])), (1, 0));
    c.advance(2.0);
    serve(&c, &[1, 2], None); // child 2 (35, for ever); 1 expires at 12
    serve(&c, &[5], keep(50, f64::INFINITY));
    c.advance(20.0);
    assert_eq!(c.evict(1), 1); // child 2 goes; expiry of 1 applied while 2 was there
    assert_eq!(
        (cached(&c, &[1]), cached(&c, &[1, 2]), cached(&c, &[5])),
        (1, 1, 1)
    );
    assert_eq!(c.evict(1), 1);
    assert_eq!(
        (cached(&c, &[1]), cached(&c, &[5])),
        (0, 1),
        "priority 35 goes before 50"
    );
}

/// Demoted while claimed (SLRU): its old entry, in segment 1, counts no more.
#[test]
fn a_block_that_was_demoted_while_claimed_goes_by_its_new_segment() {
    let c = core(1, vec![pool(20, None)], 20, PolicyKind::Slru); // 6 protected at most
    serve(&c, &[1, 2, 3, 4, 5], None);
    serve(&c, &[1, 2, 3, 4, 5], None); // reused 4 > 3: 1..5 protected
    assert_eq!(c.evict(2), 2); // 5 and 4
    serve(&c, &[900], keep(0, f64::INFINITY));
    assert_eq!(c.evict(1), 1); // 900; leaf 3 is queued in segment 1
    assert_eq!(cached(&c, &[1, 2, 3, 4, 5]), 3);
    let mut hold = c.create(&[1, 2, 3, 77], b"", None, None).unwrap(); // reuses 3: segment 0
    serve(&c, &[11, 12, 13, 14, 15], None);
    serve(&c, &[11, 12, 13, 14, 15], None);
    serve(&c, &[901], keep(0, f64::INFINITY));
    assert_eq!(c.evict(1), 1); // overflow: 3 and 2 are demoted, 3 while it is claimed
    c.close(&mut hold).unwrap(); // 3: segment 0, used now
    serve(&c, &[50], None); // segment 0, used later
    c.check(&[]).unwrap();
    assert_eq!(c.evict(1), 1);
    assert_eq!(
        (cached(&c, &[1, 2, 3]), cached(&c, &[50])),
        (2, 1),
        "3 was used before 50, in the same segment"
    );
}
