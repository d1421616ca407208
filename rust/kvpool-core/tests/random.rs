//! Random operations on the core: the books balance after each, and no block is ever taken for another.
//!
//! The comparison with the reference model runs from Python (tests/test_model_random.py); here the
//! content of every page is tracked, under both policies and with every hash forced to collide.

use kvpool_core::types::{CacheState, CoreConfig, PolicyKind, PoolSpec, RangeSpec, Retain, RetentionSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Core};
use proptest::prelude::*;
use std::collections::HashMap;

const SCOPES: [&[u8]; 2] = [b"a", b"b"];

#[derive(Debug, Clone)]
enum Op {
    Create {
        scope: usize,
        tokens: Vec<i32>,
        priority: Option<u8>,
    },
    Resume(usize),
    Suspend(usize),
    Grow {
        cache: usize,
        by: u64,
        ahead: u64,
    },
    Commit {
        cache: usize,
        tokens: Vec<i32>,
    },
    Close(usize),
    Evict(u64),
    Clear,
    Epoch,
    Step(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let tokens = || prop::collection::vec(0..3i32, 0..14);
    prop_oneof![
        4 => (0..2usize, tokens(), prop::option::of(0..100u8)).prop_map(|(scope, tokens, priority)| Op::Create { scope, tokens, priority }),
        4 => any::<usize>().prop_map(Op::Resume),
        1 => any::<usize>().prop_map(Op::Suspend),
        6 => (any::<usize>(), 0..9u64, 0..4u64).prop_map(|(cache, by, ahead)| Op::Grow { cache, by, ahead }),
        6 => (any::<usize>(), tokens()).prop_map(|(cache, tokens)| Op::Commit { cache, tokens }),
        3 => any::<usize>().prop_map(Op::Close),
        1 => (0..3u64).prop_map(Op::Evict),
        1 => Just(Op::Clear),
        1 => Just(Op::Epoch),
        2 => any::<usize>().prop_map(Op::Step),
    ]
}

struct Open {
    cache: Cache,
    scope: (usize, u64),
    prompt: Vec<i32>,
    committed: Vec<i32>,
    in_flight: bool,
}

/// What a page holds: scope, epoch and all tokens up to the end of its block.
type Content = (usize, u64, Vec<i32>);

fn run(pools: Vec<PoolSpec>, policy: PolicyKind, collide: bool, max_blocks: u32, ops: Vec<Op>) {
    let t = 2u64;
    let config = CoreConfig {
        tokens_per_block: t as u32,
        pools: pools.clone(),
        max_blocks,
        max_seq_len: Some(24),
        partial_reuse: true,
        hash_seed: 7,
        policy,
        offload_min_priority: 30,
        collide,
    };
    let core = Core::new(config).unwrap();
    let mut open: Vec<Open> = Vec::new();
    let mut content: HashMap<(usize, u32), Content> = HashMap::new();
    let mut epoch = 0;
    for op in ops {
        match op {
            Op::Create {
                scope,
                tokens,
                priority,
            } => {
                let retention = priority.map(|priority| RetentionSpec {
                    ranges: vec![RangeSpec {
                        start: 0,
                        end: 4,
                        retain: Retain {
                            priority,
                            ..Retain::DEFAULT
                        },
                    }],
                    decode: Retain {
                        priority: 50,
                        ..Retain::DEFAULT
                    },
                });
                let probed = core.probe(&tokens, SCOPES[scope], None).unwrap();
                let cache = core.create(&tokens, SCOPES[scope], None, retention).unwrap();
                let reused = core.info(&cache).unwrap().reused;
                assert_eq!(probed, reused, "probe differs from create");
                assert!(reused <= (tokens.len() as u64).saturating_sub(1));
                let committed = tokens[..reused as usize].to_vec();
                open.push(Open {
                    cache,
                    scope: (scope, epoch),
                    prompt: tokens,
                    committed,
                    in_flight: false,
                });
            }
            Op::Resume(i) if !open.is_empty() => {
                let at = i % open.len();
                let one = &mut open[at];
                let mut copies = Vec::new();
                assert!(core.resume(&mut one.cache, &mut copies).unwrap());
                for copy in &copies {
                    let from = content[&(copy.pool as usize, copy.src)].clone();
                    content.insert((copy.pool as usize, copy.dst), from);
                }
                core.copies_done(&mut one.cache);
                let reused = core.info(&one.cache).unwrap().committed as usize;
                one.committed.truncate(reused);
                for (pool, spec) in pools.iter().enumerate() {
                    let (s, e) = spec.stale(core.info(&one.cache).unwrap().history, t);
                    let table = core.table(&one.cache, pool).unwrap();
                    for (i, &slot) in table.iter().enumerate() {
                        let end = ((i as u64 + 1) * t).min(one.committed.len() as u64) as usize;
                        if i as u64 * t >= end as u64 {
                            continue;
                        }
                        assert_eq!(
                            slot == 0,
                            i >= s && i < e,
                            "stale entries and only they are empty"
                        );
                        if slot != 0 {
                            let (scope, epoch, tokens) = &content[&(pool, slot)];
                            assert_eq!((*scope, *epoch), one.scope, "a page of another scope");
                            assert_eq!(tokens[..end], one.committed[..end], "a page of other tokens");
                        }
                    }
                }
            }
            Op::Suspend(i) if !open.is_empty() => {
                let at = i % open.len();
                core.suspend(&mut open[at].cache).unwrap();
            }
            Op::Grow { cache, by, ahead } if !open.is_empty() => {
                let at = cache % open.len();
                let one = &mut open[at];
                let info = core.info(&one.cache).unwrap();
                let capacity = (info.capacity + by).min(24);
                let history = (info.history + ahead).min(capacity);
                let before = (core.books(Tier::Device), info.capacity);
                match core.resize(&mut one.cache, capacity, Some(history)) {
                    Ok(true) => assert_eq!(core.info(&one.cache).unwrap().capacity, capacity),
                    Ok(false) => assert_eq!(
                        (core.books(Tier::Device), core.info(&one.cache).unwrap().capacity),
                        before
                    ),
                    Err(_) => assert_ne!(info.state, CacheState::Active),
                }
            }
            Op::Commit { cache, tokens } if !open.is_empty() => {
                let at = cache % open.len();
                let one = &mut open[at];
                let info = core.info(&one.cache).unwrap();
                let room = (info.capacity - info.committed) as usize;
                let mut tokens = tokens;
                tokens.truncate(room);
                for (i, token) in tokens.iter_mut().enumerate() {
                    if let Some(&given) = one.prompt.get(one.committed.len() + i) {
                        *token = given;
                    }
                }
                if info.state != CacheState::Active {
                    assert!(core.commit(&mut one.cache, &tokens).is_err());
                    continue;
                }
                // "Compute": the pages of the blocks these tokens fall into hold the prefix.
                let from = one.committed.len() as u64 / t;
                one.committed.extend(&tokens);
                for pool in 0..pools.len() {
                    for (i, &slot) in core
                        .table(&one.cache, pool)
                        .unwrap()
                        .iter()
                        .enumerate()
                        .skip(from as usize)
                    {
                        let end = ((i + 1) * t as usize).min(one.committed.len());
                        if slot != 0 && i * (t as usize) < end {
                            let (scope, epoch) = one.scope;
                            content.insert((pool, slot), (scope, epoch, one.committed[..end].to_vec()));
                        }
                    }
                }
                core.commit(&mut one.cache, &tokens).unwrap();
            }
            Op::Close(i) if !open.is_empty() => {
                let at = i % open.len();
                let mut one = open.swap_remove(at);
                let over = core.close(&mut one.cache).unwrap();
                assert_eq!(over, !one.in_flight);
                if one.in_flight {
                    assert!(core.step_end(&mut one.cache, 1).unwrap());
                }
            }
            Op::Evict(n) => assert!(core.evict(n) <= n),
            Op::Clear => {
                core.clear();
                assert!(
                    core.books(Tier::Device).iter().all(|books| books.cached == 0),
                    "clear left cached pages"
                );
            }
            Op::Epoch => {
                epoch += 1;
                core.set_epoch(epoch).unwrap();
            }
            Op::Step(i) if !open.is_empty() => {
                let at = i % open.len();
                let one = &mut open[at];
                if one.in_flight {
                    core.step_end(&mut one.cache, 1).unwrap();
                    one.in_flight = false;
                } else {
                    one.in_flight = core.step_begin(&mut one.cache, 1).is_ok();
                }
            }
            _ => {}
        }
        let caches: Vec<&Cache> = open.iter().map(|one| &one.cache).collect();
        core.check(&caches).unwrap();
    }
    for mut one in open {
        core.close(&mut one.cache).unwrap();
        if one.in_flight {
            core.step_end(&mut one.cache, 1).unwrap();
        }
    }
    core.clear();
    core.check(&[]).unwrap();
    for books in core.books(Tier::Device) {
        assert_eq!(books.free, books.slots, "a page was lost");
    }
}

fn pool(name: &str, num_slots: u32, window: Option<u64>, sink_tokens: u64) -> PoolSpec {
    PoolSpec {
        name: name.into(),
        num_slots,
        host_slots: 0,
        window,
        sink_tokens,
    }
}

fn pools() -> impl Strategy<Value = Vec<PoolSpec>> {
    prop_oneof![
        (2..12u32).prop_map(|n| vec![pool("full", n, None, 0)]),
        (2..12u32, 2..9u32, 1..7u64)
            .prop_map(|(n, m, w)| vec![pool("full", n, None, 0), pool("window", m, Some(w), 0)]),
        (2..12u32, 2..9u32, 1..7u64, 1..4u64)
            .prop_map(|(n, m, w, s)| vec![pool("sinks", m, Some(w), s), pool("full", n, None, 0)]),
        (2..9u32, 2..9u32, 1..7u64)
            .prop_map(|(n, m, w)| vec![pool("near", n, Some(w), 0), pool("far", m, Some(w + 4), 3)]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn books_balance_and_no_wrong_page(
        pools in pools(),
        slru in any::<bool>(),
        collide in any::<bool>(),
        max_blocks in 2..14u32,
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let policy = if slru { PolicyKind::Slru } else { PolicyKind::Lru };
        run(pools, policy, collide, max_blocks, ops);
    }
}
