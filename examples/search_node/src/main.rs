//! The `meshx` program.
fn main() {}
