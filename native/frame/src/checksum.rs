//! Checksums of blocks.

/// What follows the payload of a block, in 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// CRC-32 (ISO-HDLC), as `erlang:crc32/1`. Number 1 in a hello.
    Crc32,
    /// CRC-32C (Castagnoli), as iSCSI. Number 2 in a hello.
    Crc32c,
}

impl Checksum {
    /// The checksum of a hello's number; 0, none, has none.
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Crc32),
            2 => Some(Self::Crc32c),
            _ => None,
        }
    }

    /// Of these bytes.
    pub fn of(self, bytes: &[u8]) -> u32 {
        self.of_parts([bytes])
    }

    /// Of these parts, one after the other, without joining them.
    pub fn of_parts<'a>(self, parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
        match self {
            Self::Crc32 => {
                let mut hasher = crc32fast::Hasher::new();
                parts.into_iter().for_each(|part| hasher.update(part));
                hasher.finalize()
            }
            Self::Crc32c => parts.into_iter().fold(0, crc32c::crc32c_append),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogues_check_values_whole_and_in_parts() {
        for (checksum, check) in [(Checksum::Crc32, 0xCBF4_3926), (Checksum::Crc32c, 0xE306_9283)] {
            assert_eq!(checksum.of(b"123456789"), check);
            assert_eq!(checksum.of_parts([&b"1234"[..], b"", b"56789"]), check);
            assert_eq!(checksum.of(b""), 0);
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(Checksum::from_number(0), None);
        assert_eq!(Checksum::from_number(1), Some(Checksum::Crc32));
        assert_eq!(Checksum::from_number(2), Some(Checksum::Crc32c));
        assert_eq!(Checksum::from_number(3), None);
    }
}
