//! W3: a Mooncake trace in file order, 64 requests active at a time, blocks of 512 tokens.
//!
//! Only the managers' calls are timed, by the CPU clock, two system calls per request included. When a pool has no room the oldest active request ends early. "ids" is kvpool
//! with blocks of one token, the trace's id: as if hashing and comparing cost next to nothing.

use crate::kvbm::Kvbm;
use crate::kvpool::Kvpool;
use crate::measure::{rounded, Turns};
use crate::world::{Prompt, Shape, Side};
use kvpool_core::types::PolicyKind;
use serde_json::{json, Value};
use std::collections::VecDeque;
use std::time::Duration;

use cpu_time::ThreadTime;

const T: usize = 512;
const ACTIVE: usize = 64;
const ROUNDS: usize = 3;

fn read(path: &str) -> Vec<Vec<u64>> {
    let text = std::fs::read_to_string(path).expect("a readable trace");
    let line = |line: &str| {
        let record: Value = serde_json::from_str(line).expect("a JSON line");
        let ids = record["hash_ids"].as_array().expect("hash_ids");
        ids.iter().map(|id| id.as_u64().expect("an id")).collect()
    };
    text.lines().map(line).collect()
}

/// The tokens of a prompt and one more; the first of a block is its id.
fn tokens(ids: &[u64], t: usize) -> Vec<i32> {
    let mut tokens = Vec::with_capacity(ids.len() * t + 1);
    for &id in ids {
        let mut x = id.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for i in 0..t {
            x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(29);
            tokens.push(if i == 0 { id as i32 } else { (x >> 33) as i32 });
        }
    }
    tokens.push(0);
    tokens
}

/// (hit rate in percent, ns per block of the prompts)
fn replay<S: Side>(side: &S, prompts: &[Vec<u64>], slots: usize, t: usize, hashed: bool) -> (f64, f64) {
    let mut active: VecDeque<S::Request<'_>> = VecDeque::new();
    let (mut spent, mut blocks, mut hits) = (Duration::ZERO, 0, 0);
    for ids in prompts {
        let ids = &ids[..ids.len().min(slots)];
        let tokens = tokens(ids, t);
        let prompt = if hashed {
            Prompt::of(tokens, t)
        } else {
            Prompt {
                tokens,
                hashes: Vec::new(),
            }
        };
        blocks += ids.len();
        let start = ThreadTime::now();
        if active.len() == ACTIVE {
            active.pop_front();
        }
        let mut request = side.open(&prompt, ids.len());
        hits += S::reused(&request);
        while !S::store(&mut request, &prompt, ids.len()) {
            drop(active.pop_front().expect("room for one"));
        }
        spent += start.elapsed();
        active.push_back(request);
    }
    drop(active);
    side.check();
    let per_block = spent.as_nanos() as f64 / blocks as f64;
    (hits as f64 / blocks as f64 * 100.0, per_block)
}

pub fn run(path: &str) -> Value {
    let prompts = read(path);
    let rows = [3_000, 10_000, 30_000].map(|slots| {
        let shape = |t| Shape {
            slots,
            t,
            ..Shape::PEERS
        };
        let mut turns = Turns::new();
        let mut rates = [0.0; 3];
        for _ in 0..ROUNDS {
            let core = replay(&Kvpool::new(shape(T)), &prompts, slots, T, false);
            let kvbm = replay(&Kvbm::new(shape(T)), &prompts, slots, T, true);
            let ids = replay(&Kvpool::new(shape(1)), &prompts, slots, 1, false);
            let slru = Kvpool::with_policy(shape(1), PolicyKind::Slru);
            let slru = replay(&slru, &prompts, slots, 1, false);
            turns.note(Kvpool::NAME, core.1);
            turns.note(Kvbm::NAME, kvbm.1);
            turns.note("kvpool-core, ids", ids.1);
            rates = [core.0, kvbm.0, slru.0];
        }
        let [core, kvbm, slru] = rates.map(rounded);
        let hits = json!({ "kvpool-core": core, "kvbm-logical": kvbm, "kvpool-core, slru": slru });
        json!({ "blocks": slots, "ns": turns.json()["figures"], "hit_percent": hits })
    });
    json!(rows)
}
