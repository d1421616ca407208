//! The `Forecast` class: started requests as they will grow, by pool.

use crate::roster::steps;
use kvpool_core::forecast::{overflow, Growth};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Mutex;

/// Asked before each start of a pass.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Forecast {
    /// Tokens per block, and rows; by pool.
    pools: Mutex<Vec<(u64, Vec<Growth>)>>,
}

impl Forecast {
    pub fn new(pools: Vec<(u64, Vec<Growth>)>) -> Self {
        Self {
            pools: Mutex::new(pools),
        }
    }
}

#[pymethods]
impl Forecast {
    /// A request starts: its tokens, tokens that it may produce and has produced; per pool the most slots that it can come to
    /// hold, its slots now, those of them that come back. With `available`, per pool what can be had besides its slots: it
    /// is not added if some pool would overflow -> (pool, step, slots missing).
    #[allow(clippy::too_many_arguments)]
    fn start(
        &self,
        share: f64,
        length: u64,
        new: u64,
        produced: u64,
        most: Vec<u64>,
        held: Vec<u64>,
        back: Vec<u64>,
        available: Option<Vec<u64>>,
    ) -> PyResult<Option<(usize, u64, u64)>> {
        let pools = self.pools.try_lock();
        let mut pools =
            pools.map_err(|_| PyValueError::new_err("the forecast is in use by another thread"))?;
        let mut over = None;
        for (pool, (t, rows)) in pools.iter_mut().enumerate() {
            rows.push(Growth {
                steps: steps(share, new, produced),
                tokens: length,
                most: most[pool],
                held: held[pool],
                back: back[pool],
            });
            if over.is_none() {
                let available = available.as_ref().and_then(|available| available.get(pool));
                let found = available.and_then(|&available| overflow(&mut rows.clone(), *t, available));
                over = found.map(|(step, missing)| (pool, step, missing));
            }
        }
        if over.is_some() {
            pools.iter_mut().for_each(|(_, rows)| {
                rows.pop();
            });
        }
        Ok(over)
    }
}
