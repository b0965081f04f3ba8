//! The meshx agent and program, and a library for Rust nodes in an Erlang cluster.
