//! The `Mover` and `Ticket` classes: page arrays and slots in, tickets out. Waits let the GIL go.

use crate::convert::raise;
use kvpool_core::CoreError;
use kvpool_mover::hazard::Hazard;
use kvpool_mover::memory::{Pool, Region};
use kvpool_mover::{Direction, Options, Order, Refusal, Tier, Use};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::time::Duration;

fn outcome<T>(py: Python<'_>, result: Result<T, Refusal>) -> PyResult<T> {
    result.map_err(|refusal| match refusal {
        Refusal::Value(message) => PyValueError::new_err(message),
        Refusal::State(message) => raise(py, CoreError::State(message)),
    })
}

fn direction(name: &str) -> PyResult<Direction> {
    let mut all = Direction::ALL.into_iter();
    all.find(|direction| direction.name() == name).ok_or_else(|| {
        PyValueError::new_err(format!("direction: {name:?} is none of offload, onboard, copy"))
    })
}

fn tier(name: &str) -> PyResult<Tier> {
    let mut tiers = [Tier::Device, Tier::Host].into_iter();
    tiers
        .find(|tier| tier.name() == name)
        .ok_or_else(|| PyValueError::new_err(format!("tier: {name:?} is none of device, host")))
}

fn order(name: &str, seed: u64) -> PyResult<Order> {
    match name {
        "compute-last" => Ok(Order::ComputeLast),
        "copies-eager" => Ok(Order::CopiesEager),
        "copies-last" => Ok(Order::CopiesLast),
        "random" => Ok(Order::Random(seed)),
        _ => Err(PyValueError::new_err(format!("order: {name:?} is unknown"))),
    }
}

fn seconds(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let convert =
        |s| Duration::try_from_secs_f64(s).map_err(|e| PyValueError::new_err(format!("timeout: {e}")));
    timeout.map(convert).transpose()
}

/// The memory of a writable, C-contiguous array of bytes.
fn region(array: &Bound<'_, PyAny>) -> PyResult<Region> {
    let buffer = PyBuffer::<u8>::get(array)?; // while it is exported the array can be neither freed nor resized
    if buffer.readonly() || !buffer.is_c_contiguous() {
        return Err(PyValueError::new_err("pages must be writable and C-contiguous"));
    }
    let (base, bytes) = (buffer.buf_ptr().cast(), buffer.len_bytes());
    Ok(Region::new(base, bytes, Box::new(buffer)))
}

/// (pool, tier, slots, whether they are written)
type Uses = Vec<(usize, String, PyBuffer<i32>, bool)>;

fn with_uses<T>(
    py: Python<'_>,
    uses: &Uses,
    f: impl FnOnce(Python<'_>, &[Use<'_>]) -> Result<T, Refusal>,
) -> PyResult<T> {
    let slots: Vec<Vec<i32>> = uses
        .iter()
        .map(|(_, _, slots, _)| slots.to_vec(py))
        .collect::<PyResult<_>>()?;
    let mut all = Vec::with_capacity(uses.len());
    for ((pool, on, _, writes), slots) in uses.iter().zip(&slots) {
        all.push(Use {
            pool: *pool,
            tier: tier(on)?,
            slots,
            writes: *writes,
        });
    }
    outcome(py, f(py, &all))
}

/// (name, bytes of a page, device pages, host pages)
type Pages<'py> = (String, usize, Bound<'py, PyAny>, Option<Bound<'py, PyAny>>);

/// What became of one submission.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Ticket(kvpool_mover::Ticket);

#[pymethods]
impl Ticket {
    fn done(&self) -> bool {
        self.0.is_done()
    }

    /// -> whether it was over in time
    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        Ok(py.detach(|| self.0.wait(timeout)))
    }

    /// -> [(code, pool, slot, direction, index)], by index
    fn errors(&self) -> Vec<(&'static str, usize, u32, &'static str, u32)> {
        let errors = self.0.errors();
        let error =
            |e: &kvpool_mover::MoveError| (e.code.name(), e.pool, e.slot, e.direction.name(), e.index);
        errors.iter().map(error).collect()
    }

    /// -> whether it counts as failed from now on, not being done
    fn give_up(&self) -> bool {
        self.0.give_up()
    }
}

/// Streams, events and memory of one manager's moves.
#[pyclass(frozen, module = "kvpool._core")]
pub struct Mover(kvpool_mover::Mover);

