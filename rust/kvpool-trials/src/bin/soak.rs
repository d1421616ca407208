//! `cargo run --profile models -p kvpool-trials --bin soak -- --operations 100000000 --threads 4 --seed 1`
//!
//! Every call of the core is an operation; all books are recomputed whenever the threads stand still. A failure prints
//! the seed of its world, and the exit status is 1.

use kvpool_trials::run::{soak, Tally};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const USAGE: &str = "usage: soak [--operations N] [--threads N] [--seed N]";

struct Options {
    operations: u64,
    threads: u64,
    seed: u64,
}

fn options(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        operations: 1_000_000,
        threads: 4,
        seed: 1,
    };
    while let Some(word) = words.next() {
        let value = match word.as_str() {
            "--operations" => &mut options.operations,
            "--threads" => &mut options.threads,
            "--seed" => &mut options.seed,
            _ => return Err(format!("unknown option {word:?}\n{USAGE}")),
        };
        let given = words.next().unwrap_or_default();
        *value = given
            .parse()
            .map_err(|_| format!("{word} wants a number, not {given:?}\n{USAGE}"))?;
    }
    if options.threads == 0 || options.operations == 0 {
        return Err(format!("--operations and --threads are at least 1\n{USAGE}"));
    }
    Ok(options)
}

fn show(began: Instant, seed: u64, tally: &Tally) {
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{seconds:8.1} s  seed {seed}  operations {}  worlds {}  quiet points {}  pages copied down {}  positions verified {}",
        tally.calls, tally.worlds, tally.quiet, tally.copies, tally.verified
    );
    let _ = std::io::stdout().flush();
}

fn main() -> ExitCode {
    let options = match options(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let next = AtomicU64::new(options.seed);
    let shown = AtomicU64::new(0);
    let run = || {
        soak(
            options.seed,
            options.threads as usize,
            options.operations,
            |seed, tally| {
                next.store(seed + 1, Ordering::Relaxed); // Relaxed: one thread
                let (now, last) = (began.elapsed().as_secs(), shown.load(Ordering::Relaxed)); // Relaxed: one thread
                if now >= last + 5 {
                    shown.store(now, Ordering::Relaxed); // Relaxed: one thread
                    show(began, seed, tally);
                }
            },
        )
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(tally) => {
            show(began, next.load(Ordering::Relaxed) - 1, &tally); // Relaxed: one thread
            println!("all invariants held");
            ExitCode::SUCCESS
        }
        Err(_) => {
            let seed = next.load(Ordering::Relaxed); // Relaxed: one thread
            eprintln!(
                "FAILED in the world of seed {seed}; again: soak --seed {seed} --threads {} --operations 100000",
                options.threads
            );
            ExitCode::FAILURE
        }
    }
}
