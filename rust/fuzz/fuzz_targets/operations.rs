//! Operation sequences, guided by coverage: see `kvpool_trials::run::bytes`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    kvpool_trials::run::bytes(bytes);
});
