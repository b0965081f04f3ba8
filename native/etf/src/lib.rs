//! Erlang external term format: borrowed walk, owned terms, encoder, limits.
