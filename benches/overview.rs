//! `cargo bench`: says what can be measured, how long that takes, and by which command.
#![allow(missing_docs)]

fn main() {
    println!(
        "
What is measured, and by which command (on two cores; where Redis is needed, a redis-server of the bench's own is started):

  3 min   cargo bench --bench goals          what a hit, a miss and a fill cost beside bare Redis and the least that a cache can do
  2 min   cargo run --release --manifest-path benches/peers/Cargo.toml
                                             hits and misses beside other crates, and beside a cache-aside written by hand
  5 s     cargo bench --bench allocations    how often a hit allocates, and what an entry takes
  1 min   bash .ci/instructions              instructions of a call, which must not grow (valgrind)
  3 min   cargo bench --bench growth         how cost grows with entries, tags, tenants and bodies: docs/growth.md
  4 min   cargo bench --bench layers         the layers by criterion: what passes through, misses, invalidations, a stampede
  5 min   cargo bench --bench redis          cascades in Redis beside SCAN, and hits in process over Redis
  1 min   cargo bench --bench memcached      hits and misses over memcached

Words behind `--` choose: `cargo bench --bench goals -- \"redis hit\"`. The first three print a table, and write
the same to target/bench/*.json. Ratios of one run can be compared with those of another; times of a busy machine cannot.
"
    );
}
