//! `kvpool._core`: the binding. One class, one file; no logic of its own.

#![forbid(unsafe_code)]

mod cache;
mod convert;
mod core;
mod forecast;
mod kernels;
mod mover;
mod outputs;
mod recorded;
mod roster;
mod started;
mod tables;

use pyo3::prelude::*;

/// Bookkeeping core of kvpool.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::cache::Cache;
    #[pymodule_export]
    use crate::core::Core;
    #[pymodule_export]
    use crate::forecast::Forecast;
    #[pymodule_export]
    use crate::kernels::{kernel_names, kernel_source};
    #[pymodule_export]
    use crate::mover::{Mover, Ticket};
    #[pymodule_export]
    use crate::recorded::Recorder;
    #[pymodule_export]
    use crate::roster::{Allocation, Roster};
    #[pymodule_export]
    use crate::started::Started;
}
