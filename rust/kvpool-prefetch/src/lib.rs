//! A hint to the processor's cache, safe to call, so that the core can go without unsafe code.
//!
//! A load that is issued early does not do: the next locked instruction waits for it. A prefetch nobody waits for. The
//! standard library has one behind a feature that is not stable (`hint_prefetch`).

/// Asks for the cache line in which `at` begins. Changes nothing else; a no-op where the instruction is not known.
#[inline(always)]
#[allow(unsafe_code)]
pub fn read<T>(at: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the instruction reads nothing and faults at no address; SSE belongs to x86_64.
    unsafe {
        use core::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    /// A hint leaves what it is about as it was, wherever it lies.
    #[test]
    fn a_hint_changes_nothing() {
        let table: Vec<u64> = (0..1000).collect();
        table.iter().for_each(super::read);
        super::read(&());
        assert!(table.iter().zip(0..).all(|(a, b)| *a == b));
    }
}
