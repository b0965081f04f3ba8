//! What a certificate says of itself, for people.

use x509_parser::prelude::{FromDer, X509Certificate};

/// Names and validity. Nothing is verified by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Certificate {
    /// In hexadecimal, as other tools print it.
    pub(super) serial: String,
    pub(super) subject: String,
    pub(super) issuer: String,
    /// Begin of its validity, unix seconds.
    pub(super) not_before: i64,
    /// End of its validity, unix seconds.
    pub(super) not_after: i64,
}

impl Certificate {
    /// None when it is no X.509 certificate.
    pub(super) fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        Some(Self {
            serial: certificate.raw_serial_as_string(),
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    #[test]
    fn names_serial_and_validity_are_read() {
        let mut params = CertificateParams::new(vec!["x".to_owned()]).unwrap();
        params.serial_number = Some(vec![0x0a, 0xff].into());
        params.not_before = time::OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(1_700_003_600).unwrap();
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let read = Certificate::read(der.der()).unwrap();
        assert_eq!(read.serial, "0a:ff");
        assert_eq!((read.not_before, read.not_after), (1_700_000_000, 1_700_003_600));
        assert_eq!(read.subject, read.issuer);
        assert_eq!(Certificate::read(b"no certificate"), None);
    }
}
