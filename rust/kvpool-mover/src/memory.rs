//! Page arrays and the copies between them. The only file with unsafe code, and the only one that knows addresses.
//!
//! Facts that the SAFETY comments rest on:
//! - F1: a `Region` is `bytes` bytes at `base`, kept alive by `keep` as long as the region exists.
//! - F2: `rows * page_bytes <= bytes`, by construction.
//! - F3: the regions of one pool do not overlap; checked at construction.

#![allow(unsafe_code)]

use crate::runs::Run;
use crate::types::Tier;
use std::any::Any;

/// Memory that others own, or that is the mover's own.
pub struct Region {
    base: *mut u8,
    bytes: usize,
    _keep: Box<dyn Any + Send + Sync>,
}

// SAFETY: F1: the memory lives as long as the region, whichever thread has it, and `keep` may be dropped anywhere. What
// threads do with the memory at the same time is ordered by the slots' events.
unsafe impl Send for Region {}
// SAFETY: as above; the fields never change.
unsafe impl Sync for Region {}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region of {} bytes", self.bytes)
    }
}

impl Region {
    /// `bytes` bytes at `base`, which `keep` owns. That they are there, writable and in their place until `keep` is dropped
    /// is what this crate takes on trust from its caller (the binding, which has no unsafe code: a writable buffer that it
    /// keeps exported).
    pub fn new(base: *mut u8, bytes: usize, keep: Box<dyn Any + Send + Sync>) -> Self {
        Self {
            base,
            bytes,
            _keep: keep,
        }
    }

    /// Zeroed memory of its own.
    pub fn zeroed(bytes: usize) -> Self {
        let mut own = vec![0u8; bytes];
        Self {
            base: own.as_mut_ptr(), // a vector may be moved about while its elements stay
            bytes,
            _keep: Box::new(own),
        }
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// One pool: an array of equal pages on each tier.
#[derive(Debug)]
pub struct Pool {
    /// Name, for messages.
    pub name: String,
    page_bytes: usize,
    /// By tier.
    regions: [Option<Region>; 3],
    rows: [u32; 3],
}

impl Pool {
    /// Device and host pages, `page_bytes` each.
    pub fn new(name: &str, page_bytes: usize, device: Region, host: Option<Region>) -> Result<Self, String> {
        let regions = [Some(device), host, None];
        if let [Some(a), Some(b), _] = &regions {
            let (first, second) = (a.base as usize, b.base as usize);
            if first < second + b.bytes && second < first + a.bytes {
                return Err(format!("pool {name:?}: device and host pages overlap"));
            }
        }
        let mut rows = [0; 3];
        for (rows, region) in rows.iter_mut().zip(&regions) {
            let bytes = region.as_ref().map_or(0, Region::bytes);
            if page_bytes == 0 || bytes % page_bytes != 0 || bytes / page_bytes > i32::MAX as usize {
                return Err(format!(
                    "pool {name:?}: {bytes} bytes are no pages of {page_bytes}"
                ));
            }
            *rows = (bytes / page_bytes) as u32;
        }
        Ok(Self {
            name: name.into(),
            page_bytes,
            regions,
            rows,
        })
    }

    /// As it is, with so many pages of staging.
    pub fn with_staging(mut self, rows: u32) -> Self {
        self.rows[Tier::Staging as usize] = rows;
        self.regions[Tier::Staging as usize] = Some(Region::zeroed(rows as usize * self.page_bytes));
        self
    }

    /// Slots on a tier: 0..rows.
    pub fn rows(&self, tier: Tier) -> u32 {
        self.rows[tier as usize]
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// All pages of a run. One that is not within the tiers, or overlaps itself, is left alone: submission has refused
    /// those, so only descriptors that were rewritten under a move (a planted bug) can be such.
    pub(crate) fn copy(&self, from: Tier, to: Tier, run: &Run) {
        let (Some(source), Some(target)) = (&self.regions[from as usize], &self.regions[to as usize]) else {
            return;
        };
        let within = |first: u32, tier: Tier| {
            first
                .checked_add(run.len)
                .is_some_and(|end| end <= self.rows(tier))
        };
        let apart = from != to || run.src.abs_diff(run.dst) >= run.len;
        if !within(run.src, from) || !within(run.dst, to) || !apart {
            return;
        }
        let bytes = run.len as usize * self.page_bytes;
        // SAFETY: `within`: src + len and dst + len are at most the tiers' rows, so by F2 both ranges lie inside their
        // regions, which exist (F1). `apart`: they do not overlap, nor do the regions of two tiers (F3). The bytes are
        // plain data, valid whatever they are.
        unsafe {
            std::ptr::copy_nonoverlapping(
                source.base.add(run.src as usize * self.page_bytes),
                target.base.add(run.dst as usize * self.page_bytes),
                bytes,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_no_whole_pages_are_refused() {
        assert!(Pool::new("kv", 3, Region::zeroed(10), None).is_err());
        assert!(Pool::new("kv", 0, Region::zeroed(10), None).is_err());
        let pool = Pool::new("kv", 5, Region::zeroed(10), Some(Region::zeroed(15))).unwrap();
        assert_eq!((pool.rows(Tier::Device), pool.rows(Tier::Host)), (2, 3));
    }
    /// What slot events prevent: `make sanitize` requires that the sanitizer reports this one.
    #[test]
    #[ignore = "a data race on purpose"]
    fn two_copies_into_one_slot_race() {
        let pool = Pool::new("kv", 64, Region::zeroed(128), Some(Region::zeroed(128))).unwrap();
        let run = |src| Run {
            src,
            dst: 1,
            len: 1,
            index: 0,
        };
        let both = std::sync::Barrier::new(2);
        let copy = |src| {
            both.wait();
            pool.copy(Tier::Device, Tier::Host, &run(src));
        };
        std::thread::scope(|scope| {
            scope.spawn(|| copy(0));
            scope.spawn(|| copy(1));
        });
    }
}
