//! How long single operations take by the wall clock: p50, p99, p99.9 and the longest, with and without a busy neighbour.
//!
//! The longest are mostly the machine's: interrupts, other processes. "arithmetic" takes about 10 us without touching
//! memory and shows how much; "nothing" is the clock around an empty operation.

use crate::compare::fill;
use crate::kvbm::Kvbm;
use crate::kvpool::Kvpool;
use crate::world::{Prompt, Rng, Shape, Side, BLOCKS, SLOTS, T};
use hdrhistogram::Histogram;
use serde_json::{json, Map, Value};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

const SAMPLES: usize = 20_000;
/// Prompts that are made at once.
const BATCH: usize = 500;

/// Histograms of operations by name, in the order in which they came.
#[derive(Default)]
struct Times(Vec<(&'static str, Histogram<u64>)>);

impl Times {
    fn time<R>(&mut self, name: &'static str, f: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = f();
        let ns = start.elapsed().as_nanos() as u64;
        let at = self.0.iter().position(|(known, _)| *known == name);
        let at = at.unwrap_or_else(|| {
            self.0.push((name, Histogram::new(3).expect("three digits")));
            self.0.len() - 1
        });
        self.0[at].1.record(ns).expect("it resizes itself");
        result
    }

    fn json(&self) -> Value {
        let mut operations = Map::new();
        for (name, times) in &self.0 {
            let at = |quantile| times.value_at_quantile(quantile);
            let row = json!({ "p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": times.max(),
                "samples": times.len() });
            operations.insert((*name).into(), row);
        }
        Value::Object(operations)
    }
}

/// What the machine does to anything that takes so long.
fn controls(times: &mut Times) {
    times.time("nothing", || black_box(()));
    let step = |x: u64, i: u64| black_box(x.rotate_left(7) ^ i);
    times.time("arithmetic", || (0..20_000).fold(1, step));
}

/// One request in its single operations: what is new is churned, then claimed again.
fn core_operations(times: &mut Times, core: &Kvpool, prompt: &Prompt) {
    let mut request = times.time("create, nothing cached", || core.open(prompt, BLOCKS));
    times.time("resume, nothing cached", || Kvpool::resume(&mut request));
    times.time("resize by 64 blocks, evicting", || {
        assert!(Kvpool::resize(&mut request, BLOCKS))
    });
    times.time("commit of 64 blocks", || {
        Kvpool::commit(&mut request, prompt, BLOCKS)
    });
    times.time("close", || drop(request));
    times.time("probe of 64 blocks", || {
        black_box(core.core.probe(&prompt.tokens, b"", None)).is_ok()
    });
    let mut request = times.time("create, 64 blocks cached", || core.open(prompt, BLOCKS));
    times.time("resume, 64 blocks cached", || Kvpool::resume(&mut request));
    times.time("resize by 1 block, evicting", || {
        Kvpool::resize(&mut request, BLOCKS + 1)
    });
    times.time("close, 64 blocks claimed", || drop(request));
    times.time("evict 1 block", || core.evict(1));
    times.time("evict 64 blocks", || core.evict(BLOCKS));
    controls(times);
}

fn kvbm_operations(times: &mut Times, kvbm: &Kvbm, prompt: &Prompt) {
    let mut request = kvbm.open(prompt, BLOCKS);
    times.time("allocate, evicting, and register 64 blocks", || {
        assert!(Kvbm::store(&mut request, prompt, BLOCKS))
    });
    times.time("drop of 64 blocks", || drop(request));
    let request = times.time("match of 64 blocks", || kvbm.open(prompt, BLOCKS));
    times.time("drop of 64 matched blocks", || drop(request));
    let evicted = times.time("allocate 64 blocks, evicting", || kvbm.evict(BLOCKS));
    times.time("drop of 64 empty blocks", || drop(evicted));
    controls(times);
}

/// Operations of this thread, while `neighbour` does W2 in the same pool or nothing.
fn sample<S: Side>(rng: &mut Rng, neighbour: bool, operate: impl Fn(&mut Times, &S, &Prompt)) -> Value {
    let side = S::new(Shape::PEERS);
    fill(&side, rng, BLOCKS);
    let theirs = Prompt::many(rng, 2 * SLOTS / BLOCKS, BLOCKS, T); // none is cached any more when it comes again
    let done = AtomicBool::new(false);
    let mut times = Times::default();
    std::thread::scope(|scope| {
        if neighbour {
            scope.spawn(|| {
                let turns = theirs.iter().cycle();
                // Relaxed: a flag alone, nothing is published by it.
                turns
                    .take_while(|_| !done.load(Relaxed))
                    .for_each(|prompt| side.churn(prompt, BLOCKS));
            });
        }
        for _ in 0..SAMPLES / BATCH {
            let fresh = Prompt::many(rng, BATCH, BLOCKS, T);
            fresh.iter().for_each(|prompt| operate(&mut times, &side, prompt));
        }
        done.store(true, Relaxed); // Relaxed: as its load
    });
    side.check();
    times.json()
}

pub fn run(rng: &mut Rng) -> Value {
    json!({
        "kvpool-core": sample(rng, false, core_operations),
        "kvpool-core, a neighbour churns": sample(rng, true, core_operations),
        "kvbm-logical": sample(rng, false, kvbm_operations),
        "kvbm-logical, a neighbour churns": sample(rng, true, kvbm_operations),
    })
}
