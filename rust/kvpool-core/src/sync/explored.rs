//! loom's atomics, explored completely.
//!
//! loom 0.7 leaves interleavings out when a thread loads a word and later writes it (tokio-rs/loom issues 166 and 392): every CAS
//! loop is such a case. Each operation here therefore first touches one word that all threads share, by a
//! relaxed read-modify-write: all operations conflict, so loom tries all their orders; being relaxed it orders
//! no memory, so stale reads are still explored.

use loom::sync::atomic::{self, Ordering};

loom::lazy_static! {
    static ref TURN: atomic::AtomicU32 = atomic::AtomicU32::new(0);
}

fn turn() {
    TURN.fetch_add(0, Ordering::Relaxed); // Relaxed: a point at which loom may switch threads, orders nothing
}

macro_rules! explored {
    ($name:ident, $value:ty) => {
        /// See the module.
        #[derive(Debug)]
        pub struct $name(atomic::$name);

        #[allow(missing_docs, dead_code)]
        impl $name {
            pub fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }
            pub fn load(&self, order: Ordering) -> $value {
                turn();
                self.0.load(order)
            }
            pub fn store(&self, value: $value, order: Ordering) {
                turn();
                self.0.store(value, order);
            }
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                turn();
                self.0.swap(value, order)
            }
            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                turn();
                self.0.fetch_add(value, order)
            }
            pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                turn();
                self.0.fetch_sub(value, order)
            }
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                turn();
                self.0.fetch_or(value, order)
            }
            pub fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                turn();
                self.0.fetch_max(value, order)
            }
            pub fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                turn();
                self.0.compare_exchange(old, new, success, failure)
            }
            pub fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                turn();
                self.0.compare_exchange_weak(old, new, success, failure)
            }
        }
    };
}

explored!(AtomicU8, u8);
explored!(AtomicU32, u32);
explored!(AtomicU64, u64);
