//! kvpool-core from Rust beside kvbm-logical (lru), dynamo-kv-router's tree and the floors of the machine, in one process.
//!
//!     rivals [--json PATH] [--trace PATH] [--rounds N] [--calls N] [--most BLOCKS] [PART ...]
//!
//! Parts: floors, claim, churn, memory, allocations, threads, scale, latency, trace; without any all of them. Results are
//! JSON; a part that was run replaces what PATH has of it.

mod compare;
mod dynamo;
mod floors;
mod kvbm;
mod kvpool;
mod latency;
mod measure;
mod memory;
mod scale;
mod threads;
mod trace;
mod world;

use measure::Effort;
use serde_json::{json, Map, Value};
use std::time::Instant;
use world::Rng;

const PARTS: [&str; 9] = [
    "floors",
    "claim",
    "churn",
    "memory",
    "allocations",
    "threads",
    "scale",
    "latency",
    "trace",
];

struct Given {
    json: Option<String>,
    trace: Option<String>,
    effort: Effort,
    most: usize,
    parts: Vec<String>,
}

fn given() -> Given {
    let effort = Effort {
        rounds: 15,
        calls: 1000,
    };
    let (json, trace, parts) = (None, None, Vec::new());
    let mut given = Given {
        json,
        trace,
        effort,
        most: 10_000_000,
        parts,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--json" => given.json = Some(value()),
            "--trace" => given.trace = Some(value()),
            "--rounds" => given.effort.rounds = value().parse().expect("a number of rounds"),
            "--calls" => given.effort.calls = value().parse().expect("a number of calls"),
            "--most" => given.most = value().parse().expect("a number of blocks"),
            part if PARTS.contains(&part) => given.parts.push(part.into()),
            other => panic!("{other}: neither an option nor one of {PARTS:?}"),
        }
    }
    given
}

/// `None`: it lacks the trace.
fn run(part: &str, given: &Given) -> Option<Value> {
    let rng = &mut Rng::new();
    let effort = given.effort;
    Some(match part {
        "floors" => floors::run(effort),
        "claim" => compare::claim(effort, rng),
        "churn" => compare::churn(effort, rng),
        "memory" => compare::memory(rng),
        "allocations" => compare::allocations(rng),
        "threads" => threads::run(effort, rng),
        "scale" => scale::run(effort, given.most, rng),
        "latency" => latency::run(rng),
        _ => trace::run(given.trace.as_deref()?),
    })
}

/// Where the figures come from.
fn machine(effort: Effort) -> Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().and_then(|load| load.parse::<f64>().ok());
    json!({ "cpu": model, "cores": cores, "load_before": load, "rounds": effort.rounds, "calls": effort.calls })
}

fn main() {
    let given = given();
    let before = given
        .json
        .as_ref()
        .and_then(|path| std::fs::read_to_string(path).ok());
    let mut results: Map<String, Value> = before.map_or_else(Map::new, |text| {
        serde_json::from_str(&text).expect("JSON results")
    });
    results.insert("machine".into(), machine(given.effort));
    let all = given.parts.is_empty();
    for part in PARTS
        .into_iter()
        .filter(|part| all || given.parts.iter().any(|p| p == part))
    {
        let start = Instant::now();
        let Some(figures) = run(part, &given) else {
            eprintln!("{part}: left out, give a Mooncake trace by --trace");
            continue;
        };
        eprintln!("{part}: {:.0} s", start.elapsed().as_secs_f64());
        results.insert(part.into(), figures);
    }
    let text = serde_json::to_string_pretty(&results).expect("JSON") + "\n";
    match &given.json {
        Some(path) => std::fs::write(path, text).expect("a place to write to"),
        None => println!("{text}"),
    }
}
