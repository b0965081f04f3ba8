//! The embedded mesh: one directory, one user, one machine.