#[pymethods]
impl Mover {
    /// Pools: (name, bytes of a page, device pages, host pages or None).
    #[new]
    #[pyo3(signature = (pools, *, queue=64, check=false, staging=0, order=None, seed=0, faults=false, plant=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        pools: Vec<Pages<'_>>,
        queue: usize,
        check: bool,
        staging: u32,
        order: Option<&str>,
        seed: u64,
        faults: bool,
        plant: Option<&str>,
    ) -> PyResult<Self> {
        let mut all = Vec::with_capacity(pools.len());
        for (name, page_bytes, device, host) in pools {
            let host = host.map(|host| region(&host)).transpose()?;
            let pool = Pool::new(&name, page_bytes, region(&device)?, host).map_err(PyValueError::new_err)?;
            all.push(if staging > 0 {
                pool.with_staging(staging)
            } else {
                pool
            });
        }
        let hazard = |name: &str| {
            Hazard::named(name).ok_or_else(|| PyValueError::new_err(format!("plant: {name:?} is unknown")))
        };
        let options = Options {
            queue,
            check,
            order: order.map(|name| self::order(name, seed)).transpose()?,
            faults,
            plant: plant.map(hazard).transpose()?,
        };
        outcome(py, kvpool_mover::Mover::new(all, options)).map(Self)
    }

    /// -> ticket, or None: the queue is full, nothing is taken
    fn submit(
        &self,
        py: Python<'_>,
        pool: usize,
        direction: &str,
        src: PyBuffer<i32>,
        dst: PyBuffer<i32>,
        after: Vec<Bound<'_, Ticket>>,
    ) -> PyResult<Option<Ticket>> {
        let direction = self::direction(direction)?;
        let (src, dst) = (src.to_vec(py)?, dst.to_vec(py)?);
        let after: Vec<_> = after.iter().map(|ticket| ticket.get().0.clone()).collect();
        let ticket = self.0.submit(pool, direction, &src, &dst, &after);
        Ok(outcome(py, ticket)?.map(Ticket))
    }

    /// The stream, or the caller (None), waits for all that touches these slots -> False: in vain for `timeout` seconds
    #[pyo3(signature = (stream, uses, timeout=None))]
    fn wait_on(
        &self,
        py: Python<'_>,
        stream: Option<usize>,
        uses: Uses,
        timeout: Option<f64>,
    ) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        with_uses(py, &uses, |py, uses| {
            py.detach(|| self.0.wait_on(stream, uses, timeout))
        })
    }

    /// What the stream, or the caller, did so far used these slots.
    fn record(&self, py: Python<'_>, stream: Option<usize>, uses: Uses) -> PyResult<()> {
        with_uses(py, &uses, |_, uses| self.0.record(stream, uses))
    }

    /// -> number of a new stream of the engine
    fn stream(&self, py: Python<'_>) -> PyResult<usize> {
        outcome(py, self.0.stream())
    }

    /// `call()` in this stream. What it raises is reported as unraisable.
    fn launch(&self, py: Python<'_>, stream: usize, call: Py<PyAny>) -> PyResult<()> {
        let run = move || {
            Python::attach(|py| {
                if let Err(error) = call.call0(py) {
                    error.write_unraisable(py, Some(call.bind(py)));
                }
                drop(call);
            });
        };
        outcome(py, self.0.launch(stream, Box::new(run)))
    }

    /// Waits for a stream, or for all directions (None).
    #[pyo3(signature = (stream=None, timeout=None))]
    fn synchronize(&self, py: Python<'_>, stream: Option<usize>, timeout: Option<f64>) -> PyResult<bool> {
        let timeout = seconds(timeout)?;
        let done = py.detach(|| self.0.synchronize(stream, timeout));
        outcome(py, done)
    }

    /// -> [(hazard, what was found)] since the last call
    fn findings(&self) -> Vec<(&'static str, String)> {
        let findings = self.0.findings();
        findings
            .iter()
            .map(|f| (f.hazard.name(), self.0.text(f)))
            .collect()
    }

    fn totals<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let totals = self.0.totals();
        let dict = PyDict::new(py);
        dict.set_item("pages", totals.pages)?;
        dict.set_item("failed", totals.failed)?;
        dict.set_item("runs", totals.runs)?;
        dict.set_item("calls", totals.calls)?;
        dict.set_item("bytes", totals.bytes)?;
        dict.set_item("full", totals.full)?;
        Ok(dict)
    }

    /// -> tickets of a direction that are not done
    fn pending(&self, direction: &str) -> PyResult<usize> {
        Ok(self.0.pending(self::direction(direction)?))
    }

    /// -> [(pool, tier, slot)] of tickets that were given up
    fn fenced(&self) -> Vec<(usize, &'static str, u32)> {
        let fenced = self.0.fenced();
        fenced
            .iter()
            .map(|&(pool, tier, slot)| (pool, tier.name(), slot))
            .collect()
    }

    /// Test switch: the k-th page from now fails.
    #[pyo3(signature = (k, direction=None))]
    fn fail(&self, py: Python<'_>, k: u64, direction: Option<&str>) -> PyResult<()> {
        let direction = direction.map(self::direction).transpose()?;
        outcome(py, self.0.fail(k, direction))
    }

    /// Test switch: every page fails with this probability.
    fn fail_at_random(&self, py: Python<'_>, rate: f64, seed: u64) -> PyResult<()> {
        outcome(py, self.0.fail_at_random(rate, seed))
    }

    /// Test switch: the next submissions find the queue full.
    fn fill(&self, py: Python<'_>, direction: &str, times: u64) -> PyResult<()> {
        outcome(py, self.0.fill(self::direction(direction)?, times))
    }

    /// Test switch: a direction stands still, or goes on.
    fn stall(&self, py: Python<'_>, direction: &str, stalled: bool) -> PyResult<()> {
        outcome(py, self.0.stall(self::direction(direction)?, stalled))
    }

    /// Takes no more and waits for what is enqueued; what stands still fails.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}
