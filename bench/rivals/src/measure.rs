//! Time of many calls, by turns between systems, and how it is written down.

use cpu_time::ThreadTime;
use serde_json::{json, Map, Value};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// How often everything is measured: min and median are over rounds.
#[derive(Clone, Copy)]
pub struct Effort {
    pub rounds: usize,
    pub calls: usize,
}

/// CPU nanoseconds of one call, of `calls` calls of this thread.
pub fn alone(calls: usize, mut f: impl FnMut(usize)) -> f64 {
    let start = ThreadTime::now();
    (0..calls).for_each(&mut f);
    start.elapsed().as_nanos() as f64 / calls as f64
}

/// Nanoseconds per call of several threads: by the wall clock from the first start to the last end over the calls of all,
/// and of CPU time, which has no time in which a thread waits or is not run. `f(thread, call)`.
pub fn together(threads: usize, calls: usize, f: impl Fn(usize, usize) + Sync) -> (f64, f64) {
    let gate = Barrier::new(threads);
    let run = |thread: usize| {
        gate.wait();
        let (start, cpu) = (Instant::now(), ThreadTime::now());
        (0..calls).for_each(|call| f(thread, call));
        (start, Instant::now(), cpu.elapsed())
    };
    let times: Vec<(Instant, Instant, Duration)> = std::thread::scope(|scope| {
        let run = &run;
        let runs: Vec<_> = (0..threads).map(|i| scope.spawn(move || run(i))).collect();
        runs.into_iter()
            .map(|run| run.join().expect("a thread"))
            .collect()
    });
    let start = times.iter().map(|times| times.0).min().expect("a thread");
    let end = times.iter().map(|times| times.1).max().expect("a thread");
    let cpu: Duration = times.iter().map(|times| times.2).sum();
    let per_call = |time: Duration| time.as_nanos() as f64 / (threads * calls) as f64;
    (per_call(end - start), per_call(cpu))
}

/// Figures of several systems from the same rounds, the first is kvpool's.
pub struct Turns {
    names: Vec<&'static str>,
    values: Vec<Vec<f64>>,
}

impl Turns {
    pub fn new() -> Self {
        let (names, values) = (Vec::new(), Vec::new());
        Self { names, values }
    }

    /// A figure of a system in this round.
    pub fn note(&mut self, name: &'static str, value: f64) {
        let at = self.names.iter().position(|&known| known == name);
        let at = at.unwrap_or_else(|| {
            self.names.push(name);
            self.values.push(Vec::new());
            self.names.len() - 1
        });
        self.values[at].push(value);
    }

    /// Least and median of each, and of what it is to the first in the same round.
    pub fn json(&self) -> Value {
        let mut figures = Map::new();
        let mut ratios = Map::new();
        for (name, values) in self.names.iter().zip(&self.values) {
            figures.insert((*name).into(), json!(ends(values)));
            let to_first = values.iter().zip(&self.values[0]).map(|(b, a)| b / a);
            ratios.insert((*name).into(), json!(ends(&to_first.collect::<Vec<_>>())));
        }
        json!({ "figures": figures, "to_first": ratios })
    }
}

/// Least and median.
pub fn ends(values: &[f64]) -> [f64; 2] {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    [rounded(values[0]), rounded(values[values.len() / 2])]
}

/// Four digits say all that a shared machine can.
pub fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let unit = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * unit).round() / unit
}
