//! What we grant a peer to send.

use crate::{Failure, Output, encode};

/// A receive window, of a stream or of the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) left: u32,
    /// Received and not yet granted again.
    pub(crate) pending: u32,
}

impl Window {
    /// Counts bytes of the connection and grants them again: they were read.
    pub(crate) fn receive(&mut self, size: usize, full: u32, output: &mut Output) -> Result<(), Failure> {
        self.count("connection", size)?;
        if size > 0 {
            self.grant(0, full, output);
        }
        Ok(())
    }

    pub(crate) fn count(&mut self, whose: &str, size: usize) -> Result<(), Failure> {
        let held = self.left;
        let spent = u32::try_from(size).ok().filter(|&size| size <= held);
        let Some(spent) = spent else {
            return Err(Failure::protocol(format!(
                "{size} bytes sent, the {whose}'s window held {held}"
            )));
        };
        self.left -= spent;
        self.pending += spent;
        Ok(())
    }

    /// Grants what was received, once it is half of the full window.
    pub(crate) fn grant(&mut self, stream: u32, full: u32, output: &mut Output) {
        if self.pending >= full.div_ceil(2) {
            encode::window(&mut output.bytes, stream, self.pending);
            self.left += self.pending;
            self.pending = 0;
        }
    }
}
