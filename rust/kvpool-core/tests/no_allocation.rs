//! probe, resume, resize, commit, close and evict do not allocate; `create` may.
#![allow(unsafe_code)]

use kvpool_core::types::{CoreConfig, PolicyKind, PoolSpec};
use kvpool_core::Core;
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
fn only_create_allocates() {
    for policy in [PolicyKind::Lru, PolicyKind::Slru] {
        run(policy);
    }
}

fn run(policy: PolicyKind) {
    let pool = |name: &str, num_slots, window| PoolSpec {
        name: name.into(),
        num_slots,
        host_slots: 0,
        window,
        sink_tokens: 0,
    };
    let core = Core::new(CoreConfig {
        tokens_per_block: 4,
        pools: vec![pool("full", 64, None), pool("window", 64, Some(10))],
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
    let mut copies = Vec::with_capacity(8);
    for round in 0..400i32 {
        let prompt: Vec<i32> = (0..42).map(|i| if i < 14 { i } else { i + round % 7 }).collect();
        let mut cache = core.create(&prompt, b"", None, None).unwrap();
        let reused = core.info(&cache).unwrap().reused;
        // The first rounds size the scratch space of look-ups.
        let mut sum = 0;
        counted(&mut sum, || core.resume(&mut cache, &mut copies).unwrap());
        core.copies_done(&mut cache);
        assert!(counted(&mut sum, || core.resize(&mut cache, 42, None).unwrap()));
        core.step_begin(&mut cache, 1).unwrap();
        counted(&mut sum, || {
            core.commit(&mut cache, &prompt[reused as usize..]).unwrap()
        });
        counted(&mut sum, || core.step_end(&mut cache, 1).unwrap());
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
    assert_eq!(total, 0, "heap allocations outside create");
}
