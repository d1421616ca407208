//! What may happen in the middle of a move, or between a plan and its report, step by step: the mover's hook calls the
//! core again, or keeps its thread there.

mod common;

use common::{keep, serve, serve_open};
use kvpool_core::sync::Sole;
use kvpool_core::types::{CoreConfig, Mover, PolicyKind, PoolSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Core};
use std::sync::mpsc::channel;
use std::sync::Arc;

/// What the next copy down does, with its host slot; returns whether the copy succeeds.
type Next = Option<Box<dyn FnOnce(u32) -> bool + Send>>;

struct Hook(Arc<Sole<Next>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

impl Mover for Hook {
    fn offload(&self, _: usize, _: u32, dst: u32) -> bool {
        let next = self.0.enter().and_then(|mut next| next.take());
        next.is_none_or(|next| next(dst))
    }
}

/// Pools by (device slots, host slots, window).
fn core(tokens_per_block: u32, pools: &[(u32, u32, Option<u64>)]) -> (Arc<Core>, Arc<Sole<Next>>) {
    let next = Arc::new(Sole::new(None));
    let pool = |&(num_slots, host_slots, window)| PoolSpec {
        name: "p".into(),
        num_slots,
        host_slots,
        window,
        sink_tokens: 0,
    };
    let config = CoreConfig {
        tokens_per_block,
        pools: pools.iter().map(pool).collect(),
        max_blocks: 64,
        max_seq_len: Some(64),
        partial_reuse: true,
        hash_seed: 1,
        policy: PolicyKind::Lru,
        offload_min_priority: 30,
        collide: false,
    };
    let core = Core::with_mover(config, Box::new(Hook(next.clone()))).unwrap();
    (Arc::new(core), next)
}

fn on_next(next: &Sole<Next>, f: impl FnOnce(u32) -> bool + Send + 'static) {
    *next.enter().unwrap() = Some(Box::new(f));
}

fn create(core: &Core, tokens: &[i32]) -> Cache {
    core.create(tokens, b"", None, None).unwrap()
}

fn end(core: &Core, caches: impl IntoIterator<Item = Cache>) {
    for mut cache in caches {
        core.close(&mut cache).unwrap();
    }
    core.clear();
    core.check(&[]).unwrap();
    for tier in [Tier::Device, Tier::Host] {
        for books in core.books(tier) {
            assert_eq!(books.free, books.slots, "a slot of the {tier:?} was lost");
        }
    }
}

#[test]
fn copies_that_are_out_when_their_cache_closes_give_their_slots_back() {
    let (core, _) = core(1, &[(4, 2, None), (4, 2, Some(9))]);
    serve(&core, &[1], None);
    assert!(core.evict(1) > 0);
    let mut cache = create(&core, &[1, 2]);
    let mut copies = Vec::new();
    assert!(core.resume(&mut cache, &mut copies).unwrap());
    assert_eq!(copies.len(), 2);
    core.check(&[&cache]).unwrap();
    end(&core, [cache]);
}

/// The page of one pool does not arrive: who waits for it has it, and so has who claims its block once it is there.
#[test]
fn a_page_that_is_lost_on_its_way_up_is_known_to_who_waits_for_it() {
    for pool in [0, 1] {
        let (core, _) = core(1, &[(6, 2, None), (6, 2, Some(9))]);
        serve(&core, &[1], None);
        assert!(core.evict(1) > 0);
        let (mut cache, other) = (create(&core, &[1, 2]), create(&core, &[1, 3]));
        let mut copies = Vec::new();
        assert!(core.resume(&mut cache, &mut copies).unwrap());
        let copy = { copies.iter() }.find(|copy| copy.pool as usize == pool).unwrap();
        let bad = core.lose(pool, Tier::Device, copy.dst);
        assert!(core.has_bad(&cache, &bad) && !core.has_bad(&other, &bad));
        core.copies_done(&mut cache);
        assert!(core.has_bad(&cache, &bad) && core.has_bad(&other, &bad));
        assert!(core.is_lost(&cache) && core.is_lost(&other));
        assert_eq!(core.probe(&[1, 2], b"", None).unwrap(), 0);
        core.check(&[&cache, &other]).unwrap();
        end(&core, [cache, other]);
    }
}

#[test]
fn evict_leaves_blocks_on_the_host_alone() {
    let (core, _) = core(1, &[(4, 2, None)]);
    serve(&core, &[1], None);
    assert_eq!((core.evict(1), core.evict(1)), (1, 0));
    assert_eq!(core.books(Tier::Host)[0].cached, 1);
    end(&core, []);
}

#[test]
fn a_host_slot_that_a_plan_reads_is_not_used_again_before_the_plan_is_made() {
    let (core, next) = core(2, &[(6, 2, None)]);
    serve(&core, &[1, 2], None);
    assert_eq!(core.evict(1), 1);
    let mut reader = create(&core, &[1, 9, 9]);
    let mut plan = Vec::new();
    assert!(core.resume(&mut reader, &mut plan).unwrap());
    assert_eq!((plan.len(), plan[0].tier), (1, Tier::Host));
    let mut other = create(&core, &[1, 2, 3]);
    let mut copies = Vec::new();
    assert!(core.resume(&mut other, &mut copies).unwrap());
    assert_eq!((copies.len(), copies[0].src), (1, plan[0].src));
    core.copies_done(&mut other);
    core.check(&[&reader, &other]).unwrap();
    serve(&core, &[5, 6], None);
    let read = plan[0].src;
    on_next(&next, move |slot| {
        assert_ne!(slot, read, "used again while a plan reads it");
        true
    });
    assert_eq!(core.evict(1), 1);
    assert!(next.enter().unwrap().is_none(), "nothing went down");
    core.check(&[&reader, &other]).unwrap();
    core.copies_done(&mut reader);
    core.check(&[&reader, &other]).unwrap();
    assert_eq!(
        core.books(Tier::Host)[0].free,
        1,
        "the slot is free with its last reader"
    );
    end(&core, [reader, other]);
}

#[test]
fn books_hold_while_another_cache_is_faster_with_a_page_that_comes_up() {
    let (core, _) = core(1, &[(6, 2, None), (6, 2, Some(9))]);
    serve(&core, &[1], None);
    assert!(core.evict(1) > 0);
    let (mut first, mut second) = (create(&core, &[1, 2]), create(&core, &[1, 3]));
    let mut copies = Vec::new();
    assert!(core.resume(&mut first, &mut copies).unwrap() && copies.len() == 2);
    assert!(core.resume(&mut second, &mut copies).unwrap() && copies.len() == 2);
    core.check(&[&first, &second]).unwrap();
    core.copies_done(&mut second);
    core.check(&[&first, &second]).unwrap();
    core.copies_done(&mut first);
    core.check(&[&first, &second]).unwrap();
    assert_eq!(core.table(&first, 1).unwrap(), core.table(&second, 1).unwrap());
    end(&core, [first, second]);
}

#[test]
fn requests_of_a_batch_are_told_apart_by_block_not_by_slot() {
    let (core, _) = core(1, &[(6, 1, None)]);
    serve(&core, &[1], None);
    assert_eq!(core.evict(1), 1);
    serve(&core, &[2], None);
    let (mut first, mut second) = (create(&core, &[1, 7]), create(&core, &[2, 8]));
    let mut copies = Vec::new();
    assert!(core.provide(&mut first, 2, &mut copies).unwrap());
    assert_eq!(copies.len(), 1);
    // Another request is faster with the first block, and the second one goes down into the slot that it left.
    let mut faster = create(&core, &[1, 9]);
    assert!(core.resume(&mut faster, &mut Vec::new()).unwrap());
    core.copies_done(&mut faster);
    assert_eq!(core.evict(1), 1);
    assert!(core.provide(&mut second, 2, &mut copies).unwrap());
    assert_eq!(copies.len(), 2, "the second block has to come up too");
    assert_eq!(copies[0].src, copies[1].src, "the slot was used again");
    core.copies_done(&mut first);
    core.copies_done(&mut second);
    core.check(&[&first, &second, &faster]).unwrap();
    assert_eq!(core.table(&second, 0).unwrap()[0], copies[1].dst);
    end(&core, [first, second, faster]);
}

#[test]
fn a_commit_in_the_middle_of_the_move_of_its_page_leaves_no_slot_behind() {
    let (core, next) = core(1, &[(2, 2, Some(4))]);
    serve(&core, &[1], None);
    let mut own = create(&core, &[1]);
    assert!(core.resume(&mut own, &mut Vec::new()).unwrap());
    assert!(core.resize(&mut own, 1, None).unwrap());
    let (done, committed) = channel();
    let inside = core.clone();
    on_next(&next, move |_| {
        assert!(!inside.commit(&mut own, &[1]).unwrap(), "its own page stays");
        done.send(own).unwrap();
        true
    });
    let mut cache = create(&core, &[5]);
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    assert!(core.resize(&mut cache, 1, None).unwrap());
    let own = committed.try_recv().unwrap();
    core.check(&[&own, &cache]).unwrap();
    end(&core, [own, cache]);
}

#[test]
fn a_cache_that_is_closed_in_the_middle_of_its_move_leaves_nothing() {
    for copied in [true, false] {
        let (core, next) = core(1, &[(3, 3, None)]);
        let mut held = create(&core, &[1, 2, 3]);
        assert!(core.resume(&mut held, &mut Vec::new()).unwrap());
        assert!(core.resize(&mut held, 3, None).unwrap());
        core.suspend(&mut held).unwrap();
        let inside = core.clone();
        on_next(&next, move |_| {
            assert!(inside.close(&mut held).unwrap());
            copied
        });
        let mut cache = create(&core, &[9]);
        assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
        core.resize(&mut cache, 1, None).unwrap();
        core.check(&[&cache]).unwrap();
        let cached: u32 = [Tier::Device, Tier::Host]
            .map(|tier| core.books(tier)[0].cached)
            .iter()
            .sum();
        assert_eq!(cached, 0, "private blocks that nobody can find");
        end(&core, [cache]);
    }
}

/// A thread that is stopped in the middle of a move costs the others its block and the order, nothing else.
#[test]
fn others_go_on_while_a_thread_is_stopped_in_the_middle_of_a_move() {
    let (core, next) = core(1, &[(24, 24, None)]);
    let long: Vec<i32> = (0..22).collect();
    serve(&core, &long, None);
    assert_eq!(core.evict(21), 21); // one block on the device covers 21 on the host
    serve(&core, &[100], keep(30, f64::INFINITY)); // goes first
    let (reached, is_there) = channel();
    let (go, going) = channel();
    on_next(&next, move |_| {
        reached.send(()).unwrap();
        going.recv().is_ok()
    });
    let mover = {
        let core = core.clone();
        std::thread::spawn(move || core.evict(1))
    };
    is_there.recv().unwrap();
    // Its block cannot be claimed, all others can.
    assert_eq!(core.info(&create(&core, &[100, 1])).unwrap().reused, 0);
    let mut joined = create(&core, &long);
    assert_eq!(core.info(&joined).unwrap().reused, 21);
    core.close(&mut joined).unwrap();
    // All the rest of the device: the leaves of the host that cover its blocks go, however many there are.
    let most: Vec<i32> = (300..323).collect();
    let mut cache = create(&core, &most);
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    assert!(
        core.resize(&mut cache, 23, None).unwrap(),
        "refused though there is room"
    );
    core.commit(&mut cache, &most).unwrap();
    core.suspend(&mut cache).unwrap();
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    core.copies_done(&mut cache);
    go.send(()).unwrap();
    assert_eq!(mover.join().unwrap(), 1);
    core.check(&[&cache]).unwrap();
    end(&core, [cache]);
}

/// A commit onto a block that goes down keeps its own page private; onto one that is down, it brings its own.
#[test]
fn a_commit_onto_a_block_on_the_host_or_on_its_way_there_keeps_its_own_page() {
    let (core, next) = core(1, &[(4, 2, None)]);
    serve(&core, &[1], None);
    let ready = |tokens: &[i32]| {
        let mut cache = create(&core, tokens);
        assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
        assert!(core.resize(&mut cache, 1, None).unwrap());
        cache
    };
    let (mut early, mut late) = (ready(&[1]), ready(&[1]));
    let (done, committed) = channel();
    let inside = core.clone();
    on_next(&next, move |_| {
        assert!(!inside.commit(&mut early, &[1]).unwrap());
        done.send(early).unwrap();
        true
    });
    assert_eq!(core.evict(1), 1);
    let early = committed.try_recv().unwrap();
    assert!(!core.commit(&mut late, &[1]).unwrap());
    core.check(&[&early, &late]).unwrap();
    assert_eq!(core.books(Tier::Host)[0].free, 2, "the other copy is freed");
    let third = serve_open(&core, &[1, 2], None);
    assert_eq!(
        core.table(&third, 0).unwrap()[0],
        core.table(&late, 0).unwrap()[0]
    );
    end(&core, [early, late, third]);
}
