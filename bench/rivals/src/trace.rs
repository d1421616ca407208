//! W3: a Mooncake trace in file order, 64 requests active at a time, blocks of 512 tokens.
//!
//! Only the managers' calls are timed. kvbm-logical is given precomputed hashes; kvpool hashes and compares 512 tokens
//! per block and copies the prompt; "ids" is kvpool with blocks of one token, the id, as if hashing and comparing cost next
//! to nothing. When a pool has no room the oldest active request ends early.

use crate::{ends, hashes_of, make_core, make_rival};
use kvpool_core::Cache;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

const T: usize = 512;
const ACTIVE: usize = 64;
const ROUNDS: usize = 3;

fn read(path: &str) -> Vec<Vec<u64>> {
    let text = std::fs::read_to_string(path).expect("a readable trace");
    let line = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).expect("a JSON line");
        let ids = record["hash_ids"].as_array().expect("hash_ids");
        ids.iter().map(|id| id.as_u64().expect("an id")).collect()
    };
    text.lines().map(line).collect()
}

/// The tokens of a prompt and one more, so that its last block can be reused; the first of a block is its id.
fn tokens(ids: &[u64], t: usize, out: &mut Vec<i32>) {
    out.clear();
    for &id in ids {
        let mut x = id.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for i in 0..t {
            x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(29);
            out.push(if i == 0 { id as i32 } else { (x >> 33) as i32 });
        }
    }
    out.push(0);
}

/// (hit rate, ns per block)
fn ours(prompts: &[Vec<u64>], slots: usize, t: usize) -> (f64, f64) {
    let core = make_core(slots, t);
    let mut active: VecDeque<Cache> = VecDeque::new();
    let (mut spent, mut blocks, mut hits) = (Duration::ZERO, 0, 0);
    let (mut given, mut copies) = (Vec::new(), Vec::new());
    for ids in prompts {
        let ids = &ids[..ids.len().min(slots)];
        tokens(ids, t, &mut given);
        blocks += ids.len();
        let start = Instant::now();
        if active.len() == ACTIVE {
            core.close(&mut active.pop_front().expect("one")).expect("open");
        }
        let mut cache = core.create(&given, b"", None, None).expect("a cache");
        let reused = core.info(&cache).expect("open").reused as usize;
        core.resume(&mut cache, &mut copies).expect("open");
        core.copies_done(&mut cache);
        while !core
            .resize(&mut cache, (ids.len() * t) as u64, None)
            .expect("active")
        {
            core.close(&mut active.pop_front().expect("room for one"))
                .expect("open");
        }
        core.commit(&mut cache, &given[reused..ids.len() * t])
            .expect("active");
        spent += start.elapsed();
        hits += reused / t;
        active.push_back(cache);
    }
    for cache in &mut active {
        core.close(cache).expect("open");
    }
    core.check(&[]).expect("books");
    (
        hits as f64 / blocks as f64,
        spent.as_nanos() as f64 / blocks as f64,
    )
}

/// (hit rate, ns per block)
fn theirs(prompts: &[Vec<u64>], slots: usize) -> (f64, f64) {
    let manager = make_rival(slots, T);
    let mut active = VecDeque::new();
    let (mut spent, mut blocks, mut hits) = (Duration::ZERO, 0, 0);
    let mut given = Vec::new();
    for ids in prompts {
        let ids = &ids[..ids.len().min(slots)];
        tokens(ids, T, &mut given);
        let hashes = hashes_of(&given[..ids.len() * T], T);
        blocks += ids.len();
        let start = Instant::now();
        if active.len() == ACTIVE {
            active.pop_front();
        }
        let mut held = manager.match_blocks(&hashes);
        let reused = held.len();
        let fresh = loop {
            match manager.allocate_blocks(hashes.len() - reused) {
                Some(fresh) => break fresh,
                None => drop(active.pop_front().expect("room for one")),
            }
        };
        let complete = fresh.into_iter().zip(&hashes[reused..]);
        let complete = complete.map(|(block, &hash)| block.stage(hash, T).expect("size"));
        held.extend(manager.register_blocks(complete.collect()));
        spent += start.elapsed();
        hits += reused;
        active.push_back(held);
    }
    (
        hits as f64 / blocks as f64,
        spent.as_nanos() as f64 / blocks as f64,
    )
}

/// Prints hit rate and ns per block for three pool sizes.
pub fn run(path: &str) {
    let prompts = read(path);
    for slots in [3_000, 10_000, 30_000] {
        let (mut mine, mut bare, mut other) = (Vec::new(), Vec::new(), Vec::new());
        let mut rates = (0.0, 0.0);
        for _ in 0..ROUNDS {
            let (a, b) = (ours(&prompts, slots, T), theirs(&prompts, slots));
            bare.push(ours(&prompts, slots, 1).1);
            rates = (a.0, b.0);
            mine.push(a.1);
            other.push(b.1);
        }
        let (mine, bare, other) = (ends(&mut mine), ends(&mut bare), ends(&mut other));
        println!(
            "W3, {slots} blocks: kvpool-core {:.2} % hits, {:.0} / {:.0} ns per block (ids: {:.0} / {:.0}), kvbm-logical lru {:.2} %, {:.0} / {:.0}",
            rates.0 * 100.0,
            mine.0,
            mine.1,
            bare.0,
            bare.1,
            rates.1 * 100.0,
            other.0,
            other.1
        );
    }
}
