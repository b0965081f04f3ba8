//! What a process used: CPU time to the nanosecond, and its memory.

use std::fs;

use crate::{Context, Result};

/// Measures the CPU time that processes use between two moments.
#[derive(Debug)]
pub struct CpuClock {
    pids: Vec<u32>,
    start: u64,
}

impl CpuClock {
    /// Starts now, over these processes together. Threads that end meanwhile are not counted: for VMs and runtimes whose
    /// threads live as long as they do.
    ///
    /// # Errors
    /// When one of them is gone.
    pub fn start(pids: &[u32]) -> Result<Self> {
        Ok(Self {
            pids: pids.to_vec(),
            start: nanoseconds(pids)?,
        })
    }

    /// Seconds of CPU since the start.
    ///
    /// # Errors
    /// When one of the processes is gone.
    pub fn seconds(&self) -> Result<f64> {
        Ok(nanoseconds(&self.pids)?.saturating_sub(self.start) as f64 / 1e9)
    }
}

/// `/proc/PID/task/*/schedstat`: its first field is the time on a CPU (proc(5)); `stat` counts in 10 ms.
fn nanoseconds(pids: &[u32]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let tasks = format!("/proc/{pid}/task");
        for task in fs::read_dir(&tasks).context(&tasks)? {
            let path = task.context(&tasks)?.path().join("schedstat");
            // A thread that ended since.
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            sum += text
                .split_ascii_whitespace()
                .next()
                .and_then(|field| field.parse::<u64>().ok())
                .ok_or_else(|| format!("{}: seen {text:?}, wanted nanoseconds", path.display()))?;
        }
    }
    Ok(sum)
}

/// The most resident memory, in bytes, that a process had since [`reset_peak_memory`].
///
/// # Errors
/// When it is gone.
pub fn peak_memory(pid: u32) -> Result<u64> {
    status(pid, "VmHWM:")
}

/// The resident memory of a process, in bytes.
///
/// # Errors
/// When it is gone.
pub fn memory(pid: u32) -> Result<u64> {
    status(pid, "VmRSS:")
}

fn status(pid: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).context(&path)?;
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| format!("{path}: no line {field}"))
}

/// Lets [`peak_memory`] begin anew (`clear_refs`, proc(5)).
///
/// # Errors
/// When the process is gone or not ours.
pub fn reset_peak_memory(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "5").context(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_work_is_seen() -> Result<()> {
        let me = std::process::id();
        reset_peak_memory(me)?;
        let before = peak_memory(me)?;
        let clock = CpuClock::start(&[me])?;
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        assert_eq!(block.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
        assert!(clock.seconds()? > 0.0);
        assert!(peak_memory(me)? >= before + (32 << 20));
        assert!(peak_memory(u32::MAX).is_err());
        Ok(())
    }
}
