//! create, probe, resume, suspend, resize, commit, close and evict do not allocate, on one tier or two, once the room of
//! the thread has the size that its requests need, and the order of eviction that of its entries.
#![allow(unsafe_code)]

use kvpool_core::types::{CoreConfig, PageCopy, PolicyKind, PoolSpec, RangeSpec, Retain, RetentionSpec};
use kvpool_core::words::Tier;
use kvpool_core::{Cache, Core, CoreError};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    /// Bytes of the largest allocation that succeeds.
    static MOST: Cell<usize> = const { Cell::new(usize::MAX) };
}

// SAFETY: every call goes to `System` unchanged, or fails; the counter and the switch are const-initialised thread locals
// without a destructor, so touching them never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        if layout.size() > MOST.with(Cell::get) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// While `f` runs this thread gets no allocation of more than `most` bytes.
fn short_of_memory<T>(most: usize, f: impl FnOnce() -> T) -> T {
    MOST.with(|at| at.set(most));
    let result = f();
    MOST.with(|at| at.set(usize::MAX));
    result
}

fn counted<T>(total: &mut u64, f: impl FnOnce() -> T) -> T {
    let before = ALLOCATIONS.with(Cell::get);
    let result = f();
    *total += ALLOCATIONS.with(Cell::get) - before;
    result
}

#[test]
fn nothing_allocates() {
    for policy in [PolicyKind::Lru, PolicyKind::Slru] {
        run(policy, 64, 0);
    }
}

#[test]
fn nothing_allocates_with_a_host_tier_either() {
    for policy in [PolicyKind::Lru, PolicyKind::Slru] {
        let moved = run(policy, 24, 48);
        assert!(
            moved.iter().all(|&pages| pages > 100),
            "pages that moved: {moved:?}"
        );
    }
}

/// Returns how many pages went down, and came up.
fn run(policy: PolicyKind, slots: u32, host_slots: u32) -> [u64; 2] {
    let pool = |name: &str, num_slots, window| PoolSpec {
        name: name.into(),
        num_slots,
        host_slots,
        window,
        sink_tokens: 0,
    };
    let core = Core::new(CoreConfig {
        tokens_per_block: 4,
        pools: vec![pool("full", slots, None), pool("window", slots, Some(10))],
        max_blocks: 64,
        max_seq_len: Some(128),
        partial_reuse: true,
        hash_seed: 1,
        policy,
        offload_min_priority: 30,
        collide: false,
    })
    .unwrap();
    let mut total = 0;
    let mut copies = Vec::with_capacity(64);
    for round in 0..400i32 {
        let prompt: Vec<i32> = (0..42).map(|i| if i < 14 { i } else { i + round % 7 }).collect();
        // The first rounds size the room of the thread and the order, which comes out of turn in a new epoch.
        let mut sum = 0;
        let mut cache = counted(&mut sum, || core.create(&prompt, b"", None, None).unwrap());
        let reused = core.info(&cache).unwrap().reused;
        let up = |sum: &mut u64, cache: &mut Cache, copies: &mut Vec<PageCopy>| {
            assert!(counted(sum, || core.resume(cache, copies).unwrap()));
            counted(sum, || core.copies_done(cache));
        };
        up(&mut sum, &mut cache, &mut copies);
        assert!(counted(&mut sum, || core.resize(&mut cache, 42, None).unwrap()));
        core.step_begin(&mut cache, 1).unwrap();
        counted(&mut sum, || {
            core.commit(&mut cache, &prompt[reused as usize..]).unwrap()
        });
        counted(&mut sum, || core.step_end(&mut cache, 1).unwrap());
        counted(&mut sum, || core.suspend(&mut cache).unwrap());
        counted(&mut sum, || core.evict(3));
        up(&mut sum, &mut cache, &mut copies);
        counted(&mut sum, || core.probe(&prompt, b"", None).unwrap());
        counted(&mut sum, || core.evict(1));
        if round % 50 == 49 {
            counted(&mut sum, || core.set_epoch(round as u64).unwrap());
        }
        counted(&mut sum, || core.close(&mut cache).unwrap());
        core.check(&[]).unwrap();
        if round >= 60 {
            total += sum;
        }
    }
    assert_eq!(total, 0, "heap allocations");
    let counters = core.counters();
    [counters.offloaded, counters.onboarded]
}

const BLOCKS: i32 = 300;

