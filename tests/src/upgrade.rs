//! An upgrade of the agent: another build of the program, and calls that must not fail meanwhile.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Beam, Context, Result, program};

/// Another build of `meshx`: the same sources under another version, so that old and new call themselves differently.
///
/// # Errors
/// When `meshx` is not built, or the file cannot be written.
pub fn other_build(dir: &Path) -> Result<PathBuf> {
    let (ours, theirs) = (b"meshx 0.2.0-dev", b"meshx 0.2.1-dev");
    let mut bytes = std::fs::read(program("meshx")?).context("read meshx")?;
    let places: Vec<usize> = bytes
        .windows(ours.len())
        .enumerate()
        .filter_map(|(at, window)| (window == ours).then_some(at))
        .collect();
    if places.is_empty() {
        return Err("the program does not hold its own version".to_owned());
    }
    for at in places {
        let place = bytes.get_mut(at..at + theirs.len());
        place
            .ok_or("half a version at the program's end")?
            .copy_from_slice(theirs);
    }
    let (data, path) = (dir.join("meshx-other.data"), dir.join("meshx-other"));
    std::fs::write(&data, bytes).context("write another build")?;
    // By another process: what this one has open for writing, a child that it starts just then has as well, and the
    // program cannot be executed.
    let words = [Path::new("-m"), Path::new("755"), &data, &path];
    let installed = Command::new("install").args(words).status();
    if !installed.context("run install")?.success() {
        return Err("another build could not be installed".to_owned());
    }
    std::fs::remove_file(data).context("remove another build's data")?;
    Ok(path)
}

/// Calls one after the other in the task `task`, and counts what is wrong; hears of every lost node. `call` is a call
/// that gives `n` back.
///
/// # Errors
/// As [`Beam::eval`].
pub fn start_load(node: &mut Beam, call: &str) -> Result<()> {
    node.eval(":net_kernel.monitor_nodes(true, [:nodedown_reason])")?;
    node.eval(&format!(
        "load = fn f, n, bad -> r = try do {call} catch k, e -> {{k, e}} end; bad = if r == n, do: bad, else: [r | bad]; \
         receive do :stop -> {{n, bad}} after 0 -> f.(f, n + 1, bad) end end; :made"
    ))?;
    node.eval("task = Task.async(fn -> load.(load, 1, []) end); :ok")?;
    Ok(())
}

/// Ends such a task, and says how many calls there were.
///
/// # Errors
/// When one of them failed.
pub fn count(node: &mut Beam, task: &str) -> Result<u64> {
    node.eval(&format!(
        "send({task}.pid, :stop); {{n, bad}} = Task.await({task}, 60_000); n"
    ))?;
    node.expect("Enum.take(bad, 3)", "[]")?;
    node.eval("n")?.parse().context("read how many calls there were")
}
