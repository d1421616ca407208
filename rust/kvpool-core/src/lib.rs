//! The core of kvpool: which request owns which page, what is kept for reuse and what goes first.
//!
//! Pure bookkeeping: no Python, no device memory, no clock. [`Core`] is shared by all threads; every [`Cache`]
//! belongs to one. Claim, release, match, probe, insert, commit and evict take no lock and never wait.
//!
//! Data flows one way: [`core`] asks [`tree`] what is cached, [`pool`] for slots and [`evict`] for
//! the order in which cached pages go; [`check`] recomputes all their books. Below them lie [`chains`], [`stack`] and
//! [`inbox`], over the words of [`words`] and the atomics of [`sync`]. docs/CONCURRENCY.md proves it.

#![forbid(unsafe_code)]

pub mod books;
pub mod cache;
pub mod chains;
pub mod check;
pub mod core;
pub mod error;
pub mod events;
pub mod evict;
pub mod forecast;
pub mod inbox;
#[cfg(all(test, kvpool_loom))]
mod models;
pub mod pool;
mod retention;
pub mod stack;
pub mod sync;
pub mod tree;
pub mod types;
pub mod words;

pub use crate::core::{BadPage, CacheInfo, Claim, Core, Refusal, Start};
pub use cache::Cache;
pub use error::{CoreError, Result};
