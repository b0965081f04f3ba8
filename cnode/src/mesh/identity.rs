//! Names that certificates prove.
