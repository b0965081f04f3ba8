//! Erlang distribution and EPMD protocols without sockets.
