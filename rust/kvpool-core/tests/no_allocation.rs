//! create, probe, resume, suspend, resize, commit, close and evict do not allocate, on one tier or two, once the room of
//! the thread has the size that its requests need.
#![allow(unsafe_code)]

use kvpool_core::types::{CoreConfig, PageCopy, PolicyKind, PoolSpec};
use kvpool_core::{Cache, Core};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to `System` unchanged; the counter is a const-initialised thread local
// without a destructor, so touching it never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
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
        // The first rounds size the room of the thread.
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
        if round >= 20 {
            total += sum;
        }
    }
    assert_eq!(total, 0, "heap allocations");
    let counters = core.counters();
    [counters.offloaded, counters.onboarded]
}
