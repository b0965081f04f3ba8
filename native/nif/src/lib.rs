//! NIF: terms to and from meshx-frame and meshx-etf, nothing else.
