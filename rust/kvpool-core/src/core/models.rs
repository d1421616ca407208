//! Models of paths and promises over the whole core: H7, payment before claims, epochs.

use super::Core;
use crate::models::{fails, holds};
use crate::sync::Weak;
use crate::tree::Root;
use crate::types::{CoreConfig, PolicyKind, PoolSpec};
use crate::words::{Link, Tier};
use loom::sync::Arc;
use loom::thread;

/// One token per block; slots of both tiers, and the window, by pool.
pub(super) fn config(pools: impl Iterator<Item = (u32, u32, Option<u64>)>, max_blocks: u32) -> CoreConfig {
    let pool = |(num_slots, host_slots, window)| PoolSpec {
        name: "kv".into(),
        num_slots,
        host_slots,
        window,
        sink_tokens: 0,
    };
    CoreConfig {
        tokens_per_block: 1,
        pools: pools.map(pool).collect(),
        max_blocks,
        max_seq_len: Some(4),
        partial_reuse: false,
        hash_seed: 1,
        policy: PolicyKind::Lru,
        offload_min_priority: 30,
        collide: false,
    }
}

pub(super) fn core(slots: &[u32], max_blocks: u32) -> Arc<Core> {
    let pools = slots.iter().map(|&slots| (slots, 0, None));
    Arc::new(Core::new(config(pools, max_blocks)).unwrap())
}

/// Caches `tokens`, if there is room, and lets them go.
pub(super) fn cached(core: &Core, tokens: &[i32]) {
    let mut cache = core.create(tokens, b"", None, None).unwrap();
    core.resume(&mut cache, &mut Vec::new()).unwrap();
    if core.resize(&mut cache, tokens.len() as u64, None).unwrap() {
        let have = core.info(&cache).unwrap().committed as usize;
        core.commit(&mut cache, &tokens[have..]).unwrap();
    }
    core.close(&mut cache).unwrap();
}

fn path(core: &Core, root: &Root, tokens: &[i32]) -> Vec<Link> {
    let (mut found, mut parent, mut key) = (Vec::new(), Link::NIL, root.key());
    for token in tokens.chunks(1) {
        key = core.tree.extend_key(key, token);
        let Some(node) = core.tree.child(root, parent, key, token) else {
            break;
        };
        found.push(node);
        parent = node;
    }
    found
}

/// A promise is kept: who reserved the last slot finds it, claims or no claims.
fn claim_against_promise() {
    let core = core(&[1], 1);
    cached(&core, &[1]);
    let root = core.root(b"", 0);
    let found = path(&core, &root, &[1]);
    let other = {
        let core = core.clone();
        thread::spawn(move || core.claim_path(&found).is_ok())
    };
    let promised = core.pools[0].reserve(1);
    let kept = promised && core.tree.kill(0).is_some();
    let claimed = other.join().unwrap();
    assert!(
        !promised || kept || !claimed,
        "claimed what was promised to another"
    );
    assert!(promised || claimed, "neither got it");
}

#[test]
fn claim_and_promise() {
    holds(2, claim_against_promise);
}

#[test]
fn claim_before_payment() {
    fails(
        Weak::PayLater,
        "claimed what was promised to another",
        2,
        claim_against_promise,
    );
}

/// All pools or none: a refused promise leaves nothing behind.
fn promise_in_two_pools() {
    let core = core(&[2, 1], 1);
    let other = {
        let core = core.clone();
        thread::spawn(move || core.reserve_nodes(Tier::Device, 1))
    };
    let ours = core.reserve_nodes(Tier::Device, 1);
    let theirs = other.join().unwrap();
    assert!(ours || theirs, "one of them fits");
    let promised = u32::from(ours) + u32::from(theirs);
    assert_eq!(
        core.pools[0].available(),
        2 - promised,
        "a refused promise left something behind"
    );
}

#[test]
fn promises_in_two_pools() {
    holds(2, promise_in_two_pools);
}

#[test]
fn promises_without_roll_back() {
    fails(
        Weak::ReserveRollback,
        "a refused promise left something behind",
        2,
        promise_in_two_pools,
    );
}

/// H7: a path that could be claimed is one path at one time: every block of it is in the tree.
fn path_against_reinsertion() {
    let core = core(&[2], 2);
    cached(&core, &[1, 2]);
    let root = core.root(b"", 0);
    let other = {
        let core = core.clone();
        thread::spawn(move || {
            if core.evict(2) == 2 {
                // The other way round, so that the blocks swap their nodes; then held, so that a claim joins.
                let last = core.tree.take_node();
                cached(&core, &[1]);
                if let Some(last) = last {
                    core.tree.recycle(last);
                }
                cached(&core, &[1, 2]);
            }
            core.create(&[1, 2, 3], b"", None, None).unwrap()
        })
    };
    let found = path(&core, &root, &[1, 2]);
    let claimed = core.claim_path(&found).is_ok();
    if claimed {
        assert!(
            found.iter().all(|&node| core.tree.is_live(node)),
            "an ancestor is not in the tree"
        );
    }
    let mut cache = other.join().unwrap();
    core.close(&mut cache).unwrap();
    if let (true, Some(&deepest)) = (claimed, found.last()) {
        core.release_path(deepest, core.tick(), 0);
    }
    core.check(&[]).unwrap();
}

