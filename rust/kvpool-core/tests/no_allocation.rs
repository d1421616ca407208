//! create, probe, resume, suspend, resize, commit, close and evict do not allocate, on one tier or two, once the room of
//! the thread has the size that its requests need, and the order of eviction that of its entries.
#![allow(unsafe_code)]

use kvpool_core::types::{CoreConfig, PageCopy, PolicyKind, PoolSpec};
use kvpool_core::{Cache, Core};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static FAILS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call goes to `System` unchanged, or fails; the counter and the switch are const-initialised thread locals
// without a destructor, so touching them never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        if FAILS.with(Cell::get) {
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

/// The order of eviction grows with its entries. Where it cannot, as many blocks can be evicted as ever, in any order, and
/// with memory again the order is exact: nothing was lost.
#[test]
fn where_no_memory_can_be_had_nothing_is_lost() {
    const BLOCKS: i32 = 300;
    for policy in [PolicyKind::Lru, PolicyKind::Slru] {
        let core = Core::new(CoreConfig {
            tokens_per_block: 1,
            pools: vec![PoolSpec {
                name: "kv".into(),
                num_slots: BLOCKS as u32,
                host_slots: 0,
                window: None,
                sink_tokens: 0,
            }],
            max_blocks: BLOCKS as u32,
            max_seq_len: None,
            partial_reuse: false,
            hash_seed: 1,
            policy,
            offload_min_priority: 30,
            collide: false,
        })
        .unwrap();
        for token in 0..BLOCKS {
            let mut cache = core.create(&[token], b"", None, None).unwrap();
            core.resume(&mut cache, &mut Vec::new()).unwrap();
            assert!(core.resize(&mut cache, 1, None).unwrap());
            core.commit(&mut cache, &[token]).unwrap();
            core.close(&mut cache).unwrap();
        }
        let cached = || {
            let is_there = |&token: &i32| core.probe(&[token, 0], b"", None).unwrap() == 1;
            (0..BLOCKS).filter(is_there).collect::<Vec<_>>()
        };
        FAILS.with(|fails| fails.set(true));
        let gone = core.evict(7);
        FAILS.with(|fails| fails.set(false));
        let left = cached();
        assert_eq!((gone, left.len()), (7, BLOCKS as usize - 7));
        core.check(&[]).unwrap();
        assert_eq!(core.evict(9), 9);
        assert_eq!(cached(), left[9..], "the oldest go first");
        FAILS.with(|fails| fails.set(true));
        let gone = core.evict(u64::MAX);
        FAILS.with(|fails| fails.set(false));
        assert_eq!((gone, cached()), (BLOCKS as u64 - 16, vec![]));
        core.check(&[]).unwrap();
    }
}
