//! End-to-end tests with real BEAMs, real TLS and the real meshx program.