#[test]
fn path_and_reinsertion() {
    holds(1, path_against_reinsertion);
}

#[test]
fn path_without_parents() {
    fails(
        Weak::ParentLink,
        "an ancestor is not in the tree",
        1,
        path_against_reinsertion,
    );
}

/// Two claims and their releases leave the counts as they were, and no claimed node is ever evictable.
#[test]
fn claim_release_and_claim() {
    holds(2, || {
        let core = core(&[2], 2);
        cached(&core, &[1, 2]);
        let root = core.root(b"", 0);
        let found = path(&core, &root, &[1, 2]);
        let claim = |core: &Core, found: &[Link]| {
            if core.claim_path(found).is_ok() {
                assert!(found.iter().all(|node| core.tree.state(node.index()).refs() > 0));
                core.release_path(found[found.len() - 1], core.tick(), 0);
            }
        };
        let other = {
            let (core, found) = (core.clone(), found.clone());
            thread::spawn(move || claim(&core, &found[..1]))
        };
        claim(&core, &found);
        other.join().unwrap();
        assert_eq!(core.pools[0].available(), 2);
        core.check(&[]).unwrap();
    });
}

/// A claim and an eviction of the same leaf: the books balance afterwards, and no slot is lost.
#[test]
fn claim_and_evict_balance() {
    holds(2, || {
        let core = core(&[2], 2);
        cached(&core, &[1, 2]);
        let other = {
            let core = core.clone();
            thread::spawn(move || core.evict(1))
        };
        let mut cache = core.create(&[1, 2, 3], b"", None, None).unwrap();
        let reused = core.info(&cache).unwrap().reused;
        let evicted = other.join().unwrap();
        assert!(
            reused + evicted >= 2 || reused == 0,
            "reused {reused}, evicted {evicted}"
        );
        core.check(&[&cache]).unwrap();
        core.close(&mut cache).unwrap();
        core.check(&[]).unwrap();
    });
}

/// A partial match on a leaf that goes: the source is claimed whole, or the match ends before it.
#[test]
fn partial_match_and_evict() {
    holds(2, || {
        let pool = PoolSpec {
            name: "full".into(),
            num_slots: 2,
            host_slots: 0,
            window: None,
            sink_tokens: 0,
        };
        let config = CoreConfig {
            tokens_per_block: 2,
            pools: vec![pool],
            max_blocks: 2,
            max_seq_len: Some(4),
            partial_reuse: true,
            hash_seed: 1,
            policy: PolicyKind::Lru,
            offload_min_priority: 30,
            collide: false,
        };
        let core = Arc::new(Core::new(config).unwrap());
        cached(&core, &[1, 2]);
        let other = {
            let core = core.clone();
            thread::spawn(move || core.evict(1))
        };
        let mut cache = core.create(&[1, 3, 4], b"", None, None).unwrap();
        let evicted = other.join().unwrap();
        let reused = core.info(&cache).unwrap().reused;
        assert_eq!(
            reused,
            1 - evicted,
            "of a source that went, or of none though it is there"
        );
        assert!(cache.source.is_nil() || core.tree.is_live(cache.source));
        core.check(&[&cache]).unwrap();
        core.close(&mut cache).unwrap();
        core.check(&[]).unwrap();
    });
}

/// Two commits of the same block: one node, and the loser switches to the winner's page.
#[test]
fn commit_and_commit() {
    holds(2, || {
        let core = core(&[2], 2);
        let open = |core: &Core| {
            let mut cache = core.create(&[1], b"", None, None).unwrap();
            core.resume(&mut cache, &mut Vec::new()).unwrap();
            assert!(core.resize(&mut cache, 1, None).unwrap());
            cache
        };
        let (mut ours, mut theirs) = (open(&core), open(&core));
        let other = {
            let core = core.clone();
            thread::spawn(move || (core.commit(&mut theirs, &[1]).unwrap(), theirs))
        };
        let switched = core.commit(&mut ours, &[1]).unwrap();
        let (also, mut theirs) = other.join().unwrap();
        assert!(switched != also, "exactly one switches");
        assert_eq!(
            core.table(&ours, 0).unwrap(),
            core.table(&theirs, 0).unwrap(),
            "two pages of one block"
        );
        core.check(&[&ours, &theirs]).unwrap();
        core.close(&mut ours).unwrap();
        core.close(&mut theirs).unwrap();
        core.check(&[]).unwrap();
        assert_eq!(core.pools[0].available(), 2);
    });
}

/// Epoch change under readers: who asks after `set_epoch` finds nothing old.
#[test]
fn epoch_and_create() {
    holds(2, || {
        let core = core(&[1], 1);
        cached(&core, &[1]);
        let other = {
            let core = core.clone();
            thread::spawn(move || {
                core.set_epoch(1).unwrap();
                core.probe(&[1, 2], b"", None).unwrap()
            })
        };
        let mut cache = core.create(&[1, 2], b"", None, None).unwrap();
        assert_eq!(other.join().unwrap(), 0, "old content after set_epoch");
        assert!(core.info(&cache).unwrap().reused == 0 || cache.root.epoch == 0);
        core.close(&mut cache).unwrap();
        assert_eq!(core.probe(&[1, 2], b"", None).unwrap(), 0);
        core.check(&[]).unwrap();
    });
}
