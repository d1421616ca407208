//! What the machine itself takes: atomic operations, and loads from memory of several sizes.

use crate::measure::{alone, ends, together, Effort};
use crate::world::Rng;
use serde_json::{json, Map, Value};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering::AcqRel, Ordering::Acquire, Ordering::Relaxed};

const MANY: usize = 200_000;
/// For threads: so many that they run beside each other for most of the time, whenever each is woken.
const LONG: usize = 3_000_000;
/// Words of eight bytes per line of the cache.
const LINE: usize = 8;

#[repr(align(128))]
struct Alone(AtomicU64);

fn step(word: &AtomicU64) {
    let seen = word.load(Relaxed);
    let _ = word.compare_exchange(seen, seen + 1, AcqRel, Relaxed);
}

/// A cycle through one word of each line of `bytes`, in an order that no prefetcher guesses.
pub fn cycle(bytes: usize) -> Vec<usize> {
    let lines = (bytes / 64).max(2);
    let mut order: Vec<usize> = (0..lines).collect();
    let mut rng = Rng::new();
    for i in (1..lines).rev() {
        order.swap(i, rng.below(i)); // never itself: one cycle through all (Sattolo)
    }
    let mut next = vec![0; lines * LINE];
    for (i, &line) in order.iter().enumerate() {
        next[i * LINE] = line * LINE;
    }
    next
}

/// Nanoseconds of one load whose address is what the load before it returned, the least of some rounds.
pub fn dependent(next: &[usize]) -> f64 {
    let mut at = 0;
    let rounds = (0..3).map(|_| alone(MANY, |_| at = next[at]));
    let least = rounds.fold(f64::INFINITY, f64::min);
    black_box(at);
    least
}

/// Nanoseconds of one load, of eight chains that do not wait for one another.
fn independent(next: &[usize]) -> f64 {
    let lines = next.len() / LINE;
    let mut at: [usize; 8] = std::array::from_fn(|i| i * (lines / 8) * LINE);
    let rounds = (0..3).map(|_| alone(MANY / 8, |_| at.iter_mut().for_each(|at| *at = next[*at])) / 8.0);
    let least = rounds.fold(f64::INFINITY, f64::min);
    black_box(at);
    least
}

/// All floors, ns per operation.
pub fn run(effort: Effort) -> Value {
    let mut atomics = Map::new();
    let word = Alone(AtomicU64::new(0));
    let mut times: [Vec<f64>; 5] = Default::default();
    let packed: Vec<AtomicU64> = (0..1 << 16).map(|_| AtomicU64::new(0)).collect();
    let mut rng = Rng::new();
    for _ in 0..effort.rounds {
        times[0].push(alone(MANY, |_| _ = word.0.fetch_add(1, AcqRel)));
        times[1].push(alone(MANY, |_| step(&word.0)));
        times[2].push(together(2, LONG, |_, _| _ = word.0.fetch_add(1, AcqRel)).0);
        times[3].push(together(2, LONG, |_, _| step(&word.0)).0);
        let picks: Vec<usize> = (0..MANY).map(|_| rng.below(packed.len())).collect();
        times[4].push(alone(MANY, |i| {
            let word = &packed[picks[i]];
            step(word);
            black_box(word.load(Acquire));
            word.fetch_sub(1, AcqRel);
        }));
    }
    let names = [
        "fetch_add",
        "compare_exchange",
        "fetch_add, two threads on one line",
        "compare_exchange, two threads on one line",
        "compare_exchange and fetch_sub on random packed words",
    ];
    for (name, times) in names.iter().zip(&times) {
        atomics.insert((*name).into(), json!(ends(times)));
    }
    let loads: Vec<Value> = [1, 4, 16, 64, 256].iter().map(|&mib| loads(mib)).collect();
    json!({ "atomics": atomics, "loads": loads })
}

fn loads(mib: usize) -> Value {
    let next = cycle(mib << 20);
    json!({ "mib": mib, "dependent": ends(&[dependent(&next)])[0], "independent": ends(&[independent(&next)])[0] })
}
