//! The core of kvpool: which request owns which page, what is kept for reuse and what goes first.
//!
//! Pure bookkeeping: no Python, no device memory, no clock. One [`Core`] is used by one thread at a
//! time (`&mut self`); the binding guards it with one mutex.
//!
//! Data flows one way: [`core`] asks [`tree`] what is cached, [`pool`] for slots and [`evict`] for
//! the order in which cached pages go; [`check`] recomputes all their books.

#![forbid(unsafe_code)]

pub mod cache;
pub mod check;
pub mod core;
pub mod error;
pub mod evict;
pub mod pool;
pub mod tree;
pub mod types;

pub use crate::core::{CacheId, CacheInfo, Core};
pub use error::{CoreError, Result};
