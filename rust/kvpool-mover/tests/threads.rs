//! Streams as threads, from Rust: order, closing, kernels that panic.

use kvpool_mover::memory::{Pool, Region};
use kvpool_mover::{Direction, Mover, Options, Order, Tier, Use};
use std::sync::{Arc, Mutex};

fn mover(options: Options) -> Mover {
    let pool = Pool::new("kv", 64, Region::zeroed(9 * 64), Some(Region::zeroed(8 * 64))).unwrap();
    Mover::new(vec![pool], options).unwrap()
}

fn device(slots: &[i32], writes: bool) -> Use<'_> {
    Use {
        pool: 0,
        tier: Tier::Device,
        slots,
        writes,
    }
}

/// A kernel waits for the move before it, a move for the kernel before it; in threads and in every simulated order.
#[test]
fn kernels_and_moves_run_in_the_order_of_their_slots() {
    let orders = [
        None,
        Some(Order::ComputeLast),
        Some(Order::CopiesEager),
        Some(Order::CopiesLast),
        Some(Order::Random(3)),
    ];
    for order in orders {
        let mover = mover(Options {
            order,
            check: true,
            faults: true,
            ..Options::default()
        });
        let stream = mover.stream().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        mover.stall(Direction::Onboard, true).unwrap();
        let up = mover
            .submit(0, Direction::Onboard, &[1], &[2], &[])
            .unwrap()
            .unwrap();
        assert!(mover.wait_on(Some(stream), &[device(&[2], true)], None).unwrap());
        let (kernel, ticket) = (log.clone(), up.clone());
        let call = move || kernel.lock().unwrap().push(("kernel", ticket.is_done()));
        mover.launch(stream, Box::new(call)).unwrap();
        mover.record(Some(stream), &[device(&[2], true)]).unwrap();
        let down = mover
            .submit(0, Direction::Offload, &[2], &[3], &[])
            .unwrap()
            .unwrap();
        assert!(!down.is_done());
        mover.stall(Direction::Onboard, false).unwrap();
        assert!(down.wait(None));
        log.lock().unwrap().push(("offload", up.is_done()));
        assert_eq!(
            *log.lock().unwrap(),
            [("kernel", true), ("offload", true)],
            "{order:?}"
        );
        assert_eq!(mover.findings(), []);
        mover.close();
    }
}

#[test]
fn a_kernel_that_panics_ends_nothing_but_itself() {
    let mover = mover(Options::default());
    let stream = mover.stream().unwrap();
    mover
        .launch(stream, Box::new(|| panic!("a kernel's own fault, on purpose")))
        .unwrap();
    mover.record(Some(stream), &[device(&[1], true)]).unwrap();
    let down = mover
        .submit(0, Direction::Offload, &[1], &[1], &[])
        .unwrap()
        .unwrap();
    assert!(down.wait(None));
    assert_eq!(down.errors(), []);
    assert_eq!(mover.totals().pages, 1);
    mover.close();
}

#[test]
fn there_are_as_many_streams_as_there_are() {
    let mover = mover(Options::default());
    assert_eq!((mover.stream(), mover.stream()), (Ok(4), Ok(5)));
    assert!(mover.stream().is_err());
    assert!(
        mover.launch(3, Box::new(|| ())).is_err(),
        "the caller has no thread"
    );
    assert!(mover.record(Some(6), &[]).is_err());
    mover.close();
    mover.close();
}
