//! Copies down that fail at once, the k-th of a run for all k: what is dropped is a page that nobody claims, and books hold.

mod common;

use common::{cached, serve, serve_open};
use kvpool_core::types::*;
use kvpool_core::Core;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Fails at one copy.
#[derive(Debug)]
struct Faulty {
    fails: u64,
    copies: Arc<AtomicU64>,
}

impl Mover for Faulty {
    fn offload(&self, _: usize, _: u32, _: u32) -> bool {
        self.copies.fetch_add(1, Ordering::Relaxed) != self.fails // Relaxed: one thread
    }
}

/// A full-attention pool and one with a window, blocks of two tokens. The copies are counted from here on.
fn core(slots: u32, fails: u64) -> (Core, Arc<AtomicU64>) {
    let pool = |window| PoolSpec {
        name: "p".into(),
        num_slots: slots,
        host_slots: 8,
        window,
        sink_tokens: 0,
    };
    let config = CoreConfig {
        tokens_per_block: 2,
        pools: vec![pool(None), pool(Some(3))],
        max_blocks: 32,
        max_seq_len: None,
        partial_reuse: true,
        hash_seed: 1,
        policy: PolicyKind::Lru,
        offload_min_priority: 30,
        collide: false,
    };
    let copies = Arc::new(AtomicU64::new(0));
    let mover = Faulty {
        fails,
        copies: copies.clone(),
    };
    (Core::with_mover(config, Box::new(mover)).unwrap(), copies)
}

#[test]
fn a_failed_copy_of_an_unclaimed_block_drops_it_for_every_k() {
    for k in 0.. {
        let (core, copies) = core(6, k);
        serve(&core, &[1, 2, 3, 4, 5, 6], None);
        serve(&core, &[21, 22, 23, 24, 25, 26], None);
        serve(&core, &[31, 32, 33, 34, 35, 36], None); // three blocks must go
        core.check(&[]).unwrap();
        let failed = k < copies.load(Ordering::Relaxed); // Relaxed: one thread
        let kept = cached(&core, &[1, 2, 3, 4, 5, 6]) + cached(&core, &[21, 22, 23, 24, 25, 26]);
        assert_eq!(core.counters().dropped > 0, failed, "k = {k}");
        assert!(kept >= if failed { 6 } else { 12 }, "k = {k}: {kept}");
        core.clear();
        core.check(&[]).unwrap();
        if !failed {
            assert!(k >= 6, "three blocks in two pools are six copies");
            return;
        }
    }
}

#[test]
fn a_failed_copy_of_a_suspended_cache_leaves_its_pages_where_they_were_for_every_k() {
    for k in 0..5 {
        let (core, _) = core(3, k);
        let mut cache = serve_open(&core, &[1, 2, 3, 4, 5, 6], None);
        core.suspend(&mut cache).unwrap();
        let mut other = core.create(&[], b"", None, None).unwrap();
        core.resume(&mut other, &mut Vec::new()).unwrap();
        // Two blocks, each with a page in both pools; nobody claims the last of these four pages, which is stale.
        assert_eq!(core.resize(&mut other, 4, None).unwrap(), k >= 3, "k = {k}");
        core.check(&[&cache, &other]).unwrap();
        assert_eq!(core.counters().dropped, u64::from(k == 3), "k = {k}");
        core.close(&mut other).unwrap();
        let mut copies = Vec::new();
        assert!(core.resume(&mut cache, &mut copies).unwrap(), "k = {k}");
        core.copies_done(&mut cache);
        assert_eq!(core.counters().onboarded, copies.len() as u64);
        core.check(&[&cache]).unwrap();
        core.close(&mut cache).unwrap();
        assert!(cached(&core, &[1, 2, 3, 4, 5, 6]) >= 4);
    }
}
