//! Drivers that try the core: a [`World`] is a core with page arrays that hold content, an [`Actor`] does random
//! operations of all kinds in it and verifies every page that it is given.
//!
//! Where the choices come from is the caller's: a seed for `soak` and the tests of threads, bytes for the fuzzer, so that all
//! of them try the same operations. A page is an array of one number per position: the hash of scope, epoch and
//! all tokens up to there.

#![forbid(unsafe_code)]

pub mod actor;
mod asks;
mod batches;
pub mod choose;
pub mod pages;
mod requests;
pub mod run;
pub mod world;

pub use actor::Actor;
pub use choose::{Bytes, Choose, Rng};
pub use world::{Spec, World};
