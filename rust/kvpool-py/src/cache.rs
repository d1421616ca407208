//! The `Cache` class: one request's claims and pages, entered by one thread at a time.

use crate::convert::outcome;
use kvpool_core::{Cache as CoreCache, CoreError, Result};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, TryLockError};

/// What one request holds; only its core can do something with it.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Cache(Mutex<CoreCache>);

impl Cache {
    pub fn new(cache: CoreCache) -> Self {
        Self(Mutex::new(cache))
    }

    /// Never waits: a second thread is told so.
    pub fn enter(&self) -> Result<MutexGuard<'_, CoreCache>> {
        self.0.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                CoreError::State("another thread is in a call of this cache: one at a time".into())
            }
            TryLockError::Poisoned(_) => {
                CoreError::State("an earlier call of this cache panicked; it cannot be used any more".into())
            }
        })
    }
}

/// Every cache once, in the order in which they are listed first, with the times it is listed.
pub fn distinct(caches: &[Py<Cache>]) -> Vec<(&Cache, u32)> {
    let mut times: HashMap<*const Cache, u32> = HashMap::with_capacity(caches.len());
    for cache in caches {
        *times.entry(std::ptr::from_ref(cache.get())).or_default() += 1;
    }
    caches
        .iter()
        .map(Py::get)
        .filter_map(|cache| Some((cache, times.remove(&std::ptr::from_ref(cache))?)))
        .collect()
}

type Entered<'a> = MutexGuard<'a, CoreCache>;

/// Enters all caches of a list, each once, with the times it is listed.
pub fn enter_all<'a>(py: Python<'_>, caches: &'a [Py<Cache>]) -> PyResult<Vec<(Entered<'a>, u32)>> {
    let enter = |(cache, times): (&'a Cache, u32)| Ok((outcome(py, cache.enter())?, times));
    distinct(caches).into_iter().map(enter).collect()
}

/// Runs a call of one cache.
pub fn with<T>(
    py: Python<'_>,
    cache: &Bound<'_, Cache>,
    f: impl FnOnce(&mut CoreCache) -> Result<T>,
) -> PyResult<T> {
    let result = cache.get().enter().and_then(|mut cache| f(&mut cache));
    outcome(py, result)
}
