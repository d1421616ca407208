//! The `Cache` class: one request's claims and pages, entered by one thread at a time.

use kvpool_core::{Cache as CoreCache, CoreError, Result};
use pyo3::prelude::*;
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

/// Every cache once, with the times it is listed.
pub fn distinct<'a>(caches: &'a [Py<Cache>]) -> Vec<(&'a Cache, u32)> {
    let mut found: Vec<(&'a Cache, u32)> = Vec::with_capacity(caches.len());
    let mut listed: Vec<&'a Cache> = caches.iter().map(Py::get).collect();
    listed.sort_by_key(|cache| std::ptr::from_ref::<Cache>(cache));
    for cache in listed {
        match found.last_mut() {
            Some((last, times)) if std::ptr::eq(*last, cache) => *times += 1,
            _ => found.push((cache, 1)),
        }
    }
    found
}
