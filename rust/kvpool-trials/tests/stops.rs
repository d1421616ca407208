//! A stopped thread blocks nobody. One thread does one operation and is stopped at its k-th access of a shared word, for
//! every k until the operation has no more of them; meanwhile this thread does all operations, to their ends, with a bound
//! on its own accesses. Then the stopped thread goes on, and the books are whole. No sleeps, no chance: `make stops`.
#![cfg(kvpool_stops)]

mod stopped;

use kvpool_core::sync::{plant, stops, Weak};
use kvpool_core::types::CacheState;
use kvpool_trials::World;
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::channel;
use std::sync::RwLock;
use stopped::cases::{Case, CASES};
use stopped::others::{everything, everything_short, MOVING};
use stopped::{suspended, Kind, Request, KINDS};

/// Accesses that all operations of the others may take together; without a stopped thread they take less than a tenth.
const BOUND: u64 = 300_000;

/// Planted weaknesses hold for the whole process: whoever plants one is alone.
static PLANTED: RwLock<()> = RwLock::new(());

/// What the others do, with a SUSPENDED cache of theirs; returns what was refused.
type Others = fn(&World, Option<Request>) -> Vec<&'static str>;

/// What one case showed.
#[derive(Debug, Default)]
struct Seen {
    /// Points of the operation.
    points: u64,
    /// At how many of them something was refused to the others, by what it was.
    refused: BTreeMap<&'static str, u64>,
    /// Most accesses of the others.
    most: u64,
}

/// Everything for all points of one operation. The refusals that `others` reports are counted.
fn stop_everywhere(kind: Kind, case: &Case, others: Others) -> Seen {
    let mut seen = Seen::default();
    for k in 1.. {
        let world = kind.world();
        let mut held = (case.prepare)(&world);
        let theirs = kind.roomy().then(|| suspended(&world));
        let (reached, is_there) = channel();
        let (go, going) = channel::<()>();
        let (stopped, refused) = std::thread::scope(|scope| {
            let (world, held, go) = (&world, &mut held, go);
            let thread = scope.spawn(move || {
                stops::at_points(Some(Box::new(move |point| {
                    if point == k {
                        reached.send(()).unwrap();
                        let _ = going.recv(); // an error: the others have panicked
                    }
                })));
                (case.operation)(world, held);
                stops::at_points(None);
            });
            let stopped = is_there.recv().is_ok();
            let mut refused = Vec::new();
            if stopped {
                let limit = |point| assert!(point < BOUND, "somebody waits for the stopped thread");
                stops::at_points(Some(Box::new(limit)));
                refused = others(world, theirs);
                seen.most = seen.most.max(stops::points());
                stops::at_points(None);
            }
            drop(go);
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
            (stopped, refused)
        });
        if !stopped {
            assert!(k > 1, "{}: no point at all", case.name);
            return seen;
        }
        seen.points = k;
        for what in refused {
            *seen.refused.entry(what).or_default() += 1;
        }
        finish(&world, held);
    }
    unreachable!()
}

/// The stopped thread has gone on to the end of its operation: nothing is lost.
fn finish(world: &World, held: Vec<Request>) {
    world.check(held.iter().map(|one| &one.cache));
    for one in &held {
        if world
            .core
            .info(&one.cache)
            .is_ok_and(|info| info.state == CacheState::Active)
        {
            let wrong = world.compare(&one.cache, &one.content);
            assert!(wrong.is_ok() || world.core.is_lost(&one.cache), "{wrong:?}");
        }
    }
    for mut one in held {
        world.core.close(&mut one.cache).unwrap();
    }
    world.end();
}

fn try_all(kind: Kind, others: Others) -> BTreeMap<&'static str, Seen> {
    let _shared = PLANTED.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut all = BTreeMap::new();
    for case in CASES.iter().filter(|case| (case.applies)(kind)) {
        let run = || stop_everywhere(kind, case, others);
        let seen = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            eprintln!("while {:?} was stopped in {kind:?}", case.name);
            std::panic::resume_unwind(panic)
        });
        println!(
            "{:<28} {:<24} {:>5} points; others took {:>6} accesses at most; refused {:?}",
            format!("{kind:?}"),
            case.name,
            seen.points,
            seen.most,
            seen.refused
        );
        all.insert(case.name, seen);
    }
    all
}

#[test]
fn a_stopped_thread_blocks_nobody_on_one_tier() {
    for kind in [KINDS[0], KINDS[1]] {
        for (name, seen) in try_all(kind, everything) {
            assert!(seen.refused.is_empty(), "{name}: {:?}", seen.refused);
        }
    }
}

#[test]
fn a_stopped_thread_blocks_nobody_on_two_tiers() {
    for kind in [KINDS[2], KINDS[3]] {
        for (name, seen) in try_all(kind, everything) {
            let only_moving = seen.refused.keys().all(|&what| what == MOVING);
            assert!(only_moving, "{name}: {:?}", seen.refused);
            // Only who moves it is in the way.
            let moves = name.starts_with("evict");
            assert!(moves || seen.refused.is_empty(), "{name}: {:?}", seen.refused);
        }
    }
}

/// All slots are wanted: what the stopped thread has in hand is refused to the others, and nothing else.
#[test]
fn a_stopped_thread_hides_no_more_than_it_has() {
    for kind in [KINDS[4], KINDS[6]] {
        for (name, seen) in try_all(kind, everything_short) {
            let in_hand = match name {
                "create" | "evict" | "evict all" | "clear" | "close" | "monitors" => 1,
                _ if name.starts_with("suspend") => 1,
                "probe" | "set_epoch" | "drain" => 0,
                _ if name.starts_with("batch") => 5,
                _ => 3,
            };
            let least = seen
                .refused
                .keys()
                .next()
                .map_or(7, |blocks| blocks[..1].parse().unwrap());
            assert!(least + in_hand >= 7, "{name}: {:?}", seen.refused);
        }
    }
}

/// The leaf that a stopped thread has killed may still hide the blocks above it: that is refused too, and later no longer.
#[test]
fn a_thread_stopped_in_an_eviction_may_hide_the_blocks_above() {
    let seen = try_all(KINDS[5], everything_short);
    for name in ["probe", "set_epoch", "drain"] {
        assert!(seen[name].refused.is_empty(), "{name}: {:?}", seen[name].refused);
    }
}

fn noticed(weak: Weak, kind: Kind, name: &str, others: Others) {
    let _alone = PLANTED.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let case = CASES.iter().find(|case| case.name == name).unwrap();
    plant(weak);
    let result = catch_unwind(AssertUnwindSafe(|| stop_everywhere(kind, case, others)));
    plant(Weak::None);
    stops::at_points(None);
    let panic = result.expect_err("a planted wait went unnoticed");
    let message = panic.downcast_ref::<&str>().map(ToString::to_string);
    let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
    assert_eq!(message.as_deref(), Some("somebody waits for the stopped thread"));
}

#[test]
fn a_lock_around_the_order_is_noticed() {
    noticed(Weak::EnterWaits, KINDS[0], "evict", everything);
}

#[test]
fn a_pin_that_waits_for_the_mover_is_noticed() {
    noticed(Weak::PinWaits, KINDS[2], "evict all", everything);
}

#[test]
fn a_search_that_waits_for_a_promised_slot_is_noticed() {
    noticed(Weak::TakeWaits, KINDS[5], "evict", everything_short);
}
