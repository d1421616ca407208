//! Page moves between the tiers: asynchronous, and ordered by construction.
//!
//! Work is put on *streams*, each a FIFO: one per direction of moves and a few of the engine's. An *event* is a place in
//! a stream. Every slot has two event sets, its last write and the reads since, from which each piece of work gets its
//! waits when it is enqueued:
//!
//! - source of a move: waits for the last write
//! - destination of a move: waits for the last write and for all reads since
//! - the engine's kernels enter the same books by [`Mover::wait_on`] before them and [`Mover::record`] behind them
//!
//! Waits name only work that was enqueued before, so there is no cycle. [`checker`] proves the waits sufficient, by
//! vector clocks taken at enqueue, whether or not the timing shows a mistake. Streams are threads, or simulated in a
//! chosen order ([`Order`]). Slots come in, addresses stay here: [`memory`] is the only file with unsafe code.
//!
//! One mutex guards the books; no copy and no callable runs under it.

pub mod checker;
pub mod faults;
pub mod hazard;
pub mod memory;
mod mover;
pub mod runs;
mod slots;
mod state;
mod submit;
mod ticket;
pub mod types;

pub use mover::{Mover, Options, Use};
pub use state::Totals;
pub use ticket::Ticket;
pub use types::{Code, Direction, MoveError, Order, Refusal, Tier};