/// A core for so many blocks of one token.
fn single_blocks(policy: PolicyKind, host_slots: u32) -> Core {
    Core::new(CoreConfig {
        tokens_per_block: 1,
        pools: vec![PoolSpec {
            name: "kv".into(),
            num_slots: BLOCKS as u32,
            host_slots,
            window: None,
            sink_tokens: 0,
        }],
        max_blocks: 2 * BLOCKS as u32,
        max_seq_len: None,
        partial_reuse: false,
        hash_seed: 1,
        policy,
        offload_min_priority: 30,
        collide: false,
    })
    .unwrap()
}

/// A request of one token comes and goes.
fn serve(core: &Core, token: i32, retention: Option<RetentionSpec>) -> Result<(), CoreError> {
    let mut cache = core.create(&[token], b"", None, retention)?;
    assert!(core.resume(&mut cache, &mut Vec::new())?);
    assert!(core.resize(&mut cache, 1, None)?);
    core.commit(&mut cache, &[token])?;
    core.close(&mut cache)?;
    Ok(())
}

/// The order of eviction grows with its entries. Where it cannot, as many blocks can be evicted as ever, in any order, and
/// with memory again the order is exact: nothing was lost.
#[test]
fn where_no_memory_can_be_had_nothing_is_lost() {
    for policy in [PolicyKind::Lru, PolicyKind::Slru] {
        let core = single_blocks(policy, 0);
        (0..BLOCKS).for_each(|token| serve(&core, token, None).unwrap());
        let cached = || {
            let is_there = |&token: &i32| core.probe(&[token, 0], b"", None).unwrap() == 1;
            (0..BLOCKS).filter(is_there).collect::<Vec<_>>()
        };
        let gone = short_of_memory(0, || core.evict(7));
        let left = cached();
        assert_eq!((gone, left.len()), (7, BLOCKS as usize - 7));
        core.check(&[]).unwrap();
        assert_eq!(core.evict(9), 9);
        assert_eq!(cached(), left[9..], "the oldest go first");
        let gone = short_of_memory(0, || core.evict(u64::MAX));
        assert_eq!((gone, cached()), (BLOCKS as u64 - 16, vec![]));
        core.check(&[]).unwrap();
    }
}

/// Room for durations is made when the first one is given: where it cannot be had that request is refused with nothing
/// changed, and the next one that gives a duration has all of it.
#[test]
fn a_first_duration_without_memory_is_refused_and_nothing_is_lost() {
    let core = single_blocks(PolicyKind::Lru, 0);
    let retain = |duration| Retain {
        priority: 80,
        duration,
    };
    let whole = |duration| {
        let range = RangeSpec {
            start: 0,
            end: u64::MAX,
            retain: retain(duration),
        };
        Some(RetentionSpec {
            ranges: vec![range],
            decode: retain(duration),
        })
    };
    core.advance(10.0);
    let refused = short_of_memory(5000, || serve(&core, 0, whole(5.0)));
    assert!(matches!(refused, Err(CoreError::Memory(_))), "{refused:?}");
    assert!(!core.is_timed() && core.counters().requests == 0);
    core.check(&[]).unwrap();
    short_of_memory(5000, || serve(&core, 1, None)).unwrap();
    serve(&core, 2, whole(5.0)).unwrap();
    (3..BLOCKS).for_each(|token| short_of_memory(5000, || serve(&core, token, whole(50.0))).unwrap());
    let is_there = |token: i32| core.probe(&[token, 0], b"", None).unwrap() == 1;
    assert_eq!(core.evict(1), 1);
    assert!(!is_there(1) && is_there(2), "the lower priority goes first");
    core.advance(16.0);
    assert_eq!(core.evict(1), 1);
    assert!(!is_there(2) && is_there(3), "its duration is over");
    core.check(&[]).unwrap();
}

/// As without a host tier: what the order lacks is dropped instead of moved, and with memory again all that can move does.
#[test]
fn where_no_memory_can_be_had_nothing_is_lost_on_two_tiers_either() {
    let core = single_blocks(PolicyKind::Lru, BLOCKS as u32);
    (0..BLOCKS).for_each(|token| serve(&core, token, None).unwrap());
    let on_device = || u64::from(core.books(Tier::Device)[0].cached);
    assert_eq!(short_of_memory(0, || core.evict(7)), 7);
    assert_eq!((on_device(), core.counters().offloaded), (BLOCKS as u64 - 7, 0));
    core.check(&[]).unwrap();
    assert_eq!(core.evict(9), 9);
    assert_eq!((on_device(), core.counters().offloaded), (BLOCKS as u64 - 16, 9));
    assert_eq!(core.evict(u64::MAX), BLOCKS as u64 - 16);
    assert_eq!((on_device(), core.counters().offloaded), (0, BLOCKS as u64 - 7));
    core.check(&[]).unwrap();
}
