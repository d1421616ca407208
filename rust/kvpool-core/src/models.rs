//! loom models: every interleaving (up to a bound on preemptions) of two or three threads over the real code.
//!
//! Each protocol has a model that must hold and, for each ordering and check that it needs, a control:
//! with that one thing weakened the model must fail, with the message of its own assertion.
//! Run by `make models`.

use crate::events::{EventKind, Events};
use crate::inbox::{Inbox, IDLE};
use crate::pool::SlotPool;
use crate::stack::Stack;
use crate::sync::{plant, AtomicU32, Ordering, Weak};
use crate::words::Tier;
use loom::sync::Arc;
use loom::thread;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Models share the planted weakness: one at a time.
static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let deeper = std::env::var("KVPOOL_PREEMPTIONS").map_or(0, |more| more.parse().unwrap_or(0));
    builder.preemption_bound = Some(preemptions.max(deeper));
    builder.max_branches = 100_000;
    builder.check(model);
}

/// The model holds in every interleaving.
pub fn holds(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    plant(Weak::None);
    explore(preemptions, model);
}

/// With the weakness some interleaving breaks the assertion that says `message`.
pub fn fails(weak: Weak, message: &str, preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    plant(weak);
    let result = catch_unwind(AssertUnwindSafe(|| explore(preemptions, model)));
    plant(Weak::None);
    let payload = result.expect_err(&format!("{weak:?} is planted and nothing failed"));
    let said = payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|said| (*said).to_string()))
        .unwrap_or_default();
    assert!(
        said.contains(message),
        "{weak:?} failed with {said:?}, not with {message:?}"
    );
}

// -- the stack ------------------------------------------------------------------------------

/// H9: an index is popped by one thread only, even if it went and came back meanwhile.
fn stack_pops_once() {
    let stack = Arc::new(Stack::full(3));
    let owners: Arc<Vec<AtomicU32>> = Arc::new((0..3).map(|_| AtomicU32::new(0)).collect());
    let own = |owners: &Vec<AtomicU32>, index: u32| {
        let before = owners[index as usize].fetch_add(1, Ordering::AcqRel); // AcqRel: the model's own count
        assert_eq!(before, 0, "popped by two threads");
    };
    let other = {
        let (stack, owners) = (stack.clone(), owners.clone());
        thread::spawn(move || {
            let a = stack.pop().unwrap();
            own(&owners, a);
            stack.set_note(a, 1); // could be an index
            let b = stack.pop();
            if let Some(b) = b {
                own(&owners, b);
            }
            owners[a as usize].fetch_sub(1, Ordering::AcqRel); // AcqRel: the model's own count
            stack.push(a);
        })
    };
    for _ in 0..2 {
        if let Some(index) = stack.pop() {
            own(&owners, index);
        }
    }
    other.join().unwrap();
}

#[test]
fn stack() {
    holds(2, stack_pops_once);
}

#[test]
fn stack_without_a_tag() {
    fails(Weak::StackTag, "popped by two threads", 2, stack_pops_once);
}

/// H9: several indices taken in one step are nobody else's, though others pop and push meanwhile.
fn stack_pops_many_once() {
    let stack = Arc::new(Stack::full(3));
    let other = {
        let stack = stack.clone();
        thread::spawn(move || {
            let a = stack.pop();
            let b = stack.pop();
            a.iter().for_each(|&a| stack.set_note(a, 9)); // is no index
            stack.push_each(a.into_iter()); // the head is the same index again, and what was below it is gone
            b
        })
    };
    let mut all = Vec::new();
    stack.pop_many(2, &mut all, |index| index);
    all.extend(other.join().unwrap());
    all.extend(stack.indices());
    all.sort_unstable();
    assert!(
        all.windows(2).all(|two| two[0] != two[1]),
        "popped by two threads"
    );
    assert_eq!(all, [0, 1, 2], "an index was lost");
}

#[test]
fn stack_of_many() {
    holds(2, stack_pops_many_once);
}

#[test]
fn stack_of_many_without_a_tag() {
    fails(Weak::StackTag, "popped by two threads", 2, stack_pops_many_once);
}

