//! What the tests of single calls share.
#![allow(dead_code)]

use kvpool_core::types::*;
use kvpool_core::{Cache, Claim, Core};

/// A pool of so many slots.
pub fn pool(num_slots: u32, window: Option<u64>) -> PoolSpec {
    PoolSpec {
        name: "p".into(),
        num_slots,
        host_slots: 0,
        window,
        sink_tokens: 0,
    }
}

/// An empty core.
pub fn core(tokens_per_block: u32, pools: Vec<PoolSpec>, max_blocks: u32, policy: PolicyKind) -> Core {
    Core::new(CoreConfig {
        tokens_per_block,
        pools,
        max_blocks,
        max_seq_len: Some(64),
        partial_reuse: true,
        hash_seed: 1,
        policy,
        offload_min_priority: 30,
        collide: false,
    })
    .unwrap()
}

/// One priority and duration for all of a request.
pub fn keep(priority: u8, duration: f64) -> Option<RetentionSpec> {
    let retain = Retain { priority, duration };
    Some(RetentionSpec {
        ranges: vec![RangeSpec {
            start: 0,
            end: u64::MAX,
            retain,
        }],
        decode: retain,
    })
}

/// A request from create to the commit of its prompt.
pub fn serve_open(core: &Core, tokens: &[i32], retention: Option<RetentionSpec>) -> Cache {
    let mut cache = core.create(tokens, b"", None, retention).unwrap();
    assert!(core.resume(&mut cache, &mut Vec::new()).unwrap());
    core.copies_done(&mut cache);
    let have = core.info(&cache).unwrap().committed as usize;
    assert!(core.resize(&mut cache, tokens.len() as u64, None).unwrap());
    core.commit(&mut cache, &tokens[have..]).unwrap();
    cache
}

/// A whole request.
pub fn serve(core: &Core, tokens: &[i32], retention: Option<RetentionSpec>) {
    let mut cache = serve_open(core, tokens, retention);
    core.close(&mut cache).unwrap();
}

/// A promised claim of a batch by itself, of all its tokens.
pub fn claim(core: &Core, tokens: &[i32]) -> Option<Cache> {
    let claim = Claim {
        tokens: tokens.into(),
        scope: b"",
        epoch: None,
        retention: None,
        least: None,
        most: None,
    };
    core.claim_all(vec![claim], true).unwrap().pop().unwrap()
}

/// Tokens of a sequence that are cached.
pub fn cached(core: &Core, tokens: &[i32]) -> u64 {
    core.probe(&[tokens, &[999]].concat(), b"", None).unwrap()
}
