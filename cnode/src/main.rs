//! The `meshx` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    meshx::cli::main()
}
