//! `kvpool._core`: the binding. One class, one file; no logic of its own.
//!
//! Calls keep the GIL: they take microseconds, and no Python object is made while the core's lock is
//! held, so neither a finaliser nor another thread can meet it locked.

#![forbid(unsafe_code)]

mod core;
mod kernels;

use pyo3::prelude::*;

/// Bookkeeping core of kvpool.
#[pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    use crate::core::Core;
    #[pymodule_export]
    use crate::kernels::{kernel_names, kernel_source};
}
