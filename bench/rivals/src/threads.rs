//! The work that 1, 2 and 4 threads do: W1 on sequences of their own, W1 on one shared sequence, W2.

use crate::compare::{cached, fill};
use crate::dynamo::{Dynamo, Keys};
use crate::kvbm::Kvbm;
use crate::kvpool::Kvpool;
use crate::measure::{ends, rounded, together, Effort};
use crate::world::{Prompt, Rng, Shape, Side, BLOCKS, SEQUENCES, T};
use serde_json::{json, Map, Value};

const THREADS: [usize; 3] = [1, 2, 4];
/// Times the calls of one thread in W1: so many that threads run beside each other whenever each is woken.
const LONGER: usize = 4;

/// (wall, CPU) ns per block of each round.
type Rounds = Vec<(f64, f64)>;

/// By system and number of threads.
#[derive(Default)]
struct Table(Vec<(&'static str, [Rounds; 3])>);

impl Table {
    fn note(&mut self, name: &'static str, at: usize, (wall, cpu): (f64, f64)) {
        if self.0.iter().all(|(known, _)| *known != name) {
            self.0.push((name, Default::default()));
        }
        let (_, values) = self
            .0
            .iter_mut()
            .find(|(known, _)| *known == name)
            .expect("noted");
        values[at].push((wall / BLOCKS as f64, cpu / BLOCKS as f64));
    }

    /// "work": what is done in the same time, as a multiple of one thread's, of the least times.
    fn json(&self) -> Value {
        let mut systems = Map::new();
        for (name, values) in &self.0 {
            let wall = |at: usize| ends(&values[at].iter().map(|ns| ns.0).collect::<Vec<_>>());
            let cpu = |at: usize| ends(&values[at].iter().map(|ns| ns.1).collect::<Vec<_>>());
            let work = |at: usize| rounded(wall(0)[0] / wall(at)[0]);
            let row = |at: usize| json!({ "threads": THREADS[at], "ns": wall(at), "cpu": cpu(at), "work": work(at) });
            systems.insert((*name).into(), json!([row(0), row(1), row(2)]));
        }
        Value::Object(systems)
    }
}

/// Threads that claim sequences of their own, or all the first one.
fn claims<S: Side>(
    side: &S,
    prompts: &[Prompt],
    picks: &[usize],
    threads: usize,
    shared: bool,
) -> (f64, f64) {
    let own = SEQUENCES / threads;
    let call = |thread: usize, i: usize| {
        let at = if shared { 0 } else { thread * own + picks[i] % own };
        side.claim(&prompts[at], BLOCKS);
    };
    together(threads, picks.len(), call)
}

fn churns<S: Side>(side: &S, fresh: &[Prompt], threads: usize) -> (f64, f64) {
    let calls = fresh.len() / threads;
    let call = |thread: usize, i: usize| side.churn(&fresh[thread * calls + i], BLOCKS);
    together(threads, calls, call)
}

fn hot(effort: Effort, rng: &mut Rng) -> (Table, Table) {
    let prompts = Prompt::many(rng, SEQUENCES, BLOCKS, T);
    let core: Kvpool = cached(Shape::PEERS, &prompts, BLOCKS);
    let kvbm: Kvbm = cached(Shape::PEERS, &prompts, BLOCKS);
    let keys: Vec<Keys> = prompts.iter().map(Keys::of).collect();
    let dynamo = Dynamo::new();
    dynamo.store(&keys, BLOCKS);
    let (mut own, mut one) = (Table::default(), Table::default());
    for _ in 0..effort.rounds {
        let picks: Vec<usize> = (0..LONGER * effort.calls).map(|_| rng.below(SEQUENCES)).collect();
        for (at, &threads) in THREADS.iter().enumerate() {
            for (table, shared) in [(&mut own, false), (&mut one, true)] {
                table.note(Kvpool::NAME, at, claims(&core, &prompts, &picks, threads, shared));
                table.note(Kvbm::NAME, at, claims(&kvbm, &prompts, &picks, threads, shared));
                let part = SEQUENCES / threads;
                let find = |thread: usize, i: usize| {
                    dynamo.find(
                        &keys[if shared {
                            0
                        } else {
                            thread * part + picks[i] % part
                        }],
                    );
                };
                table.note("dynamo, find only", at, together(threads, picks.len(), find));
            }
        }
    }
    core.check();
    (own, one)
}

fn cold(effort: Effort, rng: &mut Rng) -> Table {
    let (core, kvbm) = (Kvpool::new(Shape::PEERS), Kvbm::new(Shape::PEERS));
    fill(&core, rng, BLOCKS);
    fill(&kvbm, rng, BLOCKS);
    let mut table = Table::default();
    for _ in 0..effort.rounds {
        for (at, &threads) in THREADS.iter().enumerate() {
            let fresh = Prompt::many(rng, effort.calls * threads / 2, BLOCKS, T);
            table.note(Kvpool::NAME, at, churns(&core, &fresh, threads));
            table.note(Kvbm::NAME, at, churns(&kvbm, &fresh, threads));
        }
    }
    core.check();
    table
}

pub fn run(effort: Effort, rng: &mut Rng) -> Value {
    let (own, one) = hot(effort, rng);
    let w2 = cold(effort, rng);
    json!({ "W1, own sequences": own.json(), "W1, one shared sequence": one.json(), "W2": w2.json() })
}
