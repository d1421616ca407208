//! Every policy keeps its contract, and `Slru` protects what it says.

use kvpool_core::evict::{Lru, Policy, Slru};
use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::words::Link;
use kvpool_core::Core;

const CAPACITY: usize = 20;

fn policies() -> Vec<Box<dyn Policy>> {
    vec![Box::<Lru>::default(), Box::new(Slru::new(CAPACITY))]
}

fn node(id: u32) -> Link {
    Link::new(0, id)
}

#[test]
fn segments_are_0_or_1_and_a_miss_is_not_protected() {
    for mut policy in policies() {
        for matched in 0..10 {
            let keys: Vec<u64> = (0..10).collect();
            assert!(policy.request(&keys, matched) <= 1);
        }
        assert_eq!(policy.request(&[1, 2, 3], 0), 0, "{policy:?}");
    }
}

#[test]
fn overflow_ends_once_every_named_block_is_demoted() {
    for mut policy in policies() {
        for id in 0..CAPACITY as u32 {
            policy.protect(node(id), u64::from(id));
        }
        let mut named = 0;
        while policy.overflow().is_some() {
            policy.demoted();
            named += 1;
            assert!(
                named <= CAPACITY,
                "{policy:?} names more blocks than were protected"
            );
        }
    }
}

#[test]
fn slru_protects_at_most_30_percent_oldest_go_first() {
    let mut policy = Slru::new(CAPACITY);
    for id in 0..10 {
        policy.protect(node(id), u64::from(id));
    }
    let mut demoted = Vec::new();
    while let Some((node, _)) = policy.overflow() {
        demoted.push(node.index() as u32);
        policy.demoted();
    }
    assert_eq!(demoted, [0, 1, 2, 3]); // 6 = 30 % of 20 stay
}

#[test]
fn slru_keeps_what_was_used_since() {
    let mut policy = Slru::new(CAPACITY);
    for id in 0..7 {
        policy.protect(node(id), 0);
    }
    assert_eq!(policy.overflow(), Some((node(0), 0)));
    policy.keep(node(0), 9);
    assert_eq!(policy.overflow(), Some((node(1), 0)));
    policy.demoted();
    assert_eq!(policy.overflow(), None);
}

#[test]
fn slru_counts_ghosts_as_reuse_and_remembers_4_times_the_capacity() {
    let mut policy = Slru::new(CAPACITY);
    let keys: Vec<u64> = (0..4).collect();
    assert_eq!(policy.request(&keys, 3), 0, "3 are not more than 3");
    assert_eq!(policy.request(&keys, 4), 1);
    policy.removed(3);
    assert_eq!(policy.request(&keys, 3), 1, "the ghost of 3 counts");
    for key in 100..100 + 4 * CAPACITY as u64 {
        policy.removed(key);
    }
    assert_eq!(policy.request(&keys, 3), 0, "forgotten");
}

/// A scan of new prompts does not push out what is reused; plain LRU loses it.
#[test]
fn slru_survives_a_scan_that_lru_does_not() {
    let survives = |policy| {
        let core = Core::new(CoreConfig {
            tokens_per_block: 1,
            pools: vec![PoolSpec {
                name: "kv".into(),
                num_slots: CAPACITY as u32,
                host_slots: 0,
                window: None,
                sink_tokens: 0,
            }],
            max_blocks: CAPACITY as u32,
            max_seq_len: None,
            partial_reuse: false,
            hash_seed: 3,
            policy,
            offload_min_priority: 30,
            collide: false,
        })
        .unwrap();
        let serve = |tokens: &[i32]| {
            let mut copies = Vec::new();
            let mut cache = core.create(tokens, b"", None, None).unwrap();
            let reused = core.info(&cache).unwrap().reused;
            core.resume(&mut cache, &mut copies).unwrap();
            assert!(core.resize(&mut cache, tokens.len() as u64, None).unwrap());
            core.commit(&mut cache, &tokens[reused as usize..]).unwrap();
            core.close(&mut cache).unwrap();
            core.check(&[]).unwrap();
            reused
        };
        let hot = [1, 2, 3, 4, 5, 6];
        serve(&hot);
        serve(&hot);
        for i in 0..10 {
            serve(&[100 + i, 200 + i, 300 + i]);
        }
        serve(&hot)
    };
    assert_eq!(survives(PolicyKind::Lru), 0);
    assert_eq!(survives(PolicyKind::Slru), 5);
}
