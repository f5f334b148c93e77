#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_cache_aside_fuzz::check("entries", data));