/// What the giver did with a slot is visible to its taker.
fn stack_hands_on() {
    let stack = Arc::new(Stack::full(1));
    let data = Arc::new(AtomicU32::new(0));
    assert_eq!(stack.pop(), Some(0));
    let other = {
        let (stack, data) = (stack.clone(), data.clone());
        thread::spawn(move || {
            data.store(1, Ordering::Relaxed); // Relaxed: what the stack must order
            stack.push(0);
        })
    };
    if stack.pop().is_some() {
        assert_eq!(data.load(Ordering::Relaxed), 1, "taken before it was given");
        // Relaxed: what the stack must order
    }
    other.join().unwrap();
}

#[test]
fn stack_order() {
    holds(2, stack_hands_on);
}

#[test]
fn stack_without_order() {
    fails(Weak::StackOrder, "taken before it was given", 2, stack_hands_on);
}

/// Three threads on a stack of two: nobody gets what another has, and nothing is lost.
#[test]
fn stack_of_three_threads() {
    holds(2, || {
        let stack = Arc::new(Stack::full(2));
        let cycle = |stack: &Stack| {
            if let Some(index) = stack.pop() {
                stack.push(index);
            }
        };
        let others: Vec<_> = (0..2)
            .map(|_| {
                let stack = stack.clone();
                thread::spawn(move || cycle(&stack))
            })
            .collect();
        cycle(&stack);
        others.into_iter().for_each(|other| other.join().unwrap());
        let mut left = stack.indices();
        left.sort_unstable();
        assert_eq!(left, [0, 1], "an index was lost or doubled");
    });
}

// -- promises -------------------------------------------------------------------------------

/// `reserve` never promises more than there is.
#[test]
fn reserve_promises_once() {
    holds(2, || {
        let pool = Arc::new(SlotPool::new(3, false));
        let other = {
            let pool = pool.clone();
            thread::spawn(move || {
                let taken = pool.reserve(2);
                if taken {
                    pool.unreserve(1);
                }
                u32::from(taken)
            })
        };
        let taken = if pool.reserve(2) { 2 } else { 0 };
        let theirs = other.join().unwrap();
        assert_eq!(
            taken + theirs + pool.available(),
            3,
            "promised more than there is"
        );
    });
}

// -- the inbox ------------------------------------------------------------------------------

/// H5: a report is never lost: what was done before it is seen by this taker or the next.
fn inbox_loses_nothing() {
    let inbox = Arc::new(Inbox::new(1));
    let idle = Arc::new(AtomicU32::new(0));
    inbox.push(0, IDLE);
    let other = {
        let (inbox, idle) = (inbox.clone(), idle.clone());
        thread::spawn(move || {
            idle.store(1, Ordering::Relaxed); // Relaxed: what the inbox must order
            inbox.push(0, IDLE);
        })
    };
    let take = || {
        let mut seen = 0;
        let mut next = inbox.take_all();
        while let Some(index) = next {
            next = inbox.after(index);
            inbox.open(index);
            seen |= idle.load(Ordering::Relaxed); // Relaxed: what the inbox must order
            inbox.clear_late(index);
        }
        seen
    };
    let first = take();
    other.join().unwrap();
    assert_eq!(first | take(), 1, "a report was lost");
}

#[test]
fn inbox() {
    holds(2, inbox_loses_nothing);
}

#[test]
fn inbox_with_flags_cleared_late() {
    fails(Weak::InboxFlag, "a report was lost", 2, inbox_loses_nothing);
}

// -- events ---------------------------------------------------------------------------------

/// H17: an event that is read is one that was pushed, whole, and the numbers grow.
fn events_are_whole() {
    let events = Arc::new(Events::new(1));
    let writers: Vec<_> = (0..2u64)
        .map(|i| {
            let events = events.clone();
            thread::spawn(move || events.push(EventKind::Stored, Tier::Device, i as usize, i, Some(i)))
        })
        .collect();
    let mut seen = Vec::new();
    events.drain(2, &mut seen);
    for writer in writers {
        writer.join().unwrap();
    }
    events.drain(2, &mut seen);
    let whole = |e: &crate::events::Event| u64::from(e.pool) == e.key && e.parent == Some(e.key);
    assert!(seen.iter().all(whole), "a torn event");
    let ordered = seen.windows(2).all(|pair| pair[0].number < pair[1].number);
    assert!(ordered, "numbers do not grow");
}

#[test]
fn events() {
    holds(2, events_are_whole);
}

#[test]
fn events_without_a_second_look() {
    fails(Weak::EventAgain, "a torn event", 2, events_are_whole);
}
