//! What the benchmarks share: paired ratios, verdicts, CPU and memory of processes, tables and plots.
//!
//! The machines that run them are noisy, so absolute figures say little. Every figure that is held against a limit is a
//! ratio of two measurements of the same round; rounds interleave all peers.

mod bare;
mod machine;
mod plot;
mod relay;
mod report;
mod rounds;
mod sealed;
mod stats;
mod usage;
mod vm;

pub use bare::{bare_entrance, bare_exit};
pub use machine::machine;
pub use plot::{Series, bars};
pub use relay::{Way, relay};
pub use report::{Table, write_report};
pub use rounds::rounds;
pub use stats::{Limit, Quartiles, Verdict, judge, median, ratios};
pub use usage::{CpuClock, memory, peak_memory, reset_peak_memory};
pub use vm::{BUFFERS, ask, distribution_flags, free_port, tls_options};
