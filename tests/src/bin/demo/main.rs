//! `make demo`: the main job, end to end, on the embedded mesh. Each line that it prints was measured just then.

mod story;

use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let keep = std::env::args().any(|a| a == "--keep");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("demo: start the runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        let (mut interrupt, mut terminate) =
            match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
                (Ok(interrupt), Ok(terminate)) => (interrupt, terminate),
                (Err(e), _) | (_, Err(e)) => {
                    eprintln!("demo: watch for signals: {e}");
                    return ExitCode::FAILURE;
                }
            };
        let stop = story::Stop::default();
        // A thread of its own: children die with the thread that started them.
        let mut story = tokio::task::spawn_blocking({
            let stop = stop.clone();
            move || story::tell(&stop, keep)
        });
        let stopped = tokio::select! {
            done = &mut story => return done.unwrap_or(ExitCode::FAILURE),
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
        };
        debug_assert!(stopped);
        // Whatever the story waits for fails at once when its processes are gone; then it cleans up.
        stop.now();
        meshx_tests::kill_all();
        let code = story.await.unwrap_or(ExitCode::FAILURE);
        if keep { code } else { ExitCode::from(130) }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    code
}
