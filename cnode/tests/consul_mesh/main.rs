//! The mesh on a real Consul: $MESHX_CONSUL, or what scripts/get-consul has fetched.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod acl;
mod basics;
mod certificates;
mod https;
mod registration;
mod support;
